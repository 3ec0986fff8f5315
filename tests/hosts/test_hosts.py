"""Three hosts, 5 ms apart, with tokens and TLS: who gets in, what can be read, and links that fail.

Needs root and network namespaces: `poe hosts`.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
import trustme
from tests.chaos.load import Answer, Clients, key, references, request_bodies, streams
from tests.hosts.cluster import API_KEY, DASHBOARD, HTTPS, TIER_PORTS, host_cluster
from tests.hosts.network import APART_MS, unavailable
from tests.serve.test_operations import DASHBOARD_PATHS
from tests.support.certificates import write_certificate

from cascade.protocol.services import (
    DRAFTER,
    EXPERT,
    LEASE_KEY,
    TierKind,
    decode_description,
)
from cascade.protocol.tls import Credentials, TlsFiles, role_name
from cascade.router.router import RouterOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import httpx
    from tests.hosts.cluster import HostCluster
    from tests.hosts.network import Host

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]

STREAMS = 4
TOKENS = 128
# The deadlines that docs/resilience.md states, in seconds.
DRAFTER_SILENCE_S = 5.0
NOT_READY_S = 5.0
REFUSED_S = 3.0
RECONNECTED_S = 5.0  # after the link is back
LOSS_S = RouterOptions().loss_deadline_s
WORD = "Zanzibar"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostCluster]:
    if reason := unavailable():
        pytest.skip(reason)
    with host_cluster(tmp_path_factory.mktemp("h")) as made:
        yield made


@pytest.fixture
async def http(cluster: HostCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with cluster.client() as made:
        yield made


@pytest.fixture
async def clients(cluster: HostCluster) -> AsyncIterator[Clients]:
    made = Clients(cluster.url, verify=cluster.trusted(), key=API_KEY)
    yield made
    await made.close()


async def test_the_hosts_are_5_ms_apart_each_way(cluster: HostCluster) -> None:
    """As docs/resilience.md says; a client is half of it away."""
    script = f"""
