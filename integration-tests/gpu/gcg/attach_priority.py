"""compute.priority of attached processes: shares of the GPU by the programs' own counts."""

import time
from typing import NamedTuple

from gcg import numbers
from gcg.bench import Bench
from gcg.figure import Figure, Result, Table, verdict
from gcg.fleet import Attached, Fleet, Spin
from gcg.priority import slice_us

_MAIN = (4, 8)
_TOLERANCE = 0.15
# A launch, microseconds: with 8 in flight no queue runs empty while the host's thread
# waits for a processor.
_LAUNCH_US = 2000.0
_DEPTH = 8
# Two blocks of 1024 threads an SM: either program fills the GPU.
_PER_SM = 2
_SOLO_S, _STRETCH_S = 0.8, 3.0
_EQUAL_S = 1.0


class _Stretch(NamedTuple):
    """Both at these priorities for a while; `done` is in the programs' own units."""

    priorities: tuple[int, int]
    wall_s: float
    done: tuple[int, int]
    timeslices_us: tuple[int | None, int | None]


def _counted(fleet: Fleet, pair: list[Attached], seconds: float) -> tuple[float, tuple[int, int]]:
    """Lets frozen programs run for so long and freezes them again: wall time, and what
    each did. A process's counter stands while it is frozen."""
    before = [one.progress() for one in pair]
    began = time.monotonic_ns()
    fleet.service.thaw(pair)
    time.sleep(seconds)
    fleet.service.freeze(pair)
    took = (time.monotonic_ns() - began) / 1e9
    after = [one.progress() for one in pair]
    return took, (after[0] - before[0], after[-1] - before[-1])


def _run(fleet: Fleet, pair: list[Attached], priorities: tuple[int, int], seconds: float) -> _Stretch:
    for one, priority in zip(pair, priorities, strict=True):
        one.write("compute.priority", priority)
    took, done = _counted(fleet, pair, seconds)
    slices = [one.stat().get("timeslice_usec") for one in pair]
    return _Stretch(priorities, took, done, (slices[0], slices[1]))


def measure(bench: Bench) -> Result:
    """Each alone, equal priorities, and the pair with a figure twice in both orders."""
    torch = not bench.sim
    with Fleet(bench) as fleet:
        spins = [
            Spin(name, _LAUNCH_US, torch=torch, per_sm=_PER_SM, depth=_DEPTH) for name in ("first", "second")
        ]
        pair = fleet.attach(*spins)
        fleet.service.freeze(pair)
        for one in pair:
            one.go()
        solo = []
        for one in pair:
            took, (done, _) = _counted(fleet, [one], _SOLO_S)
            solo.append(done / took)
        equal = _run(fleet, pair, (8, 8), _EQUAL_S)
        orders = (_MAIN, _MAIN[::-1]) * 2
        main = [_run(fleet, pair, order, _STRETCH_S) for order in orders]
        fleet.service.thaw(pair)
    return _result(solo, equal, main)


def _ratio(stretch: _Stretch, solo: list[float]) -> float:
    """GPU time of the more important one for each of the other."""
    first, second = (done / rate for done, rate in zip(stretch.done, solo, strict=True))
    more, less = (first, second) if stretch.priorities[0] <= stretch.priorities[1] else (second, first)
    return more / less if less else float("inf")


def _result(solo: list[float], equal: _Stretch, main: list[_Stretch]) -> Result:
    ratios = [_ratio(stretch, solo) for stretch in main]
    wanted = slice_us(_MAIN[0]) / slice_us(_MAIN[1])
    ratio = numbers.median(ratios)
    set_right = all(
        us is None or us == slice_us(priority)
        for stretch in main
        for us, priority in zip(stretch.timeslices_us, stretch.priorities, strict=True)
    )
    figure = Figure(
        "two equal PyTorch programs at priorities 4 and 8, queues never empty",
        f"GPU time {wanted:.0f} : 1, within {_TOLERANCE:.0%}",
        f"{ratio:.2f} : 1 ({numbers.changed(ratio, wanted):+.1f}%); each "
        + ", ".join(f"{value:.2f}" for value in ratios)
        + ("" if set_right else "; timeslices read back differ from those set"),
        f"{len(ratios)} stretches of {main[0].wall_s:.1f} s, both orders, by the programs' own counts",
        verdict(abs(ratio / wanted - 1) <= _TOLERANCE and set_right),
    )
    rows = []
    for stretch in [equal, *main]:
        shares = [done / rate / stretch.wall_s for done, rate in zip(stretch.done, solo, strict=True)]
        rows.append(
            [
                " and ".join(map(str, stretch.priorities)),
                " and ".join(map(str, stretch.timeslices_us)),
                f"{_ratio(stretch, solo):.3g} : 1",
                " and ".join(f"{share:.1%}" for share in shares),
                f"{sum(shares):.1%}",
                f"{stretch.wall_s:.2f}",
            ]
        )
    header = ["priorities", "timeslices us", "GPU time", "of its solo rate", "together", "s"]
    table = Table("Shares by what each program did, over its rate alone", header, rows)
    raw = {"solo_per_s": solo, "stretches": [stretch._asdict() for stretch in [equal, *main]]}
    return Result([figure], [table], raw=raw)
