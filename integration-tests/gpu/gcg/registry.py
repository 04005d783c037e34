"""The parts, in the order in which they run. Parts with the same service stand together."""

from collections.abc import Callable
from dataclasses import dataclass

from gcg import (
    attach_channels,
    attach_checkpoint,
    attach_count,
    attach_discovery,
    attach_freeze,
    attach_kill,
    attach_log,
    attach_matrix,
    attach_max,
    attach_neighbour,
    attach_others,
    attach_priority,
    attach_results,
    attach_two_gpus,
    freeze,
    idle,
    partitions,
    priority,
    quota,
    read_cost,
    resize,
    results,
    smoke,
    stream_priority,
)
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
    # Whether its service attaches to programs that it did not launch.
    attach: bool = False
    # What `--only` may name instead of each part of it.
    group: str = "workloads"


def _attach(
    name: str,
    title: str,
    to_reach: str,
    run: Callable[[Bench], Result],
    *,
    own_service: bool = False,
    limit_s: float = 90.0,
) -> Part:
    """A part about programs that the service did not launch. Some start services of
    their own."""
    return Part(
        f"attach_{name}",
        title,
        to_reach,
        run,
        sharing=None if own_service else "temporal",
        limit_s=limit_s,
        attach=not own_service,
        group="attach",
    )


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
    _attach(
        "freeze",
        "Freeze of a PyTorch process in the middle of an 8 s kernel",
        "p50 <= 1.0 ms, p99 <= 1.5 ms",
        attach_freeze.measure,
    ),
    _attach(
        "freeze_two",
        "Freezes of several processes at once",
        "two by gcgroup.freeze: p50 <= 1.2 ms for both",
        attach_freeze.together,
    ),
    _attach(
        "neighbour",
        "A kernel of 460 us beside a frozen process",
        "p50 within 1% and p99 within 5% of solo",
        attach_neighbour.measure,
    ),
    _attach(
        "results",
        "Results of PyTorch programs after freezes",
        "bit-equal to an undisturbed run",
        attach_results.measure,
    ),
    _attach(
        "priority",
        "Two equal programs at priorities 4 and 8",
        "GPU time 16 : 1 within 15%",
        attach_priority.measure,
    ),
    _attach(
        "matrix",
        "A server of a language model beside a throughput process",
        "priority 15 on the latter: TPOT p50 <= 1.20 x alone, throughput >= 0.95 x default",
        attach_matrix.measure,
        limit_s=180,
    ),
    _attach(
        "max",
        "compute.max of a PyTorch loop that never pauses",
        "30% of its solo speed within 2 points",
        attach_max.measure,
        limit_s=150,
    ),
    _attach(
        "count",
        "Launches of attached programs",
        "exact, each process its own",
        attach_count.measure,
    ),
    _attach(
        "others",
        "A long stop, and the rest of the host",
        "nobody else waits",
        attach_others.measure,
        limit_s=180,
    ),
    _attach(
        "checkpoint",
        "Freezes beside somebody's checkpoint and beside context creation",
        "recorded: what the driver's own locks add",
        attach_checkpoint.measure,
    ),
    _attach(
        "kill",
        "SIGKILL of a frozen process",
        "memory back to what it was within 1 s",
        attach_kill.process,
    ),
    _attach(
        "discovery",
        "Programs that come and go",
        "the directory is there within 200 ms of the first context, and gone within 200 ms of the end",
        attach_discovery.measure,
        limit_s=120,
    ),
    _attach(
        "new_channels",
        "Channel groups that appear later",
        "frozen, or at the timeslice, within 200 ms",
        attach_channels.measure,
    ),
    _attach(
        "kill_service",
        "SIGKILL of the service while four are frozen",
        "all run again within 2 s",
        attach_kill.service,
        own_service=True,
    ),
    _attach(
        "count_cost",
        "What counting costs a program",
        "at most 15% of a 5 us launch, unmeasurable for a real model",
        attach_count.cost,
        own_service=True,
    ),
    _attach(
        "log",
        "The kernel log",
        "no line in steady state with four programs; no Xid",
        attach_log.measure,
        own_service=True,
        limit_s=150,
    ),
    _attach(
        "two_gpus",
        "A process on two GPUs, frozen on one",
        "its work on the other runs on",
        attach_two_gpus.measure,
        own_service=True,
    ),
    _attach(
        "matrix_mps",
        "The same pair under plain MPS",
        "recorded",
        attach_matrix.under_mps,
        own_service=True,
        limit_s=150,
    ),
)
