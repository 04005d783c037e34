"""compute.max: the share of GPU time that a quota leaves, over 10 s."""

from typing import NamedTuple

from gcg.bench import FMA, Bench
from gcg.figure import Figure, Result, Table, verdict
from gcg.service import Workload

# Quota and period in microseconds; the first is the one with a figure to reach.
_QUOTAS = ((20_000, 100_000), (50_000, 100_000), (5_000, 10_000))
_SECONDS = 10.0
_FREE_SECONDS = 1.0
_TOLERANCE = 1.0


class _Stretch(NamedTuple):
    """A stretch without a quota, and the one with it that followed; growth of counters."""

    quota: int
    period: int
    free_s: float
    free: dict[str, int]
    took_s: float
    grown: dict[str, int]

    def figure(self) -> Figure:
        """Its line."""
        wanted = self.quota / self.period * 100
        share = self.grown["usage_usec"] / self.took_s / 1e4
        work = self.rate() / self.free_rate() * 100
        return Figure(
            f"compute.max {self.quota} {self.period}",
            f"{wanted:.0f}% of GPU time, within {_TOLERANCE:.0f} point, over {_SECONDS:.0f} s",
            f"{share:.2f}% of GPU time; {work:.2f}% of its unthrottled iterations a second",
            f"{self.grown['nr_throttled']} periods throttled in {self.took_s:.2f} s",
            verdict(abs(share - wanted) <= _TOLERANCE),
        )

    def rate(self) -> float:
        """Iterations a second under the quota."""
        return self.grown["nr_iterations"] / self.took_s

    def free_rate(self) -> float:
        """Iterations a second without."""
        return self.free["nr_iterations"] / self.free_s

    def row(self) -> list[str]:
        """Its line of the further table."""
        seconds = [self.grown[key] / 1e6 for key in ("usage_usec", "throttled_usec")]
        return [
            f"{self.quota} {self.period}",
            f"{self.took_s:.3f}",
            *(f"{value:.4f}" for value in seconds),
            str(self.grown["nr_throttled"]),
            f"{self.rate():.3e}",
            f"{self.free_rate():.3e}",
        ]


_HEADER = ["compute.max", "wall s", "usage s", "throttled s", "nr_throttled"]
_HEADER += ["iterations/s", "unthrottled iterations/s"]


def _stretch(bench: Bench, workload: Workload, quota: int, period: int) -> _Stretch:
    workload.write("compute.max", "max")
    free_s, (free,) = bench.counted([workload], _FREE_SECONDS)
    workload.write("compute.max", f"{quota} {period}")
    took_s, (grown,) = bench.counted([workload], _SECONDS)
    return _Stretch(quota, period, free_s, free, took_s, grown)


def measure(bench: Bench) -> Result:
    """Each quota for 10 s, with an unthrottled stretch before each one."""
    workload = bench.launch_frozen(**FMA, blocks="per-sm:1")
    stretches = [_stretch(bench, workload, *quota) for quota in _QUOTAS]
    return Result(
        [stretch.figure() for stretch in stretches],
        [Table("Counters over each stretch", _HEADER, [stretch.row() for stretch in stretches])],
        raw={"stretches": [stretch._asdict() for stretch in stretches]},
    )
