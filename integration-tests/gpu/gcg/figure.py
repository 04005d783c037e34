"""What a part found out: figures for the table, further tables, raw values."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """How a figure stands to what was to be reached."""

    MET = "met"
    MISSED = "missed"
    # There was nothing to reach.
    RECORDED = "recorded"
    SKIPPED = "skipped"
    FAILED = "failed"


def verdict(reached: bool) -> Verdict:
    """Met or missed."""
    return Verdict.MET if reached else Verdict.MISSED


@dataclass(frozen=True)
class Figure:
    """One line of the table; `n` says what was counted, as '600 launches'."""

    name: str
    to_reach: str
    measured: str
    n: str
    verdict: Verdict


@dataclass(frozen=True)
class Table:
    """A further table: a curve, or one line a variant."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass
class Result:
    """All that a part found out. `raw` goes into the JSON as it is."""

    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


class Skip(Exception):
    """A part that cannot be measured here, with the reason."""
