"""A program that keeps a GPU busy with kernels of a length that it is told.

Each lane is a context or a stream with a thread that launches kernels one after the
other, so many in flight. How far a lane's kernel is stands in the host's memory, so
that it can be looked at while it runs, and while it does not. With --torch the first
lane lives in a PyTorch process, in its context.
"""

import argparse
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import driver
import talk

_THREADS = 1024
# Launches whose times are kept until somebody takes them.
_KEPT = 200_000
# Chunks of the launches that find out how long a chunk takes.
_TRIAL = 2000


class Lane:
    """Kernels in one stream, from a thread of their own."""

    def __init__(self, index: int, gpu: int, context: int, options: argparse.Namespace) -> None:
        self.gpu, self.context, self.begun_ns = gpu, context, time.monotonic_ns()
        self._blocks = driver.sm_count(driver.device(gpu)) * options.per_sm
        self._depth = options.depth
        self._out = driver.allocate(self._blocks * _THREADS * 4)
        self._word = driver.Word()
        self._kernel = driver.function(b"spin")
        self._stream = driver.stream()
        self._events = [(driver.event(), driver.event()) for _ in range(self._depth)]
        self._flying: deque[tuple[int, int]] = deque()
        self.samples: deque[tuple[int, float, float]] = deque(maxlen=_KEPT)
        self.chunks, self.launched, self.ended, self.error = 0, 0, 0, ""
        self.goes = threading.Event()
        self._leaves = False
        self._base = 0
        self._thread = threading.Thread(target=self._run, name=f"lane-{index}", daemon=True)
        self._thread.start()

    def progress(self) -> int:
        """Chunks that its kernels have done."""
        return self._word.read()

    def leave(self) -> None:
        """Waits until its thread does nothing more with the context, whatever is still in
        flight; it must be paused."""
        self._leaves = True
        self.goes.set()
        self._thread.join()

    def trial_us(self) -> float:
        """Microseconds of a chunk; it must be idle."""
        driver.call("cuCtxSetCurrent", self.context)
        for _ in range(3):
            first, last = self._events[0]
            self._launch(_TRIAL, first, last)
            driver.call("cuEventSynchronize", last)
        return driver.elapsed_us(first, last) / _TRIAL

    def _launch(self, chunks: int, first: int, last: int) -> None:
        parameters = (self._word.address, self._base, chunks, self._out)
        launch = driver.Launch(self._kernel, self._blocks, _THREADS, *parameters)
        driver.call("cuEventRecord", first, self._stream)
        launch.on(self._stream)
        driver.call("cuEventRecord", last, self._stream)
        self._base += chunks

    def _run(self) -> None:
        try:
            driver.call("cuCtxSetCurrent", self.context)
            while not self._leaves:
                self._turn()
        # Somebody destroyed its context, say.
        except driver.CudaError as error:
            self.error = str(error)

    def _turn(self) -> None:
        if not self.goes.is_set():
            # Not waited for in the driver, so that the thread can leave meanwhile.
            while self._flying and not self._leaves:
                if driver.has_happened(self._events[self._flying[0][0]][1]):
                    self._land()
                else:
                    time.sleep(0.001)
            self.goes.wait()
        if self._leaves:
            return
        if len(self._flying) == self._depth:
            self._land()
        place = self.launched % self._depth
        began = time.monotonic_ns()
        self._launch(self.chunks, *self._events[place])
        self._flying.append((place, began))
        self.launched += 1

    def _land(self) -> None:
        place, began = self._flying.popleft()
        first, last = self._events[place]
        driver.call("cuEventSynchronize", last)
        wall_us = (time.monotonic_ns() - began) / 1e3
        self.ended += 1
        self.samples.append((began, round(driver.elapsed_us(first, last), 2), wall_us))


