"""A kernel's results after many freezes, compared with the CPU's.

Each thread of fma_fp32 follows a chaotic map, so an iteration that was lost or
repeated once changes its result for good.
"""

import random
import time

from gcg.bench import Bench
from gcg.figure import Figure, Result, verdict

_FREEZES = 100
# Running stretches, microseconds. The CPU repeats the iterations of some thousand
# threads one by one, each at about a fifth of the GPU's pace for all of them, so the
# time is kept short.
_RUN_US = (50, 250)


def measure(bench: Bench) -> Result:
    """Freezes a worker by hand and has it compare."""
    rng = random.Random(5)
    with bench.rig() as rig:
        (worker,) = rig.workers(1)
        worker.prepare(blocks=rig.sm_count, form="sliced", iterations=None)
        worker.call("start")
        for _ in range(_FREEZES):
            time.sleep(rng.uniform(*_RUN_US) / 1e6)
            worker.call({"freeze": True})
            worker.call({"freeze": False})
        counters = worker.call({"freeze": True})["counters"]
        compared, wrong = worker.verify()
    figure = Figure(
        "iterations after many freezes: results on the GPU against the CPU's",
        "equal bit for bit: no iteration lost or repeated",
        f"{wrong} of {compared} values differ",
        f"{_FREEZES + 1} freezes, {counters['ended']} launches",
        verdict(wrong == 0 and compared > 0),
    )
    return Result([figure], raw={"counters": counters, "compared": compared, "wrong": wrong})
