"""Channel groups that appear later: a program's settings reach them too."""

import time
from typing import Any

from gcg.bench import Bench
from gcg.figure import Figure, Result, Table, verdict
from gcg.fleet import Attached, Fleet, Spin
from gcg.priority import slice_us

_WITHIN_MS = 200.0
_KERNEL_US = 1000.0
_PRIORITY = 12
# How long a new lane is watched for progress while all is frozen, seconds.
_WATCH_S = 1.5
_GIVE_UP_S = 5.0
# Deeds of the program, and what the simulated one has for them.
_DEEDS = {"stream": "group", "context": "open 0"}
_ROUNDS = 3


def _command(bench: Bench, deed: str) -> str:
    if bench.sim:
        return _DEEDS[deed]
    return "context 0" if deed == "context" else deed


def _frozen(bench: Bench, one: Attached, deed: str) -> dict[str, Any]:
    """The program makes something new while it is frozen: how long that ran."""
    one.write("compute.freeze", 1)
    groups = one.stat().get("channel_groups", 0)
    before = one.count()
    began = time.monotonic_ns()
    one.program.ask(_command(bench, deed))
    # On the simulated GPU progress is that of all lanes together.
    last, moved_ns, born_ns = _sum(before), began, began
    until = time.monotonic() + _WATCH_S
    while time.monotonic() < until:
        now = one.count()
        if _sum(now) != last:
            last, moved_ns = _sum(now), now["ns"]
        if len(now["lanes"]) > len(before["lanes"]):
            born_ns = now["lanes"][-1]["begun_ns"]
        time.sleep(0.002)
    after = one.stat().get("channel_groups", 0)
    waited = not bench.sim and len(now["lanes"]) == len(before["lanes"])
    one.write("compute.freeze", 0)
    runs = _await_lane(bench, one, len(before["lanes"]), last)
    return {
        "deed": deed,
        "ran_ms": max(moved_ns - born_ns, 0) / 1e6 if _sum(before) != last else 0.0,
        "waited_for_the_thaw": waited,
        "groups": (groups, after),
        "runs_after_thaw": runs,
    }


def _sum(count: dict[str, Any]) -> int:
    return sum(lane["progress"] for lane in count["lanes"])


def _await_lane(bench: Bench, one: Attached, lanes: int, beyond: int) -> bool:
    """Whether, once thawed, the new lane is there and all runs."""
    until = time.monotonic() + _GIVE_UP_S
    while time.monotonic() < until:
        now = one.count()
        born = bench.sim or len(now["lanes"]) > lanes
        if born and _sum(now) > beyond and (bench.sim or now["lanes"][-1]["progress"] > 0):
            return True
        time.sleep(0.005)
    return False


def _prioritised(bench: Bench, one: Attached, deed: str) -> dict[str, Any]:
    """The same at a priority: how long until the new groups are known at its timeslice."""
    one.write("compute.priority", _PRIORITY)
    before = one.stat()
    lanes = len(one.count()["lanes"])
    began = time.monotonic_ns()
    one.program.ask(_command(bench, deed))
    while not bench.sim:
        now = one.count()
        if len(now["lanes"]) > lanes:
            began = now["lanes"][-1]["begun_ns"]
            break
        if time.monotonic_ns() > began + _GIVE_UP_S * 1e9:
            raise TimeoutError(f"the program made no {deed}")
        time.sleep(0.001)
    took_ms = None
    while time.monotonic_ns() < began + _GIVE_UP_S * 1e9:
        stat = one.stat()
        grown = stat["channel_groups"] > before["channel_groups"]
        if grown and stat.get("timeslice_usec") == slice_us(_PRIORITY):
            took_ms = (time.monotonic_ns() - began) / 1e6
            break
        # A stream of an old context may have no group of its own.
        if deed == "stream" and time.monotonic_ns() > began + 1e9:
            break
        time.sleep(0.002)
    after = one.stat()
    one.write("compute.priority", 8)
    groups = (before["channel_groups"], after["channel_groups"])
    return {"deed": deed, "took_ms": took_ms, "groups": groups, "timeslice_usec": after.get("timeslice_usec")}


def measure(bench: Bench) -> Result:
    """Streams and contexts, while frozen and while at priority 12."""
    frozen, prioritised = [], []
    for number in range(_ROUNDS):
        for deed in _DEEDS:
            with Fleet(bench) as fleet:
                (one,) = fleet.attach(Spin(f"{deed}-{number}", _KERNEL_US))
                one.go()
                time.sleep(0.1)
                frozen.append(_frozen(bench, one, deed))
                prioritised.append(_prioritised(bench, one, deed))
    return _result(frozen, prioritised)


def _result(frozen: list[dict[str, Any]], prioritised: list[dict[str, Any]]) -> Result:
    longest = max(found["ran_ms"] for found in frozen)
    waited = sum(found["waited_for_the_thaw"] for found in frozen)
    run = all(found["runs_after_thaw"] for found in frozen)
    # A deed that made no group has nothing that could be set.
    new = [found for found in prioritised if found["groups"][1] > found["groups"][0]]
    took = [found["took_ms"] for found in new]
    known = [ms for ms in took if ms is not None]
    right = all(found["timeslice_usec"] == slice_us(_PRIORITY) for found in prioritised)
    figures = [
        Figure(
            "streams and contexts made while frozen: how long they ran",
            f"frozen within {_WITHIN_MS:.0f} ms; all runs after the thaw",
            f"at most {longest:.0f} ms; {waited} of {len(frozen)} were not made before the thaw"
            + ("" if run else "; not all ran after the thaw"),
            f"{len(frozen)} made",
            verdict(longest <= _WITHIN_MS and run),
        ),
        Figure(
            f"channel groups made at priority {_PRIORITY}: until gcgroup.stat has them at its timeslice",
            f"within {_WITHIN_MS:.0f} ms",
            (f"at most {max(known):.0f} ms" if known else "no new group was seen")
            + (f"; {len(took) - len(known)} never" if len(took) > len(known) else "")
            + ("" if right else "; a timeslice is not what was set"),
            f"{len(new)} of {len(prioritised)} streams and contexts made groups",
            verdict(bool(known) and len(known) == len(took) and max(known) <= _WITHIN_MS and right),
        ),
    ]
    rows = []
    for found in frozen:
        groups = " to ".join(map(str, found["groups"]))
        words = (
            "not made before the thaw" if found["waited_for_the_thaw"] else f"ran {found['ran_ms']:.0f} ms"
        )
        rows.append([found["deed"], "frozen", groups, words])
    for found in prioritised:
        groups = " to ".join(map(str, found["groups"]))
        took_ms = "-" if found["took_ms"] is None else f"known after {found['took_ms']:.0f} ms"
        rows.append([found["deed"], f"priority {_PRIORITY}", groups, took_ms])
    table = Table("What was made", ["made", "while", "channel groups", "what was seen"], rows)
    return Result(figures, [table], raw={"frozen": frozen, "prioritised": prioritised})
