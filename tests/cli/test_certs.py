"""`cascade certs` writes files that `tls` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typer.testing import CliRunner

from cascade.cli import app
from cascade.protocol.tls import ROLES, Credentials, TlsFiles

if TYPE_CHECKING:
    from pathlib import Path


def run(folder: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["certs", str(folder)], env={"COLUMNS": "300"})
    return result.exit_code, result.output


def test_each_role_gets_what_tls_takes(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "tls"
    code, text = run(folder)
    assert code == 0, text
    for name in (*ROLES, "all"):
        ca, certificate, key = (str(folder / name / f"{one}.pem") for one in ("ca", "cert", "key"))
        Credentials(TlsFiles(ca=ca, certificate=certificate, key=key))
        assert (folder / name / "key.pem").stat().st_mode & 0o777 == 0o600


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("mine")
    code, text = run(tmp_path)
    assert code == 2
    assert "is not empty" in text
    assert [one.name for one in tmp_path.iterdir()] == ["ca.pem"]
