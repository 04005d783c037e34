"""A program that launches so many kernels and knows exactly how many.

It launches the empty kernel through the driver, or with --torch additions to a tensor.
Threads and processes of it that exist before and that come later launch theirs.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from ctypes import c_uint, c_void_p
from pathlib import Path
from typing import IO, Any

import driver
import talk

# Launches between two looks at the clock; the GPU has none waiting at the next.
_BATCH = 1000
_GRAPH_NODES = 10
_THREADS = 4
# For a forked process, whose calls the driver refuses, seconds.
_FORKED_S = 5.0


class Bare:
    """Launches through the driver's interface."""

    def __init__(self) -> None:
        driver.init()
        self.context = driver.primary(driver.device(0))
        kernel = driver.function(b"empty")
        self._stream = driver.stream()
        launch = driver.Launch(kernel, 1, 1)
        self._graph = driver.capture([launch] * _GRAPH_NODES, self._stream)
        self._kernel = kernel

    def enter(self) -> None:
        """Makes its context this thread's."""
        driver.call("cuCtxSetCurrent", self.context)

    def launch(self, count: int) -> None:
        """So many kernels."""
        one, none = c_uint(1), c_uint(0)
        kernel, stream = c_void_p(self._kernel), c_void_p(self._stream)
        arguments = (kernel, one, one, one, one, one, one, none, stream, None, None)
        call = driver.fast_call("cuLaunchKernel")
        for _ in range(count):
            if status := call(*arguments):
                raise driver.CudaError(f"cuLaunchKernel returned {status}")

    def graph(self, count: int) -> None:
        """So many graphs."""
        for _ in range(count):
            driver.call("cuGraphLaunch", self._graph, self._stream)

    def settle(self) -> None:
        """Waits until all has run."""
        driver.call("cuStreamSynchronize", self._stream)


class Torch:
    """Launches by PyTorch: an addition to a small tensor is one kernel."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._tensor = torch.zeros(256, device="cuda")
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            self._tensor.add_(1)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(_GRAPH_NODES):
                self._tensor.add_(1)
        torch.cuda.synchronize()

    def enter(self) -> None:
        """PyTorch does it."""

    def launch(self, count: int) -> None:
        """So many kernels."""
        add = self._tensor.add_
        for _ in range(count):
            add(1)

    def graph(self, count: int) -> None:
        """So many graphs."""
        replay = self._graph.replay
        for _ in range(count):
            replay()

    def settle(self) -> None:
        """Waits until all has run."""
        self._cuda.synchronize()


class Child:
    """Another process of this program, spoken to through pipes."""

    def __init__(self, pid: int, writes: IO[str], reads: IO[str]) -> None:
        self.pid, self._writes, self._reads = pid, writes, reads

    def tell(self, command: str) -> dict[str, Any]:
        """Its answer, as it is."""
        self._writes.write(command + "\n")
        self._writes.flush()
        answer: dict[str, Any] = json.loads(self._reads.readline())
        return answer

    def wait_ready(self) -> None:
        """Its first line."""
        self._reads.readline()


class Crew:
    """Threads that launch when they are told."""

    def __init__(self, work: Bare | Torch) -> None:
        self._work = work
        self._barrier = threading.Barrier(_THREADS + 1)
        self._count = 0
        self._errors: list[str] = []
        for _ in range(_THREADS):
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self._work.enter()
        while True:
            self._barrier.wait()
            try:
                self._work.launch(self._count)
                self._work.settle()
            except driver.CudaError as error:
                self._errors.append(str(error))
            self._barrier.wait()

    def launch(self, count: int) -> None:
        """Each of them so many."""
        self._count = count
        self._barrier.wait()
        self._barrier.wait()
        if self._errors:
            raise driver.CudaError(self._errors[0])


class Program:
    """What is done when asked."""

    def __init__(self, options: argparse.Namespace, forked: Child | None) -> None:
        self._work = Torch() if options.torch else Bare()
        self._torch = bool(options.torch)
        self._old = Crew(self._work)
        self._children = [] if forked is None else [forked]

    def children(self) -> list[int]:
        """Pids of the processes that were forked before."""
        return [child.pid for child in self._children]

    def handlers(self) -> dict[str, talk.Handler]:
        """What it understands."""
        return {
            "launch": lambda words: self._timed(self._work.launch, int(words[0])),
            "graph": lambda words: self._timed(self._work.graph, int(words[0])),
            "threads": lambda words: self._threads(self._old, int(words[0])),
            "new-threads": lambda words: self._threads(Crew(self._work), int(words[0])),
            "fork": lambda words: self._fork(int(words[0])),
            "spawn": lambda _: self._spawn(),
            "tell": lambda words: self._children[int(words[0])].tell(" ".join(words[1:])),
        }

    def _timed(self, act: Callable[[int], None], count: int) -> dict[str, Any]:
        """Microseconds a launch of each batch."""
        times = []
        for begin in range(0, count, _BATCH):
            batch = min(_BATCH, count - begin)
            began = time.monotonic_ns()
            act(batch)
            times.append((time.monotonic_ns() - began) / 1e3 / batch)
            self._work.settle()
        return {"done": count, "us": times}

    def _threads(self, crew: Crew, count: int) -> dict[str, Any]:
        crew.launch(count)
        return {"done": count * _THREADS}

    def _fork(self, count: int) -> dict[str, Any]:
        """A fork of a process that uses CUDA cannot use it; the attempt ends nowhere."""
        pid = os.fork()
        if pid == 0:
            try:
                self._work.launch(count)
            except BaseException:
                os._exit(3)
            os._exit(0)
        until = time.monotonic() + _FORKED_S
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
                return {"ended": False}
            time.sleep(0.01)
        return {"ended": True}

    def _spawn(self) -> dict[str, Any]:
        command = [sys.executable, str(Path(__file__).resolve())]
        command += ["--torch"] if self._torch else []
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("a child has no pipes")
        self._children.append(Child(child.pid, child.stdin, child.stdout))
        self._children[-1].wait_ready()
        return {"pid": child.pid, "index": len(self._children) - 1}


def _fork_first() -> Child | None:
    """A fork from before anybody used CUDA; `None` in the fork itself."""
    to_child, to_parent = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(to_child[1])
        os.close(to_parent[0])
        talk.redirect(to_child[0], to_parent[1])
        return None
    os.close(to_child[0])
    os.close(to_parent[1])
    return Child(pid, os.fdopen(to_child[1], "w"), os.fdopen(to_parent[0]))


def main() -> None:
    """Waits for commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", action="store_true", help="by PyTorch")
    parser.add_argument("--fork-first", action="store_true", help="fork before CUDA is used")
    options = parser.parse_args()
    forked = _fork_first() if options.fork_first else None
    program = Program(options, forked)
    if forked is not None:
        forked.wait_ready()
    talk.ready(children=program.children())
    talk.answer(program.handlers())


if __name__ == "__main__":
    main()
