from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from cascade.cli import app
from cascade.cli.doctor import (
    DEFAULT_PLAN,
    Finding,
    Grade,
    Plan,
    available_bytes,
    check_cluster,
    check_memory,
    check_plan,
    check_ports,
    check_requirement,
    check_resources,
    check_server,
    check_threads,
    check_versions,
    resources_of,
)

Serving = Callable[..., Any]
NOWHERE = "http://127.0.0.1:9"
JSON = "application/json"
YAMLS = [  # what `serve run` takes
    path
    for path in sorted((Path(__file__).parents[2] / "cluster").glob("*.yaml"))
    if "\napplications:" in path.read_text()
]
USAGE = {"CPU": [1.0, 4.0], "GPU": [0.0, 1.0], "memory": [0, 8e9], "node:10.0.0.1": [0, 1]}
STATUS = {"data": {"clusterStatus": {"loadMetricsReport": {"usage": USAGE}}}}


def _json(value: object) -> tuple[int, str, bytes]:
    return 200, JSON, json.dumps(value).encode()


def _grades(findings: list[Finding]) -> list[Grade]:
    return [finding.grade for finding in findings]


def _write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_every_finding_that_is_not_well_says_what_to_do() -> None:
    findings = [
        *check_memory(free_bytes=1),
        *check_threads({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "9999"}),
        *check_server(NOWHERE),
        *check_cluster(NOWHERE, plan=Plan(resources={"GPU": 999})),
    ]
    assert {finding.grade for finding in findings} == {Grade.WARN, Grade.FAIL}
    assert all(finding.advice for finding in findings)


def test_what_is_installed_here_is_new_enough() -> None:
    assert set(_grades(check_versions())) == {Grade.OK}


def test_a_library_that_is_too_old_fails_with_the_command_that_mends_it() -> None:
    [finding] = check_requirement(Requirement("httpx>=999"))
    assert finding.grade is Grade.FAIL
    assert finding.advice == "pip install 'httpx>=999'"


def test_a_library_that_is_missing_fails() -> None:
    [finding] = check_requirement(Requirement("no-such-library-here"))
    assert "not installed" in finding.told


def test_a_package_that_is_not_installed_fails() -> None:
    assert _grades(check_versions("no-such-library-here")) == [Grade.FAIL]


def test_plain_thread_settings_are_well() -> None:
    assert _grades(check_threads({})) == [Grade.OK]
    assert _grades(check_threads({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})) == [
        Grade.OK
    ]


def test_free_memory_is_a_number_of_this_machine() -> None:
    assert 0 < available_bytes() < 2**50


def test_a_taken_port_fails_unless_the_server_holds_it() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        plan = Plan(http_port=port, grpc_port=port)
        assert _grades(check_ports(plan, serving=False)) == [Grade.FAIL, Grade.FAIL]
        assert _grades(check_ports(plan, serving=True)) == [Grade.OK, Grade.OK]
    assert _grades(check_ports(plan, serving=False)) == [Grade.OK, Grade.OK]


def test_a_server_that_is_not_well_is_quoted(serving: Serving) -> None:
    with serving({"/health": (503, JSON, b'{"error": "no expert"}')}) as server:
        [finding] = check_server(server.url)
    assert finding.grade is Grade.FAIL
    assert "no expert" in finding.told


def test_a_healthy_server_is_well(serving: Serving) -> None:
    with serving({"/health": _json({"status": "ok"})}) as server:
        assert _grades(check_server(server.url)) == [Grade.OK]


def test_a_cluster_is_held_against_the_plan(serving: Serving) -> None:
    responses = {"/api/cluster_status": _json(STATUS), "/api/serve/applications/": _json({})}
    with serving(responses) as server:
        findings = check_cluster(server.url, plan=Plan(resources={"CPU": 2.0, "GPU": 3.0}))
    assert _grades(findings) == [Grade.OK, Grade.FAIL]
    assert findings[0].told.endswith("4 CPU, 1 GPU")
    assert findings[1].told == "the YAML asks for 3 GPU, the cluster has 1"


def test_memory_and_node_marks_are_no_resources_to_plan_with() -> None:
    assert resources_of(STATUS) == {"CPU": 4.0, "GPU": 1.0}


def test_enough_of_everything_is_well() -> None:
    assert _grades(check_resources({"CPU": 2}, have={"CPU": 2}, where="here")) == [Grade.OK]


def test_an_application_that_failed_says_why(serving: Serving) -> None:
    told = {
        "applications": {
            "cascade": {
                "status": "DEPLOY_FAILED",
                "message": "",
                "deployments": {"Expert": {"message": "No vocabulary\nis shared", "replicas": []}},
            }
        }
    }
    responses = {"/api/cluster_status": _json(STATUS), "/api/serve/applications/": _json(told)}
    with serving(responses) as server:
        findings = check_cluster(server.url, plan=DEFAULT_PLAN)
    assert findings[-1].grade is Grade.FAIL
    assert findings[-1].told == "application cascade is DEPLOY_FAILED: No vocabulary is shared"


def test_a_running_application_counts_its_replicas(serving: Serving) -> None:
    inside = {"Router": {"replicas": [{}]}, "Expert": {"replicas": [{}, {}]}}
    told = {"applications": {"cascade": {"status": "RUNNING", "deployments": inside}}}
    responses = {"/api/cluster_status": _json(STATUS), "/api/serve/applications/": _json(told)}
    with serving(responses) as server:
        findings = check_cluster(server.url, plan=DEFAULT_PLAN)
    assert findings[-1].told == "application cascade runs: Router 1, Expert 2"


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_our_own_yaml_is_well_formed(path: Path) -> None:
    findings, plan = check_plan(path)
    assert _grades(findings) == [Grade.OK]
    assert plan.resources["CPU"] > 0


def test_replicas_and_ports_are_read(tmp_path: Path) -> None:
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
    findings, plan = check_plan(_write(tmp_path, text))
    assert _grades(findings) == [Grade.OK]
    assert plan.http_port == 8100
    assert plan.grpc_port == 9000
    assert plan.resources == {"CPU": 1.5 + 2 + 1, "GPU": 3 + 2, "door": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is no YAML"),
        ("a: 1", "is no Serve YAML"),
        ("- 1", "is no Serve YAML"),
        (
            "applications: [{import_path: 'cascade.app:build', args: {router: {n: 1}}}]",
            "args.router.n",
        ),
    ],
)
def test_a_bad_yaml_is_named_with_its_fault(text: str, said: str, tmp_path: Path) -> None:
    findings, _ = check_plan(_write(tmp_path, text))
    assert set(_grades(findings)) == {Grade.FAIL}
    assert any(said in finding.told for finding in findings)


def test_a_yaml_that_is_not_there_is_named(tmp_path: Path) -> None:
    [finding], _ = check_plan(tmp_path / "none.yaml")
    assert finding.grade is Grade.FAIL
    assert "No such file" in finding.told


def test_the_command_exits_with_one_where_something_fails(tmp_path: Path) -> None:
    arguments = ["doctor", "--dashboard", NOWHERE, "--url", NOWHERE, str(tmp_path / "none.yaml")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stdout.startswith("fail  ")


def test_the_command_looks_at_everything() -> None:
    result = CliRunner().invoke(app, ["doctor", "--dashboard", NOWHERE, "--url", NOWHERE])
    for told in ("Python", "libraries", "cores", "memory", "OpenMP", "Ray cluster", "port 8000"):
        assert told in result.stdout
