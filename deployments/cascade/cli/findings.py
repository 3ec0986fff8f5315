"""What `cascade check` and `cascade doctor` find: one line each, and how to fix it."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable


class Status(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    WARN = "warn"  # runs, but not at its best
    FAIL = "fail"  # does not run


class Check(NamedTuple):
    """One line of the output, and how to fix it unless the status is OK."""

    status: Status
    message: str
    fix: str = ""


ok = partial(Check, Status.OK)
warn = partial(Check, Status.WARN)
fail = partial(Check, Status.FAIL)

_STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def show(checks: Iterable[Check]) -> bool:
    """Print what was found, and return whether nothing failed."""
    console, passed = Console(highlight=False), True
    for check in checks:
        passed &= check.status is not Status.FAIL
        line = Text.assemble((f"{check.status.value:4}  ", _STYLES[check.status]), check.message)
        console.print(line, soft_wrap=True)
        if check.fix:
            console.print(Text(f"      {check.fix}", "dim"), soft_wrap=True)
    return passed
