"""The `cascade` command line, one module for each command."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade.cli.commands import app

__all__ = ["app", "main"]

_INTERRUPTED = 130


def main() -> None:
    """Run the command line. Ctrl-C ends it with status 130, without a traceback."""
    # Importing the commands takes a second; what Ctrl-C interrupts there has nothing to clean up.
    signal.signal(signal.SIGINT, _exit_at_once)
    from cascade.cli.commands import app  # noqa: PLC0415 - as above

    signal.signal(signal.SIGINT, signal.default_int_handler)
    app()


def _exit_at_once(*_: object) -> None:
    os._exit(_INTERRUPTED)


def __getattr__(name: str) -> Any:
    """Return `app`, which is imported when it is asked for: `main` has to run before."""
    if name != "app":
        raise AttributeError(name)
    from cascade.cli.commands import app  # noqa: PLC0415 - as above

    return app
