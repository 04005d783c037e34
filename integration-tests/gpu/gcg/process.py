"""Processes: who descends from whom, what they used, and their end by pid.

A process is named by its pid and its start time, so that a pid which was used
again is never taken for it.
"""

import os
import select
import signal
import time
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
# Fields of /proc/PID/stat behind the name, counted from the state (proc(5)).
_PPID, _UTIME, _STIME, _START = 1, 11, 12, 19


class Process(NamedTuple):
    """A process; `start` is in clock ticks since boot."""

    pid: int
    start: int


def _fields(pid: int) -> list[str] | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name stands in parentheses and may hold anything.
    return text[text.rindex(")") + 2 :].split()


def identify(pid: int) -> Process | None:
    """The process that has this pid now."""
    fields = _fields(pid)
    return None if fields is None or fields[0] == "Z" else Process(pid, int(fields[_START]))


def is_alive(process: Process) -> bool:
    """Whether it runs still; a zombie does not."""
    return identify(process.pid) == process


def descendants(pid: int) -> list[Process]:
    """Every living process below this one."""
    parents: dict[int, list[Process]] = {}
    for entry in _PROC.iterdir():
        fields = _fields(int(entry.name)) if entry.name.isdecimal() else None
        if fields is not None and fields[0] != "Z":
            process = Process(int(entry.name), int(fields[_START]))
            parents.setdefault(int(fields[_PPID]), []).append(process)
    found: list[Process] = []
    waiting = [pid]
    while waiting:
        below = parents.get(waiting.pop(), [])
        found += below
        waiting += [process.pid for process in below]
    return found


def arguments(pid: int) -> list[str]:
    """Its command line, empty where it has ended."""
    try:
        text = (_PROC / str(pid) / "cmdline").read_text(errors="replace")
    except OSError:
        return []
    return text.split("\0")


def cpu_seconds(pid: int) -> float:
    """CPU time of all its threads, user and system, in seconds (ticks of 10 ms)."""
    fields = _fields(pid)
    if fields is None:
        raise ProcessLookupError(f"process {pid} has ended")
    return (int(fields[_UTIME]) + int(fields[_STIME])) / os.sysconf("SC_CLK_TCK")


def resident_kib(pid: int) -> int:
    """VmRSS in KiB."""
    for line in (_PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise ProcessLookupError(f"process {pid} has no memory")


def send(process: Process, number: signal.Signals) -> None:
    """Signals it, unless it has ended; never another that has its pid."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if is_alive(process):
            signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def wait_gone(processes: list[Process], seconds: float) -> list[Process]:
    """Waits until they have ended; those that have not by then."""
    until = time.monotonic() + seconds
    left = [process for process in processes if is_alive(process)]
    while left and time.monotonic() < until:
        time.sleep(0.02)
        left = [process for process in left if is_alive(process)]
    return left


def end(processes: list[Process], patience_s: float) -> list[Process]:
    """Waits for them to end by themselves, then kills; those that had to be killed."""
    left = wait_gone(processes, patience_s)
    for process in left:
        send(process, signal.SIGKILL)
    wait_gone(left, 5.0)
    return left


def wait_readable(descriptor: int, seconds: float) -> bool:
    """Whether a descriptor became readable in time."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(max(seconds, 0) * 1000))
