"""A program that does one thing with the driver again and again, and times each.

`context` creates one and destroys it, `memory` takes 256 MiB and gives them back,
`stream` likewise, `launch` runs the empty kernel and waits for it.
"""

import argparse
import threading
import time
from collections.abc import Callable
from typing import Any

import driver
import talk

_BYTES = 256 << 20
# Between two, seconds: nobody does it without a pause.
_PAUSE_S = 0.005


class Program:
    """One thread that does it, while it is told to."""

    def __init__(self, deed: str) -> None:
        driver.init()
        self._device = driver.device(0)
        self._context = driver.primary(self._device)
        self._stream = driver.stream()
        self._launch = driver.Launch(driver.function(b"empty"), 1, 1)
        self._act: Callable[[], None] = getattr(self, f"_{deed}")
        self._goes = threading.Event()
        self._times: list[tuple[int, float]] = []
        self._since: int | None = None
        self._error = ""
        threading.Thread(target=self._run, daemon=True).start()

    def _context_once(self) -> None:
        driver.call("cuCtxDestroy_v2", driver.create_context(self._device))
        driver.call("cuCtxSetCurrent", self._context)

    def _memory_once(self) -> None:
        driver.call("cuMemFree_v2", driver.allocate(_BYTES))

    def _stream_once(self) -> None:
        driver.call("cuStreamDestroy_v2", driver.stream())

    def _launch_once(self) -> None:
        self._launch.on(self._stream)
        driver.call("cuStreamSynchronize", self._stream)

    def _run(self) -> None:
        driver.call("cuCtxSetCurrent", self._context)
        while self._goes.wait():
            self._since = time.monotonic_ns()
            try:
                self._act()
            except driver.CudaError as error:
                self._error = str(error)
                return
            self._times.append((self._since, (time.monotonic_ns() - self._since) / 1e3))
            self._since = None
            time.sleep(_PAUSE_S)

    def _take(self, _: list[str]) -> dict[str, Any]:
        """When each began and its microseconds, and since when the present one runs."""
        times, self._times = self._times, []
        return {"times": times, "since_ns": self._since, "ns": time.monotonic_ns(), "error": self._error}

    def handlers(self) -> dict[str, talk.Handler]:
        """What it understands."""
        return {
            **talk.turning(self._goes),
            "take": self._take,
        }


def main() -> None:
    """Waits for commands; nothing is done before `go`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deed", choices=("context", "memory", "stream", "launch"))
    program = Program(parser.parse_args().deed + "_once")
    talk.ready()
    talk.answer(program.handlers())


if __name__ == "__main__":
    main()
