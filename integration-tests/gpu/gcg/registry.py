"""The parts, in the order in which they run. Parts with the same service stand together."""

from collections.abc import Callable
from dataclasses import dataclass

from gcg import freeze, idle, partitions, priority, quota, read_cost, resize, results, smoke, stream_priority
from gcg.bench import Bench
from gcg.figure import Result


@dataclass(frozen=True)
class Part:
    """One part; `sharing` is the service that it needs, if any."""

    name: str
    title: str
    to_reach: str
    run: Callable[[Bench], Result]
    sharing: str | None = "spatial"
    # Whether nothing may have run on its service before.
    fresh: bool = False
    # When the service is killed because the part hangs, seconds.
    limit_s: float = 60.0


PARTS = (
    Part(
        "smoke",
        "Every kernel of the catalogue, sliced and uncut",
        "counters move, samples make sense",
        smoke.measure,
        limit_s=90,
    ),
    Part(
        "partitions",
        "fma_fp32 in partition a beside fma_fp32 in partition b",
        "each within 1% of its solo time a launch",
        partitions.side_by_side,
    ),
    Part(
        "one-partition",
        "Both in one partition",
        "the sharing shows: each about 2 times slower",
        partitions.one_partition,
    ),
    Part(
        "three",
        "Three workers on 40, 40 and 48 SMs, one of them copying",
        "all three at once; the two fma within 2% of solo",
        partitions.three,
    ),
    Part(
        "freeze",
        "Freeze, write(2) to return, 1000 times, spatial",
        "p50 <= 150 us, p99 <= 500 us; no kernel ends while frozen; iterations add up exactly",
        freeze.measure,
    ),
    Part(
        "resize",
        "Live resize 64 to 32 SMs and back",
        "the write returns within 100 ms with the new size in force",
        resize.measure,
    ),
    Part(
        "quota",
        "compute.max",
        "the quota's share of GPU time, within 1 point, over 10 s",
        quota.measure,
        limit_s=90,
    ),
    Part(
        "stream-priority-file",
        "compute.priority under spatial sharing",
        "measured: what order it gives",
        stream_priority.by_file,
    ),
    Part(
        "idle",
        "The idle service with 32 workloads frozen",
        "< 1% of one core, < 60 MiB resident",
        idle.measure,
        fresh=True,
        limit_s=120,
    ),
    Part(
        "priority",
        "Temporal sharing by compute.priority",
        "GPU time in the ratio 16 : 1 for priorities 4 and 8, within 15%; the curve recorded",
        priority.measure,
        sharing="temporal",
        limit_s=150,
    ),
    Part(
        "results",
        "Results after many freezes",
        "equal to the CPU's bit for bit",
        results.measure,
        sharing=None,
    ),
    Part(
        "stream-priority",
        "Stream priorities across MPS clients",
        "measured: what order they give",
        stream_priority.measure,
        sharing=None,
    ),
    Part(
        "read-cost",
        "One control-file read",
        "<= 1.3 times a bare fuser filesystem in the same run",
        read_cost.measure,
        sharing=None,
    ),
)
