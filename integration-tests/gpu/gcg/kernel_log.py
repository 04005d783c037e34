"""The kernel's log: what it says from a moment on."""

import os
from typing import Self

from gcg.figure import Skip

_DEVICE = "/dev/kmsg"
# A record is at most 8 KiB.
_RECORD = 8192


class KernelLog:
    """Reads what is logged after it was opened."""

    def __init__(self) -> None:
        try:
            self._descriptor = os.open(_DEVICE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise Skip(f"the kernel log cannot be read: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def lines(self) -> list[str]:
        """What was logged since the last call."""
        found: list[str] = []
        while True:
            try:
                record = os.read(self._descriptor, _RECORD)
            except BlockingIOError:
                return found
            except BrokenPipeError:
                # Records were overwritten before they were read; the next ones follow.
                found.append("(records were lost)")
                continue
            # `priority,number,time,flags;text`, then lines of further facts.
            text = record.decode(errors="replace").partition(";")[2]
            found.append(text.splitlines()[0] if text else "")


class Watch:
    """The log throughout a run, where it can be read."""

    def __init__(self) -> None:
        self._log: KernelLog | None
        try:
            self._log, self._why = KernelLog(), ""
        except Skip as skip:
            self._log, self._why = None, str(skip)
        self._count, self._xids = 0, list[str]()

    def so_far(self) -> str:
        """What it says of faults, in words."""
        if self._log is None:
            return self._why
        lines = self._log.lines()
        self._count += len(lines)
        self._xids += of_xid(lines)
        found = "; ".join([f"{len(self._xids)} with Xid", *self._xids[:3]])
        return f"{self._count} lines since the beginning, {found}"


def of_xid(lines: list[str]) -> list[str]:
    """Those that tell of a fault on a GPU."""
    return [line for line in lines if "Xid" in line]
