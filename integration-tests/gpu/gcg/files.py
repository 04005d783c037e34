"""Control files: one open, one write(2) or one read to the end, nothing buffered.

Python's own file objects may split, join or delay what is written to them; one
write is one command here, so everything goes through the system calls.
"""

import os
import time
from pathlib import Path

# Reads are of small files; a longer one takes several reads of one open file.
_CHUNK = 1 << 20


def read(path: Path) -> str:
    """The whole text of a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_all(descriptor)
    finally:
        os.close(descriptor)


def read_all(descriptor: int) -> str:
    """What is left to read from a descriptor."""
    parts = []
    while part := os.read(descriptor, _CHUNK):
        parts.append(part)
    return b"".join(parts).decode()


def write(path: Path, text: str) -> int:
    """Writes with exactly one write(2); nanoseconds that open, write and close took."""
    data = text.encode()
    began = time.monotonic_ns()
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        written = os.write(descriptor, data)
    finally:
        os.close(descriptor)
    took = time.monotonic_ns() - began
    if written != len(data):
        raise OSError(f"{path} took {written} of {len(data)} bytes")
    return took


def keyed(text: str) -> dict[str, int]:
    """Numbers of lines `key: value` (a stat file) or `key value` (the others)."""
    numbers = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        numbers[key.removesuffix(":")] = int(value)
    return numbers


def words(text: str) -> dict[str, str]:
    """The same lines with any text after the key."""
    pairs = (line.partition(" ") for line in text.splitlines())
    return {key.removesuffix(":"): value for key, _, value in pairs}
