"""What a read costs beside a bare fuser filesystem: runs the example of the package fs."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from gcg.bench import Bench
from gcg.figure import Figure, Result, Skip, verdict

_LIMIT_S = 90.0
_MOST = 1.3
# file, kind of read, then microseconds and their ratio, all that the example prints.
_LINE = re.compile(r"(\S+) +(\S.*?\S)((?: +\d+\.\d+){5})")


class _Line(NamedTuple):
    """Percentiles of one kind of read of one file, microseconds."""

    file: str
    kind: str
    bare_p50: float
    ours_p50: float
    bare_p99: float
    ours_p99: float
    ratio: float


def _find(directory: Path) -> Path:
    places = [directory, directory / "examples", directory.parent / "release" / "examples"]
    for place in places:
        if (place / "read_cost").is_file():
            return place / "read_cost"
    raise Skip("the example read_cost is not built: cargo build --release -p gcgroup-fs --example read_cost")


def parse(text: str) -> list[_Line]:
    """The lines with figures."""
    found = (_LINE.fullmatch(line.strip()) for line in text.splitlines())
    return [_Line(m[1], m[2], *map(float, m[3].split())) for m in found if m is not None]


def measure(bench: Bench) -> Result:
    """Runs it; the worst file of each kind of read counts."""
    program = _find(bench.directory)
    done = subprocess.run(
        [str(program)], capture_output=True, text=True, timeout=_LIMIT_S, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise RuntimeError(f"read_cost ended with status {done.returncode}: {done.stderr.strip()}")
    lines = parse(done.stdout)
    if not lines:
        raise RuntimeError(f"read_cost printed no figures: {done.stdout.strip()}")
    count = done.stdout.split(maxsplit=1)[0]
    result = Result(raw={"output": done.stdout})
    for kind in dict.fromkeys(line.kind for line in lines):
        of_kind = [line for line in lines if line.kind == kind]
        worst = max(of_kind, key=lambda line: line.ratio)
        medians = f"{worst.ours_p50:.2f} us, bare {worst.bare_p50:.2f} us"
        result.figures.append(
            Figure(
                f"one control-file read, {kind}",
                f"<= {_MOST} times a bare fuser filesystem in the same run",
                f"{worst.ratio:.3f} times: {medians} ({worst.file})",
                f"{len(of_kind)} files, {count} reads of each",
                verdict(worst.ratio <= _MOST),
            )
        )
    result.notes.append(f"Output of read_cost:\n\n```\n{done.stdout.strip()}\n```")
    return result
