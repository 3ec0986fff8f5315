"""TLS between router and tiers: who gets in, and certificates that change."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme
from tests.support.certificates import write_certificate, write_role
from tests.support.recording_tier import RecordingTier

from cascade.errors import ExpertUnavailable, StartupError
from cascade.protocol.client import ReplicaClient
from cascade.protocol.messages import Judge, Judgement, Open
from cascade.protocol.server import TierServer
from cascade.protocol.services import EXPERT
from cascade.protocol.tls import Credentials, TlsFiles, credentials_of, role_name
from cascade.types import Block, DecodingParams, Session, SessionId

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from tests.support.tcp_relay import TcpRelay

    from cascade.protocol.client import SessionStream

SESSION = SessionId("a session that nobody may read")
TOKEN = "a token that nobody may read"  # noqa: S105 - of a lease that a test makes up


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def expert_files(tmp_path: Path, ca: trustme.CA) -> TlsFiles:
    return write_role(tmp_path, ca, "expert")


@pytest.fixture
def router_files(tmp_path: Path, ca: trustme.CA) -> TlsFiles:
    return write_role(tmp_path, ca, "router")


@pytest.fixture
async def expert(expert_files: TlsFiles) -> AsyncGenerator[str]:
    """An expert that serves with TLS, by its address."""
    server = TierServer(RecordingTier(), EXPERT, credentials=Credentials(expert_files))
    yield await server.start("127.0.0.1:0")
    await server.stop()


@asynccontextmanager
async def connected(address: str, files: TlsFiles | None) -> AsyncGenerator[SessionStream]:
    """Open a session on an expert, with the certificate of these files or without TLS."""
    credentials = None if files is None else Credentials(files)
    client = ReplicaClient(address, EXPERT, credentials=credentials)
    stream = client.open_stream(SESSION, 1, lease=TOKEN)
    session = Session(id=SESSION, prompt=(1, 2), policy=DecodingParams())
    stream.send(Open(session=session, epoch=1, lease=TOKEN))
    yield stream
    await client.close()


async def answer(stream: SessionStream) -> Judgement:
    block = Block(tokens=(7, 8))
    stream.send(Judge(session_id=SESSION, epoch=1, position=0, digest=0, block=block))
    reply = await stream.receive()
    assert isinstance(reply, Judgement)
    return reply


async def test_a_router_with_its_certificate_is_served(expert: str, router_files: TlsFiles) -> None:
    async with connected(expert, router_files) as stream:
        assert (await answer(stream)).verdict.tokens == (7, 8)


async def test_nothing_crosses_the_network_in_clear(
    expert: str, router_files: TlsFiles, relay: Callable[[str], Awaitable[TcpRelay]]
) -> None:
    listener = await relay(expert)
    async with connected(listener.address, router_files) as stream:
        await answer(stream)
    assert len(listener.seen) > 1_000
    assert TOKEN.encode() not in listener.seen
    assert SESSION.encode() not in listener.seen


async def test_without_tls_a_listener_reads_the_token(
    relay: Callable[[str], Awaitable[TcpRelay]],
) -> None:
    """What the test above looks for is there to be found."""
    server = TierServer(RecordingTier(), EXPERT)
    listener = await relay(await server.start("127.0.0.1:0"))
    async with connected(listener.address, None) as stream:
        await answer(stream)
    assert TOKEN.encode() in listener.seen
    await server.stop()


async def test_a_client_without_tls_gets_nothing(expert: str) -> None:
    async with connected(expert, None) as stream:
        with pytest.raises(ExpertUnavailable):
            await answer(stream)


async def test_a_client_without_a_certificate_gets_nothing(
    expert: str, expert_files: TlsFiles
) -> None:
    credentials = grpc.ssl_channel_credentials(Credentials(expert_files).current()[0])
    options = (("grpc.ssl_target_name_override", role_name("expert")),)
    async with grpc.aio.secure_channel(expert, credentials, options=options) as channel:
        call: Any = channel.unary_unary(EXPERT.path(EXPERT.describe_method))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_another_authority_gets_nothing(
    tmp_path: Path, expert: str, ca: trustme.CA
) -> None:
    other = trustme.CA()
    files = write_certificate(tmp_path / "other", other, role_name("router"), trusts=ca)
    async with connected(expert, files) as stream:
        with pytest.raises(ExpertUnavailable):
            await answer(stream)


async def test_only_routers_call_tiers(tmp_path: Path, expert: str, ca: trustme.CA) -> None:
    drafter = write_role(tmp_path, ca, "drafter")
    async with connected(expert, drafter) as stream:
        with pytest.raises(ExpertUnavailable, match=r"is for drafter\.cascade; only that of rout"):
            await answer(stream)


async def test_a_router_calls_only_the_tier_that_it_means(
    tmp_path: Path, ca: trustme.CA, router_files: TlsFiles
) -> None:
    """Where a drafter has taken an expert's address, the router sends it nothing."""
    tier = RecordingTier()
    files = write_role(tmp_path, ca, "drafter")
    server = TierServer(tier, EXPERT, credentials=Credentials(files))
    async with connected(await server.start("127.0.0.1:0"), router_files) as stream:
        with pytest.raises(ExpertUnavailable):
            await answer(stream)
    assert tier.received.empty()
    await server.stop()


