"""Workers driven by hand: `gcgroupd worker` with its control socket as standard input.

The protocol is one JSON object a line (kernels/src/protocol.rs). This reaches what
no control file does: the stream priority itself, and the comparison of a kernel's
results with the CPU reference.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gcg import process
from gcg.figure import Skip
from gcg.mps import Mps
from gcg.samples import Sample

# For any answer but that of a verification, which computes on the CPU.
_ANSWER_S = 30.0
_VERIFY_S = 90.0
# The first client of an MPS server waits for the server to start.
_OPEN_S = 60.0
_END_S = 3.0
_UNLIMITED = {"quota_usec": None, "period_usec": 100_000}


class Refused(Exception):
    """A command that the worker refused, in its own words."""


@dataclass
class Worker:
    """One worker process."""

    _child: subprocess.Popen[bytes]
    _socket: socket.socket
    samples: list[Sample] = field(default_factory=list)
    _buffer: bytes = b""
    _next_id: int = 0
    _replies: dict[int, dict[str, Any]] = field(default_factory=dict)

    def send(self, command: object) -> int:
        """Sends a command; the id that its reply will have."""
        self._next_id += 1
        line = json.dumps({"id": self._next_id, "command": command}) + "\n"
        self._socket.sendall(line.encode())
        return self._next_id

    def wait(self, number: int, seconds: float = _ANSWER_S) -> dict[str, Any]:
        """The reply of a command: its `answer` and `counters`."""
        until = time.monotonic() + seconds
        while number not in self._replies:
            self._receive(until)
        reply = self._replies.pop(number)
        if "Err" in reply["result"]:
            raise Refused(json.dumps(reply["result"]["Err"]))
        return {"answer": reply["result"]["Ok"], "counters": reply["counters"]}

    def call(self, command: object, seconds: float = _ANSWER_S) -> dict[str, Any]:
        """Sends a command and waits for its reply."""
        return self.wait(self.send(command), seconds)

    def drain(self) -> None:
        """Takes the reports that have come."""
        while process.wait_readable(self._socket.fileno(), 0):
            self._receive(time.monotonic() + 1)

    def _receive(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0 or not process.wait_readable(self._socket.fileno(), left):
            raise TimeoutError(f"worker {self._child.pid} did not answer")
        data = self._socket.recv(1 << 20)
        if not data:
            raise RuntimeError(f"worker {self._child.pid} ended")
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if "reply" in message:
            self._replies[message["reply"]["id"]] = message["reply"]
        elif "report" in message:
            rows = message["report"]["samples"]
            self.samples += [Sample(**row) for row in rows]
        elif error := message["ending"]["error"]:
            raise RuntimeError(f"worker {self._child.pid} failed: {json.dumps(error)}")

    def prepare(
        self, *, blocks: int, form: str, iterations: int | None, kernel: str = "fma_fp32"
    ) -> dict[str, Any]:
        """Prepares an arithmetic kernel with 4 chains and blocks of 1024 threads on the
        whole GPU, two launches in flight; its readiness."""
        plan = {"kernel": kernel, "ilp": 4, "blocks": blocks, "threads": 1024}
        setup = {
            "plan": {**plan, "bytes": 0, "form": form},
            "iterations": iterations,
            "duration_ms": None,
            "placement": placement(0),
            "quota": _UNLIMITED,
            "depth": 2,
        }
        ready: dict[str, Any] = self.call({"prepare": setup})["answer"]["ready"]
        return ready

    def verify(self) -> tuple[int, int]:
        """Compares results with the CPU reference; values compared, and wrong ones."""
        answer = self.call("verify", _VERIFY_S)["answer"]["verified"]
        return answer["compared"], answer["wrong"]

    def end(self) -> None:
        """Ends it: it is asked, then its socket closes, then it is killed."""
        try:
            self.send("end")
            self._child.wait(_END_S)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self._socket.close()
        try:
            self._child.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def placement(stream_priority: int) -> dict[str, Any]:
    """The whole GPU, with this CUDA stream priority (lower is more important)."""
    return {"groups": None, "stream_priority": stream_priority}


@dataclass
class Rig:
    """Starts workers as clients of one private MPS server; ends all with its context.

    On the simulated GPU there is no MPS server of ours, so its workers share the GPU
    temporally: good for trying the scripts, not for a figure.
    """

    binary: Path
    # The GPU's UUID; `None` for the simulated one.
    uuid: str | None
    _stack: ExitStack = field(default_factory=ExitStack)
    _environment: dict[str, str] = field(default_factory=dict)
    _address: dict[str, Any] = field(default_factory=dict)
    _workers: list[Worker] = field(default_factory=list)
    # SMs of the GPU, known once a worker has opened it.
    sm_count: int = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self.uuid is None:
                self._address = {"sim": {"socket": str(self._simulated(stack)), "gpu": 0}}
            else:
                self._address = {"cuda": self.uuid}
                self._environment = stack.enter_context(Mps(self.uuid)).environment
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            for worker in self._workers:
                try:
                    worker.send("end")
                except OSError:
                    # It has ended already.
                    continue
            for worker in self._workers:
                worker.end()

    def _simulated(self, stack: ExitStack) -> Path:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gcg-sim-")))
        child = subprocess.Popen(
            [str(self.binary), "sim-gpu", "--state", str(state)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(_end_child, child)
        until = time.monotonic() + 10
        while not (found := [path for path in state.iterdir() if path.is_socket()]):
            if time.monotonic() > until:
                raise TimeoutError("the simulated GPU made no socket")
            time.sleep(0.02)
        return found[0]

    def workers(self, count: int) -> list[Worker]:
        """Starts so many at once and opens the GPU in each."""
        workers = [self._spawn() for _ in range(count)]
        asked = [worker.send({"open": self._address}) for worker in workers]
        for worker, number in zip(workers, asked, strict=True):
            try:
                opened = worker.wait(number, _OPEN_S)["answer"]["opened"]
            except Refused as error:
                raise Skip(f"a worker could not open the GPU: {error}") from error
            self.sm_count = opened["sm_count"]
        return workers

    def retire(self, workers: list[Worker]) -> None:
        """Ends some of them."""
        for worker in workers:
            worker.end()
            self._workers.remove(worker)

    def _spawn(self) -> Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        keep = ("LD_LIBRARY_PATH", "RUST_LOG", "RUST_BACKTRACE")
        inherited = {key: os.environ[key] for key in keep if key in os.environ}
        child = subprocess.Popen(
            [str(self.binary), "worker"],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            cwd="/",
            env={**inherited, **self._environment, "CUDA_CACHE_DISABLE": "1"},
            process_group=0,
        )
        theirs.close()
        worker = Worker(child, ours)
        self._workers.append(worker)
        return worker


def _end_child(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(3)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
