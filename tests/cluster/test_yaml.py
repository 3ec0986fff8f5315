"""Every YAML says what Serve and this server understand."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize("name", ["production.yaml", "kuberay.yaml"])
def test_the_drafters_that_share_a_small_gpu_fit_into_it(name: str) -> None:
    """Four of Qwen3-0.6B on an L4: weights, KV cache and half a GiB of CUDA for each."""
    drafter = Application.model_validate(CONFIGS[name]["applications"][0]["args"]).drafter
    assert drafter.model == "Qwen/Qwen3-0.6B"
    layers, heads, head_size, weight_bytes = 28, 8, 128, 1.2e9
    cache_bytes = drafter.engine.cache_tokens * 2 * layers * heads * head_size * 2
    sharing = 1 / drafter.deployment.ray_actor_options["num_gpus"]
    assert sharing * (cache_bytes + weight_bytes + 2**29) < 22 * 2**30


def test_kuberay_gives_every_node_the_token_and_the_api_keys_and_exposes_both_apis() -> None:
    """KubeRay puts ports into the service whose names are `serve` or begin with `serve-`."""
    spec = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())["spec"]["rayClusterConfig"]
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers = [one for group in groups for one in group["template"]["spec"]["containers"]]
    keys = [{"secretRef": {"name": "cascade-api-keys", "optional": True}}]
    assert [one["envFrom"] for one in containers] == [keys] * len(groups)
    ports = {one["name"]: one["containerPort"] for one in containers[0]["ports"]}
    served = {number for name, number in ports.items() if re.match(r"serve(-|$)", name)}
    options = CONFIGS["kuberay.yaml"]
    assert served == {options["http_options"]["port"], options["grpc_options"]["port"]}


@pytest.mark.parametrize("name", ["README.md", "cluster.yaml", "production.yaml"])
def test_every_recipe_asks_for_the_token_before_it_starts_ray(name: str) -> None:
    """A block of code, or the comment of a YAML, is a recipe."""
    text = (FOLDER / name).read_text()
    recipes = re.findall(r"```console\n(.*?)```", text, re.DOTALL) or [text]
    starting = [recipe for recipe in recipes if "ray start" in recipe]
    assert starting
    for recipe in starting:
        before = recipe[: recipe.index("ray start")]
        assert "export RAY_AUTH_MODE=token" in before


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