async def test_the_holder_of_any_certificate_calls_where_clients_need_none(
    expert_files: TlsFiles, router_files: TlsFiles
) -> None:
    open_files = TlsFiles(
        ca=expert_files.ca,
        certificate=expert_files.certificate,
        key=expert_files.key,
        require_client=False,
    )
    server = TierServer(RecordingTier(), EXPERT, credentials=Credentials(open_files))
    async with connected(await server.start("127.0.0.1:0"), router_files) as stream:
        await answer(stream)
    await server.stop()


async def test_rotation_keeps_open_streams_and_changes_new_ones(
    tmp_path: Path, expert: str, router_files: TlsFiles
) -> None:
    """The new certificates are of a new authority, so those with old ones stay out."""
    async with connected(expert, router_files) as before:
        await answer(before)
        successor = trustme.CA()
        write_role(tmp_path, successor, "expert")
        renewed = write_certificate(tmp_path / "renewed", successor, role_name("router"))
        async with connected(expert, renewed) as after:
            await answer(after)
        await answer(before)
        async with connected(expert, router_files) as refused:
            with pytest.raises(ExpertUnavailable):
                await answer(refused)


async def test_files_that_cannot_be_used_leave_the_old_ones_in_use(
    tmp_path: Path, expert: str, router_files: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "expert" / "key.pem").write_text("half of a key")
    async with connected(expert, router_files) as stream:
        await answer(stream)
    assert "Keeping the certificates read before" in caplog.text
    assert "half of a key" not in caplog.text


def test_files_that_are_missing_stop_the_start(tmp_path: Path, router_files: TlsFiles) -> None:
    files = TlsFiles(ca=router_files.ca, certificate=str(tmp_path / "no.pem"), key=router_files.key)
    with pytest.raises(StartupError, match=r"`tls` cannot be used: .*no\.pem"):
        Credentials(files)


def test_a_key_of_another_certificate_stops_the_start(
    expert_files: TlsFiles, router_files: TlsFiles
) -> None:
    files = TlsFiles(ca=router_files.ca, certificate=router_files.certificate, key=expert_files.key)
    with pytest.raises(StartupError, match="are no certificate and its key"):
        Credentials(files)


def test_without_settings_there_is_no_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    assert credentials_of(None) is None


def test_half_of_rays_own_tls_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_CA_CERT", "ca.pem")
    monkeypatch.delenv("RAY_TLS_SERVER_CERT", raising=False)
    monkeypatch.delenv("RAY_TLS_SERVER_KEY", raising=False)
    with pytest.raises(StartupError, match="RAY_TLS_SERVER_CERT and RAY_TLS_SERVER_KEY is not"):
        credentials_of(None)


async def test_the_files_of_rays_own_tls_are_used_as_ray_uses_them(
    tmp_path: Path, ca: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They name hosts: the address that a client calls."""
    files = write_certificate(tmp_path / "ray", ca, "127.0.0.1")
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_CA_CERT", files.ca)
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", files.certificate)
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", files.key)
    of_ray = credentials_of(None)
    assert of_ray is not None
    server = TierServer(RecordingTier(), EXPERT, credentials=of_ray)
    async with connected(await server.start("127.0.0.1:0"), of_ray.files) as stream:
        await answer(stream)
    await server.stop()
