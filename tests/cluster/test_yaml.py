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


def serve_configs() -> dict[str, dict[str, Any]]:
    """Return each configuration of Serve by its file's name; KubeRay wraps one."""
    documents = {path.name: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}
    wrapped = yaml.safe_load(documents["kuberay.yaml"]["spec"]["serveConfigV2"])
    documents["kuberay.yaml"] = wrapped
    return {name: one for name, one in sorted(documents.items()) if "applications" in one}


CONFIGS = serve_configs()
each = pytest.mark.parametrize("document", CONFIGS.values(), ids=CONFIGS)


def test_all_are_here() -> None:
    assert set(CONFIGS) == {"cluster.yaml", "kuberay.yaml", "local.yaml", "production.yaml"}


@each
def test_serve_accepts_it(document: dict[str, Any]) -> None:
    ServeDeploySchema.model_validate(document)


@each
def test_its_arguments_are_settings(document: dict[str, Any]) -> None:
    for application in document["applications"]:
        settings = Application.model_validate(application["args"])
        longest_s = settings.router.max_generation_s
        for tier in (settings.drafter, settings.expert, settings.router):
            assert tier.deployment.graceful_shutdown_timeout_s > longest_s


@each
def test_what_it_imports_is_there(document: dict[str, Any]) -> None:
    names = [one["import_path"].replace(":", ".") for one in document["applications"]]
    for name in (*names, *document["grpc_options"]["grpc_servicer_functions"]):
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(import_module(module), attribute))


def test_the_nodes_of_kuberay_have_what_its_tiers_ask_for() -> None:
    """Each tier asks for a resource that exactly one kind of node brings."""
    spec = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())["spec"]["rayClusterConfig"]
    brought = [
        set(yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"])))
        for group in spec["workerGroupSpecs"]
    ]
    settings = Application.model_validate(CONFIGS["kuberay.yaml"]["applications"][0]["args"])
    for tier in (settings.drafter, settings.expert):
        wanted = set(tier.deployment.ray_actor_options["resources"])
        assert [wanted <= one for one in brought].count(True) == 1
