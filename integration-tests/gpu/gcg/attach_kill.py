"""SIGKILL: of a frozen process, and of the service while it has frozen others."""

import time

from gcg import numbers
from gcg.bench import Bench
from gcg.figure import Figure, Result, Table, verdict
from gcg.fleet import Attached, Fleet, Spin, await_progress, stands
from gcg.nvml import Nvml

_TIMES = 5
_MEMORY = 2 << 30
_KERNEL_US, _SIM_KERNEL_US = 500_000.0, 2000.0
_BACK_S, _RUN_S = 1.0, 2.0
# Until waiting has no sense any more, seconds.
_GIVE_UP_S = 10.0
# How far device memory may be from what it was: what the driver keeps for itself.
_NEAR = 64 << 20
_FROZEN, _DEATHS = 4, 2


class _Memory:
    """Device memory in use: by NVML, on the simulated GPU by its file."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._nvml = None if fleet.bench.sim else Nvml(fleet.bench.uuid)

    def used(self) -> int:
        """Bytes."""
        if self._nvml is None:
            return int(self._fleet.service.device("memory.current"))
        return self._nvml.used()


def process(bench: Bench) -> Result:
    """A frozen process is killed: how long until its memory is back."""
    back_ms: list[float | None] = []
    gone_ms: list[float] = []
    with Fleet(bench) as fleet:
        fleet.await_proof()
        memory = _Memory(fleet)
        for number in range(_TIMES):
            # The simulated figure is sampled.
            time.sleep(1.2 if bench.sim else 0.2)
            before = memory.used()
            kernel_us = _SIM_KERNEL_US if bench.sim else _KERNEL_US
            (one,) = fleet.attach(Spin(f"killed-{number}", kernel_us, memory=_MEMORY))
            one.go()
            time.sleep(0.1)
            one.write("compute.freeze", 1)
            began = time.monotonic_ns()
            one.program.kill()
            back_ms.append(_until_back(memory, before, began))
            one.program.wait_ended(_GIVE_UP_S)
            while one.path.exists() and time.monotonic_ns() < began + _GIVE_UP_S * 1e9:
                time.sleep(0.002)
            gone_ms.append((time.monotonic_ns() - began) / 1e6)
            fleet.retire([one])
    seen = [ms for ms in back_ms if ms is not None]
    figure = Figure(
        f"SIGKILL of a frozen process with {_MEMORY >> 30} GiB",
        f"memory back to what it was within {_BACK_S:.0f} s",
        f"p50 {numbers.median(seen):.0f}, max {max(seen):.0f} ms; directory gone after at most "
        f"{max(gone_ms):.0f} ms"
        if len(seen) == len(back_ms)
        else "memory was left behind",
        f"{len(back_ms)} times",
        verdict(len(seen) == len(back_ms) and max(seen) <= _BACK_S * 1e3),
    )
    return Result([figure], raw={"memory_back_ms": back_ms, "directory_gone_ms": gone_ms})


def _until_back(memory: _Memory, before: int, began: int) -> float | None:
    """Milliseconds until no more memory is in use than before."""
    while (now := time.monotonic_ns()) < began + _GIVE_UP_S * 1e9:
        if memory.used() <= before + _NEAR:
            return (time.monotonic_ns() - began) / 1e6
        time.sleep(0.002 if now < began + 2e9 else 0.05)
    return None


def service(bench: Bench) -> Result:
    """The service is killed while four are frozen, twice: how long until all run."""
    deaths: list[list[float | None]] = []
    after: list[bool] = []
    for _ in range(_DEATHS):
        with bench.serving(killed=True) as killed, Fleet(bench) as fleet:
            kernel_us = _SIM_KERNEL_US if bench.sim else _KERNEL_US
            names = [f"frozen-{i}" for i in range(_FROZEN)]
            frozen = fleet.attach(*(Spin(name, kernel_us) for name in names))
            for one in frozen:
                one.go()
            time.sleep(0.3)
            fleet.service.freeze(frozen)
            if not all(stands(one) for one in frozen):
                raise RuntimeError("a program ran while it was frozen")
            at = [one.progress() for one in frozen]
            began = time.monotonic_ns()
            killed.kill()
            deaths.append(_until_running(frozen, at, began))
            time.sleep(0.5)
            after.append(not any(stands(one, 0.1) for one in frozen))
    return _deaths(deaths, after)


def _until_running(frozen: list[Attached], at: list[int], began: int) -> list[float | None]:
    """Milliseconds until each was seen to be further."""
    found: list[float | None] = []
    for one, beyond in zip(frozen, at, strict=True):
        left = _GIVE_UP_S - (time.monotonic_ns() - began) / 1e9
        seen = await_progress(one, beyond, max(left, 0.1))
        found.append(None if seen is None else (seen - began) / 1e6)
    return found


def _deaths(deaths: list[list[float | None]], after: list[bool]) -> Result:
    times = [ms for death in deaths for ms in death if ms is not None]
    missing = sum(ms is None for death in deaths for ms in death)
    measured = f"all after p50 {numbers.median(times):.0f}, max {max(times):.0f} ms" if times else "none runs"
    figure = Figure(
        f"SIGKILL of the service while {_FROZEN} are frozen",
        f"all {_FROZEN} run again within {_RUN_S:.0f} s",
        measured + (f"; {missing} did not run again" if missing else ""),
        f"{len(deaths)} deaths, {_FROZEN} programs each",
        verdict(not missing and max(times) <= _RUN_S * 1e3 and all(after)),
    )
    rows = [
        [str(number), *("never" if ms is None else f"{ms:.0f}" for ms in death)]
        for number, death in enumerate(deaths)
    ]
    header = ["death", *(f"program {i} ms" for i in range(_FROZEN))]
    table = Table("From the signal to the first progress", header, rows)
    return Result([figure], [table], raw={"deaths_ms": deaths, "all_run_afterwards": after})
