"""compute.freeze and gcgroup.freeze of attached processes: how long the writes take."""

import gc
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gcg import numbers
from gcg.bench import Bench
from gcg.figure import Figure, Result, Table, Verdict, verdict
from gcg.fleet import Attached, Fleet, Spin, stands
from gcg.pace import Kept, Opened, read_times, rest, stay_awake

_ROUNDS = 200
_FEWER_ROUNDS = 100
_P50_US, _P99_US = 1000.0, 1500.0
_TWO_P50_US = 1200.0
# The kernel that is stopped in its middle, microseconds.
_KERNEL_US = 8e6
_SIX_US = 50_000.0
# Every so many rounds after a rest the progress is read twice, 5 ms apart.
_LOOK_EVERY = 10
_THREADS = 4

Pause = Callable[[random.Random], None]


@dataclass
class Series:
    """What a series of rounds gave; times in microseconds."""

    freeze_us: list[float] = field(default_factory=list)
    thaw_us: list[float] = field(default_factory=list)
    looks: int = 0
    wrong: list[str] = field(default_factory=list)

    def rows(self, name: str) -> list[list[str]]:
        """Lines of the table."""
        rows = []
        for what, values in (("freeze", self.freeze_us), ("thaw", self.thaw_us)):
            s = numbers.spread(values)
            rows.append([name, what, str(s.n), *(f"{v:.0f}" for v in s[1:])])
        return rows

    def raw(self) -> dict[str, object]:
        """For the JSON."""
        return {"freeze_us": self.freeze_us, "thaw_us": self.thaw_us, "wrong": self.wrong}


HEADER = ["how", "write", "n", "p50 us", "p90 us", "p99 us", "max us"]


def in_words(values: Sequence[float]) -> str:
    """Percentiles of microseconds."""
    s = numbers.spread(values)
    return f"p50 {s.p50:.0f}, p90 {s.p90:.0f}, p99 {s.p99:.0f}, max {s.max:.0f} us"


def rounds(
    door: Kept | Opened,
    words: tuple[bytes, bytes],
    watched: Sequence[Attached],
    count: int,
    seed: int,
    pause: Pause,
) -> Series:
    """Writes the first words and the second in turn, with a pause before each write."""
    rng = random.Random(seed)
    out = Series()
    gc.disable()
    try:
        for number in range(count):
            pause(rng)
            out.freeze_us.append(door.write(words[0]) / 1e3)
            # A look sleeps, and what follows a sleep is not awake.
            if pause is rest and number % _LOOK_EVERY == 0:
                out.looks += 1
                out.wrong += [f"{w.name} ran while frozen" for w in watched if not stands(w)]
            pause(rng)
            out.thaw_us.append(door.write(words[1]) / 1e3)
    finally:
        gc.enable()
        door.close()
    return out


def _file(workload: Attached) -> Path:
    return workload.path / "compute.freeze"


def _reads(workload: Attached, pause: Pause) -> list[float]:
    """Reads that ask neither the controller nor the GPU; microseconds."""
    return read_times(workload.path / "compute.priority", _FEWER_ROUNDS, pause)


def measure(bench: Bench) -> Result:
    """A PyTorch process in the middle of an 8 s kernel."""
    with Fleet(bench) as fleet:
        (program,) = fleet.attach(Spin("pytorch", _KERNEL_US, torch=True))
        program.go()
        time.sleep(0.2)
        began = program.count()["lanes"][0]
        first_us = program.write("compute.freeze", 1) / 1e3
        program.write("compute.freeze", 0)
        plan: list[tuple[str, type[Kept] | type[Opened], int, Pause]] = [
            ("kept open", Kept, _ROUNDS, stay_awake),
            ("after a rest", Kept, _ROUNDS, rest),
            ("open-write-close", Opened, _FEWER_ROUNDS, stay_awake),
        ]
        series = {}
        for seed, (name, door, count, pause) in enumerate(plan):
            words = (b"1", b"0")
            series[name] = rounds(door(_file(program)), words, [program], count, seed, pause)
        reads = {"awake": _reads(program, stay_awake), "after a rest": _reads(program, rest)}
        ended = program.count()["lanes"][0]["ended"] - began["ended"]
        stat = program.stat()
    figures = [_figure(name, one, ended) for name, one in series.items()]
    figures.append(_standing(series))
    rows = [row for name, one in series.items() for row in one.rows(name)]
    for name, values in reads.items():
        s = numbers.spread(values)
        rows.append(
            [name, "for comparison: read of compute.priority", str(s.n), *(f"{v:.0f}" for v in s[1:])]
        )
    note = (
        f"The very first freeze after the process was attached to, which looks its channels up and "
        f"lists the process in the journal, took {first_us:.0f} us. The service does not tell how long the "
        f"driver's call alone was (0.6 to 0.9 ms where it was measured by itself); a read of a file, "
        f"which makes no call, shows what the way through FUSE costs with the same pauses."
    )
    raw: dict[str, object] = {name: one.raw() for name, one in series.items()}
    raw |= {"reads": reads, "first_us": first_us, "stat": stat}
    return Result(figures, [Table("Time of a write to compute.freeze", HEADER, rows)], [note], raw)


