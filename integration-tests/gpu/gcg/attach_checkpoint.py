"""Freezes beside calls of the driver that hold its locks for long."""

import time
from collections.abc import Callable
from typing import Any

from gcg import numbers
from gcg.bench import Bench
from gcg.figure import Figure, Result, Skip, Table, Verdict
from gcg.fleet import Attached, Fleet, Spin

_MEMORY, _MEMORY_LONG = 4 << 30, 17 << 30
_STEPS = ("lock", "checkpoint", "restore", "unlock")
_QUIET_S, _CHURN_S = 1.0, 3.0
# For a checkpoint or a restore, seconds.
_STEP_S = 60.0
_KERNEL_US = 20_000.0
_PAUSE_S = 0.002


def _freezes(one: Attached, until: Callable[[], bool]) -> list[float]:
    """Freezes and thaws again and again; microseconds of each freeze. At least one."""
    times: list[float] = []
    while not times or not until():
        times.append(one.write("compute.freeze", 1) / 1e3)
        time.sleep(_PAUSE_S)
        one.write("compute.freeze", 0)
        time.sleep(_PAUSE_S)
    return times


def _for(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def measure(bench: Bench) -> Result:
    """Beside nothing, beside each step of a checkpoint, beside context creation."""
    if bench.sim:
        raise Skip("the simulated GPU has no such locks")
    found: dict[str, list[float]] = {}
    took: dict[str, float] = {}
    memory = _MEMORY_LONG if bench.long else _MEMORY
    with Fleet(bench) as fleet:
        somebody, churn = fleet.start("checkpointer"), fleet.start("churn", "context")
        one, other = fleet.attach(Spin("frozen", _KERNEL_US), Spin("checkpointed", 1000, memory=memory))
        for program in (somebody, churn):
            program.wait_ready()
        one.go()
        found["beside nothing"] = _freezes(one, _for(_QUIET_S))
        for step in _STEPS:
            name = f"beside {step}, {memory >> 30} GiB"
            somebody.send(f"{step} {other.pid}")
            found[name] = _freezes(one, somebody.answered)
            answer = somebody.wait(_STEP_S)
            took[name] = (answer["ended_ns"] - answer["began_ns"]) / 1e9
        alive = not other.program.has_ended()
        churn.ask("go")
        found["beside context creation"] = _freezes(one, _for(_CHURN_S))
        churn.ask("pause")
        contexts = len(churn.ask("take")["times"])
    return _result(found, took, contexts, alive)


def _result(found: dict[str, list[float]], took: dict[str, float], contexts: int, alive: bool) -> Result:
    quiet = numbers.spread(found["beside nothing"])
    during = [us for name in took for us in found[name]]
    figures = []
    for name, values, beside in (
        ("somebody's checkpoint and restore", during, f"{sum(took.values()):.1f} s of them"),
        ("context creation", found["beside context creation"], f"{contexts} contexts"),
    ):
        s = numbers.spread(values)
        figures.append(
            Figure(
                f"a freeze beside {name}",
                "recorded: what the driver's own locks add",
                f"p50 {s.p50 / 1e3:.2f}, p99 {s.p99 / 1e3:.2f}, max {s.max / 1e3:.2f} ms; "
                f"beside nothing p50 {quiet.p50 / 1e3:.2f}, p99 {quiet.p99 / 1e3:.2f} ms",
                f"{s.n} freezes, {beside}",
                Verdict.RECORDED,
            )
        )
    rows = []
    for name, values in found.items():
        s = numbers.spread(values)
        rows.append([name, f"{took[name]:.2f}" if name in took else "-", str(s.n)])
        rows[-1] += [f"{v / 1e3:.2f}" for v in s[1:]]
    header = ["freezes", "step took s", "n", "p50 ms", "p90 ms", "p99 ms", "max ms"]
    notes = [] if alive else ["The program that was checkpointed and restored has ended."]
    raw: dict[str, Any] = {"freeze_us": found, "took_s": took}
    return Result(figures, [Table("Time of a write of 1", header, rows)], notes, raw)
