"""workload.samples: a workload's launches, collected while they happen.

The file shows the newest 1024 launches, half a second of them at 0.5 ms each, and
the service brings it up to date every 50 ms while somebody reads. So it is read
again and again, and what overlaps is told apart by the launches' numbers.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gcg import files

HEADER = "seq,start_ns,device_us,wall_us,sm_count"
# Between two reads, seconds: a fifth of what the file holds of 0.5 ms launches.
_EVERY = 0.1


class Sample(NamedTuple):
    """One launch. `start_ns` is on CLOCK_MONOTONIC, `device_us` its time on the GPU
    (from the end of the launch before where they follow at once), `wall_us` from its
    submission until the host saw its end."""

    seq: int
    start_ns: int
    device_us: float
    wall_us: float
    sm_count: int

    @property
    def end_ns(self) -> float:
        """When it ended, unless something stopped it in between."""
        return self.start_ns + self.device_us * 1e3


def parse(text: str) -> list[Sample]:
    """The lines of the file, oldest first."""
    lines = text.splitlines()
    if not lines or lines[0] != HEADER:
        raise ValueError(f"workload.samples begins with {lines[:1]}, not with {HEADER!r}")
    rows = (line.split(",") for line in lines[1:])
    return [Sample(int(r[0]), int(r[1]), float(r[2]), float(r[3]), int(r[4])) for r in rows]


class Collector:
    """Collects the samples of some workloads by their directories."""

    def __init__(self, directories: Iterable[Path]) -> None:
        self._seen: dict[Path, dict[int, Sample]] = {path: {} for path in directories}

    def look(self) -> None:
        """Takes what is there now."""
        for path, seen in self._seen.items():
            for sample in parse(files.read(path / "workload.samples")):
                seen[sample.seq] = sample

    def run(self, seconds: float) -> tuple[int, int]:
        """Collects for so long; the begin and the end on CLOCK_MONOTONIC, ns."""
        begin = time.monotonic_ns()
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(_EVERY, left))
            self.look()
        return begin, time.monotonic_ns()

    def of(self, directory: Path) -> list[Sample]:
        """All that were seen of one workload, in the order of their numbers."""
        return [sample for _, sample in sorted(self._seen[directory].items())]


def within(samples: Iterable[Sample], begin_ns: int, end_ns: int) -> list[Sample]:
    """Those that began and ended within a time."""
    return [s for s in samples if s.start_ns >= begin_ns and s.end_ns <= end_ns]
