"""nr_submitted_kernels of attached processes, and what counting costs them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gcg import numbers
from gcg.bench import Bench
from gcg.figure import Figure, Result, Skip, Table, verdict
from gcg.fleet import Attached, Fleet, Spin
from gcg.program import Program

_LAUNCHES, _GRAPHS = 100_000, 1000
_FEW = 5000
_THREADS = 4
# Until the figures are there: they are 100 ms old at most while somebody reads.
_SETTLE_S, _LATER_S = 3.0, 0.3
# Until counting has begun: the service retries for a few seconds.
_BEGIN_S = 10.0
_SLOWER_PERCENT, _LAUNCH_US = 15.0, 5.0
_MODEL_PERCENT = 1.0
_TIMED, _MODEL_S = 100_000, 2.5


@dataclass
class _Book:
    """A process's counters against what it knows that it did."""

    one: Attached
    expected: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Waits until its launches are counted, and takes what there is as zero."""
        until = time.monotonic() + _BEGIN_S
        while "nr_submitted_kernels" not in (stat := self._stat()):
            if time.monotonic() > until:
                raise Skip(f"launches of {self.one.name} are not counted: the line is absent")
            time.sleep(0.02)
        # What it did before it was attached to may still be arriving.
        time.sleep(_LATER_S)
        stat = self._stat()
        self.expected = {key: stat[key] for key in ("nr_submitted_kernels", "nr_graph_launches")}

    def _stat(self) -> dict[str, int]:
        try:
            return self.one.stat()
        except FileNotFoundError:
            return {}

    def did(self, launches: int, graphs: int = 0) -> None:
        """It launched so many kernels, and so many graphs beside."""
        self.expected["nr_submitted_kernels"] += launches + graphs
        self.expected["nr_graph_launches"] += graphs

    def off(self) -> dict[str, int]:
        """By how much each counter differs from what was done, once it has had time."""
        until = time.monotonic() + _SETTLE_S
        while self._differences() and time.monotonic() < until:
            time.sleep(0.02)
        # More than was done must not come later either.
        time.sleep(_LATER_S)
        return self._differences()

    def _differences(self) -> dict[str, int]:
        stat = self._stat()
        found = {key: stat.get(key, 0) - value for key, value in self.expected.items()}
        return {key: value for key, value in found.items() if value}


@dataclass
class _Check:
    """A line of the table: what was done, and by how much each process's counters are off."""

    what: str
    launches: int
    off: dict[str, dict[str, int]]

    def cells(self) -> list[str]:
        """Its cells."""
        wrong = [f"{name}: {off}" for name, off in self.off.items() if off]
        return [self.what, str(self.launches), "; ".join(wrong) or "exact"]


def _exact(bench: Bench, torch: bool) -> tuple[list[_Check], list[str]]:
    """Every kind of launch by one program, with its children's books beside."""
    checks: list[_Check] = []
    notes: list[str] = []
    with Fleet(bench) as fleet:
        fleet.await_proof()
        start: Callable[..., Program] = fleet.start_torch if torch else fleet.start
        program = start("launches", "--fork-first", *(["--torch"] if torch else []))
        program.wait_ready()
        (parent,) = fleet.adopt(program)
        books = {
            "it": _Book(parent),
            "its fork": _Book(fleet.attached(program, program.facts["children"][0])),
        }
        for book in books.values():
            book.begin()

        def check(what: str, launches: int) -> None:
            checks.append(_Check(what, launches, {name: book.off() for name, book in books.items()}))

        def tell(command: str) -> dict[str, Any]:
            return program.ask(command, 30)

        tell(f"launch {_LAUNCHES}")
        books["it"].did(_LAUNCHES)
        check("a loop of launches", _LAUNCHES)
        tell(f"graph {_GRAPHS}")
        books["it"].did(0, _GRAPHS)
        check("graph replays", _GRAPHS)
        for words, command in (("before", "threads"), ("after", "new-threads")):
            tell(f"{command} {_FEW}")
            books["it"].did(_THREADS * _FEW)
            check(f"{_THREADS} threads born {words} the attach", _THREADS * _FEW)
        tell(f"tell 0 launch {_FEW}")
        books["its fork"].did(_FEW)
        check("a fork born before the attach", _FEW)
        if not tell(f"fork {_FEW}")["ended"]:
            notes.append("A fork of the program while it used CUDA hung in its launches and was killed.")
        check("a fork born after, whose launches the driver refuses", 0)
        born = tell("spawn")
        books["its child"] = _Book(fleet.attached(program, born["pid"]))
        books["its child"].begin()
        tell(f"tell {born['index']} launch {_FEW}")
        books["its child"].did(_FEW)
        check("a spawned child born after the attach", _FEW)
        tell(f"launch {_FEW}")
        books["it"].did(_FEW)
        check("a loop again: the program is unharmed", _FEW)
    return checks, notes


