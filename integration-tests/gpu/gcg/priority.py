"""compute.priority under temporal sharing: GPU time by timeslice."""

import time
from typing import NamedTuple

from gcg import numbers
from gcg.bench import FMA, Bench
from gcg.figure import Figure, Result, Skip, Table, verdict
from gcg.service import Workload

_MAIN = (4, 8)
_CURVE = ((0, 8), (2, 8), (6, 8), (8, 8), (8, 10), (8, 12), (8, 15))
_TOLERANCE = 0.15
# A launch, microseconds: with 8 in flight no queue runs empty while the host's thread
# waits for a processor, and the driver takes no slice away for it.
_LAUNCH_US = 2000.0
# Two blocks of 1024 threads an SM: either workload fills the GPU.
_PER_SM = 2
# A stretch lasts so long, seconds, and at least so many turns of both.
_LEAST_S, _TURNS = 3.0, 11
_SOLO_S = 1.0
# For channel control to prove itself on workers of the service's own.
_PROOF_S = 40.0


def slice_us(priority: int) -> float:
    """Timeslice that a priority stands for, microseconds."""
    return float(524_288 >> priority)


def _await_channels(bench: Bench) -> None:
    until = time.monotonic() + _PROOF_S
    while (by := bench.service.enforcer("compute.priority")) != "channel":
        if time.monotonic() > until:
            raise Skip(f"compute.priority has no enforcer under temporal sharing: {by}")
        time.sleep(0.1)


class _Stretch(NamedTuple):
    """Both at these priorities for a while; GPU time in seconds, by iterations done."""

    priorities: tuple[int, int]
    wall_s: float
    gpu_s: list[float]
    timeslices_us: list[int | None]
    counters: list[dict[str, int]]

    def ratio(self) -> float:
        """GPU time of the first for each of the second."""
        first, second = self.gpu_s
        return first / second if second else float("inf")

    def row(self) -> list[str]:
        """A line of the table."""
        first, second = self.priorities
        wanted = slice_us(first) / slice_us(second)
        return [
            f"{first} and {second}",
            " and ".join(str(us) for us in self.timeslices_us),
            f"{wanted:.3g} : 1",
            f"{self.ratio():.3g} : 1",
            f"{numbers.changed(self.ratio(), wanted):+.0f}%",
            f"{sum(self.gpu_s) / self.wall_s * 100:.1f}%",
            f"{self.wall_s:.1f}",
        ]


class _Pair:
    """Two workloads whose queues never run empty."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        iterations = bench.iterations(_LAUNCH_US / _PER_SM)
        spec = {**FMA, "blocks": f"per-sm:{_PER_SM}", "iterations": iterations}
        self._work: list[Workload] = [bench.launch_frozen(**spec, name=name) for name in ("first", "second")]
        self.iteration_us = [self._solo(workload) for workload in self._work]

    def _solo(self, workload: Workload) -> float:
        """Microseconds of an iteration alone, over all blocks."""
        took_s, (grown,) = self._bench.counted([workload], _SOLO_S)
        return took_s * 1e6 / grown["nr_iterations"]

    def run(self, priorities: tuple[int, int]) -> _Stretch:
        """Runs both at these priorities."""
        for workload, priority in zip(self._work, priorities, strict=True):
            workload.write("compute.priority", priority)
        seconds = max(_LEAST_S, _TURNS * sum(map(slice_us, priorities)) / 1e6)
        took_s, grown = self._bench.counted(self._work, seconds)
        gpu_s = [
            counters["nr_iterations"] * us / 1e6
            for counters, us in zip(grown, self.iteration_us, strict=True)
        ]
        slices = [workload.stat().get("timeslice_usec") for workload in self._work]
        return _Stretch(priorities, took_s, gpu_s, slices, grown)


def _more_to_less(stretch: _Stretch) -> float:
    """GPU time of the more important one for each of the other."""
    first, second = stretch.priorities
    ratio = stretch.ratio()
    if first <= second:
        return ratio
    return 1 / ratio if ratio else float("inf")


def measure(bench: Bench) -> Result:
    """The pair with a figure four times, in both orders, and the curve."""
    _await_channels(bench)
    pair = _Pair(bench)
    main = [pair.run(order) for order in (_MAIN, _MAIN[::-1], _MAIN, _MAIN[::-1])]
    curve = [pair.run(priorities) for priorities in _CURVE]
    ratios = [_more_to_less(stretch) for stretch in main]
    wanted = slice_us(_MAIN[0]) / slice_us(_MAIN[1])
    ratio = numbers.median(ratios)
    each = ", ".join(f"{value:.2f}" for value in ratios)
    figure = Figure(
        "temporal, priorities 4 and 8, queues never empty",
        f"GPU time {wanted:.0f} : 1, within {_TOLERANCE:.0%}",
        f"{ratio:.2f} : 1 ({numbers.changed(ratio, wanted):+.1f}%); each {each}",
        f"{len(ratios)} stretches of {main[0].wall_s:.1f} s, both orders",
        verdict(abs(ratio / wanted - 1) <= _TOLERANCE),
    )
    header = ["priorities", "timeslices us", "expected", "GPU time", "off by", "work done of wall time", "s"]
    note = (
        "GPU time is iterations done x the time of one alone, measured in the same run. What is missing "
        "from 100% of wall time went into context switches, which flatten the ratio of short slices."
    )
    stretches = main + curve
    return Result(
        [figure],
        [Table("GPU time by priority", header, [stretch.row() for stretch in stretches])],
        [note],
        {"iteration_us": pair.iteration_us, "stretches": [stretch._asdict() for stretch in stretches]},
    )
