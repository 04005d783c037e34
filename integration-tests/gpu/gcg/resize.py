"""sm.count, written while a worker runs in the partition."""

import gc

from gcg import files, numbers
from gcg.bench import FMA, Bench
from gcg.figure import Figure, Result, Table, verdict
from gcg.samples import Collector, Sample

_CYCLES = 50
_MAX_MS = 100.0
_LAUNCH_US = 500.0
# Between two resizes: reports come every 50 ms and hold the launches since.
_STAY_S = 0.06
# "Doubles": half the SMs for the same blocks.
_DOUBLED = (1.9, 2.1)


def measure(bench: Bench) -> Result:
    """64 to 32 SMs and back, 50 times; the write must return with the size in force."""
    sizes = bench.sizes()
    small = sizes.of(32)
    large = 2 * small
    iterations = bench.iterations(_LAUNCH_US)
    count = bench.service.partition("a", large) / "sm.count"
    workload = bench.launch(**FMA, partition="a", blocks=large, iterations=iterations)
    collector = Collector([workload.path])
    took_ms: dict[int, list[float]] = {small: [], large: []}
    wrong: list[str] = []
    collector.run(_STAY_S)
    gc.disable()
    try:
        for _ in range(_CYCLES):
            for sms in (small, large):
                took_ms[sms].append(files.write(count, str(sms)) / 1e6)
                inside, granted = workload.stat()["sm_count"], int(files.read(count))
                if (inside, granted) != (sms, sms):
                    wrong.append(f"{inside} SMs in gcgroup.stat, {granted} in sm.count, {sms} written")
                collector.run(_STAY_S)
    finally:
        gc.enable()
    return _result(took_ms, wrong, collector.of(workload.path))


def _result(took_ms: dict[int, list[float]], wrong: list[str], samples: list[Sample]) -> Result:
    small, large = took_ms
    every = numbers.spread(took_ms[small] + took_ms[large])
    us = {sms: [s.device_us for s in samples if s.sm_count == sms] for sms in took_ms}
    if not all(us.values()):
        raise RuntimeError("no launches were seen on one of the two sizes")
    slow, fast = numbers.median(us[small]), numbers.median(us[large])
    times = slow / fast
    in_force = Figure(
        f"live resize {large} to {small} to {large} SMs, write(2) to return",
        f"within {_MAX_MS:.0f} ms with the new size in force",
        f"p50 {every.p50:.2f}, p99 {every.p99:.2f}, max {every.max:.2f} ms; "
        + (f"{len(wrong)} times not in force: {wrong[0]}" if wrong else "in force each time"),
        f"{every.n} resizes",
        verdict(every.max <= _MAX_MS and not wrong),
    )
    doubled = Figure(
        f"the same: time of a launch of {large} blocks",
        f"doubles on {small} SMs",
        f"{slow:.1f} us on {small} SMs, {fast:.1f} us on {large} ({times:.3f} times)",
        f"{len(us[small])} and {len(us[large])} launches",
        verdict(_DOUBLED[0] <= times <= _DOUBLED[1]),
    )
    rows = []
    for sms, values in took_ms.items():
        s = numbers.spread(values)
        rows.append([f"to {sms} SMs", str(s.n), *(f"{v:.2f}" for v in s[1:])])
    table = Table(
        "Time of a write to sm.count", ["resize", "n", "p50 ms", "p90 ms", "p99 ms", "max ms"], rows
    )
    raw = {"took_ms": {str(sms): ms for sms, ms in took_ms.items()}, "wrong": wrong}
    raw["device_us"] = {str(sms): values for sms, values in us.items()}
    return Result([in_force, doubled], [table], raw=raw)
