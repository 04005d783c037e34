"""Results of PyTorch programs that were frozen on the way, against undisturbed runs."""

import os
import random
import time
from typing import Any

from gcg.bench import Bench
from gcg.figure import Figure, Result, Table, verdict
from gcg.fleet import Attached, Fleet
from gcg.program import Program

# Each job with its words for people; a run of one shall take about so long, seconds.
_JOBS = {
    "matmul": "matrix products",
    "graph": "CUDA graph replays",
    "train": "a training loop with fixed seed",
}
_JOB_S = 1.0
# Steps of two short runs, whose difference tells how long a step takes.
_SHORT, _SHORTER = 120, 20
_LEAST, _MOST = 20, 50_000
_FREEZES = 5
# Random stretches, seconds.
_RUN_S, _STOP_S = (0.002, 0.06), (0.001, 0.08)


def _disturbed(program: Attached, command: str, rng: random.Random) -> tuple[dict[str, Any], int]:
    """A run with freezes at random moments: its answer, and how many there were."""
    program.program.send(command)
    freezes = 0
    while not program.program.answered():
        time.sleep(rng.uniform(*_RUN_S))
        if program.program.answered():
            break
        program.write("compute.freeze", 1)
        time.sleep(rng.uniform(*_STOP_S))
        program.write("compute.freeze", 0)
        freezes += 1
    return program.program.wait(), freezes


def _steps(program: Program, job: str) -> int:
    """How many steps of a job take about as long as it shall."""
    took = [program.ask(f"run {job} {steps}")["took_s"] for steps in (_SHORTER, _SHORT)]
    step_s = max(float(took[1] - took[0]) / (_SHORT - _SHORTER), _JOB_S / _MOST)
    return max(round(_JOB_S / step_s), _LEAST)


def measure(bench: Bench) -> Result:
    """Each job twice undisturbed, once disturbed in the same process, and undisturbed
    once more."""
    seed = int.from_bytes(os.urandom(4))
    rng = random.Random(seed)
    result = Result(notes=[f"Moments of freezes and thaws were drawn from seed {seed}."])
    rows = []
    with Fleet(bench) as fleet:
        fleet.await_proof()
        program = fleet.start_torch("results")
        program.wait_ready()
        (attached,) = fleet.adopt(program)
        print(f"  seed {seed}", flush=True)
        for job, words in _JOBS.items():
            command = f"run {job} {_steps(program, job)}"
            runs = [program.ask(command) for _ in range(2)]
            disturbed, freezes = _disturbed(attached, command, rng)
            runs.append(program.ask(command))
            result.figures.append(_figure(words, runs, disturbed, freezes))
            rows.append([job, command.split()[-1], *(f"{one['took_s']:.2f}" for one in [*runs, disturbed])])
            result.raw[job] = {"undisturbed": runs, "disturbed": disturbed, "freezes": freezes}
    header = ["job", "steps", "undisturbed s", "again s", "again s", "disturbed s"]
    result.tables.append(Table("Time of each run, stops included", header, rows))
    return result


def _figure(words: str, runs: list[dict[str, Any]], disturbed: dict[str, Any], freezes: int) -> Figure:
    undisturbed = {one["digest"] for one in runs}
    if len(undisturbed) > 1:
        measured = "undisturbed runs differ from each other: nothing can be said"
    elif disturbed["digest"] in undisturbed:
        measured = f"equal: {disturbed['values']} values, digest {disturbed['digest'][:16]}"
    else:
        measured = f"different: {disturbed['digest'][:16]}, undisturbed {runs[0]['digest'][:16]}"
    equal = undisturbed == {disturbed["digest"]} and disturbed["finite"]
    return Figure(
        f"results after freezes at random moments: {words}",
        "bit-equal to an undisturbed run",
        measured,
        f"{freezes} freezes in the run; {len(runs)} undisturbed ones",
        verdict(equal and freezes >= _FREEZES),
    )