class Program:
    """The lanes, and what is done with them when asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.times: dict[str, int] = {"first_call": time.monotonic_ns()}
        context = _torch(options) if options.torch else _bare(options)
        self.times["context"] = time.monotonic_ns()
        self.lanes = [Lane(0, options.gpu, context, options)]
        self._memory = driver.allocate(options.memory) if options.memory else 0
        self._chunk_us = 0.0
        # What runs in the background, by its name: when it began and ended.
        self._deeds: dict[str, dict[str, Any]] = {}

    def handlers(self) -> dict[str, talk.Handler]:
        """What it understands."""
        return {
            "prepare": self._prepare,
            "go": lambda _: self._all(lambda lane: lane.goes.set()),
            "pause": lambda _: self._all(lambda lane: lane.goes.clear()),
            "count": self._count,
            "take": self._take,
            "context": lambda words: self._begin("context", lambda: self._context(int(words[0]))),
            "stream": lambda _: self._begin("stream", self._stream),
            "free": lambda _: self._begin("free", self._free),
            "destroy": lambda _: self._begin("destroy", self._destroy),
        }

    def _all(self, act: Callable[[Lane], None]) -> dict[str, Any]:
        for lane in self.lanes:
            act(lane)
        return {}

    def _prepare(self, words: list[str]) -> dict[str, Any]:
        """The length of its kernels from now on, microseconds."""
        if not self._chunk_us:
            self._chunk_us = self.lanes[0].trial_us()
        chunks = max(round(float(words[0]) / self._chunk_us), 1)
        for lane in self.lanes:
            lane.chunks = chunks
        return {"chunks": chunks, "chunk_us": self._chunk_us}

    def _count(self, _: list[str]) -> dict[str, Any]:
        lanes = [
            {
                "progress": lane.progress(),
                "launched": lane.launched,
                "ended": lane.ended,
                "gpu": lane.gpu,
                "begun_ns": lane.begun_ns,
                "error": lane.error,
            }
            for lane in self.lanes
        ]
        return {"ns": time.monotonic_ns(), "lanes": lanes, "deeds": self._deeds}

    def _take(self, _: list[str]) -> dict[str, Any]:
        """Launches that ended: when each began, its time on the GPU and on the host."""
        samples = self.lanes[0].samples
        return {"samples": [samples.popleft() for _ in range(len(samples))]}

    def _begin(self, name: str, act: Callable[[], None]) -> dict[str, Any]:
        deed: dict[str, Any] = {"began_ns": time.monotonic_ns(), "ended_ns": None, "error": ""}
        self._deeds[name] = deed

        def run() -> None:
            try:
                act()
            except driver.CudaError as error:
                deed["error"] = str(error)
            deed["ended_ns"] = time.monotonic_ns()

        threading.Thread(target=run, daemon=True).start()
        return {}

    def _context(self, gpu: int) -> None:
        """Another context, which runs the same."""
        self._join(gpu, driver.create_context(driver.device(gpu)))

    def _stream(self) -> None:
        """Another stream in the first context, which runs the same."""
        first = self.lanes[0]
        driver.call("cuCtxSetCurrent", first.context)
        self._join(first.gpu, first.context)

    def _join(self, gpu: int, context: int) -> None:
        lane = Lane(len(self.lanes), gpu, context, self._options)
        lane.chunks = self.lanes[0].chunks
        self.lanes.append(lane)
        lane.goes.set()

    def _free(self) -> None:
        driver.call("cuCtxSetCurrent", self.lanes[0].context)
        memory, self._memory = self._memory, 0
        driver.call("cuMemFree_v2", memory)

    def _destroy(self) -> None:
        """The first lane's context goes, which is the primary one."""
        self.lanes[0].leave()
        driver.call("cuDevicePrimaryCtxRelease_v2", driver.device(self.lanes[0].gpu))


def _bare(options: argparse.Namespace) -> int:
    driver.init()
    return driver.primary(driver.device(options.gpu))


def _torch(options: argparse.Namespace) -> int:
    import torch

    torch.cuda.set_device(options.gpu)
    # What any PyTorch program has: its allocator, and cuBLAS with its workspace.
    matrix = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    (matrix @ matrix).sum().item()
    return driver.current()


def main() -> None:
    """Waits for commands; nothing runs before `go`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--torch", action="store_true", help="in a PyTorch process")
    add("--gpu", type=int, default=0)
    add("--per-sm", type=int, default=1, help="blocks of 1024 threads on each SM")
    add("--depth", type=int, default=1, help="launches in flight")
    add("--memory", type=int, default=0, help="bytes to allocate")
    program = Program(parser.parse_args())
    talk.ready(**program.times)
    talk.answer(program.handlers())


if __name__ == "__main__":
    main()
