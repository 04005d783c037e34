"""The kernel's log: what attaching and controlling write into it."""

import time
from collections import Counter

from gcg.bench import Bench
from gcg.figure import Figure, Result, Table, verdict
from gcg.fleet import Fleet, Spin
from gcg.kernel_log import KernelLog, of_xid

_PROGRAMS = 4
_STEADY_S, _STEADY_LONG_S = 20.0, 60.0
# "A few lines each once at most."
_FEW = 4
_FREEZES = 20


def measure(bench: Bench) -> Result:
    """Starts of programs without a service, of the service, steady state, one program
    more, and writes."""
    lines: dict[str, list[str]] = {}
    steady_s = _STEADY_LONG_S if bench.long else _STEADY_S
    with KernelLog() as log, Fleet(bench) as fleet:

        def mark(name: str) -> None:
            # What is to come comes within this.
            time.sleep(0.3)
            lines[name] = log.lines()

        running = [Spin(f"running-{i}", 2000) for i in range(_PROGRAMS)]
        # The simulated GPU is the service's; its programs come after it.
        programs = [] if bench.sim else fleet.launch(*running)
        mark("starts of the programs, no service")
        with bench.serving():
            fleet.await_proof()
            attached = fleet.adopt(*(programs or fleet.launch(*running)))
            for one in attached:
                one.go()
            mark(f"a service start with {_PROGRAMS} running programs, up to all attached")
            until = time.monotonic() + steady_s
            while time.monotonic() < until:
                for one in attached:
                    one.stat()
                time.sleep(0.5)
            mark(f"{steady_s:.0f} s of steady state with somebody who reads")
            attached += fleet.attach(Spin("late", 2000))
            mark("one program more")
            for one in attached:
                for _ in range(_FREEZES):
                    one.write("compute.freeze", 1)
                    one.write("compute.freeze", 0)
                one.write("compute.priority", 12)
                one.write("compute.priority", 8)
            mark("freezes, thaws and priorities of all")
        mark("the service's end")
    return _result(lines)


def _result(lines: dict[str, list[str]]) -> Result:
    by_name = list(lines.values())
    xids = of_xid([line for found in by_name for line in found])
    start, steady, late = by_name[1:4]
    names = list(lines)
    figures = [
        Figure(
            f"kernel log: {names[2]}",
            "no line",
            f"{len(steady)} lines",
            f"{_PROGRAMS} programs",
            verdict(not steady),
        ),
        Figure(
            f"kernel log: {names[1]}",
            f"a few lines a program: at most {_FEW}",
            f"{len(start)} lines",
            f"{_PROGRAMS} programs",
            verdict(len(start) <= _FEW * _PROGRAMS),
        ),
        Figure(
            "kernel log: one program more is attached to",
            f"at most {_FEW} lines",
            f"{len(late)} lines",
            "1 program",
            verdict(len(late) <= _FEW),
        ),
        Figure(
            "kernel log: Xid",
            "none",
            f"{len(xids)}" + (f", the first: {xids[0]}" if xids else ""),
            f"{sum(map(len, by_name))} lines in all",
            verdict(not xids),
        ),
    ]
    rows = []
    for name, found in lines.items():
        said = Counter(line[:100] for line in found).most_common(3)
        rows.append([name, str(len(found)), "; ".join(f"{count} x {text}" for text, count in said)])
    table = Table("Lines of the kernel log", ["when", "lines", "most frequent"], rows)
    return Result(figures, [table], raw=dict(lines))
