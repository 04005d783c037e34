"""Programs under test: started, spoken to by lines, ended by their pids.

They know nothing of the service. On a real GPU they are those in programs/ beside this
package; on the simulated one `gcgroupd sim-app` stands in for `spin.py`.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gcg import process

DIRECTORY = Path(__file__).resolve().parent.parent / "programs"
# PyTorch from a cold disk, and eight of them at once.
_READY_S = 60.0
_ANSWER_S = 20.0
_END_S = 2.0
_SIM_COUNT = re.compile(r"launched (\d+) graphs (\d+) ended (\d+)")
_SIM_BEGUN = re.compile(r"process \d+ runs kernels")


class Failed(Exception):
    """What a program said about a command that failed."""


def has_torch(python: Path) -> bool:
    """Whether programs of this interpreter can use PyTorch."""
    question = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    done = subprocess.run([str(python), "-c", question], capture_output=True, timeout=60)
    return done.returncode == 0


@dataclass
class Program:
    """A program that answers each line with one line."""

    name: str
    _child: subprocess.Popen[bytes]
    _buffer: bytes = b""
    _lines: list[str] = field(default_factory=list)
    # What it said when it was ready.
    facts: dict[str, Any] = field(default_factory=dict)
    # When it was started, on CLOCK_MONOTONIC, ns.
    started_ns: int = field(default_factory=time.monotonic_ns)

    @classmethod
    def start(
        cls,
        python: Path,
        script: str,
        arguments: Sequence[object],
        log: IO[bytes],
        environment: dict[str, str] | None = None,
    ) -> "Program":
        """Starts one of programs/; it is not waited for."""
        command = [str(python), str(DIRECTORY / f"{script}.py"), *map(str, arguments)]
        variables = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            **(environment or {}),
        }
        return cls(script, _spawn(command, variables, log))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def wait_ready(self) -> None:
        """Waits until it takes commands."""
        self.facts = json.loads(self._line(_READY_S))["ready"]

    def send(self, command: str) -> None:
        """Sends a command, whose answer is to be waited for later."""
        if self._child.stdin is None:
            raise RuntimeError(f"{self.name} has no standard input")
        self._child.stdin.write(command.encode() + b"\n")
        self._child.stdin.flush()

    def wait(self, seconds: float = _ANSWER_S) -> dict[str, Any]:
        """The answer of the oldest command without one."""
        answer = json.loads(self._line(seconds))
        if "error" in answer:
            raise Failed(f"{self.name} {self.pid}: {answer['error']}")
        found: dict[str, Any] = answer["ok"]
        return found

    def answered(self) -> bool:
        """Whether an answer is there."""
        return bool(self._lines) or process.wait_readable(self._descriptor(), 0)

    def ask(self, command: str, seconds: float = _ANSWER_S) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        self.send(command)
        return self.wait(seconds)

    def _descriptor(self) -> int:
        if self._child.stdout is None:
            raise RuntimeError(f"{self.name} has no standard output")
        return self._child.stdout.fileno()

    def _line(self, seconds: float) -> str:
        until = time.monotonic() + seconds
        while not self._lines:
            left = until - time.monotonic()
            if left <= 0 or not process.wait_readable(self._descriptor(), left):
                raise TimeoutError(f"{self.name} {self.pid} said nothing for {seconds:.0f} s")
            data = os.read(self._descriptor(), 1 << 20)
            if not data:
                raise RuntimeError(f"{self.name} {self.pid} ended; see programs.log")
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            self._lines += [line.decode() for line in lines]
        return self._lines.pop(0)

    def has_ended(self) -> bool:
        """Whether it has; it is then no zombie any more."""
        return self._child.poll() is not None

    def kill(self) -> None:
        """SIGKILL; it is not waited for."""
        self._child.kill()

    def terminate(self) -> None:
        """SIGTERM; it is not waited for."""
        self._child.terminate()

    def wait_ended(self, seconds: float) -> bool:
        """Whether it ended in time."""
        try:
            self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ask_to_end(self) -> None:
        """Its input ends, which ends it; it is not waited for."""
        try:
            if self._child.stdin is not None:
                self._child.stdin.close()
        except OSError:
            # It has ended already.
            pass

    def end(self) -> str | None:
        """Ends it; what had to be forced, in words."""
        self.ask_to_end()
        forced = None
        if not self.wait_ended(_END_S):
            forced = f"{self.name} {self.pid} had to be killed"
            self.kill()
            if not self.wait_ended(_END_S):
                forced = f"{self.name} {self.pid} is still there after SIGKILL"
        if self._child.stdout is not None:
            self._child.stdout.close()
        return forced


@dataclass
class SimProgram(Program):
    """`gcgroupd sim-app`, with the answers of spin.py as far as they go together."""

    @classmethod
    def launch(cls, binary: Path, state: Path, arguments: Sequence[object], log: IO[bytes]) -> "SimProgram":
        """Starts it; it is not waited for."""
        command = [str(binary), "sim-app", "--state", str(state), *map(str, arguments)]
        return cls("sim-app", _spawn(command, dict(os.environ), log))

    def wait_ready(self) -> None:
        """Waits until it has a context, or listens where it has not been let go."""
        while not _SIM_BEGUN.search(self._line(_READY_S)):
            pass

    def wait(self, seconds: float = _ANSWER_S) -> dict[str, Any]:
        """The same shape as spin.py's answers."""
        line = self._line(seconds)
        if line.startswith("error"):
            raise Failed(f"sim-app {self.pid}: {line}")
        if not (found := _SIM_COUNT.match(line)):
            return {}
        launched, graphs, ended = map(int, found.groups())
        lane = {"progress": ended, "launched": launched, "graphs": graphs, "ended": ended, "error": ""}
        return {"ns": time.monotonic_ns(), "lanes": [lane], "deeds": {}}

    def ask_to_end(self) -> None:
        """The end of its input is not its end."""
        if self._child.stdin is not None and not self._child.stdin.closed:
            try:
                self.send("quit")
            except OSError:
                # It has ended already.
                pass
        super().ask_to_end()


def _spawn(command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    log.write(f"--- {' '.join(command)}\n".encode())
    log.flush()
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        process_group=0,
    )


def end_all(programs: Sequence[Program]) -> list[str]:
    """Ends all of them; what had to be forced, in words."""
    for program in programs:
        program.ask_to_end()
    forced = [text for program in programs if (text := program.end())]
    for text in forced:
        print(text, file=sys.stderr)
    return forced
