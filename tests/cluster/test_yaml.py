"""Every YAML says what Serve and this server understand."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cascade.settings import Application

FOLDER = Path(__file__).parents[2] / "cluster"
FILES = sorted(FOLDER.glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_serve_accepts_it(path: Path) -> None:
    ServeDeploySchema.model_validate(read(path))


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_its_arguments_are_settings(path: Path) -> None:
    for application in read(path)["applications"]:
        settings = Application.model_validate(application["args"])
        longest_s = settings.router.max_generation_s
        for tier in (settings.drafter, settings.expert, settings.router):
            assert tier.deployment.graceful_shutdown_timeout_s > longest_s


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_what_it_imports_is_there(path: Path) -> None:
    document = read(path)
    names = [one["import_path"].replace(":", ".") for one in document["applications"]]
    for name in (*names, *document["grpc_options"]["grpc_servicer_functions"]):
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(import_module(module), attribute))