def _simulated(bench: Bench) -> list[_Check]:
    """Launches and graphs of the simulated program, by its own account."""
    with Fleet(bench) as fleet:
        (one,) = fleet.attach(Spin("app", 100))
        book = _Book(one)
        book.begin()
        before = one.count()["lanes"][0]
        one.go()
        time.sleep(0.5)
        one.pause()
        one.program.ask("graph 1000")
        lane = one.count()["lanes"][0]
        graphs = lane["graphs"] - before["graphs"]
        book.did(lane["launched"] - before["launched"] - graphs, graphs)
        return [_Check("launches and graphs", lane["launched"], {"it": book.off()})]


def _figure(name: str, checks: list[_Check]) -> Figure:
    wrong = [check for check in checks if any(check.off.values())]
    return Figure(
        f"nr_submitted_kernels and nr_graph_launches, {name}",
        "exact, each process its own",
        "exact in every case"
        if not wrong
        else f"off in {len(wrong)}: " + "; ".join(f"{check.what}: {check.cells()[2]}" for check in wrong),
        f"{sum(check.launches for check in checks)} launches in {len(checks)} cases",
        verdict(not wrong),
    )


def measure(bench: Bench) -> Result:
    """Exactness, through the driver's interface and through PyTorch."""
    if bench.sim:
        found = {"simulated": (_simulated(bench), list[str]())}
    else:
        bench.need_torch()
        found = {"empty kernels": _exact(bench, torch=False), "PyTorch": _exact(bench, torch=True)}
    result = Result()
    rows = []
    for name, (checks, notes) in found.items():
        result.figures.append(_figure(name, checks))
        result.notes += [f"{name}: {note}" for note in notes]
        rows += [[name, *check.cells()] for check in checks]
        result.raw[name] = [check.__dict__ for check in checks]
    header = ["program", "what was launched", "launches", "counters of it, its fork and its child"]
    result.tables.append(Table("What was done, and by how much the counters are off", header, rows))
    return result


def _rates(launcher: Program, model: Program) -> tuple[list[float], float]:
    """Microseconds a launch in batches, and steps a second of the model."""
    times: list[float] = launcher.ask(f"launch {_TIMED}", 30)["us"]
    model.ask("go")
    time.sleep(0.3)
    before = model.ask("count")
    time.sleep(_MODEL_S)
    after = model.ask("count")
    model.ask("pause")
    time.sleep(0.1)
    return times, (after["steps"] - before["steps"]) / ((after["ns"] - before["ns"]) / 1e9)


def cost(bench: Bench) -> Result:
    """Without a service, with one that counts, and without again."""
    if bench.sim:
        raise Skip("launches on the simulated GPU cost what sockets cost")
    found: dict[str, tuple[list[float], float]] = {}
    with Fleet(bench) as fleet:
        launcher, model = fleet.start("launches"), fleet.start_torch("loop", "train")
        for program in (launcher, model):
            program.wait_ready()
        _rates(launcher, model)
        found["without"] = _rates(launcher, model)
        with bench.serving():
            fleet.await_proof()
            for one in fleet.adopt(launcher, model):
                _Book(one).begin()
            found["counted"] = _rates(launcher, model)
        found["without again"] = _rates(launcher, model)
    return _cost(found)


def _cost(found: dict[str, tuple[list[float], float]]) -> Result:
    spreads = {name: numbers.spread(times) for name, (times, _) in found.items()}
    rates = {name: rate for name, (_, rate) in found.items()}
    bare = (spreads["without"].p50 + spreads["without again"].p50) / 2
    added = spreads["counted"].p50 - bare
    # Where a launch of this program takes longer than that, the share would flatter.
    percent = added / min(bare, _LAUNCH_US) * 100
    solo = (rates["without"] + rates["without again"]) / 2
    slower = -numbers.changed(rates["counted"], solo)
    noise = abs(numbers.changed(rates["without again"], rates["without"]))
    figures = [
        Figure(
            "counting: what a launch of 5 us takes longer",
            f"at most {_SLOWER_PERCENT:.0f}%",
            f"{added:+.2f} us, {percent:+.1f}% of {min(bare, _LAUNCH_US):.2f} us "
            f"({spreads['counted'].p50:.2f} us counted, {bare:.2f} not)",
            f"{_TIMED} launches each, medians of batches of 1000",
            verdict(percent <= _SLOWER_PERCENT),
        ),
        Figure(
            "counting: a real model (training a transformer)",
            f"unmeasurable: within {_MODEL_PERCENT:.0f}%, or within what two runs without differ by",
            f"{slower:+.2f}% slower; the two runs without differ by {noise:.2f}%",
            f"{_MODEL_S:.1f} s each, {rates['counted']:.1f} steps/s",
            verdict(slower <= max(_MODEL_PERCENT, noise)),
        ),
    ]
    rows = [[name, *(f"{value:.2f}" for value in spreads[name][1:]), f"{rates[name]:.2f}"] for name in found]
    header = ["service", "launch p50 us", "p90 us", "p99 us", "max us", "model steps/s"]
    raw = {name: {"us": times, "steps_per_s": rate} for name, (times, rate) in found.items()}
    return Result(figures, [Table("Microseconds a launch, of each batch of 1000", header, rows)], raw=raw)
