"""What a command is doing, while it takes more than a moment."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Generator


class Show(Protocol):
    """Shows a stage."""

    def __call__(self, stage: str, completed: int = 0, total: int = 0, /) -> None:
        """Show a stage, and how much of it is done; a total of 0 is unknown."""


@contextmanager
def stages() -> Generator[Show]:
    """Show what the command is doing: a bar on a terminal, otherwise a line for each stage."""
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    live = console.is_terminal
    with Progress(*columns, console=console, disable=not live, transient=True) as progress:
        task = progress.add_task("", total=None)
        current = ""

        def show(stage: str, completed: int = 0, total: int = 0, /) -> None:
            nonlocal current
            if stage != current and not live:
                console.print(stage, markup=False, highlight=False, soft_wrap=True)
            current = stage
            progress.update(task, description=stage, completed=completed, total=total or None)

        yield show
