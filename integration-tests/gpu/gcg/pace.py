"""How writes are made and paced where their time is measured."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from gcg import files

# Running stretches, microseconds, never in step with the launches. In a short one,
# waited out awake, no processor falls asleep (Linux keeps an idle one awake for 200 us
# in a virtual machine); in a long one, slept through, those of the service do, and in a
# virtual machine waking each of them can take longer than the stop itself.
_AWAKE_US = (50, 150)
_RESTED_US = (500, 2500)


class Kept:
    """A control file, opened once."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, value: bytes) -> int:
        """One write(2); nanoseconds."""
        began = time.monotonic_ns()
        os.write(self._descriptor, value)
        return time.monotonic_ns() - began

    def close(self) -> None:
        """Closes it."""
        os.close(self._descriptor)


class Opened:
    """A control file, opened and closed around each write."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, value: bytes) -> int:
        """open(2), write(2), close(2); nanoseconds."""
        return files.write(self._path, value.decode())

    def close(self) -> None:
        """Nothing is open."""


def stay_awake(rng: random.Random) -> None:
    """A short stretch, waited out awake."""
    until = time.monotonic_ns() + rng.uniform(*_AWAKE_US) * 1e3
    while time.monotonic_ns() < until:
        pass


def rest(rng: random.Random) -> None:
    """A long stretch, slept through."""
    time.sleep(rng.uniform(*_RESTED_US) / 1e6)


def read_times(path: Path, rounds: int, pause: Callable[[random.Random], None]) -> list[float]:
    """Reads of a control file that is kept open; microseconds."""
    rng = random.Random(6)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    times = []
    try:
        for _ in range(rounds):
            pause(rng)
            began = time.monotonic_ns()
            os.pread(descriptor, 64, 0)
            times.append((time.monotonic_ns() - began) / 1e3)
    finally:
        os.close(descriptor)
    return times
