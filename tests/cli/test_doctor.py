from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from packaging.requirements import Requirement
from typer.testing import CliRunner

from cascade.cli import app
from cascade.cli.check_serve import ServeConfig, check_config
from cascade.cli.doctor import (
    available_bytes,
    check_cluster,
    check_drafts,
    check_memory,
    check_ports,
    check_requirement,
    check_resources,
    check_server,
    check_threads,
    check_versions,
    resources_of,
)
from cascade.cli.findings import Check, Status

Serving = Callable[..., Any]
NOWHERE = "http://127.0.0.1:9"
JSON = "application/json"
YAMLS = [  # what `serve run` takes
    path
    for path in sorted((Path(__file__).parents[2] / "cluster").glob("*.yaml"))
    if "\napplications:" in path.read_text()
]
USAGE = {
    "CPU": [1.0, 4.0],
    "GPU": [0.0, 1.0],
    "objectStoreMemory": [0, 8e9],
    "node:10.0.0.1": [0, 1],
}
STATUS = {"data": {"clusterStatus": {"loadMetricsReport": {"usage": USAGE}}}}


def _json(value: object) -> tuple[int, str, bytes]:
    return 200, JSON, json.dumps(value).encode()


def _statuses(checks: list[Check]) -> list[Status]:
    return [check.status for check in checks]


def _write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_every_warning_and_failure_says_how_to_fix_it() -> None:
    checks = [
        *check_memory(free_bytes=1),
        *check_threads({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "9999"}),
        check_server(NOWHERE),
        *check_cluster(NOWHERE, config=ServeConfig(resources={"GPU": 999})),
    ]
    assert {check.status for check in checks} == {Status.WARN, Status.FAIL}
    assert all(check.fix for check in checks)


def test_the_installed_libraries_are_new_enough() -> None:
    assert set(_statuses(check_versions())) == {Status.OK}


def test_a_library_that_is_too_old_fails_with_the_command_that_updates_it() -> None:
    check = check_requirement(Requirement("httpx>=999"))
    assert check is not None
    assert check.status is Status.FAIL
    assert check.fix == "pip install 'httpx>=999'"


def test_a_library_that_is_missing_fails() -> None:
    check = check_requirement(Requirement("no-such-library-here"))
    assert check is not None
    assert "not installed" in check.message


def test_a_package_that_is_not_installed_fails() -> None:
    assert _statuses(check_versions("no-such-library-here")) == [Status.FAIL]


def test_default_thread_settings_are_ok() -> None:
    assert _statuses(check_threads({})) == [Status.OK]
    assert _statuses(check_threads({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})) == [
        Status.OK
    ]


def test_the_available_memory_is_plausible() -> None:
    assert 0 < available_bytes() < 2**50


def test_a_taken_port_fails_unless_the_server_uses_it() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        config = ServeConfig(http_port=port, grpc_port=port)
        assert _statuses(check_ports(config, serving=False)) == [Status.FAIL, Status.FAIL]
        assert _statuses(check_ports(config, serving=True)) == [Status.OK, Status.OK]
    assert _statuses(check_ports(config, serving=False)) == [Status.OK, Status.OK]


def test_a_healthy_server_on_the_port_is_not_in_the_way_of_a_wrong_url(
    serving: Serving, tmp_path: Path
) -> None:
    with serving({"/health": _json({"status": "ok"})}) as server:
        port = server.url.rpartition(":")[2]
        config = _write(tmp_path, f"http_options: {{port: {port}}}\napplications: []")
        result = CliRunner().invoke(
            app, ["doctor", "--dashboard", NOWHERE, "--url", NOWHERE, str(config)]
        )
    assert f"port {port} for HTTP is in use, and the server answers" in result.stdout
    assert f"the server at {server.url} is healthy; leave out --url" in result.stdout
    assert result.exit_code == 0


async def test_a_healthy_grpc_server_is_not_in_the_way() -> None:
    class Healthy(health_pb2_grpc.HealthServicer):
        async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the RPC's name
            del request, context
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(Healthy(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    config = ServeConfig(grpc_port=port)
    checks = await asyncio.to_thread(check_ports, config, serving=False)
    await server.stop(None)
    assert checks[1].message == f"port {port} for gRPC is in use, and the server answers"


def test_a_server_without_a_health_page_may_be_another(serving: Serving) -> None:
    with serving({}) as server:
        check = check_server(server.url)
    assert check.status is Status.FAIL
    assert "not a cascade" in check.fix


def test_the_failure_of_an_unhealthy_server_quotes_its_response(serving: Serving) -> None:
    with serving({"/health": (503, JSON, b'{"error": "no expert"}')}) as server:
        check = check_server(server.url)
    assert check.status is Status.FAIL
    assert "no expert" in check.message


def test_rejected_drafts_are_a_warning_of_a_healthy_server(serving: Serving) -> None:
    health = {"status": "ok", "warnings": ["nearly all drafts are rejected under rule lossless"]}
    with serving({"/health": _json(health)}) as server:
        assert check_server(server.url).status is Status.OK
        (check,) = check_drafts(server.url)
    assert check.status is Status.WARN
    assert "rejected under rule lossless" in check.message
    assert "names the drafter" in check.fix


@pytest.mark.parametrize("response", [_json({"status": "ok"}), _json([]), (503, JSON, b"{")])
def test_a_server_without_warnings_has_none(serving: Serving, response: Any) -> None:
    with serving({"/health": response}) as server:
        assert check_drafts(server.url) == []
    assert check_drafts(NOWHERE) == []


def test_a_healthy_server_is_ok(serving: Serving) -> None:
    with serving({"/health": _json({"status": "ok"})}) as server:
        assert check_server(server.url).status is Status.OK


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (_json({"authentication_mode": "token"}), Status.OK),
        (_json({"authentication_mode": "disabled"}), Status.FAIL),
        ((404, "text/plain", b"an older Ray"), Status.FAIL),
    ],
)
def test_a_cluster_that_asks_for_no_token_fails(
    serving: Serving, answer: tuple[int, str, bytes], status: Status
) -> None:
    responses = {"/api/cluster_status": _json(STATUS), "/api/authentication_mode": answer}
    with serving(responses) as server:
        [_, check, *_] = check_cluster(server.url, config=ServeConfig())
    assert check.status is status
    assert status is Status.OK or "RAY_AUTH_MODE=token" in check.fix


