"""Every kernel of the catalogue, sliced and uncut: counters move, samples make sense."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from gcg import numbers
from gcg.bench import Bench, Phase
from gcg.figure import Figure, Result, Table, verdict
from gcg.service import Workload

_SECONDS = 0.8
# A launch may not take longer than the host saw it take, beyond what clocks differ, us.
_SLACK_US = 50.0
_LAUNCH_US = (250.0, 5000.0)


class _Case(NamedTuple):
    """A kernel, and what one iteration of all its blocks is worth."""

    spec: dict[str, object]
    unit: str
    # Worth of one iteration of the whole launch, from the spec as decided; with
    # microseconds this makes 10^-6 of the unit a second.
    worth: Callable[[dict[str, Any]], float]
    scale: float


def _flops(each: int) -> Callable[[dict[str, Any]], float]:
    return lambda spec: float(each * spec["ilp"] * spec["threads"] * spec["blocks"])


def _copied(spec: dict[str, Any]) -> float:
    return float(spec["bytes"])


def _copied_per_block(spec: dict[str, Any]) -> float:
    return float(spec["bytes"] * spec["blocks"])


def _slept(spec: dict[str, Any]) -> float:
    return 1.0


_TERA, _GIGA = 1e-6, 1e-3
_CASES = (
    _Case({"kernel": "fma_fp32", "blocks": "per-sm:2"}, "TFLOP/s", _flops(2), _TERA),
    _Case({"kernel": "mul_fp32", "blocks": "per-sm:2"}, "TFLOP/s", _flops(1), _TERA),
    _Case({"kernel": "mul_fp64", "blocks": "per-sm:2"}, "TFLOP/s", _flops(1), _TERA),
    _Case({"kernel": "copy", "bytes": "8G", "blocks": "per-sm:2"}, "GB/s of DRAM", _copied, _GIGA),
    _Case({"kernel": "copy", "bytes": "16M", "blocks": "per-sm:2"}, "GB/s of L2", _copied, _GIGA),
    _Case({"kernel": "copy_per_block", "blocks": "per-sm:8"}, "GB/s of L1", _copied_per_block, _GIGA),
    _Case({"kernel": "sleep"}, "naps of a block in 1 us", _slept, 1.0),
)


def _wrong(workload: Workload, phase: Phase, before: dict[str, int]) -> list[str]:
    """What makes no sense."""
    stat = workload.stat()
    samples = phase.samples[workload.name]
    checks = {
        "no launch ended": stat["nr_ended_kernels"] > before["nr_ended_kernels"],
        "no iterations": stat["nr_iterations"] > before["nr_iterations"],
        "no GPU time": stat["usage_usec"] > before["usage_usec"],
        "more ended than were submitted": stat["nr_ended_kernels"] <= stat["nr_submitted_kernels"],
        "launch numbers with gaps": all(b.seq == a.seq + 1 for a, b in pairwise(samples)),
        "a launch of no time": all(s.device_us > 0 for s in samples),
        "a launch longer than the host saw": all(s.device_us <= s.wall_us + _SLACK_US for s in samples),
    }
    median = numbers.median(phase.device_us(workload.name))
    if workload.spec()["kernel"] != "copy":
        usual = _LAUNCH_US[0] <= median <= _LAUNCH_US[1]
        checks[f"a launch of {median:.0f} us where about 500 were asked for"] = usual
    return [what for what, fine in checks.items() if not fine]


def measure(bench: Bench) -> Result:
    """Each for under a second, alone."""
    result = Result()
    rows, count = [], 0
    wrong: list[str] = []
    for case in _CASES:
        for sliced in (True, False):
            workload = bench.launch(**case.spec, sliced=sliced)
            before = workload.stat()
            phase = bench.phase([workload], [workload], _SECONDS)
            spec = workload.spec()
            s = numbers.spread(phase.device_us(workload.name))
            rate = case.worth(spec) * spec["iterations"] / s.p50 * case.scale
            found = _wrong(workload, phase, before)
            form = "sliced" if sliced else "uncut"
            what = f"{spec['kernel']} {spec['bytes'] or ''}".strip()
            wrong += [f"{what}, {form}: {text}" for text in found]
            count += s.n
            row = [what, form, *(str(spec[key]) for key in ("blocks", "threads", "iterations")), str(s.n)]
            row += [f"{s.p50:.1f}", f"{s.p99:.1f}", f"{rate:.4g} {case.unit}", "; ".join(found) or "none"]
            rows.append(row)
            result.raw[f"{what} {form}"] = {"spec": spec, "samples": phase.raw()[workload.name]}
            bench.service.clear()
    result.figures.append(
        Figure(
            "every kernel of the catalogue, sliced and uncut",
            "counters move, samples make sense",
            f"{len(wrong)} contradictions" + (f", the first: {wrong[0]}" if wrong else ""),
            f"{len(rows)} workloads, {count} launches",
            verdict(not wrong),
        )
    )
    header = [
        "kernel",
        "form",
        "blocks",
        "threads",
        "iterations",
        "launches",
        "p50 us",
        "p99 us",
        "rate",
        "contradictions",
    ]
    result.tables.append(Table("Launches of each kernel", header, rows))
    return result