import socket, time
began_s = time.monotonic()
socket.create_connection(("{cluster.head.address}", {HTTPS}), 30)
print(time.monotonic() - began_s)
"""
    for host in (cluster.drafters, cluster.experts):
        round_trip_s = float(cluster.run(host, "python", "-c", script).stdout)
        assert round_trip_s >= 2 * APART_MS / 1000


async def test_nothing_can_be_read_between_the_hosts(
    cluster: HostCluster, http: httpx.AsyncClient
) -> None:
    body = {"prompt": f"Who is {WORD}?", "max_tokens": 24, "cascade": {"draft_tokens": 4}}
    with cluster.captured() as packets:
        response = await http.post("/v1/completions", json=body)
        assert response.is_success, response.text
        accepted = response.json()["usage"]["cascade"]["expert_passes"]
    assert accepted > 0
    assert len(packets) > 10_000
    for secret in (WORD, API_KEY, cluster.token):
        assert secret.encode() not in packets


async def test_a_lease_opens_a_tier_and_cannot_be_read_between_the_hosts(
    cluster: HostCluster,
) -> None:
    """The head takes a lease, as a router does, and a client uses it."""
    with cluster.captured() as packets, cluster.holding_lease("Expert") as ticket:
        address, token = ticket
        async with secure(address, cluster.roles, EXPERT) as channel:
            call: Any = channel.unary_unary(EXPERT.path(EXPERT.describe_method))
            said = await call(b"", timeout=30, metadata=((LEASE_KEY, token),))
    assert decode_description(said, EXPERT).vocab_size > 0
    assert len(packets) > 10_000
    assert token.encode() not in packets


async def test_the_capture_sees_what_is_not_encrypted(cluster: HostCluster) -> None:
    with cluster.captured() as packets:
        reader, writer = await asyncio.open_connection(cluster.head.address, HTTPS)
        writer.write(WORD.encode() + b"\r\n\r\n")
        await writer.drain()
        await reader.read(1024)
        writer.close()
    assert WORD.encode() in packets


async def test_a_call_without_a_key_is_refused(cluster: HostCluster) -> None:
    async with cluster.client(key="sk-another") as stranger:
        response = await stranger.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 401


@pytest.mark.parametrize("kind", [DRAFTER, EXPERT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("has", ["nothing", "a certificate of its own", "no lease"])
async def test_a_stranger_gets_nothing_from_a_tier(
    cluster: HostCluster, kind: TierKind, has: str, tmp_path: Path
) -> None:
    host = cluster.drafters if kind is DRAFTER else cluster.experts
    address = f"{host.address}:{TIER_PORTS.partition('-')[0]}"
    files = cluster.roles
    match has:
        case "nothing":
            channel = grpc.aio.insecure_channel(address)
        case "no lease":
            channel = secure(address, files, kind)
        case _:
            other = trustme.CA()
            own = write_certificate(tmp_path / "x", other, role_name("router"), trusts=cluster.ca)
            channel = secure(address, own, kind)
    async with channel:
        call: Any = channel.unary_unary(kind.path(kind.describe_method))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=10)
    wanted = "UNAUTHENTICATED" if has == "no lease" else "UNAVAILABLE"
    assert caught.value.code().name == wanted, caught.value.details()


def secure(address: str, files: TlsFiles, kind: TierKind) -> grpc.aio.Channel:
    credentials = Credentials(files)
    options = credentials.channel_options(kind.name)
    return grpc.aio.secure_channel(address, credentials.channel(), options=options)


@pytest.mark.parametrize("lacks", ["token", "certificate"])
def test_a_host_without_token_or_certificate_does_not_join(
    cluster: HostCluster, lacks: str
) -> None:
    more = {"RAY_AUTH_TOKEN": "0" * 64} if lacks == "token" else {"RAY_USE_TLS": "0"}
    address = f"--address={cluster.head.address}:6379"
    tried = cluster.run(cluster.experts, "ray", "status", address, **more)
    assert tried.returncode != 0
    assert "Active:" not in tried.stdout


async def test_no_secret_is_written_down_or_shown(
    cluster: HostCluster, http: httpx.AsyncClient
) -> None:
    """Neither in a log, nor in a process list, nor by `serve config` and the dashboard."""
    for key_ in (API_KEY, "sk-of-nobody"):
        headers = {"authorization": f"Bearer {key_}"}
        await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers)
    places = {
        str(path): path.read_text(errors="replace")
        for path in (cluster.folder / "ray").rglob("*")
        if path.is_file() and "logs" in path.parts
    }
    assert len(places) > 20
    for what in ("config", "status"):
        places[what] = cluster.run(cluster.head, "serve", what, "-a", DASHBOARD).stdout
    for path in DASHBOARD_PATHS:
        places[path] = cluster.ask_dashboard(path)
    assert "api_keys_file" in places["config"]
    assert "api_keys_file" in places["/api/serve/applications/"]
    places["processes"] = "\n".join(
        " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])
    )
    for secret in (API_KEY, "sk-of-nobody", cluster.token, *cluster.private_keys):
        assert [where for where, text in places.items() if secret in text] == []


@pytest.fixture
async def texts(clients: Clients) -> dict[str, str]:
    """The text of each request without faults."""
    return await references(clients, request_bodies(tokens=TOKENS)[::6])


async def test_a_drafter_host_that_is_cut_off_changes_no_answer(
    cluster: HostCluster, clients: Clients, texts: dict[str, str]
) -> None:
    """The expert goes on alone after the draft deadline; drafts come back with the link."""
    answers = await through_a_cut(clients, texts, cluster.drafters, for_s=20)
    assert all(answer.done for answer in answers), [(a.status, a.error, a.broken) for a in answers]
    assert exact(answers, texts)
    assert max(answer.gap_s for answer in answers) <= DRAFTER_SILENCE_S
    report("drafter host cut for 20 s", answers)


@pytest.mark.parametrize("for_s", [12, 60, 80])  # after a minute Ray takes the host for dead
async def test_answers_resume_or_end_cleanly_when_the_expert_host_is_cut_off(
    cluster: HostCluster,
    clients: Clients,
    http: httpx.AsyncClient,
    texts: dict[str, str],
    for_s: float,
) -> None:
    """New requests get 503 meanwhile; the door becomes ready again by itself."""
    bodies = [json.loads(name) for name in texts]
    async with streams(clients, bodies, count=STREAMS) as answers:
        await began(answers)
        with cluster.experts.cut():
            cut_s = time.monotonic()
            red_s = await becomes(http, ready=False) - cut_s
            asked_s = time.monotonic()
            refused = await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
            refused_s = time.monotonic() - asked_s
            assert refused.status_code == 503, refused.text
            await asyncio.sleep(max(0.0, cut_s + for_s - time.monotonic()))
        linked_s = time.monotonic()
        back_s = await becomes(http, ready=True) - linked_s
    assert red_s <= NOT_READY_S
    assert refused_s <= REFUSED_S
    ended = [one for one in answers if one.status == 200]
    for one in ended:
        # Silent from the cut on, or a little before, until the link is back or it is given up.
        longest_s = min(linked_s - cut_s, LOSS_S) + RECONNECTED_S
        assert max(one.gap_s, one.gap_at(cut_s, for_s=1)) <= longest_s
    assert all(one.done or one.error == "expert_unavailable" for one in ended)
    assert exact([one for one in ended if one.done], texts)
    report(
        f"expert host cut for {for_s} s: not ready {red_s:.1f} s after the cut, a new request"
        f" refused in {refused_s:.1f} s, ready {back_s:.1f} s after the link was back",
        ended,
    )


async def through_a_cut(
    clients: Clients, texts: dict[str, str], host: Host, *, for_s: float
) -> list[Answer]:
    """Return the answers of streams that run while a host is cut off for a while."""
    bodies = [json.loads(name) for name in texts]
    async with streams(clients, bodies, count=STREAMS) as answers:
        await began(answers)
        with host.cut():
            await asyncio.sleep(for_s)
        await asyncio.sleep(5)
    return answers


async def began(answers: list[Answer]) -> None:
    """Wait until all streams write."""
    while sum(bool(one.chunk_times_s) for one in answers) < STREAMS:  # noqa: ASYNC110 - untold
        await asyncio.sleep(0.1)


async def becomes(http: httpx.AsyncClient, *, ready: bool) -> float:
    """Return when the door says so."""
    async with asyncio.timeout(180):
        while (await http.get("/health")).is_success is not ready:  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.1)
    return time.monotonic()


def exact(answers: list[Answer], texts: dict[str, str]) -> bool:
    return all(answer.text == texts[key(answer.body)] for answer in answers)


def report(what: str, answers: list[Answer]) -> None:
    gap_s = max(answer.gap_s for answer in answers)
    done = sum(answer.done for answer in answers)
    print(f"{what}: {done} of {len(answers)} answers to their end, longest silence {gap_s:.1f} s")  # noqa: T201 - what `poe hosts` reports
