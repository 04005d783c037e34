"""compute.max: the share of GPU time that a quota leaves, over 10 s."""

import random

from gcg.bench import FMA, Bench
from gcg.figure import Figure, Result, Table, verdict

# Quota and period in microseconds; the first is the one with a figure to reach.
_QUOTAS = ((20_000, 100_000), (50_000, 100_000), (5_000, 10_000))
_SECONDS = 10.0
_FREE_SECONDS = 1.0
_TOLERANCE = 1.0


def measure(bench: Bench) -> Result:
    """Each quota for 10 s, with an unthrottled stretch before each one."""
    workload = bench.launch_frozen(**FMA, blocks="per-sm:1")
    result = Result()
    rows = []
    # In another order than by size, so that a drift is not taken for an effect.
    order = list(_QUOTAS)
    random.Random(1).shuffle(order)
    found = {}
    for quota, period in order:
        workload.write("compute.max", "max")
        free_s, (free,) = bench.counted([workload], _FREE_SECONDS)
        workload.write("compute.max", f"{quota} {period}")
        took_s, (grown,) = bench.counted([workload], _SECONDS)
        found[quota, period] = (free_s, free, took_s, grown)
    for (quota, period), (free_s, free, took_s, grown) in sorted(found.items(), key=lambda i: _QUOTAS.index(i[0])):
        share = grown["usage_usec"] / took_s / 1e4
        wanted = quota / period * 100
        work = grown["nr_iterations"] / took_s / (free["nr_iterations"] / free_s) * 100
        result.figures.append(
            Figure(
                f"compute.max {quota} {period}",
                f"{wanted:.0f}% of GPU time, within {_TOLERANCE:.0f} point, over {_SECONDS:.0f} s",
                f"{share:.2f}% of GPU time; {work:.2f}% of its unthrottled iterations a second",
                f"{grown['nr_throttled']} periods throttled in {took_s:.2f} s",
                verdict(abs(share - wanted) <= _TOLERANCE),
            )
        )
        rows.append(
            [
                f"{quota} {period}",
                f"{took_s:.3f}",
                f"{grown['usage_usec'] / 1e6:.4f}",
                f"{grown['throttled_usec'] / 1e6:.4f}",
                str(grown["nr_throttled"]),
                f"{grown['nr_iterations'] / took_s:.3e}",
                f"{free['nr_iterations'] / free_s:.3e}",
            ]
        )
        result.raw[f"{quota} {period}"] = {"seconds": took_s, "grown": grown, "free_seconds": free_s, "free": free}
    header = ["compute.max", "wall s", "usage s", "throttled s", "nr_throttled", "iterations/s", "unthrottled iterations/s"]
    result.tables.append(Table("Counters over each stretch", header, rows))
    return result
