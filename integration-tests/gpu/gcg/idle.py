"""The service with 32 frozen workloads and nobody who reads."""

import time
from concurrent.futures import ThreadPoolExecutor

from gcg import process
from gcg.bench import Bench
from gcg.figure import Figure, Result, Table, verdict

_WORKLOADS = 32
# Launches at once: most of a launch is the driver's work in the worker.
_AT_ONCE = 8
# Until reports are rare again: a reader is thought to be there for 2 s.
_SETTLE_S = 3.0
_SECONDS = 20.0
_CPU_PERCENT, _RESIDENT_MIB = 1.0, 60.0


def measure(bench: Bench) -> Result:
    """CPU time of all the service's threads over 20 s, and its VmRSS."""

    def launch(_: int) -> int:
        return bench.launch_frozen(kernel="fma_fp32", blocks=1, threads=32, iterations=1000).pid

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        workers = list(pool.map(launch, range(_WORKLOADS)))
    time.sleep(_SETTLE_S)
    service = bench.service.pid
    watched = [service, *workers]
    began = time.monotonic()
    before = {pid: process.cpu_seconds(pid) for pid in watched}
    time.sleep(_SECONDS)
    took = time.monotonic() - began
    used = {pid: process.cpu_seconds(pid) - before[pid] for pid in watched}
    resident = process.resident_kib(service) / 1024
    percent = used[service] / took * 100
    of_workers = sum(used[pid] for pid in workers) / took * 100
    figures = [
        Figure(
            f"the idle service with {_WORKLOADS} workloads frozen: CPU time",
            f"< {_CPU_PERCENT:.0f}% of one core",
            f"{percent:.2f}% ({used[service]:.2f} s in {took:.1f} s)",
            f"{took:.0f} s, in ticks of 10 ms",
            verdict(percent < _CPU_PERCENT),
        ),
        Figure(
            "the same: resident memory (VmRSS)",
            f"< {_RESIDENT_MIB:.0f} MiB",
            f"{resident:.1f} MiB",
            "1 reading",
            verdict(resident < _RESIDENT_MIB),
        ),
    ]
    rows = [
        ["gcgroupd", f"{percent:.2f}%", f"{resident:.1f}"],
        [
            f"its {_WORKLOADS} workers together",
            f"{of_workers:.2f}%",
            f"{sum(process.resident_kib(pid) for pid in workers) / 1024:.0f}",
        ],
    ]
    table = Table("CPU and memory", ["process", "of one core", "VmRSS MiB"], rows)
    raw = {
        "seconds": took,
        "cpu_s": {str(pid): s for pid, s in used.items()},
        "service": service,
        "resident_mib": resident,
    }
    return Result(figures, [table], raw=raw)
