"""Partitions: whether work in one is felt in another, and in the same one."""

from collections.abc import Sequence

from gcg import numbers
from gcg.bench import FMA, Bench, Phase
from gcg.figure import Figure, Result, Table, verdict
from gcg.service import Workload

# A launch, microseconds: events count half a microsecond, so this is 0.05%.
_LAUNCH_US = 1000.0
_PHASE_S = 0.5
_ROUNDS = 3
# How far a time may be from its solo time, percent.
_BESIDE_PERCENT = 1.0
_BESIDE_COPY_PERCENT = 2.0
# "About 2 times slower", for launches in a second.
_SHARED = (1.7, 2.4)
# Share of the time in which all three shall be on the GPU at once.
_AT_ONCE = 0.95
_COPY_BYTES = "8G"


class _Rounds:
    """Phases that take turns: each measured workload alone, then all together."""

    def __init__(self, bench: Bench, measured: Sequence[Workload], everyone: Sequence[Workload]) -> None:
        self._solo: dict[str, list[Phase]] = {workload.name: [] for workload in measured}
        self.together: list[Phase] = []
        for _ in range(_ROUNDS):
            for workload in measured:
                self._solo[workload.name].append(bench.phase([workload], everyone, _PHASE_S))
            self.together.append(bench.phase(everyone, everyone, _PHASE_S))

    def solo_us(self, name: str) -> list[float]:
        """Times of its launches alone."""
        return [us for phase in self._solo[name] for us in phase.device_us(name)]

    def together_us(self, name: str) -> list[float]:
        """Times of its launches beside the others."""
        return [us for phase in self.together for us in phase.device_us(name)]

    def change(self, name: str) -> float:
        """Change of the median from solo to together, percent."""
        return numbers.changed(numbers.median(self.together_us(name)), numbers.median(self.solo_us(name)))

    def slower(self, name: str) -> float:
        """How many times fewer launches a second it did together."""
        solo = numbers.median([phase.launches_per_s(name) for phase in self._solo[name]])
        return solo / numbers.median([phase.launches_per_s(name) for phase in self.together])

    def counts(self, name: str) -> str:
        """What was counted."""
        return f"{len(self.solo_us(name))} solo, {len(self.together_us(name))} together"

    def in_words(self, name: str) -> str:
        """The medians and their change."""
        solo, together = numbers.median(self.solo_us(name)), numbers.median(self.together_us(name))
        return f"{together:.1f} us beside, {solo:.1f} us solo ({self.change(name):+.2f}%)"

    def rows(self, label: str) -> list[list[str]]:
        """A line a workload with its percentiles."""
        rows = []
        for name in self._solo:
            for how, values in (("solo", self.solo_us(name)), ("together", self.together_us(name))):
                s = numbers.spread(values)
                rows.append([label, name, how, str(s.n), *(f"{v:.1f}" for v in s[1:])])
        return rows

    def raw(self) -> dict[str, object]:
        """Every launch."""
        solo = {name: [phase.raw()[name] for phase in phases] for name, phases in self._solo.items()}
        return {"solo": solo, "together": [phase.raw() for phase in self.together]}


_HEADER = ["setup", "workload", "phase", "launches", "p50 us", "p90 us", "p99 us", "max us"]


def side_by_side(bench: Bench) -> Result:
    """fma_fp32 in partition a beside fma_fp32 in partition b, one block an SM."""
    sms = bench.sizes().of(64)
    iterations = bench.iterations(_LAUNCH_US)
    pair = []
    for name in ("a", "b"):
        bench.service.partition(name, sms)
        spec = {**FMA, "name": name, "partition": name, "blocks": sms, "iterations": iterations}
        pair.append(bench.launch_frozen(**spec))
    rounds = _Rounds(bench, pair, pair)
    result = Result(raw=rounds.raw())
    for name, other in (("a", "b"), ("b", "a")):
        result.figures.append(
            Figure(
                f"fma_fp32 in partition {name} ({sms} SMs) beside fma_fp32 in {other} ({sms} SMs), spatial",
                f"within {_BESIDE_PERCENT:.0f}% of its solo time a launch",
                rounds.in_words(name),
                rounds.counts(name),
                verdict(abs(rounds.change(name)) <= _BESIDE_PERCENT),
            )
        )
    result.tables.append(Table("Time of a launch", _HEADER, rounds.rows("a beside b")))
    return result


