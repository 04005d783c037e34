"""A long stop: what the rest of the host feels of it, and what it does to the stopped."""

import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from gcg import host, numbers
from gcg.bench import Bench
from gcg.figure import Figure, Result, Skip, Table, verdict
from gcg.fleet import Attached, Fleet, Spin, stands
from gcg.nvml import Nvml
from gcg.program import Program

_DEEDS = ("context", "memory", "stream", "launch")
_WITHOUT_S, _STOP_S, _STOP_LONG_S = 4.0, 20.0, 60.0
# Others wait when the longest of theirs is this many times the longest without a stop,
# and this much more, milliseconds.
_TIMES, _MORE_MS = 2.0, 20.0
# A stop in which the stopped program does something, seconds; and its kernels.
_ACT_S, _ACT_KERNEL_US = 1.0, 300_000.0
_MEMORY = 1 << 30
# Until a program that was let go, or told to end, has done so, seconds.
_AFTER_S = 10.0
_KERNEL_US = 2e6


class _Smi:
    """nvidia-smi again and again, on a thread of its own."""

    def __init__(self) -> None:
        program = host.program("nvidia-smi")
        if program is None:
            raise Skip("there is no nvidia-smi")
        self._command = [str(program)]
        self._goes, self._ends = threading.Event(), False
        self._times: list[float] = []
        self._since: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._goes.wait()
            if self._ends:
                return
            self._since = time.monotonic_ns()
            subprocess.run(self._command, capture_output=True, timeout=120, check=True)
            self._times.append((time.monotonic_ns() - self._since) / 1e6)
            self._since = None

    def turn(self, goes: bool) -> None:
        """Lets it run, or no more."""
        (self._goes.set if goes else self._goes.clear)()

    def take(self) -> list[float]:
        """Milliseconds of those since the last call, and of the present one so far."""
        times, self._times = self._times, []
        since = self._since
        return times if since is None else [*times, (time.monotonic_ns() - since) / 1e6]

    def end(self) -> None:
        """Ends the thread after the run that it is in."""
        self._ends = True
        self._goes.set()
        self._thread.join(60)


@dataclass
class _Others:
    """Whoever uses the driver beside."""

    programs: dict[str, Program]
    smi: _Smi
    _began_ns: int = 0

    def begin(self) -> None:
        """All of them, from now on."""
        self._began_ns = time.monotonic_ns()
        for program in self.programs.values():
            program.ask("take")
            program.ask("go")
        self.smi.take()
        self.smi.turn(True)

    def end(self) -> dict[str, list[float]]:
        """No more; milliseconds of each that began since, unfinished ones so far."""
        found = {}
        for name, program in self.programs.items():
            answer = program.ask("take")
            if answer["error"]:
                raise RuntimeError(f"{name}: {answer['error']}")
            times = [us / 1e3 for began, us in answer["times"] if began >= self._began_ns]
            if answer["since_ns"] is not None:
                times.append((answer["ns"] - answer["since_ns"]) / 1e6)
            found[name] = times
            program.ask("pause")
        self.smi.turn(False)
        found["nvidia-smi"] = self.smi.take()
        return {name: times for name, times in found.items() if times}


@dataclass
class _Deed:
    """Something that the stopped program did, or that was done to it."""

    name: str
    measured: str = ""
    wrong: list[str] = field(default_factory=list)
    waits: dict[str, list[float]] = field(default_factory=dict)


def _waited(stopped: dict[str, list[float]], without: dict[str, list[float]]) -> list[str]:
    """Whose longest was too long."""
    found = []
    for name, times in stopped.items():
        longest, allowed = max(times), _TIMES * max(without.get(name, [0.0])) + _MORE_MS
        if longest > allowed:
            found.append(f"{name} {longest:.1f} ms, allowed {allowed:.1f}")
    return found


def measure(bench: Bench) -> Result:
    """Others without a stop, during one, and during stops in which the stopped acts."""
    if bench.sim:
        raise Skip("the simulated GPU has no other programs")
    stop_s = _STOP_LONG_S if bench.long else _STOP_S
    with Fleet(bench) as fleet:
        smi = _Smi()
        try:
            programs = {deed: fleet.start("churn", deed) for deed in _DEEDS}
            (hog,) = fleet.attach(Spin("hog", _KERNEL_US, torch=True))
            for program in programs.values():
                program.wait_ready()
            others = _Others(programs, smi)
            others.begin()
            time.sleep(_WITHOUT_S)
            without = others.end()
            hog.go()
            time.sleep(0.3)
            hog.write("compute.freeze", 1)
            others.begin()
            stood = hog.progress()
            time.sleep(stop_s)
            stopped = others.end()
            stood_still = hog.progress() == stood
            hog.write("compute.freeze", 0)
            runs = not stands(hog, 0.2)
            fleet.retire([hog])
            deeds = [_act(fleet, others, without, name) for name in ("free", "destroy", "SIGTERM")]
        finally:
            smi.end()
    return _result(without, stopped, stop_s, deeds, stood_still and runs)


