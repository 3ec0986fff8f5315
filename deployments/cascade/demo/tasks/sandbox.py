"""Whether a program of a model holds up to its assertions, found out in a process of its own."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from cascade.demo.tasks import jail

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIMEOUT_S = 10.0  # of the clock; a busy machine may give two seconds of processor late


def passed(program: str, assertions: Sequence[str]) -> float:
    """Return 1 if `program` runs and all `assertions` hold, else 0.

    Both run in an isolated interpreter with an empty environment and folder, under the limits of
    `jail`: two seconds of processor, 256 MiB, no files, no processes, no imports, plain builtins.
    It withstands the ways out of Python that are known to us; it is no virtual machine.
    """
    mark = secrets.token_hex()
    told = repr((mark, program, list(assertions)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(  # noqa: S603 - our own interpreter, isolated
                [sys.executable, "-I", "-S", jail.__file__],
                input=told.encode("utf-8", "backslashreplace"), cwd=folder,
                env={"PYTHONUTF8": "1"}, capture_output=True, timeout=_TIMEOUT_S, check=False,
                start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 0.0
    return float(done.stdout == f"{mark} {len(assertions)}".encode())
