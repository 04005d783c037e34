"""A server of a language model beside a throughput loop: what priorities change.

Every row serves the same arrivals: they come from one seed.
"""

from dataclasses import dataclass
from typing import Any

from gcg import numbers
from gcg.bench import Bench
from gcg.figure import Figure, Result, Skip, Table, Verdict, verdict
from gcg.fleet import Attached, Fleet
from gcg.mps import Mps
from gcg.priority import slice_us
from gcg.program import Program

_RATE, _SEED = 4.0, 1
_ROW_S, _ROW_LONG_S = 6.0, 20.0
_TPOT_TIMES, _THROUGHPUT_SHARE = 1.20, 0.95
# The throughput process's, and GVM's own example for a server.
_LOW, _GVM = 15, 2
_ALONE, _DEFAULT = "alone", "default time slicing"


@dataclass(frozen=True)
class _Row:
    """One row: the server's own times, and the loop's steps in the same time."""

    answer: dict[str, Any]
    steps_per_s: float | None
    timeslices_us: str

    def tpot(self) -> numbers.Spread:
        """Milliseconds from a token to the next."""
        return numbers.spread(self.answer["tpot_ms"])

    def cells(self, name: str) -> list[str]:
        """Its line of the table."""
        first = numbers.spread(self.answer["ttft_ms"])
        next_ = self.tpot()
        return [
            name,
            f"{first.p50:.2f} / {first.p99:.1f}",
            f"{next_.p50:.3f} / {next_.p99:.3f}",
            "-" if self.steps_per_s is None else f"{self.steps_per_s:.1f}",
            self.timeslices_us,
            f"{first.n} requests, {next_.n} tokens",
        ]


_HEADER = ["sharing", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms", "steps/s", "timeslices us", "n"]


def _row_s(bench: Bench) -> float:
    return _ROW_LONG_S if bench.long else _ROW_S


def _serve(server: Program, loop: Program | None, seconds: float, slices: str) -> _Row:
    """Serves for so long; the loop runs throughout, where there is one."""
    if loop is not None:
        loop.ask("go")
        # Until the loop runs at its pace.
        server.ask(f"run 0.5 {_RATE * 2} 7")
    before = None if loop is None else loop.ask("count")
    answer = server.ask(f"run {seconds} {_RATE} {_SEED}", seconds + 30)
    steps = None
    if loop is not None and before is not None:
        after = loop.ask("count")
        steps = (after["steps"] - before["steps"]) / ((after["ns"] - before["ns"]) / 1e9)
        loop.ask("pause")
    return _Row(answer, steps, slices)


def _start(fleet: Fleet, environment: dict[str, str] | None = None) -> tuple[Program, Program]:
    server = fleet.start_torch("server", environment=environment)
    loop = fleet.start_torch("loop", "diffusion", environment=environment)
    for program in (server, loop):
        program.wait_ready()
    return server, loop


def _slices(*attached: Attached) -> str:
    return " and ".join(str(one.stat().get("timeslice_usec")) for one in attached)


def measure(bench: Bench) -> Result:
    """The rows of the matrix, and a server at priority 2."""
    rows: dict[str, _Row] = {}
    seconds = _row_s(bench)
    with Fleet(bench) as fleet:
        fleet.await_proof()
        pair = fleet.adopt(*_start(fleet))
        server, loop = pair

        def row(name: str, beside: Program | None) -> None:
            rows[name] = _serve(server.program, beside, seconds, _slices(*pair))

        row(_ALONE, None)
        row(_DEFAULT, loop.program)
        loop.write("compute.priority", _LOW)
        row(f"compute.priority {_LOW} on the throughput process", loop.program)
        loop.write("compute.priority", 8)
        server.write("compute.priority", _GVM)
        read_back = server.stat().get("timeslice_usec")
        row(f"compute.priority {_GVM} on the server", loop.program)
    result = Result(_figures(rows), raw={name: one.__dict__ for name, one in rows.items()})
    result.figures.append(_example(rows, read_back))
    table = [one.cells(name) for name, one in rows.items()]
    result.tables.append(Table("Server of 1.2 B parameters beside a diffusion-like loop", _HEADER, table))
    return result


def _figures(rows: dict[str, _Row]) -> list[Figure]:
    alone, default, low = list(rows.values())[:3]
    tpot = low.tpot().p50 / alone.tpot().p50
    share = (low.steps_per_s or 0) / (default.steps_per_s or float("inf"))
    counted = f"{alone.tpot().n} and {low.tpot().n} tokens"
    return [
        Figure(
            f"time per output token, compute.priority {_LOW} on the throughput process",
            f"p50 <= {_TPOT_TIMES:.2f} x alone",
            f"p50 {low.tpot().p50:.3f} ms, alone {alone.tpot().p50:.3f} ({tpot:.2f} x), "
            f"default {default.tpot().p50:.3f}; p99 {low.tpot().p99:.3f} ms",
            counted,
            verdict(tpot <= _TPOT_TIMES),
        ),
        Figure(
            "throughput in the same row",
            f">= {_THROUGHPUT_SHARE:.2f} x the default row's",
            f"{low.steps_per_s or 0:.1f} steps/s, default {default.steps_per_s or 0:.1f} ({share:.3f} x)",
            f"rows of {alone.answer['took_s']:.0f} s",
            verdict(share >= _THROUGHPUT_SHARE),
        ),
    ]


def _example(rows: dict[str, _Row], read_back: int | None) -> Figure:
    """GVM's own example: 131 ms slices on a server."""
    default, row = list(rows.values())[1], list(rows.values())[3]
    return Figure(
        f"`echo {_GVM}` on the server beside the throughput process",
        f"read back {slice_us(_GVM):.0f} us; effect recorded",
        f"read back {read_back} us; TPOT p50 {row.tpot().p50:.3f} ms, default {default.tpot().p50:.3f}; "
        f"{row.steps_per_s or 0:.1f} steps/s, default {default.steps_per_s or 0:.1f}",
        f"{row.tpot().n} tokens",
        verdict(read_back == slice_us(_GVM)),
    )


def under_mps(bench: Bench) -> Result:
    """The same pair as clients of a plain private MPS server, for comparison."""
    if bench.uuid is None:
        raise Skip("the simulated GPU has no PyTorch programs")
    with Mps(bench.uuid) as mps, Fleet(bench) as fleet:
        server, loop = _start(fleet, mps.environment)
        alone = _serve(server, None, _row_s(bench), "-")
        row = _serve(server, loop, _row_s(bench), "-")
    first, next_ = numbers.spread(row.answer["ttft_ms"]), row.tpot()
    figure = Figure(
        "the matrix under plain MPS",
        "recorded",
        f"TTFT p50 {first.p50:.2f}, p99 {first.p99:.1f} ms; TPOT p50 {next_.p50:.3f}, p99 {next_.p99:.3f} ms; "
        f"{row.steps_per_s or 0:.1f} steps/s",
        f"{first.n} requests, {next_.n} tokens",
        Verdict.RECORDED,
    )
    rows = {"alone, as an MPS client": alone, "MPS": row}
    table = Table("Under MPS", _HEADER, [one.cells(name) for name, one in rows.items()])
    return Result([figure], [table], raw={name: one.__dict__ for name, one in rows.items()})
