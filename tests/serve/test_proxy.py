"""`cluster/nginx.conf` in front of a running server: TLS at both doors, and what it keeps out."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
import trustme
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from tests.serve.conftest import free_port

from cascade.v1 import cascade_pb2, cascade_pb2_grpc, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterator

    from tests.serve.conftest import Server

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin")
FILE = Path(__file__).parents[2] / "cluster" / "nginx.conf"
QUESTION = "Who is Buzz Aldrin?"
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A running nginx."""

    port: int
    ca: trustme.CA

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        return context

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, verify=self.trust, timeout=60)

    def channel(self) -> grpc.aio.Channel:
        trusted = grpc.ssl_channel_credentials(self.ca.cert_pem.bytes())
        return grpc.aio.secure_channel(f"localhost:{self.port}", trusted)

    @asynccontextmanager
    async def connection(
        self, sent: bytes
    ) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Open a connection that says no more than this."""
        reader, writer = await asyncio.open_connection("localhost", self.port, ssl=self.trust)
        writer.write(sent)
        try:
            yield reader, writer
        finally:
            writer.close()


def nginx(*words: str) -> list[str]:
    assert NGINX is not None
    return [NGINX, "-e", "stderr", *words]


@contextmanager
def proxy(folder: Path, http: str, grpc_address: str, **changed: str) -> Generator[Proxy]:
    """Run the shipped file with ports, files and some values of its own.

    Args:
        folder: Where its files are.
        http: Address of the HTTP door behind it.
        grpc_address: Address of the gRPC door behind it.
        changed: Other values of directives, by their value in the file.
    """
    ca, port = trustme.CA(), free_port()
    issued = ca.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    text = FILE.read_text()
    others = {
        "/etc/cascade/door": str(folder),
        "/tmp/cascade-nginx.pid": str(folder / "pid"),  # noqa: S108 - what the file says
        "listen 443 ": f"listen 127.0.0.1:{port} ",
        "127.0.0.1:8000": http,
        "127.0.0.1:9000": grpc_address,
        "\nhttp {": "\nhttp {"
        + "".join(f"\n  {name}_temp_path {folder / name};" for name in TEMPORARY),
        **changed,
    }
    for before, after in others.items():
        assert before in text, f"cluster/nginx.conf has no {before!r}"
        text = text.replace(before, after)
    path = folder / "nginx.conf"
    path.write_text(text)
    checked = subprocess.run(  # noqa: S603 - our own words
        nginx("-t", "-c", str(path)), capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    running = subprocess.Popen(nginx("-c", str(path), "-g", "daemon off;"))  # noqa: S603 - as above
    try:
        yield Proxy(port=port, ca=ca)
    finally:
        running.terminate()
        running.wait()


@pytest.fixture(scope="module")
def door(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("door")
    changed = {"_timeout 10s": "_timeout 1s"}
    with proxy(folder, server.http.partition("//")[2], server.grpc, **changed) as made:
        wait_for(made)
        yield made


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Proxy]:
    """In front of nothing, with a small rate."""
    changed = {"rate=50r/s": "rate=1r/m", "burst=100": "burst=4"}
    nothing = f"127.0.0.1:{free_port()}"
    with proxy(tmp_path, nothing, nothing, **changed) as made:
        wait_for(made)
        yield made


def wait_for(made: Proxy) -> None:
    """Return when it listens; its certificate is checked, and nothing is asked."""
    transport = httpx.HTTPTransport(verify=made.trust, retries=8)  # with pauses between them
    with httpx.Client(transport=transport) as client:
        client.get(f"{made.url}/metrics")


def question() -> cascade_pb2.GenerateStreamRequest:
    return cascade_pb2.GenerateStreamRequest(
        generation=cascade_pb2.Generation(
            text=QUESTION, sampling=tokens_pb2.Sampling(temperature=0), max_tokens=32
        )
    )


async def test_both_doors_answer_over_tls_with_the_same_text(server: Server, door: Proxy) -> None:
    body: dict[str, Any] = {
        "model": "cascade",
        "prompt": QUESTION,
        "max_tokens": 32,
        "temperature": 0,
    }
    async with httpx.AsyncClient(base_url=server.http, timeout=60) as plain:
        wanted = (await plain.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    trusting = DefaultAsyncHttpxClient(verify=door.trust)
    async with AsyncOpenAI(
        base_url=f"{door.url}/v1", api_key="none", http_client=trusting
    ) as client:
        chunks = [one async for one in await client.completions.create(**body, stream=True)]
    assert len(chunks) > 2
    assert "".join(one.choices[0].text for one in chunks) == wanted
    async with door.channel() as channel:
        stub = cascade_pb2_grpc.GenerationServiceStub(channel)
        frames = [frame async for frame in stub.GenerateStream(question())]
    assert len(frames) > 2
    assert "".join(choice.text for frame in frames for choice in frame.choices) == wanted


async def test_without_tls_nothing_is_answered(door: Proxy) -> None:
    async with httpx.AsyncClient() as plain:
        response = await plain.get(f"http://localhost:{door.port}/v1/models")
    assert response.status_code == 400
    async with grpc.aio.insecure_channel(f"localhost:{door.port}") as channel:
        stub = cascade_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(cascade_pb2.ListModelsRequest(), timeout=30)
    assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-slow:",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{",
    ],
    ids=["says nothing", "half a header", "half a body"],
)
async def test_a_client_that_stalls_is_let_go(door: Proxy, sent: bytes) -> None:
    rest = b""
    async with door.connection(sent) as (reader, _):
        with suppress(ConnectionResetError):
            rest = await asyncio.wait_for(reader.read(), 60)
    assert rest == b"" or rest.startswith(b"HTTP/1.1 408")


async def test_a_body_that_is_too_large_is_refused_in_openais_shape(door: Proxy) -> None:
    async with door.http() as http:
        response = await http.post("/v1/completions", content=b"x" * 3_000_000)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


async def test_metrics_are_not_for_clients(door: Proxy) -> None:
    async with door.http() as http:
        assert (await http.get("/metrics")).status_code == 404


async def test_who_calls_too_often_is_told_so(alone: Proxy) -> None:
    """And while no router is there, the others get 503, or UNAVAILABLE, and when to come again."""
    async with alone.http() as http:
        found = await asyncio.gather(*(http.get("/v1/models") for _ in range(20)))
    assert {one.status_code for one in found} == {429, 503}
    for one in found:
        assert one.headers["retry-after"] == "1"
        wanted = {429: "rate_limit_exceeded", 503: "unavailable"}
        assert one.json()["error"]["code"] == wanted[one.status_code]
    async with alone.channel() as channel:
        stub = cascade_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(cascade_pb2.ListModelsRequest(), timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, caught.value
