"""compute.freeze: how long the write takes, and that nothing runs or is lost meanwhile."""

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gcg import numbers
from gcg.bench import FMA, Bench
from gcg.figure import Figure, Result, Table, verdict
from gcg.pace import Kept, Opened, read_times, rest, stay_awake
from gcg.samples import Collector, Sample
from gcg.service import Workload

_ROUNDS = 1000
_FEWER_ROUNDS = 200
_UNCUT_ROUNDS = 50
_P50_US, _P99_US = 150.0, 500.0
# Every so many rounds it runs for long enough that its samples are reported.
_REPORT_EVERY, _REPORT_S = 50, 0.14
# Every so many rounds the counters are read twice, 5 ms apart.
_LOOK_EVERY, _LOOK_S = 10, 0.005
# Between the end of a launch and its time stamp, as the host's clock has it, ns.
_STAMP_NS = 200_000


@dataclass
class _Stop:
    """One freeze: when the write of 1 returned, when the write of 0 began."""

    returned_ns: int
    thawed_ns: int
    ended: int | None = None


@dataclass
class _Rounds:
    """What a series of rounds gave; times in microseconds."""

    freeze_us: list[float] = field(default_factory=list)
    thaw_us: list[float] = field(default_factory=list)
    stops: list[_Stop] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    looks: int = 0
    samples: list[Sample] = field(default_factory=list)


def _file(workload: Workload) -> Path:
    return workload.path / "compute.freeze"


class _Ledger:
    """Checks each exact reading of the counters against the spec and the one before.

    Launches follow one another, so with E ended, B blocks and I iterations a launch the
    iterations of all blocks are at least E*I*B, and below (E+1)*I*B: the launch that was
    cut short has not ended.
    """

    def __init__(self, workload: Workload) -> None:
        spec = workload.spec()
        self._whole = spec["iterations"] * spec["blocks"]
        self._sliced = spec["sliced"]
        self._last = 0

    def check(self, stat: dict[str, int]) -> list[str]:
        """What does not add up."""
        done, ended = stat["nr_iterations"], stat["nr_ended_kernels"]
        wrong = []
        partial = done - ended * self._whole
        allowed = partial == 0 or (self._sliced and 0 < partial < self._whole)
        if not allowed:
            wrong.append(f"{ended} launches of {self._whole} iterations ended, {done} iterations done")
        if done < self._last:
            wrong.append(f"iterations went back from {self._last} to {done}")
        self._last = done
        return wrong


def _measure(
    workload: Workload,
    door: Kept | Opened,
    rounds: int,
    seed: int,
    pause: Callable[[random.Random], None],
) -> _Rounds:
    """Freezes and thaws a running workload, with a pause before each write."""
    rng = random.Random(seed)
    ledger = _Ledger(workload)
    collector = Collector([workload.path])
    out = _Rounds()
    gc.disable()
    try:
        for number in range(rounds):
            pause(rng)
            out.freeze_us.append(door.write(b"1") / 1e3)
            stop = _Stop(time.monotonic_ns(), 0)
            # A look sleeps, and what follows a sleep is not awake.
            if pause is rest and number % _LOOK_EVERY == 0:
                _look(workload, ledger, stop, out)
            pause(rng)
            stop.thawed_ns = time.monotonic_ns()
            out.thaw_us.append(door.write(b"0") / 1e3)
            out.stops.append(stop)
            if pause is rest and number % _REPORT_EVERY == _REPORT_EVERY - 1:
                time.sleep(_REPORT_S)
                collector.look()
        door.write(b"1")
        out.wrong += ledger.check(workload.stat())
    finally:
        gc.enable()
        door.close()
    out.samples = collector.of(workload.path)
    out.wrong += _ran_while_frozen(out)
    return out


def _reads(workload: Workload, pause: Callable[[random.Random], None]) -> list[float]:
    """Reads that ask neither the controller nor the GPU; microseconds."""
    return read_times(workload.path / "memory.current", _FEWER_ROUNDS, pause)


def _look(workload: Workload, ledger: _Ledger, stop: _Stop, out: _Rounds) -> None:
    first = workload.stat()
    time.sleep(_LOOK_S)
    second = workload.stat()
    for key in ("nr_ended_kernels", "nr_iterations"):
        if first[key] != second[key]:
            out.wrong.append(f"{key} went from {first[key]} to {second[key]} while frozen")
    stop.ended = first["nr_ended_kernels"]
    out.looks += 1
    out.wrong += ledger.check(first)


