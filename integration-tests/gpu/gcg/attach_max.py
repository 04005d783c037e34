"""compute.max of an attached process: a run window of each period."""

import time
from typing import NamedTuple

from gcg import numbers
from gcg.bench import Bench
from gcg.figure import Figure, Result, Table, verdict
from gcg.fleet import Attached, Fleet, Spin

_QUOTA, _PERIOD = 30_000, 100_000
_TOLERANCE = 2.0
_FREE_S, _LIMITED_S, _LIMITED_LONG_S = 2.0, 8.0, 30.0
_ROUNDS = 2
_SIM_KERNEL_US = 500


class _Stretch(NamedTuple):
    """Steps a second of the program over so many seconds."""

    seconds: float
    rate: float


def _steps(one: Attached) -> tuple[int, int]:
    """When, in ns, and how many so far."""
    now = one.count()
    return now["ns"], now["steps"] if "steps" in now else now["lanes"][0]["progress"]


def _rate(one: Attached, seconds: float) -> _Stretch:
    # The setting just made, and clocks that rise.
    time.sleep(0.3)
    began, before = _steps(one)
    time.sleep(seconds)
    ended, after = _steps(one)
    took = (ended - began) / 1e9
    return _Stretch(took, (after - before) / took)


def measure(bench: Bench) -> Result:
    """Without a quota, with it, without, and so on: each with is compared with the two
    without beside it."""
    with Fleet(bench) as fleet:
        fleet.await_proof()
        if bench.sim:
            (program,) = fleet.attach(Spin("loop", _SIM_KERNEL_US))
        else:
            loop = fleet.start_torch("loop", "matmul")
            loop.wait_ready()
            (program,) = fleet.adopt(loop)
        program.go()
        seconds = _LIMITED_LONG_S if bench.long else _LIMITED_S
        free, limited = [_rate(program, _FREE_S)], []
        before = program.stat()
        for _ in range(_ROUNDS):
            program.write("compute.max", f"{_QUOTA} {_PERIOD}")
            limited.append(_rate(program, seconds))
            program.write("compute.max", "max")
            free.append(_rate(program, _FREE_S))
        after = program.stat()
    shares = [one.rate / ((free[i].rate + free[i + 1].rate) / 2) * 100 for i, one in enumerate(limited)]
    wanted = _QUOTA / _PERIOD * 100
    share = numbers.median(shares)
    throttled = after.get("nr_throttled", 0) - before.get("nr_throttled", 0)
    figure = Figure(
        f"compute.max {_QUOTA} {_PERIOD} on a PyTorch loop that never pauses",
        f"{wanted:.0f}% of its solo speed, within {_TOLERANCE:.0f} points",
        f"{share:.2f}%; each " + ", ".join(f"{value:.2f}%" for value in shares),
        f"{_ROUNDS} stretches of {limited[0].seconds:.1f} s, {throttled} periods throttled",
        verdict(all(abs(value - wanted) <= _TOLERANCE for value in shares)),
    )
    rows = [["max", f"{free[0].seconds:.2f}", f"{free[0].rate:.1f}"]]
    for with_, without in zip(limited, free[1:], strict=True):
        rows.append([f"{_QUOTA} {_PERIOD}", f"{with_.seconds:.2f}", f"{with_.rate:.1f}"])
        rows.append(["max", f"{without.seconds:.2f}", f"{without.rate:.1f}"])
    table = Table("Steps of the program's own count", ["compute.max", "s", "steps/s"], rows)
    raw = {"free": free, "limited": limited, "stat_before": before, "stat_after": after}
    return Result([figure], [table], raw=raw)
