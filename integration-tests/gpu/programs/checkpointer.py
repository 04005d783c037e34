"""Somebody who checkpoints another process with the driver's own calls."""

import ctypes
import time
from typing import Any

import driver
import talk

# What each call takes beside the pid: 64 bytes, all zero.
_ARGUMENTS = 64
_STEPS = {
    "lock": "cuCheckpointProcessLock",
    "checkpoint": "cuCheckpointProcessCheckpoint",
    "restore": "cuCheckpointProcessRestore",
    "unlock": "cuCheckpointProcessUnlock",
}


def _step(name: str, words: list[str]) -> dict[str, Any]:
    began = time.monotonic_ns()
    driver.call(name, int(words[0]), ctypes.create_string_buffer(_ARGUMENTS))
    return {"began_ns": began, "ended_ns": time.monotonic_ns()}


def main() -> None:
    """Waits for commands: a step and a pid."""
    driver.init()
    talk.ready()

    def handler(name: str) -> talk.Handler:
        return lambda words: _step(name, words)

    talk.answer({step: handler(name) for step, name in _STEPS.items()})


if __name__ == "__main__":
    main()
