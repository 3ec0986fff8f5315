from __future__ import annotations

import signal
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING

from typer.testing import CliRunner

from cascade.cli import app

if TYPE_CHECKING:
    from pathlib import Path


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout == f"cascade {metadata.version('speculative-cascades')}\n"
    assert result.exit_code == 0


def test_an_interruption_while_modules_are_imported_prints_nothing(tmp_path: Path) -> None:
    """Typer, whose import never ends here, stands for all of them."""
    (tmp_path / "typer.py").write_text("print('importing', flush=True)\ninput()\n")
    command = [sys.executable, "-c", "from cascade.cli import main; main()", "--help"]
    with subprocess.Popen(  # noqa: S603 - our own command
        command,
        env={"PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
