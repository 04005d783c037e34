"""Attached processes: programs under test and their directories in the service's tree."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from gcg import files
from gcg.bench import Bench
from gcg.figure import Skip
from gcg.program import Program, SimProgram, end_all
from gcg.service import Service, Workload

# For channel control to prove itself on processes of the service's own.
_PROOF_S = 40.0
# From a program that is ready to a directory with everything in it.
_ENTRY_S = 5.0


@dataclass(frozen=True)
class Attached(Workload):
    """A program of somebody else, and its directory."""

    program: Program

    def count(self) -> dict[str, Any]:
        """What its lanes have done by their own account."""
        return self.program.ask("count")

    def progress(self) -> int:
        """How far its first lane is: chunks of a kernel, on the simulated GPU kernels."""
        return int(self.count()["lanes"][0]["progress"])

    def go(self) -> None:
        """Lets it launch."""
        self.program.ask("go")

    def pause(self) -> None:
        """Lets it launch no more; what it launched runs on."""
        self.program.ask("pause")

    def has_entry(self) -> bool:
        """Whether its directory is there and channel control acts on it."""
        try:
            lines = files.words(self.read("gcgroup.enforcers"))
        except OSError:
            return False
        return lines.get("compute.freeze") == "channel" and "channel_groups" in self.stat()


@dataclass(frozen=True)
class Spin:
    """What a spin.py shall be."""

    name: str
    # Length of its kernels alone, microseconds.
    kernel_us: float
    # Whether it lives in a PyTorch process; skipped where there is none.
    torch: bool = False
    per_sm: int = 1
    depth: int = 1
    memory: int = 0
    gpu: int = 0

    def arguments(self) -> list[object]:
        """Its command line."""
        found: list[object] = ["--gpu", self.gpu, "--per-sm", self.per_sm, "--depth", self.depth]
        found += ["--memory", self.memory] if self.memory else []
        return [*found, "--torch"] if self.torch else found

    def sim_arguments(self) -> list[object]:
        """Those of the simulated one, whose kernels' length is fixed."""
        memory = ["--memory", self.memory] if self.memory else []
        return ["--gpu", self.gpu, "--kernel-us", round(self.kernel_us), *memory]


@dataclass
class Fleet:
    """Programs beside a service; all are ended with its context."""

    bench: Bench
    _programs: list[Program] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bench.forced += end_all(self._programs)
        self._programs.clear()

    @property
    def service(self) -> Service:
        """The service of the moment."""
        return self.bench.service

    def retire(self, ended: Sequence[Attached | Program]) -> None:
        """Ends some of them."""
        programs = [one.program if isinstance(one, Attached) else one for one in ended]
        self.bench.forced += end_all(programs)
        self._programs = [program for program in self._programs if program not in programs]

    def start(self, script: str, *arguments: object, environment: dict[str, str] | None = None) -> Program:
        """Starts one of programs/, which is not waited for."""
        bench = self.bench
        if bench.sim:
            raise Skip(f"{script}.py needs a real GPU")
        program = Program.start(bench.python, script, arguments, bench.programs_log, environment)
        self._programs.append(program)
        return program

    def start_torch(self, script: str, *arguments: object, **options: Any) -> Program:
        """The same for one that needs PyTorch."""
        self.bench.need_torch()
        return self.start(script, *arguments, **options)

    def launch(self, *spins: Spin) -> list[Program]:
        """Starts them all, and gives each its kernels while no other runs; they wait for
        `go`. They need no service."""
        if self.bench.sim:
            return [self._simulated(spin) for spin in spins]
        start = [self.start_torch if spin.torch else self.start for spin in spins]
        programs = [begin("spin", *spin.arguments()) for begin, spin in zip(start, spins, strict=True)]
        for program, spin in zip(programs, spins, strict=True):
            program.wait_ready()
            program.name = spin.name
        for program, spin in zip(programs, spins, strict=True):
            program.ask(f"prepare {spin.kernel_us}")
        return programs

    def _simulated(self, spin: Spin) -> Program:
        bench = self.bench
        program = SimProgram.launch(
            bench.gcgroupd, self.service.state, spin.sim_arguments(), bench.programs_log
        )
        self._programs.append(program)
        program.wait_ready()
        program.name = spin.name
        program.ask("pause")
        return program

    def attach(self, *spins: Spin) -> list[Attached]:
        """Starts them and waits until the service has attached to each."""
        self.await_proof()
        return self.adopt(*self.launch(*spins))

    def adopt(self, *programs: Program) -> list[Attached]:
        """Waits until the service has attached to programs that run."""
        attached = [self.attached(program) for program in programs]
        until = time.monotonic() + _ENTRY_S
        for one in attached:
            while not one.has_entry():
                if time.monotonic() > until:
                    raise TimeoutError(f"{one.name} {one.pid} is not attached to: {self._why_not(one)}")
                time.sleep(0.01)
        return attached

    def attached(self, program: Program, pid: int | None = None) -> Attached:
        """A program, or a process of it, with the directory that it has or will have."""
        pid = program.pid if pid is None else pid
        path = self.service.root / "processes" / str(pid) / str(self.service.gpu)
        return Attached(pid, program.name, path, program)

    def _why_not(self, one: Attached) -> str:
        if one.program.has_ended():
            return "it has ended"
        if not one.path.exists():
            return "it has no directory"
        return one.read("gcgroup.enforcers").replace("\n", "; ") + "; " + one.read("gcgroup.stat")

    def await_proof(self) -> None:
        """Waits until processes of others may be touched, or skips the part."""
        until = time.monotonic() + _PROOF_S
        while (by := self.service.enforcer("attached/compute.freeze")) != "channel":
            if time.monotonic() > until:
                raise Skip(f"processes of others cannot be controlled here: {by}")
            time.sleep(0.1)


def stands(workload: Attached, seconds: float = 0.005) -> bool:
    """Whether its kernels make no progress in this time."""
    before = workload.progress()
    time.sleep(seconds)
    return workload.progress() == before


def await_progress(workload: Attached, beyond: int, seconds: float) -> int | None:
    """When it was seen to be further than that, on CLOCK_MONOTONIC, ns; `None` if it
    was not in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        now = workload.count()
        if now["lanes"][0]["progress"] > beyond:
            return int(now["ns"])
        time.sleep(0.001)
    return None