def _ran_while_frozen(out: _Rounds) -> list[str]:
    """Launches whose own time stamps lie within a freeze.

    Counters that nobody reports stand still too; time stamps do not lie. Those before
    the freeze must have ended when the write returned, those behind the one that was cut
    short must have begun after the thaw. A host that is late stamps a launch later.
    """
    wrong = []
    for stop in out.stops:
        if (ended := stop.ended) is None:
            continue
        for sample in out.samples:
            late = sample.seq < ended and sample.end_ns > stop.returned_ns + _STAMP_NS
            early = sample.seq > ended and sample.start_ns < stop.thawed_ns - _STAMP_NS
            if late or early:
                wrong.append(f"launch {sample.seq} ran while {ended} had ended and it was frozen")
    return wrong


def _figure(name: str, rounds: _Rounds) -> Figure:
    s = numbers.spread(rounds.freeze_us)
    return Figure(
        f"freeze, write(2) to return, spatial{name}",
        f"p50 <= {_P50_US:.0f} us, p99 <= {_P99_US:.0f} us",
        f"p50 {s.p50:.0f}, p90 {s.p90:.0f}, p99 {s.p99:.0f}, max {s.max:.0f} us",
        f"{s.n} freezes",
        verdict(s.p50 <= _P50_US and s.p99 <= _P99_US),
    )


def measure(bench: Bench) -> Result:
    """A freeze of fma_fp32 on the whole GPU, beside others in a partition, and uncut."""
    result = Result()
    series: dict[str, _Rounds] = {}
    alone = bench.launch(**FMA, name="alone", blocks="per-sm:1")
    series["whole GPU"] = _measure(alone, Kept(_file(alone)), _ROUNDS, 1, stay_awake)
    alone.write("compute.freeze", 0)
    series["whole GPU, after a rest"] = _measure(alone, Kept(_file(alone)), _ROUNDS, 5, rest)
    alone.write("compute.freeze", 0)
    series["whole GPU, open-write-close"] = _measure(
        alone, Opened(_file(alone)), _FEWER_ROUNDS, 2, stay_awake
    )
    reads = {"awake": _reads(alone, stay_awake), "after a rest": _reads(alone, rest)}
    result.raw["reads"] = reads
    series["partition, beside a busy one"] = _beside(bench)
    series["whole GPU, uncut launches"] = _uncut(bench)
    for name, rounds in series.items():
        result.raw[name] = {
            "freeze_us": rounds.freeze_us,
            "thaw_us": rounds.thaw_us,
            "wrong": rounds.wrong,
        }
    sliced = [name for name in series if "uncut" not in name]
    result.figures.append(_figure("", series[sliced[0]]))
    result.figures += [_figure(f" ({name})", series[name]) for name in sliced[1:]]
    result.figures.append(_adding_up(series))
    result.tables.append(_table(series, reads))
    return result


def _beside(bench: Bench) -> _Rounds:
    bench.service.clear()
    sms = bench.sizes().of(64)
    pair = []
    for name in ("a", "b"):
        bench.service.partition(name, sms)
        pair.append(bench.launch_frozen(**FMA, name=name, partition=name, blocks=sms))
    bench.service.thaw(pair)
    return _measure(pair[0], Kept(_file(pair[0])), _FEWER_ROUNDS, 3, stay_awake)


def _uncut(bench: Bench) -> _Rounds:
    bench.service.clear()
    workload = bench.launch(**FMA, name="uncut", blocks="per-sm:1", sliced=False)
    return _measure(workload, Kept(_file(workload)), _UNCUT_ROUNDS, 4, stay_awake)


def _adding_up(series: dict[str, _Rounds]) -> Figure:
    wrong = [text for rounds in series.values() for text in rounds.wrong]
    looks = sum(rounds.looks for rounds in series.values())
    freezes = sum(len(rounds.freeze_us) for rounds in series.values())
    samples = sum(len(rounds.samples) for rounds in series.values())
    return Figure(
        "the same: while frozen",
        "no kernel ends while frozen; iterations add up exactly",
        f"{len(wrong)} contradictions" + (f", the first: {wrong[0]}" if wrong else ""),
        f"{looks} double readings in {freezes} freezes, time stamps of {samples} launches",
        verdict(not wrong),
    )


def _table(series: dict[str, _Rounds], reads: dict[str, list[float]]) -> Table:
    rows = []
    for name, rounds in series.items():
        for what, values in (("freeze", rounds.freeze_us), ("thaw", rounds.thaw_us)):
            s = numbers.spread(values)
            rows.append([name, what, str(s.n), *(f"{v:.0f}" for v in s[1:])])
    for name, values in reads.items():
        s = numbers.spread(values)
        rows.append(
            [f"for comparison, {name}", "read of memory.current", str(s.n), *(f"{v:.0f}" for v in s[1:])]
        )
    return Table(
        "Time of a write to compute.freeze",
        ["how", "write", "n", "p50 us", "p90 us", "p99 us", "max us"],
        rows,
    )
