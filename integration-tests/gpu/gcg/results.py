"""Results on the GPU after many freezes, compared with the CPU's.

Each thread's accumulator tells how many iterations it had: in fma_fp32 it follows a
chaotic map, in mul_fp64 each iteration is the next smaller double. So an iteration
that was lost or repeated once changes the result for good.
"""

import random
import time
from typing import NamedTuple

from gcg.bench import Bench
from gcg.figure import Figure, Result, verdict
from gcg.worker import Rig


class _Case(NamedTuple):
    """A kernel and how often it is frozen; running stretches in microseconds."""

    kernel: str
    freezes: int
    run_us: tuple[int, int]


# For fma_fp32 the CPU repeats the iterations of some thousand chains one by one, so it
# runs for milliseconds only; mul_fp64 has a closed form.
_CASES = (_Case("fma_fp32", 100, (50, 250)), _Case("mul_fp64", 1000, (300, 1500)))


def _freeze_and_compare(rig: Rig, case: _Case) -> tuple[dict[str, int], int, int]:
    """Counters at the end, values compared, and values that differed."""
    rng = random.Random(5)
    workers = rig.workers(1)
    worker = workers[0]
    worker.prepare(kernel=case.kernel, blocks=rig.sm_count, form="sliced", iterations=None)
    worker.call("start")
    for _ in range(case.freezes):
        time.sleep(rng.uniform(*case.run_us) / 1e6)
        worker.call({"freeze": True})
        worker.call({"freeze": False})
    counters = worker.call({"freeze": True})["counters"]
    compared, wrong = worker.verify()
    rig.retire(workers)
    return counters, compared, wrong


def measure(bench: Bench) -> Result:
    """Freezes workers by hand and has them compare."""
    result = Result()
    with bench.rig() as rig:
        for case in _CASES:
            counters, compared, wrong = _freeze_and_compare(rig, case)
            result.raw[case.kernel] = {"counters": counters, "compared": compared, "wrong": wrong}
            result.figures.append(
                Figure(
                    f"{case.kernel} after many freezes: results on the GPU against the CPU's",
                    "equal bit for bit: no iteration lost or repeated",
                    f"{wrong} of {compared} values differ",
                    f"{counters['nr_freezes']} freezes, {counters['ended']} launches",
                    verdict(wrong == 0 and compared > 0),
                )
            )
    return result
