"""How soon a program has its directory, and how soon it loses it."""

import os
import select
import time
from dataclasses import dataclass

from gcg import numbers
from gcg.bench import Bench
from gcg.figure import Figure, Result, Table, verdict
from gcg.fleet import Attached, Fleet, Spin
from gcg.nvml import Nvml
from gcg.program import Program, SimProgram

_TIMES, _TORCH_TIMES = 20, 2
_WITHIN_MS = 200.0
_GIVE_UP_S = 10.0
_MEMORY = 512 << 20
_LOOK_S = 0.001
# Its first figure after a pause may be a second old, which is waited for in some.
_MEMORY_EVERY = 5


@dataclass
class _Life:
    """One program, in milliseconds."""

    kind: str
    # From its first CUDA call, and from its context, to the directory.
    from_call: float | None
    from_context: float
    # From the moment in which it had ended to the end of the directory.
    gone: float
    # memory.current against what NVML says, bytes; looked at in some.
    memory: tuple[int, int | None] | None


def _await(path_there: bool, one: Attached) -> int:
    """When its directory came, or went, on CLOCK_MONOTONIC, ns."""
    until = time.monotonic() + _GIVE_UP_S
    while one.path.exists() != path_there:
        if time.monotonic() > until:
            raise TimeoutError(f"{one.path} {'did not come' if path_there else 'did not go'}")
        time.sleep(_LOOK_S)
    return time.monotonic_ns()


def _ended(pid: int, program: Program, kill: bool) -> int:
    """Ends it and waits until it has ended; when that was, ns."""
    pidfd = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if kill:
            program.kill()
        else:
            program.ask_to_end()
        if not poller.poll(_GIVE_UP_S * 1000):
            raise TimeoutError(f"{pid} does not end")
        return time.monotonic_ns()
    finally:
        os.close(pidfd)


def _live(fleet: Fleet, spin: Spin, nvml: Nvml | None, number: int) -> _Life:
    bench = fleet.bench
    program: Program
    if bench.sim:
        state = fleet.service.state
        program = SimProgram.launch(bench.gcgroupd, state, spin.sim_arguments(), bench.programs_log)
    else:
        program = (fleet.start_torch if spin.torch else fleet.start)("spin", *spin.arguments())
    one = fleet.attached(program)
    came = _await(True, one)
    program.wait_ready()
    context = program.facts.get("context", program.started_ns)
    call = program.facts.get("first_call")
    memory = _memory(one, nvml) if nvml is not None and number % _MEMORY_EVERY == 0 else None
    ended = _ended(program.pid, program, kill=bool(number % 2))
    gone = _await(False, one)
    fleet.retire([program])
    return _Life(
        "PyTorch" if spin.torch else "bare",
        None if call is None else (came - call) / 1e6,
        # It may be there before the program itself knows that it has a context.
        max((came - context) / 1e6, 0.0),
        max((gone - ended) / 1e6, 0.0),
        memory,
    )


def _memory(one: Attached, nvml: Nvml) -> tuple[int, int | None]:
    """Both figures, once they had time to be the same."""
    until = time.monotonic() + 1.5
    while True:
        shown = int(one.read("memory.current"))
        wanted = nvml.processes().get(one.pid)
        if shown == wanted or time.monotonic() > until:
            return shown, wanted
        time.sleep(0.02)


def measure(bench: Bench) -> Result:
    """Programs one after the other, half of them killed."""
    with Fleet(bench) as fleet:
        fleet.await_proof()
        nvml = None if bench.sim else Nvml(bench.uuid)
        spin = Spin("bare", 1000, memory=_MEMORY)
        lives = [_live(fleet, spin, nvml, number) for number in range(_TIMES)]
        if not bench.sim:
            torch = Spin("torch", 1000, torch=True, memory=_MEMORY)
            lives += [_live(fleet, torch, nvml, number) for number in range(_TORCH_TIMES)]
    return _result(lives)


def _result(lives: list[_Life]) -> Result:
    came = numbers.spread([life.from_context for life in lives])
    gone = numbers.spread([life.gone for life in lives])
    calls = [life.from_call for life in lives if life.from_call is not None]
    since_call = f"; from the first CUDA call p50 {numbers.median(calls):.0f} ms" if calls else ""
    known = [life.memory for life in lives if life.memory is not None]
    equal = sum(shown == wanted for shown, wanted in known)
    figures = [
        Figure(
            "a new program's directory, from its first context",
            f"within {_WITHIN_MS:.0f} ms",
            f"p50 {came.p50:.0f}, p99 {came.p99:.0f}, max {came.max:.0f} ms{since_call}",
            f"{came.n} programs",
            verdict(came.max <= _WITHIN_MS),
        ),
        Figure(
            "the directory of a program that ended, from its end",
            f"gone within {_WITHIN_MS:.0f} ms",
            f"p50 {gone.p50:.1f}, p99 {gone.p99:.1f}, max {gone.max:.1f} ms",
            f"{gone.n} programs, half of them killed",
            verdict(gone.max <= _WITHIN_MS),
        ),
    ]
    if known:
        figures.append(
            Figure(
                "memory.current against NVML's figure",
                "equal",
                f"{equal} of {len(known)} equal",
                f"{len(known)} programs of {_MEMORY >> 20} MiB and their contexts",
                verdict(equal == len(known)),
            )
        )
    rows = []
    for kind in dict.fromkeys(life.kind for life in lives):
        of = [life for life in lives if life.kind == kind]
        series = {
            "from its first CUDA call to its directory": [x.from_call for x in of if x.from_call is not None],
            "from its context to its directory": [x.from_context for x in of],
            "from its end to the directory's": [x.gone for x in of],
        }
        for what, values in series.items():
            if values:
                s = numbers.spread(values)
                rows.append([kind, what, str(s.n), *(f"{v:.1f}" for v in s[1:])])
    header = ["program", "time", "n", "p50 ms", "p90 ms", "p99 ms", "max ms"]
    raw = {"lives": [life.__dict__ for life in lives]}
    return Result(figures, [Table("Comings and goings", header, rows)], raw=raw)