def test_resources_of_the_cluster_are_compared_with_the_yaml(serving: Serving) -> None:
    responses = {
        "/api/cluster_status": _json(STATUS),
        "/api/authentication_mode": _json({"authentication_mode": "token"}),
        "/api/serve/applications/": _json({}),
    }
    with serving(responses) as server:
        checks = check_cluster(server.url, config=ServeConfig(resources={"CPU": 2.0, "GPU": 3.0}))
    assert _statuses(checks) == [Status.OK, Status.OK, Status.FAIL]
    assert checks[0].message.endswith("4 CPU, 1 GPU")
    assert checks[2].message == "the YAML asks for 3 GPU, the cluster has 1"


def test_memory_and_node_resources_are_ignored() -> None:
    assert resources_of(STATUS) == {"CPU": 4.0, "GPU": 1.0}


def test_sufficient_resources_are_ok() -> None:
    assert _statuses(check_resources({"CPU": 2}, available={"CPU": 2}, where="here")) == [Status.OK]


def test_a_failed_application_shows_the_reason(serving: Serving) -> None:
    status = {
        "applications": {
            "cascade": {
                "status": "DEPLOY_FAILED",
                "message": "",
                "deployments": {"Expert": {"message": "No vocabulary\nis shared", "replicas": []}},
            }
        }
    }
    responses = {"/api/cluster_status": _json(STATUS), "/api/serve/applications/": _json(status)}
    with serving(responses) as server:
        checks = check_cluster(server.url, config=ServeConfig())
    assert checks[-1].status is Status.FAIL
    assert checks[-1].message == "application cascade is DEPLOY_FAILED: No vocabulary is shared"


def test_a_running_application_shows_its_replicas(serving: Serving) -> None:
    inside = {"Router": {"replicas": [{}]}, "Expert": {"replicas": [{}, {}]}}
    status = {"applications": {"cascade": {"status": "RUNNING", "deployments": inside}}}
    responses = {"/api/cluster_status": _json(STATUS), "/api/serve/applications/": _json(status)}
    with serving(responses) as server:
        checks = check_cluster(server.url, config=ServeConfig())
    assert checks[-1].message == "application cascade runs: Router 1, Expert 2"


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_the_yaml_files_of_the_repository_are_valid(path: Path) -> None:
    checks, config = check_config(path)
    assert _statuses(checks) == [Status.OK]
    assert config.resources["CPU"] > 0


def test_the_resources_of_all_replicas_and_the_ports_are_read(tmp_path: Path) -> None:
    text = """
http_options: {port: 8100}
applications:
  - import_path: cascade.app:build
    args:
      drafter:
        model: demo
        deployment: {num_replicas: 3, ray_actor_options: {num_cpus: 0.5, num_gpus: 1}}
      expert:
        model: demo
        deployment:
          autoscaling_config: {min_replicas: 2, max_replicas: 8}
          placement_group_bundles: [{CPU: 1}, {GPU: 1}]
      router:
        deployment: {ray_actor_options: {num_cpus: 1, resources: {door: 1}}}
"""
    checks, config = check_config(_write(tmp_path, text))
    assert _statuses(checks) == [Status.OK]
    assert config.http_port == 8100
    assert config.grpc_port == 9000
    assert config.resources == {"CPU": 1.5 + 2 + 1, "GPU": 3 + 2, "door": 1}


def test_every_process_of_a_sharded_model_is_counted(tmp_path: Path) -> None:
    text = """
applications:
  - import_path: cascade.app:build
    args:
      expert:
        engine: {tensor_parallel: 4}
        deployment: {num_replicas: 2, ray_actor_options: {num_cpus: 0.5, num_gpus: 1}}
"""
    _, config = check_config(_write(tmp_path, text))
    assert config.resources == {"CPU": 1 + 2 * 4 * 0.5 + 1, "GPU": 2 * 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("a: 1", "is not a Serve YAML"),
        ("- 1", "is not a Serve YAML"),
        (
            "applications: [{import_path: 'cascade.app:build', args: {router: {n: 1}}}]",
            "args.router.n",
        ),
    ],
)
def test_the_failure_of_an_invalid_yaml_says_what_is_wrong(
    text: str, message: str, tmp_path: Path
) -> None:
    checks, _ = check_config(_write(tmp_path, text))
    assert set(_statuses(checks)) == {Status.FAIL}
    assert any(message in check.message for check in checks)


def test_a_missing_yaml_fails(tmp_path: Path) -> None:
    [check], _ = check_config(tmp_path / "none.yaml")
    assert check.status is Status.FAIL
    assert "No such file" in check.message


def test_the_command_exits_with_1_if_a_check_fails(tmp_path: Path) -> None:
    arguments = ["doctor", "--dashboard", NOWHERE, "--url", NOWHERE, str(tmp_path / "none.yaml")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stdout.startswith("fail  ")


def test_the_command_runs_every_check() -> None:
    result = CliRunner().invoke(app, ["doctor", "--dashboard", NOWHERE, "--url", NOWHERE])
    for text in ("Python", "libraries", "cores", "memory", "OpenMP", "Ray cluster", "port 8000"):
        assert text in result.stdout