def _act(fleet: Fleet, others: _Others, without: dict[str, list[float]], name: str) -> _Deed:
    """A program that is stopped in a kernel does one thing; then it is let go."""
    nvml = Nvml(fleet.bench.uuid)
    before = nvml.used()
    deed = _Deed(name)
    (one,) = fleet.attach(Spin(name, _ACT_KERNEL_US, memory=_MEMORY))
    one.go()
    time.sleep(0.2)
    # It launches no more, but is in the middle of a kernel.
    one.pause()
    one.write("compute.freeze", 1)
    others.begin()
    time.sleep(0.3)
    began = time.monotonic_ns()
    if name == "SIGTERM":
        one.program.terminate()
        _ends(one, deed, began)
        time.sleep(max(_ACT_S - (time.monotonic_ns() - began) / 1e9, 0))
    else:
        one.program.ask(name)
        time.sleep(_ACT_S)
        at_once = one.count()["deeds"][name]["ended_ns"] is not None
        thawed = time.monotonic_ns()
        one.write("compute.freeze", 0)
        _is_done(one, deed, name, thawed, at_once)
    deed.waits = others.end()
    deed.wrong += [f"others waited: {text}" for text in _waited(deed.waits, without)]
    fleet.retire([one])
    _memory_back(nvml, before, deed)
    return deed


def _ends(one: Attached, deed: _Deed, began: int) -> None:
    ended = one.program.wait_ended(_AFTER_S)
    took = (time.monotonic_ns() - began) / 1e6
    deed.measured = f"ended {took:.0f} ms after the signal, still stopped" if ended else "did not end"
    deed.wrong += [] if ended else [f"it had not ended {_AFTER_S:.0f} s after SIGTERM"]


def _is_done(one: Attached, deed: _Deed, name: str, thawed: int, at_once: bool) -> None:
    until = time.monotonic() + _AFTER_S
    while (done := one.count()["deeds"][name])["ended_ns"] is None and time.monotonic() < until:
        time.sleep(0.005)
    if done["ended_ns"] is None:
        deed.measured = "never done"
        deed.wrong.append(f"it was not done {_AFTER_S:.0f} s after the thaw")
        return
    if done["error"]:
        deed.wrong.append(done["error"])
    after = (done["ended_ns"] - thawed) / 1e6
    deed.measured = "done while stopped" if at_once else f"done {after:.0f} ms after the thaw"


def _memory_back(nvml: Nvml, before: int, deed: _Deed) -> None:
    until = time.monotonic() + 2
    while nvml.used() > before + _MEMORY // 2 and time.monotonic() < until:
        time.sleep(0.01)
    left = nvml.used() - before
    if left > _MEMORY // 2:
        deed.wrong.append(f"{left >> 20} MiB were left behind")


def _result(
    without: dict[str, list[float]],
    stopped: dict[str, list[float]],
    stop_s: float,
    deeds: list[_Deed],
    obeyed: bool,
) -> Result:
    waited = _waited(stopped, without)
    longest = ", ".join(
        f"{name} {max(times):.1f} (without {max(without.get(name, [0.0])):.1f})"
        for name, times in stopped.items()
    )
    figures = [
        Figure(
            f"a stop of {stop_s:.0f} s while others create and destroy contexts, allocate, run nvidia-smi",
            f"nobody waits: longest <= {_TIMES:.0f} x the longest without + {_MORE_MS:.0f} ms",
            f"longest, ms: {longest}"
            + ("" if obeyed else "; the stopped one did not stand, or did not run on"),
            ", ".join(f"{len(times)} {name}" for name, times in stopped.items()),
            verdict(not waited and obeyed and set(stopped) == set(without)),
        )
    ]
    words = {"free": "frees memory", "destroy": "destroys its context", "SIGTERM": "gets SIGTERM"}
    for deed in deeds:
        figures.append(
            Figure(
                f"the frozen program {words[deed.name]}",
                "ends as it would have, after the thaw or the signal; nobody else waits",
                deed.measured + "".join(f"; {text}" for text in deed.wrong),
                f"1 run; {sum(map(len, deed.waits.values()))} calls of others",
                verdict(not deed.wrong),
            )
        )
    rows: list[list[str]] = []
    series: dict[str, dict[str, list[float]]] = {"without a stop": without, "during the stop": stopped}
    series |= {f"stopped, {words[deed.name]}": deed.waits for deed in deeds}
    for when, found in series.items():
        for name, times in found.items():
            s = numbers.spread(times)
            rows.append([when, name, str(s.n), *(f"{v:.2f}" for v in s[1:])])
    raw: dict[str, Any] = {**series, "deeds": [deed.__dict__ for deed in deeds]}
    header = ["when", "what", "n", "p50 ms", "p90 ms", "p99 ms", "max ms"]
    return Result(figures, [Table("Calls of others", header, rows)], raw=raw)
