"""`cascade check` names what Ray would accept, and then fail at or ignore."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from cascade.cli import app
from cascade.cli.check import check_file
from cascade.cli.check_serve import check_serve
from cascade.cli.findings import Status

CLUSTER = Path(__file__).parents[2] / "cluster"
SERVE: dict[str, Any] = yaml.safe_load((CLUSTER / "production.yaml").read_text())
RAY_SERVICE: dict[str, Any] = next(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))
LAUNCHER: dict[str, Any] = yaml.safe_load((CLUSTER / "launcher.yaml").read_text())
DELETED = object()
ARGS = "applications.0.args"
ACTOR = "deployment.ray_actor_options"


def changed(document: Any, changes: dict[str, Any]) -> Any:
    """Return a copy with values replaced, added or deleted, by the path of each."""
    result = deepcopy(document)
    for path, value in changes.items():
        *outer, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
        inner = result
        for part in outer:
            inner = inner.setdefault(part, {}) if isinstance(part, str) else inner[part]
        if value is DELETED:
            del inner[last]
        else:
            inner[last] = value
    return result


def found(changes: dict[str, Any]) -> list[str]:
    """Return what is wrong with production.yaml after some changes."""
    checks, _ = check_serve(changed(SERVE, changes))
    assert all(one.fix for one in checks)
    return [f"{one.status.value} {one.message}" for one in checks]


def found_in(path: Path, document: Any) -> list[str]:
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    checks = check_file(path)
    assert all(one.message.startswith(str(path)) for one in checks)
    return [
        f"{one.status.value} {one.message.removeprefix(str(path)).lstrip(': ')}" for one in checks
    ]


def test_nothing_is_wrong_with_the_files_of_the_repository() -> None:
    paths = [str(path) for path in sorted(CLUSTER.glob("*.yaml"))]
    result = CliRunner().invoke(app, ["check", *paths])
    assert [line.split()[0] for line in result.output.splitlines()] == ["ok"] * len(paths)
    assert result.exit_code == 0


SILENT: list[tuple[dict[str, Any], str]] = [
    ({"proxy_locaton": "Disabled"}, "proxy_locaton is unknown: wanted one of proxy_location"),
    ({"http_options.hosts": "::"}, "http_options.hosts is unknown"),
    ({"grpc_options.ports": 9}, "did you mean `port`?"),
    ({"applications.0.arg": {}}, "applications[0].arg is unknown"),
    ({"http_options.port": 0}, "http_options.port is 0"),
    ({"http_options.port": 8265}, "http_options.port is 8265, the port of Ray's dashboard"),
    ({"grpc_options.port": 8000}, "http_options.port and grpc_options.port are both 8000"),
    (
        {"grpc_options.grpc_servicer_functions": ["cascade.v1.nothing.add"]},
        "grpc_options.grpc_servicer_functions[0] cannot be imported",
    ),
    ({"http_options.request_timeout_s": 60}, "http_options.request_timeout_s is 60, so answers"),
    ({"grpc_options.request_timeout_s": 60}, "grpc_options.request_timeout_s is 60, so answers"),
    ({"http_options.ssl_keyfile_password": "x"}, "ssl_keyfile_password holds a secret"),
    (
        {"applications.0.runtime_env": {"env_vars": {"HF_TOKEN": "x"}}},
        "applications[0].runtime_env.env_vars.HF_TOKEN holds a secret",
    ),
    (
        {"applications.0.runtime_env": {"env_vars": {"CASCADE_API_KEYS": "x"}}},
        "env_vars.CASCADE_API_KEYS holds a secret",
    ),
    ({f"{ARGS}.drafter.models": "x"}, "applications[0].args.drafter.models is unknown"),
    ({f"{ARGS}.api_keys": ["sk-1"]}, "applications[0].args"),
    (
        {f"{ARGS}.drafter.{ACTOR}.num_gpu": 1},
        "applications[0].args.drafter: Specifying 'num_gpu' in ray_actor_options is not allowed",
    ),
    ({f"{ARGS}.expert.{ACTOR}.num_gpus": 1.5}, "applications[0].args.expert"),
    (
        {f"{ARGS}.expert.scaling": {"min_replicas": 5, "max_replicas": 2}},
        "applications[0].args.expert",
    ),
    (
        {f"{ARGS}.router.deployment.autoscaling_config.max_replicas": 1},
        "applications[0].args.router",
    ),
    (
        {f"{ARGS}.drafter.engine.device": "cpu"},
        "args.drafter.deployment.ray_actor_options.num_gpus is 0.25, but the model runs on the CPU",
    ),
    (
        {f"{ARGS}.expert.engine.path": "lean"},
        "num_gpus is 1, but the model runs on the CPU: engine.device is auto, engine.path is lean",
    ),
    (
        {f"{ARGS}.expert.engine.device": "cuda", f"{ARGS}.expert.{ACTOR}": {"num_cpus": 1}},
        "num_gpus is 0, so the replica sees no GPU, but engine.device is cuda",
    ),
    ({f"{ARGS}.expert.{ACTOR}.num_gpus": 2}, "num_gpus is 2, but a replica uses one GPU"),
    (
        {f"{ARGS}.drafter.engine.tensor_parallel": 2},
        "num_gpus is 0.25 of each of 2 processes, which need a GPU each",
    ),
    ({f"{ARGS}.router.{ACTOR}.num_gpus": 1}, "applications[0].args.router reserves a GPU"),
    (
        {f"{ARGS}.expert.bind_ports": "8990-9005"},
        "args.expert.bind_ports 8990-9005 has 9000, the port of grpc_options",
    ),
    ({f"{ARGS}.drafter.bind_ports": "8265"}, "8265 has 8265, the port of Ray's dashboard"),
    (
        {f"{ARGS}.router.deployment.graceful_shutdown_timeout_s": 30},
        "args.router: graceful_shutdown_timeout_s is 30, so a replica that is replaced loses",
    ),
]


@pytest.mark.parametrize(("changes", "message"), SILENT)
def test_what_the_schema_of_serve_takes_and_should_not_is_found(
    changes: dict[str, Any], message: str
) -> None:
    ServeDeploySchema.model_validate(changed(SERVE, changes))
    lines = found(changes)
    assert any(line.startswith("fail ") and message in line for line in lines), lines


OVERRIDES: list[tuple[list[dict[str, Any]], str]] = [
    (
        [{"name": "Drafter", "ray_actor_options": {"num_gpu": 1}}],
        "applications[0].deployments[0].ray_actor_options.num_gpu is unknown: wanted one of",
    ),
    (
        [{"name": "Drafter", "ray_actor_options": {"num_gpus": 1}}],
        "ray_actor_options replaces all of applications[0].args.drafter.deployment.ray_actor_opt",
    ),
    ([{"name": "Drafters"}], "deployments[0].name is Drafters: wanted one of Router, Drafter, Exp"),
    ([{"name": "Router", "num_replica": 1}], "deployments[0].num_replica is unknown"),
    ([{"name": "Router"}, {"name": "Router"}], "deployments[1] is the second for Router"),
    (
        [{"name": "Drafter", "autoscaling_config": {"min_replicas": 5, "max_replicas": 2}}],
        "max_replicas (2) must be greater than or equal to min_replicas (5)",
    ),
    (
        [{"name": "Drafter", "autoscaling_config": {"min_replica": 1}}],
        "autoscaling_config.min_replica is unknown",
    ),
    ([{"name": "Expert", "num_replicas": 2}], "num_replicas has no effect: Expert scales by"),
    ([{"name": "Expert", "max_ongoing_requests": 300}], "an engine of this tier holds 256 session"),
    ([{"name": "Router", "user_config": {"limit": {}}}], "deployments[0].user_config: "),
    ([{"name": "Router", "graceful_shutdown_timeout_s": 9}], "deployments[0]: graceful_shutdown_t"),
]


@pytest.mark.parametrize(("overrides", "message"), OVERRIDES)
def test_overrides_beside_args_are_checked_as_serve_would_apply_them(
    overrides: list[dict[str, Any]], message: str
) -> None:
    changes = {"applications.0.deployments": overrides}
    ServeDeploySchema.model_validate(changed(SERVE, changes))
    lines = found(changes)
    assert any(line.startswith("fail ") and message in line for line in lines), lines


def test_enough_ports_for_old_and_new_replicas_are_right() -> None:
    ports = {f"{ARGS}.drafter.bind_ports": "7000-7031", f"{ARGS}.expert.bind_ports": "7100-7107"}
    assert found(ports) == []


def test_what_anybody_could_read_or_call_is_named_for_the_doctor() -> None:
    _, config = check_serve(SERVE)
    named = [one.message for one in config.open_doors]
    assert [message.partition(" is ")[0] for message in named[:2]] == [
        "HTTP at port 8000", "gRPC at port 9000",
    ]  # fmt: skip
    assert "anybody may call" in named[2]
    assert "prompts cross in clear" in named[3]
    closed = {
        "http_options.ssl_certfile": "cert.pem",
        "http_options.ssl_keyfile": "key.pem",
        "grpc_options": DELETED,
        f"{ARGS}.api_keys_file": "keys.yaml",
        f"{ARGS}.tls": {"ca": "ca.pem", "certificate": "cert.pem", "key": "key.pem"},
    }
    assert check_serve(changed(SERVE, closed))[1].open_doors == []


def test_a_change_of_counts_beside_args_is_right() -> None:
    changes: dict[str, Any] = {
        f"{ARGS}.drafter.scaling": DELETED,
        "applications.0.deployments": [
            {"name": "Drafter", "num_replicas": 4},
            {"name": "Router", "max_ongoing_requests": 256},
        ],
    }
    assert found(changes) == []


WARNINGS: list[tuple[dict[str, Any], str]] = [
    ({"http_options.host": "127.0.0.1"}, "but gRPC listens on all interfaces at port 9000"),
    ({"grpc_options.enable_reflection": DELETED}, "grpc_options.enable_reflection is true"),
    ({f"{ARGS}.expert.bind_host": "127.0.0.1"}, "args.expert.bind_host is 127.0.0.1, where no"),
    ({f"{ARGS}.expert.scaling.min_replicas": 0}, "applications[0].args.expert scales to zero"),
    (
        {f"{ARGS}.expert.deployment.max_surge_percent": 0},
        "args.expert may have one replica, and max_surge_percent is 0: there is no Expert while",
    ),
    (
        {f"{ARGS}.expert.bind_ports": "7100-7105"},
        "args.expert share 6 of bind_ports, and need 8 where all replicas are on one node",
    ),
    (
        {f"{ARGS}.drafter.bind_ports": "7000-7031", f"{ARGS}.expert.bind_ports": "7030-7037"},
        "args.drafter and applications[0].args.expert share 38 of bind_ports, and need 40",
    ),
    ({f"{ARGS}.expert.bind_ports": "11000-11007"}, "is among the ports of Ray's workers, 10002"),
    ({"applications.0.import_path": "other:app"}, "no application has import_path cascade.app"),
]


@pytest.mark.parametrize(("changes", "message"), WARNINGS)
def test_what_runs_but_is_rarely_meant_is_a_warning(changes: dict[str, Any], message: str) -> None:
    lines = found(changes)
    assert any(line.startswith("warn ") and message in line for line in lines), lines


POD = "spec.rayClusterConfig.headGroupSpec.template.spec"
KUBERAY: list[tuple[dict[str, Any], str]] = [
    ({"spec.rayClusterConfig.authOptions": DELETED}, "spec.rayClusterConfig asks for no token"),
    ({"spec.rayClusterConfig.rayVersion": DELETED}, "rayVersion is missing"),
    (
        {f"{POD}.containers.0.ports.3.name": "grpc"},
        "no port 9000 whose name begins with `serve`, so no service leads to grpc_options.port",
    ),
    (
        {f"{POD}.terminationGracePeriodSeconds": 60},
        "headGroupSpec: terminationGracePeriodSeconds is 60, so Kubernetes ends replicas before",
    ),
    (
        {f"{POD}.containers.0.env": [{"name": "HF_TOKEN", "value": "hf_x"}]},
        "headGroupSpec: HF_TOKEN is written in the file",
    ),
    (
        {"spec.rayClusterConfig.workerGroupSpecs.2.rayStartParams.resources": '"{}"'},
        "args.expert: a replica needs 4 CPU, 1 GPU, 1 expert on one node; headGroupSpec has ; rout",
    ),
    (
        {"spec.rayClusterConfig.workerGroupSpecs.0.maxReplicas": 0},
        "the replicas at the start need 2 router, and all nodes together have 0",
    ),
    ({"spec.serveConfigV2": "applications: [{import_path: x.y, nme: z}]"}, "[0].nme is unknown"),
    ({"spec.serveConfigV2": "applications: ["}, "spec.serveConfigV2 is not YAML"),
    ({"spec.rayClusterConfig": {}}, "it is no RayService that can be read (KeyError('headGroupSp"),
]


@pytest.mark.parametrize(("changes", "message"), KUBERAY)
def test_a_ray_service_is_checked_with_its_pods(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lines = found_in(tmp_path / "service.yaml", changed(RAY_SERVICE, changes))
    assert any(line.startswith("fail ") and message in line for line in lines), lines


def test_a_head_that_forgets_or_is_crowded_is_a_warning(tmp_path: Path) -> None:
    head = "spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus"
    changes = {"spec.rayClusterConfig.gcsFaultToleranceOptions": DELETED, head: DELETED}
    lines = found_in(tmp_path / "service.yaml", changed(RAY_SERVICE, changes))
    assert [line.split()[0] for line in lines] == ["warn", "warn"]


LAUNCHED: list[tuple[dict[str, Any], str]] = [
    ({"max_worker": 3}, "Ray refuses it: Additional properties are not allowed ('max_worker'"),
    ({"available_node_types.large.min_workers": 99}, "Ray refuses it: The specified global"),
    (
        {"worker_start_ray_commands": ["ray start --address=$RAY_HEAD_IP:6379"]},
        "worker_start_ray_commands[0] starts Ray without a token",
    ),
    ({"head_start_ray_commands": DELETED}, "head_start_ray_commands[1] starts Ray without a tok"),
    ({"file_mounts": DELETED}, "file_mounts does not bring the token to the nodes"),
]


@pytest.mark.parametrize(("changes", "message"), LAUNCHED)
def test_a_file_of_ray_up_is_valid_for_ray_and_has_a_token(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lines = found_in(tmp_path / "launcher.yaml", changed(LAUNCHER, changes))
    assert any(line.startswith("fail ") and message in line for line in lines), lines


def test_some_type_of_node_must_hold_each_replica(tmp_path: Path) -> None:
    nodes = CLUSTER / "launcher.yaml"
    assert [one.status for one in check_file(CLUSTER / "production.yaml", nodes=nodes)] == ["ok"]
    path = tmp_path / "serve.yaml"
    actor = f"{ARGS}.expert.{ACTOR}"
    for wanted, message in (
        ({f"{actor}.accelerator_type": "B200"}, "0.001 accelerator_type:B200 on one node; head"),
        ({f"{actor}.num_cpus": 64}, "needs 64 CPU, 1 GPU"),
        ({f"{ARGS}.expert.engine.tensor_parallel": 2}, "needs 8 CPU, 2 GPU"),
    ):
        path.write_text(yaml.safe_dump(changed(SERVE, wanted)))
        assert any(message in one.message for one in check_file(path, nodes=nodes)), wanted
    full = changed(LAUNCHER, {"available_node_types.large.max_workers": 1})
    (tmp_path / "launcher.yaml").write_text(yaml.safe_dump(full))
    [spare] = check_file(CLUSTER / "production.yaml", nodes=tmp_path / "launcher.yaml")
    assert spare.status is Status.WARN
    assert "args.expert: a new version starts before the old one stops" in spare.message
    assert "room for 1 of its replicas at most" in spare.message
    [check] = check_file(CLUSTER / "production.yaml", nodes=CLUSTER / "local.yaml")
    assert "has no available_node_types" in check.message


def test_a_key_that_stands_twice_is_found(tmp_path: Path) -> None:
    text = "applications:\n  - import_path: cascade.app:build\n    name: a\n    name: b\n"
    [line] = found_in(tmp_path / "serve.yaml", text)
    assert "'name' stands twice, and only the last would count" in line
    assert "line 4" in line


def test_alerts_ask_for_metrics_that_exist(tmp_path: Path) -> None:
    rule = {"alert": "Gone", "expr": "rate(ray_cascade_nothing_total[5m]) > 0"}
    [line] = found_in(tmp_path / "rules.yaml", {"groups": [{"name": "x", "rules": [rule]}]})
    assert "alert Gone asks for ray_cascade_nothing, which no part exports" in line


@pytest.mark.parametrize(
    ("document", "changes"),
    [
        (SERVE, {"applications.0": None}),
        (SERVE, {f"{ARGS}.expert.{ACTOR}.num_gpus": "one"}),
        (RAY_SERVICE, {f"{POD}.containers.0.ports": None}),
        (RAY_SERVICE, {f"{POD}.terminationGracePeriodSeconds": "long"}),
        (RAY_SERVICE, {"spec.serveConfigV2": "text"}),
        (LAUNCHER, {"available_node_types": "many"}),
        ({"groups": [None]}, {}),
    ],
)
def test_values_of_another_type_fail_and_break_nothing(
    document: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    lines = found_in(tmp_path / "file.yaml", changed(document, changes))
    assert any(line.startswith("fail ") for line in lines), lines


def test_secrets_and_files_of_no_known_kind_fail(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    [line] = found_in(path, {"apiVersion": "v1", "kind": "Secret", "data": {"keys": "eA=="}})
    assert "it holds a Secret" in line
    [line] = found_in(path, {"something": "else"})
    assert line.startswith("fail it has none of `applications`")
    [check] = check_file(tmp_path / "none.yaml")
    assert check.status is Status.FAIL


def test_the_command_exits_with_1_if_something_fails(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(changed(SERVE, {"http_options.prt": 1})))
    result = CliRunner().invoke(app, ["check", str(CLUSTER / "local.yaml"), str(path)])
    assert result.exit_code == 1
    ok, failed, fix = result.output.splitlines()
    assert ok.startswith("ok ")
    assert failed.startswith(f"fail  {path}: http_options.prt is unknown")
    assert fix.strip() == "Serve ignores it; correct it"
