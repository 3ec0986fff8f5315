"""Every YAML says what Serve and this server understand."""

from __future__ import annotations

import re
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cascade.settings import Application

FOLDER = Path(__file__).parents[2] / "cluster"


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def serve_configs() -> dict[str, dict[str, Any]]:
    """Return each configuration of Serve by its file's name; KubeRay wraps one."""
    documents = {path.name: read(path.name)[0] for path in FOLDER.glob("*.yaml")}
    wrapped = yaml.safe_load(documents["kuberay.yaml"]["spec"]["serveConfigV2"])
    documents["kuberay.yaml"] = wrapped
    return {name: one for name, one in sorted(documents.items()) if "applications" in one}


CONFIGS = serve_configs()
MANIFESTS = {one["kind"]: one for one in read("kuberay.yaml")}
CLUSTER = MANIFESTS["RayService"]["spec"]["rayClusterConfig"]
GROUPS = {"head": CLUSTER["headGroupSpec"]} | {
    one["groupName"]: one for one in CLUSTER["workerGroupSpecs"]
}
PODS = {name: group["template"]["spec"] for name, group in GROUPS.items()}
each = pytest.mark.parametrize("document", CONFIGS.values(), ids=CONFIGS)


def test_all_are_here() -> None:
    assert set(CONFIGS) == {
        "cluster.yaml", "kuberay.yaml", "local.yaml", "local_t5.yaml", "production.yaml",
    }  # fmt: skip


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
    services = document.get("grpc_options", {}).get("grpc_servicer_functions", [])
    assert bool(services) is (document["http_options"]["host"] == "0.0.0.0")  # noqa: S104 - compared
    for name in (*names, *services):
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


SCHEMAS = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text())


def violations(manifest: dict[str, Any]) -> list[str]:
    schema = SCHEMAS[manifest["kind"]] | {"$defs": SCHEMAS["$defs"]}
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{one.json_path} {one.message}" for one in validator.iter_errors(manifest)]


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_has_the_fields_that_kubernetes_and_kuberay_publish(kind: str) -> None:
    assert violations(MANIFESTS[kind]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.rayClusterConfig.authOption", {"mode": "token"}),
        ("spec.rayClusterConfig.authOptions.mode", "tokens"),
        ("spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.tolerations", [{"effects": "x"}]),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.containers", []),
        ("spec.rayClusterConfig.autoscalerOptions.upscalingMode", "Fast"),
        ("spec.serveConfig", "applications: []"),
    ],
)
def test_the_schema_finds_a_mistake(path: str, value: object) -> None:
    manifest = deepcopy(MANIFESTS["RayService"])
    *outer, last = path.split(".")
    inner = manifest
    for part in outer:
        inner = inner[part]
    inner[last] = value
    assert violations(manifest)


def test_kuberay_gives_every_node_the_token_and_its_secrets_and_exposes_both_apis() -> None:
    """KubeRay puts ports into the service whose names are `serve` or begin with `serve-`."""
    assert CLUSTER["authOptions"] == {"mode": "token"}
    keys = CONFIGS["kuberay.yaml"]["applications"][0]["args"]["api_keys_file"]
    for pod in PODS.values():
        sources = {one["name"]: one for one in pod["volumes"]}
        mounts = {one["mountPath"]: one["name"] for one in pod["containers"][0]["volumeMounts"]}
        assert set(mounts.values()) <= set(sources)
        secret = sources[mounts[str(Path(keys).parent)]]["secret"]
        assert secret == {"secretName": "cascade-keys"}  # not optional: without keys no pod starts
        assert sources[mounts["/etc/cascade/tls"]]["secret"] == {"secretName": "cascade-tls"}
    options = CONFIGS["kuberay.yaml"]
    for pod in PODS.values():
        ports = {one["name"]: one["containerPort"] for one in pod["containers"][0]["ports"]}
        served = {number for name, number in ports.items() if re.match(r"serve(-|$)", name)}
        assert served == {options["http_options"]["port"], options["grpc_options"]["port"]}


def test_pods_run_without_root_and_are_watched_drained_and_spread() -> None:
    longest_s = Application.model_validate(
        CONFIGS["kuberay.yaml"]["applications"][0]["args"]
    ).router.deployment.graceful_shutdown_timeout_s
    for name, pod in PODS.items():
        container = pod["containers"][0]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"livenessProbe", "readinessProbe", "resources"} <= set(container)
        assert pod["terminationGracePeriodSeconds"] > longest_s
        if name != "head":
            command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
            assert command == "drain-node"
            assert longest_s < int(seconds) < pod["terminationGracePeriodSeconds"]
        gpus = "nvidia.com/gpu" in container["resources"]["limits"]
        assert ("nvidia.com/gpu" in str(pod.get("tolerations"))) is gpus
    assert {"routers", "large"} <= {
        name for name, pod in PODS.items() if pod.get("topologySpreadConstraints")
    }


def test_the_head_runs_no_replica_and_is_remembered() -> None:
    assert GROUPS["head"]["rayStartParams"]["num-cpus"] == "0"
    redis = CLUSTER["gcsFaultToleranceOptions"]
    assert redis["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "cascade-redis"


def test_what_stands_beside_the_pods_selects_all_of_them() -> None:
    for group in GROUPS.values():
        assert group["template"]["metadata"]["labels"] == {"app": "cascade"}
    for kind in ("NetworkPolicy", "PodDisruptionBudget", "PodMonitor"):
        spec = MANIFESTS[kind]["spec"]
        assert (spec.get("podSelector") or spec["selector"]) == {"matchLabels": {"app": "cascade"}}
    claims = [
        one["persistentVolumeClaim"]["claimName"]
        for pod in PODS.values()
        for one in pod["volumes"]
        if "persistentVolumeClaim" in one
    ]
    assert set(claims) == {MANIFESTS["PersistentVolumeClaim"]["metadata"]["name"]}


def test_from_outside_the_network_policy_opens_the_apis_dashboard_and_metrics_alone() -> None:
    spec = MANIFESTS["NetworkPolicy"]["spec"]
    inside, *outside = spec["ingress"]
    assert inside == {"from": [{"podSelector": spec["podSelector"]}]}
    opened = [(rule["from"], [one["port"] for one in rule["ports"]]) for rule in outside]
    assert [ports for _, ports in opened] == [[8000, 9000], [8265, 8000], [8080]]
    assert all("namespaceSelector" in peer for peers, _ in opened for peer in peers)


@pytest.mark.parametrize("name", ["README.md", "cluster.yaml", "production.yaml", "launcher.yaml"])
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
    brought = [
        set(yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"])))
        for name, group in GROUPS.items()
        if name != "head"
    ]
    settings = Application.model_validate(CONFIGS["kuberay.yaml"]["applications"][0]["args"])
    for tier in (settings.drafter, settings.expert, settings.router):
        wanted = set(tier.deployment.ray_actor_options["resources"])
        assert [wanted <= one for one in brought].count(True) == 1
