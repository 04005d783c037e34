"""How a program under test is spoken to: lines on standard input, lines of JSON back.

The first line back is `{"ready": {...}}`. Each command, a line of words, has one line
for an answer: `{"ok": {...}}` or `{"error": "..."}`. The end of the input ends the
program, so nothing is left behind by whoever started it.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

Handler = Callable[[list[str]], dict[str, Any]]

# Libraries may print what they like: it goes to standard error.
_out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def say(message: dict[str, Any]) -> None:
    """One line."""
    _out.write(json.dumps(message, separators=(",", ":")) + "\n")
    _out.flush()


def redirect(reads: int, writes: int) -> None:
    """Speaks over these descriptors from now on, for a process that was forked."""
    global _out
    os.dup2(reads, 0)
    _out = os.fdopen(writes, "w", buffering=1)


def ready(**facts: Any) -> None:
    """The program can take commands."""
    say({"ready": {"pid": os.getpid(), **facts}})


def turning(goes: threading.Event) -> dict[str, Handler]:
    """The commands that let a program go on and make it pause."""

    def turn(act: Callable[[], None]) -> dict[str, Any]:
        act()
        return {}

    return {"go": lambda _: turn(goes.set), "pause": lambda _: turn(goes.clear)}


def answer(handlers: dict[str, Handler]) -> None:
    """Answers commands until the input ends; then the process ends."""
    for line in sys.stdin:
        verb, *words = line.split()
        if verb == "quit":
            say({"ok": {}})
            break
        try:
            if verb not in handlers:
                raise ValueError(f"{verb!r} is none of: {', '.join(handlers)}, quit")
            say({"ok": handlers[verb](words)})
        # Whatever went wrong is the answer.
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def listen(handlers: dict[str, Handler]) -> None:
    """The same on a thread of its own."""
    threading.Thread(target=answer, args=(handlers,), daemon=True).start()
