"""The image's context has what its build needs and nothing else; the units start Ray again."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.cluster.test_yaml import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

ROOT = FOLDER.parent
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()
ALLOWED = [line[1:] for line in IGNORED if line.startswith("!")]
UNITS = sorted((FOLDER / "systemd").glob("*.service"))


def test_the_context_has_no_history_tests_or_secrets() -> None:
    assert IGNORED[1] == "*"  # after the comment: everything, but for what is allowed
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert {name for name in ALLOWED if "/" not in name} == files | {"protos", "deployments"}
    assert all(name.startswith("cluster/") for name in ALLOWED if "/" in name)


def test_what_the_dockerfile_copies_is_in_the_context() -> None:
    for line in re.findall(r"^COPY (?!.*--from)(.+)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        for source in sources:
            assert source == "." or any(fnmatch(name, source) for name in ALLOWED), source


def test_the_image_runs_without_root_and_its_base_can_be_pinned() -> None:
    assert re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE)[-1] == "ray"
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"${BASE}"}
    [ray] = re.findall(r"^ray==(.+)$", (FOLDER / "constraints.txt").read_text(), re.MULTILINE)
    assert f"ARG BASE=rayproject/ray:{ray}-" in DOCKERFILE


def test_the_lock_file_has_the_tested_versions_of_all_that_is_needed_with_hashes() -> None:
    """It names no index; `pip install --require-hashes` refuses whatever lacks a hash."""
    text = (FOLDER / "requirements.lock").read_text()
    assert "://" not in text
    locked: dict[str, str] = {}
    for entry in re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]:
        found = re.fullmatch(r"(\S+)==(\S+)(( \\\n)? +--hash=sha256:[0-9a-f]{64})+\n", entry)
        assert found is not None, entry
        locked[canonicalize_name(found[1])] = found[2]
    lines = (FOLDER / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    for name, version in tested.items():
        assert locked.get(canonicalize_name(name), version) == version, name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["tensor-parallel"]
    for needed in map(Requirement, (*project["dependencies"], *extra)):
        assert needed.specifier.contains(locked[canonicalize_name(needed.name)]), needed
    assert "--require-hashes -r requirements.lock" in DOCKERFILE


@pytest.mark.slow
def test_the_wheel_is_built_from_the_context_alone(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    for name in ALLOWED:
        source, target = ROOT / name, context / name
        if source.is_dir():
            generated = ["v1"] if name == "deployments" else []
            ignore = shutil.ignore_patterns("__pycache__", *generated)
            shutil.copytree(source, target, ignore=ignore)
        elif source.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(context)], check=True)  # noqa: S603 - pip
    [wheel] = tmp_path.glob("speculative_cascades-*.whl")
    listed = subprocess.run(  # noqa: S603 - as above
        [sys.executable, "-m", "zipfile", "-l", str(wheel)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in ("cascade/app.py", "cascade/v1/cascade_pb2.py", "cascade/demo/expert/config.json"):
        assert name in listed


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_ray_again_with_the_token(path: Path) -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # pyright: ignore[reportAttributeAccessIssue] - as configparser documents
    unit.read(path)
    service = unit["Service"]
    assert service["Restart"] == "always"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"  # however long it was cut off
    assert "ray start --block" in service["ExecStart"]
    assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%d/auth_token" in service["Environment"]
    assert service["LoadCredential"].startswith("auth_token:")
    assert service["User"] != "root"
    if "ExecStop" in service:
        [seconds] = re.findall(r"drain-node (\d+)", service["ExecStop"])
        assert int(seconds) < int(service["TimeoutStopSec"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_a_unit(path: Path, tmp_path: Path) -> None:
    here = tmp_path / path.name
    here.write_text(re.sub(r"/opt/cascade/bin/\w[\w-]*", "/bin/true", path.read_text()))
    command = ["systemd-analyze", "verify", "--man=no", str(here)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert str(here) not in checked.stderr
    assert path.name not in checked.stderr
