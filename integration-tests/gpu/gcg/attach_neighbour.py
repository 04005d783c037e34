"""A process beside one that is frozen in the middle of a kernel."""

import time
from typing import NamedTuple

from gcg import numbers
from gcg.bench import Bench
from gcg.figure import Figure, Result, Skip, Table, verdict
from gcg.fleet import Attached, Fleet, Spin

_VICTIM_US = 460.0
# Launches in flight: the next follows at once, so its time is that on the GPU alone.
_DEPTH = 2
# Long enough to be stopped in its middle, short enough to be waited for.
_HOG_US = 200_000.0
_ROUNDS = 6
_PHASE_S = 0.8
_BESIDE_S = 0.3
# What a phase leaves out at its beginning, seconds.
_WARM_S = 0.1
_P50_PERCENT, _P99_PERCENT = 1.0, 5.0
_PHASES = ("solo", "beside a frozen one", "beside a running one")


class _Launch(NamedTuple):
    """A launch of the victim: when it began, and its microseconds."""

    start_ns: int
    device_us: float
    wall_us: float


def _phase(victim: Attached, seconds: float) -> list[_Launch]:
    """Launches that began and ended within it."""
    time.sleep(_WARM_S)
    begin = time.monotonic_ns()
    time.sleep(seconds)
    end = time.monotonic_ns()
    launches = [_Launch(*row) for row in victim.program.ask("take")["samples"]]
    return [one for one in launches if one.start_ns >= begin and one.start_ns + one.wall_us * 1e3 <= end]


def measure(bench: Bench) -> Result:
    """Phases that take turns: alone, beside a frozen hog, beside a running one."""
    if bench.sim:
        raise Skip("the simulated program does not time its launches")
    found: dict[str, list[_Launch]] = {name: [] for name in _PHASES}
    with Fleet(bench) as fleet:
        hog, victim = fleet.attach(Spin("hog", _HOG_US, torch=True), Spin("victim", _VICTIM_US, depth=_DEPTH))
        victim.go()
        for _ in range(_ROUNDS):
            hog.pause()
            # Until the kernel that it has launched has ended, beside the victim.
            time.sleep(4 * _HOG_US / 1e6)
            found["solo"] += _phase(victim, _PHASE_S)
            hog.go()
            time.sleep(0.05)
            hog.write("compute.freeze", 1)
            found["beside a frozen one"] += _phase(victim, _PHASE_S)
            hog.write("compute.freeze", 0)
            found["beside a running one"] += _phase(victim, _BESIDE_S)
    return _result(found)


def _result(found: dict[str, list[_Launch]]) -> Result:
    device = {name: numbers.spread([one.device_us for one in launches]) for name, launches in found.items()}
    solo, beside = device["solo"], device["beside a frozen one"]
    p50, p99 = numbers.changed(beside.p50, solo.p50), numbers.changed(beside.p99, solo.p99)
    figure = Figure(
        "a 460 us kernel of another process while one is frozen in a kernel",
        f"p50 within {_P50_PERCENT:.0f}% and p99 within {_P99_PERCENT:.0f}% of solo",
        f"p50 {beside.p50:.1f} us, solo {solo.p50:.1f} ({p50:+.2f}%); "
        f"p99 {beside.p99:.1f} us, solo {solo.p99:.1f} ({p99:+.2f}%)",
        f"{solo.n} solo, {beside.n} beside, in {_ROUNDS} rounds that took turns",
        # Faster is no fault: another's kernels keep the clocks up.
        verdict(abs(p50) <= _P50_PERCENT and p99 <= _P99_PERCENT),
    )
    rows = []
    for name, s in device.items():
        rows.append([name, str(s.n), *(f"{v:.1f}" for v in s[1:])])
    header = ["phase", "n", "p50 us", "p90 us", "p99 us", "max us"]
    return Result([figure], [Table("Time of a launch on the GPU", header, rows)], raw=dict(found))
