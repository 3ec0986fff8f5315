"""What an operator sees of a running server: Ray's metrics endpoint, its log, its dashboard."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.serve.test_serve import replica

from cascade.observability.metric_specs import ENGINE, ROUTER, MetricKind
from cascade.observability.metrics import name_at_ray

if TYPE_CHECKING:
    from prometheus_client.samples import Sample
    from tests.serve.conftest import Server

    from cascade.observability.metric_specs import MetricSpec

# Seen only when things go wrong, or where a client has a key or sends a prediction or a budget, a
# rule defers or leaves the expert, tiers have prices, or the vocabularies differ.
RARE = {
    "cascade_divergence",
    "cascade_divergence_budgets",
    "cascade_price",
    "cascade_suspected_drafters",
    "cascade_unmeasured_tokens",
    "cascade_caller_answers",
    "cascade_caller_tokens",
    "cascade_lost_mass",
    "cascade_failovers",
    "cascade_predicted_tokens",
    "cascade_deferred_tokens",
    "cascade_engine_preemptions",
    "cascade_engine_prefix_hits",
    "cascade_engine_prefix_tokens",
    "cascade_cached_prompt_tokens",
    "cascade_undrafted_rounds",
}

DASHBOARD_PATHS = (  # that show settings, command lines or environments
    "/api/serve/applications/",
    "/api/jobs/",
    "/api/v0/actors?detail=1",
    "/api/v0/workers?detail=1",
    "/logical/actors",
    "/nodes?view=summary",
)


def exported(family: MetricSpec) -> str:
    ending = {MetricKind.COUNTER: "_total", MetricKind.GAUGE: "", MetricKind.HISTOGRAM: "_count"}
    return f"ray_{name_at_ray(family)}{ending[family.kind]}"


async def samples(server: Server) -> list[Sample]:
    """Return what Prometheus reads of every node, found as Prometheus finds it."""
    groups = await server.ask_dashboard("/api/prometheus/sd")
    async with httpx.AsyncClient(timeout=60) as client:
        targets = [target for group in groups for target in group["targets"]]
        pages = [await client.get(f"http://{target}/metrics") for target in targets]
    families = [one for page in pages for one in text_string_to_metric_families(page.text)]
    return [sample for family in families for sample in family.samples]


def lacking(found: list[Sample]) -> set[tuple[str, str]]:
    """Return the metrics that a deployment should have shown, and has not."""
    sources = [("Router", ROUTER), ("Drafter", ENGINE), ("Expert", ENGINE)]
    wanted = {
        (exported(family), deployment)
        for deployment, families in sources
        for family in families
        if family.name not in RARE
    }
    return wanted - {(sample.name, sample.labels.get("deployment", "")) for sample in found}


async def answer(server: Server, name: str) -> dict[str, Any]:
    body = {
        "prompt": "Who is Buzz Aldrin?",
        "max_tokens": 24,
        "temperature": 0,
        "cascade": {"mode": "speculative", "draft_tokens": 4},
    }
    async with httpx.AsyncClient(base_url=server.http, timeout=120) as client:
        given = await client.post("/v1/completions", json=body, headers={"x-request-id": name})
    return given.json()


@pytest.fixture(scope="module")
async def seen(server: Server) -> list[Sample]:
    """What is exported once it has all arrived: Ray's workers report every few seconds."""
    await answer(server, "measured")
    found: list[Sample] = []
    for _ in range(60):
        with suppress(httpx.TransportError):  # a node's agent that is not there yet
            found = await samples(server)
        if not lacking(found):
            return found
        await asyncio.sleep(1)
    pytest.fail(f"not exported: {sorted(lacking(found))}")


def test_every_metric_is_in_rays_endpoint_with_the_labels_of_serve(seen: list[Sample]) -> None:
    for family in (*ROUTER, *ENGINE):
        for sample in seen:
            if sample.name == exported(family):
                assert {"application", "deployment", "replica", *family.labels} <= set(
                    sample.labels
                )


def test_each_tier_reports_from_its_own_deployment(seen: list[Sample]) -> None:
    told = {
        (sample.labels["deployment"], sample.labels["tier"])
        for sample in seen
        if sample.name == "ray_cascade_engine_passes_total"
    }
    assert told == {("Drafter", "drafter"), ("Expert", "expert")}


def test_vllms_names_are_ours_under_another_name(seen: list[Sample]) -> None:
    found = {
        sample.name: sample.value for sample in seen if sample.labels.get("model_name") == "cascade"
    }
    drafted = found["ray_vllm_spec_decode_num_draft_tokens_total"]
    assert drafted >= found["ray_vllm_spec_decode_num_accepted_tokens_total"] > 0


async def test_an_answer_is_one_line_in_serves_log_and_has_no_text(server: Server) -> None:
    said = await answer(server, "logged-once")
    paths = [Path(one.path) for one in replica(server, "Router").open_files()]
    (log,) = [path for path in paths if path.name.startswith("replica_cascade_Router")]
    lines = [line for line in log.read_text().splitlines() if "logged-once: " in line]
    assert len(lines) == 1
    assert f": {said['usage']['completion_tokens']} tokens in " in lines[0]
    assert "Buzz" not in lines[0]
    assert said["choices"][0]["text"] not in lines[0]


async def test_no_secret_is_written_down_or_shown(server: Server) -> None:
    """Neither in a log, nor in a process list, nor by `serve config` and the dashboard."""
    files = server.config["applications"][0]["args"]["tls"]
    async with httpx.AsyncClient(base_url=server.http, timeout=120) as client:
        headers = {"authorization": "Bearer sk-of-nobody"}
        body = {"prompt": "x", "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body, headers=headers)).is_success
    paths = [Path(one.path) for one in replica(server, "Router").open_files()]
    (logs,) = {path.parents[1] for path in paths if path.parent.name == "serve"}
    written = [Path(files["key"]).parents[2] / "serve.log", *logs.rglob("*")]
    places = {str(path): path.read_text(errors="replace") for path in written if path.is_file()}
    assert len(places) > 20
    for path in DASHBOARD_PATHS:
        places[path] = json.dumps(await server.ask_dashboard(path))
    shown = server.command("serve", "config", "-a", server.dashboard).stdout
    assert files["key"] in shown
    places |= {"serve config": shown, "processes": command_lines()}
    for secret in ("sk-of-nobody", server.token, a_line_of(files["key"])):
        assert [where for where, text in places.items() if secret in text] == []


def a_line_of(key: str) -> str:
    """Return a line of a private key that no other key has."""
    return Path(key).read_text().splitlines()[2]


def command_lines() -> str:
    """Return how each process of this machine was started."""
    found = psutil.process_iter(["cmdline"])
    return "\n".join(" ".join(one.info["cmdline"] or ()) for one in found)


async def test_the_dashboard_shows_the_three_deployments(server: Server) -> None:
    told = await server.ask_dashboard("/api/serve/applications/")
    deployments = told["applications"]["cascade"]["deployments"]
    counts = {name: len(one["replicas"]) for name, one in deployments.items()}
    assert counts == {"Router": 1, "Drafter": 1, "Expert": 1}
