"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Grade(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"  # runs, but not as it could
    FAIL = "fail"  # does not run


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's, and what to do unless all is well."""

    grade: Grade
    told: str
    advice: str = ""


def ok(told: str) -> Finding:
    """Return a finding that needs nothing done."""
    return Finding(grade=Grade.OK, told=told)


def warn(told: str, advice: str) -> Finding:
    """Return a finding that costs something."""
    return Finding(grade=Grade.WARN, told=told, advice=advice)


def fail(told: str, advice: str) -> Finding:
    """Return a finding that stops the server."""
    return Finding(grade=Grade.FAIL, told=told, advice=advice)
