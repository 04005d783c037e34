"""What parts measure with: the service or workers of the moment, and phases.

A phase runs some of the workloads while the others are frozen, and collects the
launches in it. Two things that are compared take turns in phases of one run, so
that a GPU that changes its clocks meanwhile changes both.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from gcg import numbers, program
from gcg.figure import Skip
from gcg.samples import Collector, Sample, within
from gcg.service import Refused, Service, Workload
from gcg.worker import Rig

# What a phase leaves out at its beginning, seconds: the thaw, and clocks that rise.
WARM_S = 0.1
# Threads of a block and chains of a thread in every fma_fp32 here: one block keeps
# an SM's FMA pipe busy, two blocks fill its 2048 places for threads.
FMA: dict[str, object] = {"kernel": "fma_fp32", "threads": 1024, "ilp": 4}
_EOPNOTSUPP = 95


@dataclass(frozen=True)
class Sizes:
    """SMs of the partitions: those of an H200 where they fit, else in proportion."""

    capacity: int
    granularity: int

    def of(self, h200: int) -> int:
        """What stands for so many of an H200's 132 SMs here."""
        share = h200 if self.capacity >= 132 else h200 * self.capacity // 132
        return max(share // self.granularity, 1) * self.granularity


@dataclass
class Phase:
    """What ran in a phase: each workload's launches within it, by name."""

    begin_ns: int
    end_ns: int
    samples: dict[str, list[Sample]]

    def device_us(self, name: str) -> list[float]:
        """Times of one workload's launches on the GPU, microseconds."""
        return [sample.device_us for sample in self.samples[name]]

    def launches_per_s(self, name: str) -> float:
        """Launches that ended in a second."""
        samples = self.samples[name]
        return (len(samples) - 1) / ((samples[-1].end_ns - samples[0].end_ns) / 1e9)

    def busy(self, name: str) -> float:
        """Share of the time between its first and its last launch that the workload
        had one on the GPU."""
        samples = self.samples[name]
        span_us = (samples[-1].end_ns - samples[0].start_ns) / 1e3
        return min(sum(sample.device_us for sample in samples) / span_us, 1.0)

    def raw(self) -> dict[str, object]:
        """For the JSON: starts in microseconds of the phase, and times."""
        return {
            name: [[round((s.start_ns - self.begin_ns) / 1e3, 1), s.device_us, s.wall_us] for s in samples]
            for name, samples in self.samples.items()
        }


@dataclass
class Bench:
    """What a part gets."""

    # Where the binaries are.
    directory: Path
    sim: bool
    # The GPU's UUID, `None` for the simulated one.
    uuid: str | None
    # What the services say.
    log: IO[bytes]
    # What the programs under test say.
    programs_log: IO[bytes]
    # The interpreter of programs under test.
    python: Path
    # Whether parts take the time that was asked for, where the default is shorter.
    long: bool = False
    # What had to be forced, in words.
    forced: list[str] = field(default_factory=list)
    _service: Service | None = field(default=None)
    _unit_us: float | None = field(default=None)

    @property
    def gcgroupd(self) -> Path:
        """The service's binary."""
        return self.directory / "gcgroupd"

    @property
    def service(self) -> Service:
        """The service of this part."""
        if self._service is None:
            raise RuntimeError("this part asked for no service")
        return self._service

    def serve(self, service: Service | None) -> None:
        """Puts another service in place."""
        self._service = service

    @contextmanager
    def serving(self, *, killed: bool = False, **options: Any) -> Iterator[Service]:
        """A service of a part's own, for parts that run without one. Where it is to be
        `killed`, what it leaves behind is not held against it."""
        if self._service is not None:
            raise RuntimeError("two services on one GPU")
        service = Service(self.gcgroupd, self.sim, "temporal", self.log, attach=True, **options)
        service.__enter__()
        self._service = service
        try:
            yield service
        finally:
            self._service = None
            forced = service.stop()
            self.forced += [] if killed else forced

    def kill_service(self) -> None:
        """Kills the service of the moment, which ends every call that hangs in it."""
        if self._service is not None:
            self._service.kill()

    @cached_property
    def _has_torch(self) -> bool:
        return program.has_torch(self.python)

    def need_torch(self) -> None:
        """Skips the part where there is no PyTorch."""
        if not self._has_torch:
            raise Skip(f"{self.python} has no PyTorch")

    def rig(self) -> Rig:
        """For workers without the service, which must not run at the same time."""
        if self._service is not None:
            raise RuntimeError("workers by hand beside a service would share its GPU")
        return Rig(self.gcgroupd, self.uuid)

    def sizes(self) -> Sizes:
        """SMs of this GPU."""
        device = self.service.device
        return Sizes(int(device("sm.capacity")), int(device("sm.granularity")))

    def iterations(self, launch_us: float) -> int:
        """Iterations of fma_fp32 in a launch of so many microseconds, with one block
        of 1024 threads on each SM. The service calibrates it once."""
        if self._unit_us is None:
            workload = self.launch(**FMA, blocks="per-sm:1")
            phase = self.phase([workload], [workload], 0.3)
            self._unit_us = numbers.median(phase.device_us(workload.name)) / workload.spec()["iterations"]
            self.service.clear()
        return max(round(launch_us / self._unit_us), 1)

    def launch(self, **spec: object) -> Workload:
        """Launches, or skips the part where this GPU cannot."""
        try:
            return self.service.launch(**spec)
        except Refused as error:
            if error.errno == _EOPNOTSUPP:
                raise Skip(str(error)) from error
            raise

    def launch_frozen(self, **spec: object) -> Workload:
        """Launches and freezes at once: the next launch calibrates undisturbed."""
        workload = self.launch(**spec)
        workload.write("compute.freeze", 1)
        return workload

    def run_only(self, running: Sequence[Workload], everyone: Sequence[Workload]) -> None:
        """Freezes the others, then thaws these together."""
        self.service.freeze(w for w in everyone if w not in running)
        self.service.thaw(running)

    def phase(self, running: Sequence[Workload], everyone: Sequence[Workload], seconds: float) -> Phase:
        """Runs these, and only these, for so long beyond a warm-up."""
        self.run_only(running, everyone)
        collector = Collector(w.path for w in running)
        begin, end = collector.run(seconds + WARM_S)
        begin += int(WARM_S * 1e9)
        samples = {w.name: within(collector.of(w.path), begin, end) for w in running}
        for name, found in samples.items():
            if len(found) < 3:
                raise RuntimeError(f"{name} had {len(found)} launches in {seconds} s: too few to measure")
        return Phase(begin, end, samples)

    def counted(self, workloads: Sequence[Workload], seconds: float) -> tuple[float, list[dict[str, int]]]:
        """Runs frozen workloads for so long and freezes them again: the seconds it
        was, and by how much each one's counters grew, exactly."""
        before = [workload.stat() for workload in workloads]
        began = time.monotonic_ns()
        self.service.thaw(workloads)
        time.sleep(seconds)
        self.service.freeze(workloads)
        took = (time.monotonic_ns() - began) / 1e9
        grown = []
        for workload, first in zip(workloads, before, strict=True):
            last = workload.stat()
            grown.append({key: last[key] - first[key] for key in first if key in last})
        return took, grown
