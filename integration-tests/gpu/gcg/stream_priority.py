"""Stream priorities across MPS clients: what order they give, if any.

Two clients of one MPS server offer the same SMs more blocks than fit. Three settings
take turns: both streams at the lowest priority, the first at the highest, the second
at the highest. Where priorities order the clients' blocks, the more important one does
more in the same time and its launches end sooner; where they do not, the three
settings look alike.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from gcg import numbers
from gcg.bench import FMA, Bench
from gcg.figure import Figure, Result, Table, Verdict
from gcg.samples import Sample
from gcg.service import Workload
from gcg.worker import Rig, Worker, placement

_LOWEST, _HIGHEST = 0, -5
_SETTINGS = ((_LOWEST, _LOWEST), (_HIGHEST, _LOWEST), (_LOWEST, _HIGHEST))
_ROUNDS = 2
_WINDOW_S = 0.2
# Launches alone, microseconds. A block lasts as long as its launch where all blocks
# are resident at once.
_LONG_US, _SHORT_US = 5000.0, 100.0
# How much more than its equal a client must do for priorities to count as an order.
_ORDER = 1.5


class _Variant(NamedTuple):
    """What the two clients launch."""

    first_us: float
    second_us: float
    form: str
    per_sm: int

    def title(self) -> str:
        """In words."""
        lengths = {_LONG_US: "long", _SHORT_US: "short"}
        return (
            f"{lengths[self.first_us]} and {lengths[self.second_us]}, {self.form}, {self.per_sm} blocks an SM"
        )


VARIANTS = tuple(
    _Variant(first, second, form, per_sm)
    for first, second in ((_LONG_US, _LONG_US), (_SHORT_US, _SHORT_US), (_SHORT_US, _LONG_US))
    for form in ("sliced", "uncut")
    for per_sm in (2, 8)
)


class _Window(NamedTuple):
    """One setting for a while."""

    priorities: tuple[int, int]
    # Iterations of all blocks a second, of each client.
    rates: tuple[float, float]
    wall_us: tuple[list[float], list[float]]


def _run(pair: Sequence[Worker], priorities: tuple[int, int]) -> _Window:
    """Places both frozen workers, lets them run, freezes them."""
    before = []
    for worker, priority in zip(pair, priorities, strict=True):
        worker.call({"place": placement(priority)})
        # The answer of a freeze that is in force already carries the counters.
        before.append(worker.call({"freeze": True})["counters"])
        worker.samples.clear()
    began = time.monotonic_ns()
    for number, worker in [(worker.send({"freeze": False}), worker) for worker in pair]:
        worker.wait(number)
    until = time.monotonic() + _WINDOW_S
    while time.monotonic() < until:
        time.sleep(0.02)
        for worker in pair:
            worker.drain()
    asked = [worker.send({"freeze": True}) for worker in pair]
    after = [worker.wait(number)["counters"] for worker, number in zip(pair, asked, strict=True)]
    took_s = (time.monotonic_ns() - began) / 1e9
    rates = [(b["iterations"] - a["iterations"]) / took_s for a, b in zip(before, after, strict=True)]
    walls = [_walls(worker.samples, began) for worker in pair]
    return _Window(priorities, (rates[0], rates[1]), (walls[0], walls[1]))


def _walls(samples: list[Sample], began_ns: int) -> list[float]:
    # Reports may still hold launches of the window before.
    return [sample.wall_us for sample in samples if sample.start_ns >= began_ns]


def _solo(worker: Worker) -> float:
    """Iterations a second alone."""
    before = worker.call({"freeze": True})["counters"]
    began = time.monotonic_ns()
    worker.call({"freeze": False})
    time.sleep(_WINDOW_S / 2)
    after = worker.call({"freeze": True})["counters"]
    took_s = (time.monotonic_ns() - began) / 1e9
    return float(after["iterations"] - before["iterations"]) / took_s


def _prepare(rig: Rig, pair: Sequence[Worker], variant: _Variant, unit_us: float) -> None:
    """Prepares both one after the other, so that neither calibrates beside the other,
    and leaves them frozen."""
    for worker, launch_us in zip(pair, variant[:2], strict=True):
        iterations = max(round(launch_us / unit_us / variant.per_sm), 1)
        worker.prepare(blocks=variant.per_sm * rig.sm_count, form=variant.form, iterations=iterations)
        worker.call({"freeze": True})
        worker.call("start")
        worker.call({"report_every": {"ms": 50}})


def _measure(pair: Sequence[Worker]) -> tuple[list[float], list[_Window]]:
    solo = [_solo(worker) for worker in pair]
    return solo, [_run(pair, setting) for _ in range(_ROUNDS) for setting in _SETTINGS]


def _unit_us(rig: Rig) -> float:
    """Microseconds of an iteration with one block of 1024 threads an SM."""
    workers = rig.workers(1)
    ready = workers[0].prepare(blocks=rig.sm_count, form="sliced", iterations=None)
    rig.retire(workers)
    return float(ready["launch_us"]) / int(ready["iterations"])


def measure(bench: Bench) -> Result:
    """Every variant with workers by hand, then as workloads where a file can set it."""
    result = Result()
    orders = []
    rows = []
    with bench.rig() as rig:
        unit_us = _unit_us(rig)
        for variant in VARIANTS:
            pair = rig.workers(2)
            _prepare(rig, pair, variant, unit_us)
            solo, windows = _measure(pair)
            rig.retire(pair)
            order = _order(windows)
            orders.append(order)
            rows += _rows(variant.title(), solo, windows)
            result.raw[variant.title()] = _raw(solo, windows, order)
    result.tables.append(_table(rows))
    result.figures.append(_figure(orders))
    return result


def _of(windows: list[_Window], setting: tuple[int, int]) -> list[_Window]:
    return [window for window in windows if window.priorities == setting]


def _ratio(window: _Window) -> float:
    first, second = window.rates
    return first / second if second else float("inf")


def _order(windows: list[_Window]) -> float:
    """By how much the first's share over the second's grows from less to more important,
    the square root of it: 1 where priorities do nothing, 2 where each does twice as much
    for being the more important one."""
    more, less = (
        numbers.median([_ratio(window) for window in _of(windows, setting)]) for setting in _SETTINGS[1:]
    )
    if less == 0:
        return float("inf")
    return math.sqrt(more / less)


def _rows(title: str, solo: list[float], windows: list[_Window]) -> list[list[str]]:
    rows = []
    for setting in _SETTINGS:
        found = _of(windows, setting)
        row = [title, f"{setting[0]} and {setting[1]}"]
        row.append(" and ".join(f"{_ratio(window):.2f}" for window in found))
        for index in (0, 1):
            rate = numbers.median([window.rates[index] for window in found])
            row.append(f"{rate / solo[index]:.2f}")
            row.append(_percentiles([us for window in found for us in window.wall_us[index]]))
        rows.append(row)
    return rows


def _percentiles(values: list[float]) -> str:
    if not values:
        return "none"
    return f"{numbers.percentile(values, 50):.0f} / {numbers.percentile(values, 99):.0f}"


def _table(rows: list[list[str]]) -> Table:
    header = ["launches of the first and the second", "stream priorities", "iterations, first : second"]
    for which in ("first", "second"):
        header += [f"{which}: of its solo rate", f"{which}: launch wall p50 / p99 us"]
    return Table("Two MPS clients in the same SMs", header, rows)


def _raw(solo: list[float], windows: list[_Window], order: float) -> dict[str, object]:
    return {
        "solo_iterations_per_s": solo,
        # JSON has no infinity.
        "order": order if math.isfinite(order) else None,
        "windows": [
            {
                "priorities": window.priorities,
                "iterations_per_s": window.rates,
                "wall_us": [[round(us, 1) for us in walls] for walls in window.wall_us],
            }
            for window in windows
        ],
    }


def _figure(orders: list[float]) -> Figure:
    ordered = [order for order in orders if order >= _ORDER]
    least, most = min(orders), max(orders)
    worst = f"the more important one does {least:.2f} to {most:.2f} times what it does as an equal"
    if len(ordered) == len(orders):
        words = f"an order in every variant: {worst}"
    elif ordered:
        words = f"an order in {len(ordered)} of {len(orders)} variants: {worst}"
    else:
        words = f"no order: {worst}"
    return Figure(
        "stream priorities -5 and 0 across MPS clients in the same SMs",
        "measured: what order they give",
        words,
        f"{len(orders)} variants, {_ROUNDS} windows of {_WINDOW_S} s a setting",
        Verdict.RECORDED,
    )


_PRIORITIES = ((8, 8), (0, 15), (15, 0))
_PHASE_S = 0.4


def by_file(bench: Bench) -> Result:
    """The same through compute.priority, where the service enforces it spatially."""
    name, to_reach = "compute.priority 0 and 15, spatial, same SMs", "measured: what order it gives"
    enforcer = bench.service.enforcer("compute.priority")
    if enforcer.startswith("none"):
        figure = Figure(name, to_reach, f"refused: {enforcer}", "0", Verdict.RECORDED)
        return Result([figure])
    pair: list[Workload] = []
    iterations = bench.iterations(_SHORT_US)
    for which in ("first", "second"):
        pair.append(bench.launch_frozen(**FMA, name=which, blocks="per-sm:8", iterations=iterations))
    rows, ratios = [], []
    for priorities in _PRIORITIES * _ROUNDS:
        for workload, priority in zip(pair, priorities, strict=True):
            workload.write("compute.priority", priority)
        phase = bench.phase(pair, pair, _PHASE_S)
        rates = [phase.launches_per_s(workload.name) for workload in pair]
        ratios.append(rates[0] / rates[1])
        row = [f"{priorities[0]} and {priorities[1]}", f"{ratios[-1]:.2f}"]
        for workload in pair:
            row.append(_percentiles([sample.wall_us for sample in phase.samples[workload.name]]))
        rows.append(row)
    bench.service.freeze(pair)
    header = [
        "priorities",
        "launches, first : second",
        "first: wall p50 / p99 us",
        "second: wall p50 / p99 us",
    ]
    words = "first : second " + ", ".join(f"{row[1]} at {row[0]}" for row in rows)
    figure = Figure(name, to_reach, words, f"{len(rows)} phases of {_PHASE_S} s", Verdict.RECORDED)
    return Result([figure], [Table("Two workloads in the same SMs", header, rows)], raw={"ratios": ratios})
