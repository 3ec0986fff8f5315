"""The oldest and the newest release of transformers that pyproject.toml allows, each installed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib import metadata
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from pathlib import Path

TESTS = (
    *("tests/engine/test_exactness.py", "tests/engine/test_model_loader.py"),
    *("tests/engine/test_model_pair.py", "tests/engine/test_tokenizer.py"),
    *("tests/integration/test_local.py", "tests/demo/test_pair.py"),
)


def oldest() -> str:
    """Return the requirement of the lowest release that pyproject.toml names."""
    found = metadata.requires("speculative-cascades") or ()
    stated = next(one for one in map(Requirement, found) if one.name == "transformers")
    return next(f"transformers=={one.version}" for one in stated.specifier if one.operator == ">=")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter of a new virtualenv that also sees this one's packages, after its own."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)  # noqa: S603 - our own command
    site = next(tmp_path.glob("lib/*/site-packages"))
    parent = sysconfig.get_path("purelib")
    (site / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    return tmp_path / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("requirement", [oldest(), "transformers"], ids=["oldest", "newest"])
def test_models_are_served_exactly_with(requirement: str, python: Path) -> None:
    install = [python, "-m", "pip", "install", "-q", "--upgrade", requirement]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)  # noqa: S603 - as above
    if installed.returncode:
        pytest.skip(f"no package index gives {requirement}: {installed.stderr[-200:]}")

    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    tested = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - as above

    assert tested.returncode == 0, tested.stdout[-4000:]
