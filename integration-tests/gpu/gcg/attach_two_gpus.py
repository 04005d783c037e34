"""A process with contexts on two GPUs: freezing it on one leaves the other running."""

import subprocess
import time

from gcg import host
from gcg.bench import Bench
from gcg.figure import Figure, Result, Skip, Table, verdict
from gcg.fleet import Attached, Fleet, Spin

_KERNEL_US = 2000.0
_WINDOW_S = 1.0
_WARM_S = 0.3
_LEAST = 0.95
_ENTRY_S = 5.0


def _gpus() -> int:
    program = host.program("nvidia-smi")
    if program is None:
        return 0
    done = subprocess.run([str(program), "-L"], capture_output=True, text=True, timeout=60)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def measure(bench: Bench) -> Result:
    """Each GPU's work while neither, the first, the second and both are frozen."""
    if not bench.sim and (count := _gpus()) < 2:
        raise Skip(f"it takes two GPUs; there is {count}")
    with bench.serving(sim_gpus=2) as service, Fleet(bench) as fleet:
        (first,) = fleet.attach(Spin("both", _KERNEL_US))
        first.go()
        first.program.ask("open 1" if bench.sim else "context 1")
        path = service.root / "processes" / str(first.pid) / "1"
        second = Attached(first.pid, "both", path, first.program)
        until = time.monotonic() + _ENTRY_S
        while not second.has_entry():
            if time.monotonic() > until:
                raise TimeoutError(f"{path} is not there, or not controlled")
            time.sleep(0.01)
        while not bench.sim and len(first.count()["lanes"]) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        rates = {"none": _rates(first)}
        for name, frozen in (("GPU 0", [first]), ("GPU 1", [second]), ("both", [first, second])):
            for one in frozen:
                one.write("compute.freeze", 1)
            rates[name] = _rates(first)
            for one in frozen:
                one.write("compute.freeze", 0)
        rates["none again"] = _rates(first)
    return _simulated(rates) if bench.sim else _result(rates)


def _rates(one: Attached) -> list[float]:
    """What each GPU's kernels do in a second."""
    time.sleep(_WARM_S)
    before = one.count()
    time.sleep(_WINDOW_S)
    after = one.count()
    seconds = (after["ns"] - before["ns"]) / 1e9
    lanes = zip(before["lanes"], after["lanes"], strict=True)
    return [(b["progress"] - a["progress"]) / seconds for a, b in lanes]


def _result(rates: dict[str, list[float]]) -> Result:
    """The program counts for each GPU."""
    free = rates["none"]
    beside = rates["GPU 0"][1] / free[1]
    stood = rates["GPU 0"][0] == 0 and rates["GPU 1"][1] == 0 and rates["both"] == [0, 0]
    figure = Figure(
        "a process with contexts on two GPUs, <pid>/0 frozen",
        f"its work on GPU 1 runs on, at {_LEAST:.0%} of its speed or more; GPU 0's stands",
        f"GPU 1 at {beside:.1%} of its speed; GPU 0 did {rates['GPU 0'][0]:.0f} chunks",
        f"windows of {_WINDOW_S:.0f} s",
        verdict(beside >= _LEAST and stood and rates["none again"][0] > 0),
    )
    rows = [[name, *(f"{value:.0f}" for value in values)] for name, values in rates.items()]
    table = Table("Chunks of kernels a second", ["frozen", "on GPU 0", "on GPU 1"], rows)
    return Result([figure], [table], raw={"rates": rates})


def _simulated(rates: dict[str, list[float]]) -> Result:
    """The simulated program counts both GPUs together."""
    free, first, both = rates["none"][0], rates["GPU 0"][0], rates["both"][0]
    figure = Figure(
        "a process with contexts on two GPUs, <pid>/0 frozen",
        "its work on GPU 1 runs on",
        f"{first:.0f} kernels a second of {free:.0f}; with both frozen {both:.0f}",
        f"windows of {_WINDOW_S:.0f} s",
        verdict(first > 0 and both == 0),
    )
    return Result([figure], raw={"rates": rates})