def one_partition(bench: Bench) -> Result:
    """Two workloads in the same SMs, in the two ways in which they can meet there.

    With one block of 1024 threads an SM, both are resident at once and share the issue
    slots, which either alone uses up. With two blocks an SM, either alone takes all 2048
    places for threads, so that they take turns. Launches a second are compared: where
    turns are of several launches, the median time of one would not show them.
    """
    sms = bench.sizes().of(64)
    iterations = bench.iterations(_LAUNCH_US)
    bench.service.partition("a", sms)
    result = Result()
    rows = []
    for per_sm, how in ((1, "resident together"), (2, "taking turns")):
        spec = {**FMA, "partition": "a", "blocks": per_sm * sms, "iterations": iterations}
        names = (f"first-{per_sm}", f"second-{per_sm}")
        pair = [bench.launch_frozen(**spec, name=name) for name in names]
        rounds = _Rounds(bench, pair, pair)
        slower = [rounds.slower(name) for name in names]
        result.figures.append(
            Figure(
                f"both in one partition of {sms} SMs, {per_sm} x 1024 threads an SM each ({how})",
                "the sharing shows: each about 2 times slower",
                " and ".join(f"{times:.2f}" for times in slower) + " times fewer launches a second",
                f"{_ROUNDS} rounds; {rounds.counts(names[0])} of the first",
                verdict(all(_SHARED[0] <= times <= _SHARED[1] for times in slower)),
            )
        )
        rows += rounds.rows(how)
        result.raw[how] = rounds.raw()
        bench.service.freeze(pair)
    result.tables.append(Table("Time of a launch", _HEADER, rows))
    return result


def three(bench: Bench) -> Result:
    """Two fma_fp32 and a copy through DRAM in three partitions."""
    sizes = bench.sizes()
    iterations = bench.iterations(_LAUNCH_US)
    work = []
    for name, h200 in (("a", 40), ("b", 40), ("c", 48)):
        sms = sizes.of(h200)
        bench.service.partition(name, sms)
        what = (
            {"kernel": "copy", "bytes": _COPY_BYTES, "blocks": 2 * sms}
            if name == "c"
            else {**FMA, "blocks": sms, "iterations": iterations}
        )
        work.append(bench.launch_frozen(**what, name=name, partition=name))
    rounds = _Rounds(bench, work[:2], work)
    result = Result(raw=rounds.raw())
    for name in ("a", "b"):
        sms = sizes.of(40)
        result.figures.append(
            Figure(
                f"three workers on {sms}, {sms} and {sizes.of(48)} SMs, one copying: fma_fp32 in {name}",
                f"within {_BESIDE_COPY_PERCENT:.0f}% of solo",
                rounds.in_words(name),
                rounds.counts(name),
                verdict(abs(rounds.change(name)) <= _BESIDE_COPY_PERCENT),
            )
        )
    # What each leaves idle, added up, is the most that they can miss each other.
    at_once = [1 - sum(1 - phase.busy(w.name) for w in work) for phase in rounds.together]
    launches = " + ".join(str(len(rounds.together_us(w.name))) for w in work)
    result.figures.append(
        Figure(
            "the same: all three on the GPU at once",
            f"more than {_AT_ONCE:.0%} of the time",
            f"at least {min(at_once):.1%} in each round",
            f"{_ROUNDS} rounds, {launches} launches",
            verdict(min(at_once) > _AT_ONCE),
        )
    )
    result.notes.append(_bandwidth(rounds, work[2]))
    result.tables.append(
        Table("Time of a launch", _HEADER, rounds.rows("a and b beside each other and a copy"))
    )
    return result


def _bandwidth(rounds: _Rounds, copy: Workload) -> str:
    spec = copy.spec()
    us = numbers.median(rounds.together_us(copy.name))
    gb = spec["bytes"] * spec["iterations"] / us / 1e3
    return f"The copy moved {gb:.0f} GB/s, read and written together, beside the two others."
