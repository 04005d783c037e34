"""The outcomes as Markdown for docs/measurements, and as JSON with every raw value."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcg.figure import Figure, Table
from gcg.runner import Outcome

_LABELS = {
    "date": "Date",
    "gpu": "GPU",
    "driver": "Driver",
    "kernel": "Kernel",
    "cpus": "CPUs",
    "version": "Version",
    "kernel_log": "Kernel log",
    "command": "Command",
}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _figures(figures: Sequence[Figure]) -> str:
    rows = [[f.name, f.to_reach, f.measured, f.n, str(f.verdict)] for f in figures]
    return _table(["figure", "to reach", "measured", "n", "verdict"], rows)


def _further(table: Table) -> str:
    return f"{table.title}:\n\n{_table(table.header, table.rows)}"


def markdown(facts: dict[str, str], outcomes: Sequence[Outcome], forced: Sequence[str]) -> str:
    """The whole report."""
    facts = {**facts, "command": f"`{facts['command']}`"}
    head = _table(["", ""], [[label, facts[key]] for key, label in _LABELS.items() if key in facts])
    figures = [figure for outcome in outcomes for figure in outcome.result.figures]
    parts = [f"# Measurements: {facts['gpu']}\n", head, "## Figures\n", _figures(figures)]
    if forced:
        parts.append("Ended by force:\n\n" + "\n".join(f"- {text}" for text in forced) + "\n")
    parts += [_part(outcome) for outcome in outcomes]
    return "\n".join(parts)


def _part(outcome: Outcome) -> str:
    part, result = outcome.part, outcome.result
    text = [f"## {part.title}\n", f"`measure --only {part.name}`, {outcome.seconds:.0f} s.\n"]
    text += [_further(table) for table in result.tables]
    text += [f"{note}\n" for note in result.notes]
    return "\n".join(text)


def as_json(facts: dict[str, Any], outcomes: Sequence[Outcome], forced: Sequence[str]) -> dict[str, Any]:
    """Everything, raw values too."""
    return {
        "facts": facts,
        "forced": list(forced),
        "parts": {
            outcome.part.name: {
                "title": outcome.part.title,
                "seconds": outcome.seconds,
                "figures": [
                    {
                        "name": f.name,
                        "to_reach": f.to_reach,
                        "measured": f.measured,
                        "n": f.n,
                        "verdict": str(f.verdict),
                    }
                    for f in outcome.result.figures
                ],
                "tables": [
                    {"title": t.title, "header": t.header, "rows": t.rows} for t in outcome.result.tables
                ],
                "notes": outcome.result.notes,
                "raw": outcome.result.raw,
            }
            for outcome in outcomes
        },
    }


def save(directory: Path, facts: dict[str, Any], outcomes: Sequence[Outcome], forced: Sequence[str]) -> None:
    """Writes measurements.md and measurements.json."""
    text = markdown({k: v for k, v in facts.items() if isinstance(v, str)}, outcomes, forced)
    (directory / "measurements.md").write_text(text)
    data = json.dumps(as_json(facts, outcomes, forced), separators=(",", ":"))
    (directory / "measurements.json").write_text(data + "\n")