def _figure(name: str, series: Series, ended: int) -> Figure:
    s = numbers.spread(series.freeze_us)
    return Figure(
        f"freeze of a PyTorch process in the middle of an 8 s kernel, write(2) to return ({name})",
        f"p50 <= {_P50_US / 1e3} ms, p99 <= {_P99_US / 1e3} ms",
        in_words(series.freeze_us),
        f"{s.n} freezes; {ended} kernels ended during all series",
        verdict(s.p50 <= _P50_US and s.p99 <= _P99_US),
    )


def _standing(series: dict[str, Series]) -> Figure:
    wrong = [text for one in series.values() for text in one.wrong]
    looks = sum(one.looks for one in series.values())
    return Figure(
        "the same: while frozen",
        "no kernel makes progress",
        f"{len(wrong)} contradictions" + (f", the first: {wrong[0]}" if wrong else ""),
        f"{looks} double readings of the kernel's own counter",
        verdict(not wrong and looks > 0),
    )


class _Four:
    """Four threads, each with a process of its own, that write at the same moment."""

    def __init__(self, workloads: Sequence[Attached]) -> None:
        self._workloads = workloads
        self._barrier = threading.Barrier(len(workloads))
        self.series = [Series() for _ in workloads]
        # From the first that began to the last that returned, of each round.
        self.all_us: list[float] = []
        self._times: list[tuple[int, int]] = [(0, 0)] * len(workloads)
        self.errors: list[str] = []

    def run(self) -> None:
        """All rounds."""
        threads = [threading.Thread(target=self._one, args=(i,)) for i in range(len(self._workloads))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise RuntimeError(self.errors[0])

    def _one(self, index: int) -> None:
        door = Kept(_file(self._workloads[index]))
        series, rng = self.series[index], random.Random(index)
        try:
            for _ in range(_FEWER_ROUNDS):
                self._barrier.wait()
                began = time.monotonic_ns()
                took = door.write(b"1")
                self._times[index] = (began, began + took)
                series.freeze_us.append(took / 1e3)
                if self._barrier.wait() == 0:
                    first = min(begin for begin, _ in self._times)
                    self.all_us.append((max(end for _, end in self._times) - first) / 1e3)
                self._barrier.wait()
                series.thaw_us.append(door.write(b"0") / 1e3)
                stay_awake(rng)
        except (OSError, threading.BrokenBarrierError) as error:
            self.errors.append(f"{self._workloads[index].name}: {error}")
            self._barrier.abort()
        finally:
            door.close()


def together(bench: Bench) -> Result:
    """Two and six processes by gcgroup.freeze, and four by four threads."""
    with Fleet(bench) as fleet:
        two = fleet.attach(
            Spin("first", _KERNEL_US, torch=not bench.sim), Spin("second", _KERNEL_US, torch=not bench.sim)
        )
        four = fleet.attach(*(Spin(f"bare-{i}", _SIX_US) for i in range(_THREADS)))
        six = [*two, *four]
        for one in six:
            one.go()
        time.sleep(0.2)
        many = fleet.service.root / "gcgroup.freeze"

        def words(of: Sequence[Attached]) -> tuple[bytes, bytes]:
            pids = " ".join(str(one.pid) for one in of)
            return f"1 {pids}".encode(), f"0 {pids}".encode()

        # Each is looked up at its first stop, which is not what is measured.
        rounds(Kept(many), words(six), [], 1, 0, rest)
        series = {
            "two": rounds(Kept(many), words(two), two, _ROUNDS, 1, stay_awake),
            "two, after a rest": rounds(Kept(many), words(two), two, _FEWER_ROUNDS, 2, rest),
            "six": rounds(Kept(many), words(six), six, _FEWER_ROUNDS, 3, stay_awake),
            "six, after a rest": rounds(Kept(many), words(six), six, 50, 4, rest),
        }
        single = rounds(Kept(_file(four[0])), (b"1", b"0"), [], _FEWER_ROUNDS, 5, stay_awake)
        threads = _Four(four)
        threads.run()
    return _result(series, single, threads)


def _result(series: dict[str, Series], single: Series, threads: _Four) -> Result:
    two = numbers.spread(series["two"].freeze_us)
    each = [us for one in threads.series for us in one.freeze_us]
    figures = [
        Figure(
            "two processes by gcgroup.freeze, write(2) to return",
            f"p50 <= {_TWO_P50_US / 1e3} ms for both",
            in_words(series["two"].freeze_us),
            f"{two.n} freezes of both",
            verdict(two.p50 <= _TWO_P50_US),
        ),
        Figure(
            "six at once by gcgroup.freeze",
            "recorded",
            in_words(series["six"].freeze_us),
            f"{len(series['six'].freeze_us)} freezes of all six",
            Verdict.RECORDED,
        ),
        Figure(
            "four processes by four threads, each its compute.freeze at the same moment",
            "recorded",
            f"each {in_words(each)}; from the first write to the last return {in_words(threads.all_us)}",
            f"{len(threads.all_us)} rounds of four; one of them alone: {in_words(single.freeze_us)}",
            Verdict.RECORDED,
        ),
        _standing(series),
    ]
    rows = [row for name, one in series.items() for row in one.rows(name)]
    rows += single.rows("one of the four alone, its compute.freeze")
    for index, one in enumerate(threads.series):
        rows += one.rows(f"thread {index} of four at once")
    raw: dict[str, object] = {name: one.raw() for name, one in series.items()}
    raw |= {"four": [one.raw() for one in threads.series], "four_all_us": threads.all_us}
    return Result(figures, [Table("Time of a write", HEADER, rows)], raw=raw)
