"""Doors and tiers under attack: memory bounded, honest callers served, nothing crashes.

Each attack comes from sixteen addresses of this machine while honest callers ask through both
doors. Serve's HTTP proxy answers 429 while requests arrive faster than a router takes them, and
gRPC ends calls with CANCELLED while a thousand others wait to be looked at, so honest callers
repeat a refused request, as OpenAI's clients do. Through `cluster/nginx.conf` none is refused.
"""

from __future__ import annotations

import asyncio
import os
import resource
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from tests.chaos.cluster import wait_until
from tests.floods import attacks, bad_requests
from tests.floods.server import MESSAGE_BYTES, Server, serve_run
from tests.serve.test_proxy import NGINX, Proxy, proxy, wait_for

from cascade.v1 import cascade_pb2 as pb
from cascade.v1 import cascade_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from tests.floods.server import Held

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

HALF_OPEN = 10_000
SLOW_BODIES = 2_000
BAD_REQUESTS = int(os.environ.get("FLOODS_REQUESTS", "20000"))
FRAMES = 20_000  # on each of four connections
CONNECTIONS = 100  # through a proxy, 32 at a time
UPLOAD_S = 20.0
AT_ONCE = 32

PROMPT, TOKENS = "The capital of", 24
BODY = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
HONEST_S = 120.0  # in which a caller must have its answer, whatever else goes on
REPEATED = {408, 429, 503}
REPEATED_CODES = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}
GROWTH_MIB = 400.0  # of a process, of what is left after an attack too: allocators keep memory
SPARE_FILES = 16

DOOR = "/cascade.v1.GenerationService/Generate"
TIER = "/cascade.v1.ExpertService/Judge"
SLOW = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"content-length: 1000\r\n\r\n{"
)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"  # and no more


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < HALF_OPEN + 1000:
        pytest.skip(f"a process may open {hard} files; {HALF_OPEN + 1000} are needed")
    with serve_run(tmp_path_factory.mktemp("floods")) as made:
        yield made
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def http_answer(http: httpx.AsyncClient, *, repeats: bool = True) -> str:
    """Return the answer of an honest caller, which repeats what was refused for now."""
    async with asyncio.timeout(HONEST_S):
        while True:
            response = await http.post("/v1/completions", json=BODY)
            if not repeats or response.status_code not in REPEATED:
                assert response.status_code == 200, response.text
                return response.json()["choices"][0]["text"]
            await asyncio.sleep(float(response.headers.get("retry-after", 1)))


async def grpc_answer(
    stub: cascade_pb2_grpc.GenerationServiceAsyncStub, *, repeats: bool = True
) -> str:
    generation = pb.Generation(text=PROMPT, max_tokens=TOKENS, ignore_eos=True)
    generation.sampling.temperature = 0
    async with asyncio.timeout(HONEST_S):
        while True:
            try:
                response = await stub.Generate(pb.GenerateRequest(generation=generation))
                return response.choices[0].text
            except grpc.aio.AioRpcError as error:
                if not repeats or error.code() not in REPEATED_CODES:
                    raise
                await asyncio.sleep(1)


@asynccontextmanager
async def attacked(
    server: Server, *, behind: Proxy | None = None
) -> AsyncGenerator[Callable[[], Any]]:
    """Check what must hold during and after an attack; yields what asks once through both doors.

    Args:
        server: What is attacked.
        behind: The proxy that honest callers ask; it lets no attack refuse them anything.
    """
    before, most = server.held(), dict[str, float]()

    async def watch() -> None:
        while True:
            for part, held in server.held().items():
                most[part] = max(most.get(part, 0.0), held.memory_mib)
            await asyncio.sleep(0.5)

    if behind is None:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc}")
        client = httpx.AsyncClient(base_url=server.url, timeout=HONEST_S)
    else:
        channel, client = behind.channel(), behind.http()
    repeats = behind is None
    async with client as http, channel:
        stub: Any = cascade_pb2_grpc.GenerationServiceStub(channel)
        expected = await http_answer(http)

        async def ask() -> None:
            answers = await asyncio.gather(
                http_answer(http, repeats=repeats), grpc_answer(stub, repeats=repeats)
            )
            assert answers == [expected, expected]

        async def keep_asking() -> None:
            while True:
                await ask()

        watching, asking = asyncio.create_task(watch()), asyncio.create_task(keep_asking())
        try:
            yield ask
        finally:
            watching.cancel()
            asking.cancel()
            done = await asyncio.gather(watching, asking, return_exceptions=True)
        for error in done:
            assert isinstance(error, asyncio.CancelledError), error
        await ask()
        await wait_until(lambda: ready(http), "the server to be ready")
    for part, held in server.held().items():
        assert held.pid == before[part].pid, f"the {part} was replaced"
        grown = max(most.get(part, 0.0), held.memory_mib) - before[part].memory_mib
        assert grown < GROWTH_MIB, f"the {part} grew by {grown:.0f} MiB"
    await wait_until(lambda: files_are_back(server, before), "files to be closed")


async def ready(http: httpx.AsyncClient) -> bool:
    return (await http.get("/health/ready")).is_success


def files_are_back(server: Server, before: dict[str, Held]) -> bool:
    now = server.held()
    return all(now[part].files <= before[part].files + SPARE_FILES for part in now)


@pytest.mark.parametrize("port", ["http", "grpc", "drafter", "expert"])
async def test_ten_thousand_connections_that_say_half(server: Server, port: str) -> None:
    first = {"http": HEAD, "grpc": attacks.PREFACE}.get(port, b"")
    number = getattr(server, port, None) or server.tiers[port]
    async with (
        attacked(server) as ask,
        attacks.connections(number, HALF_OPEN, first=first) as made,
    ):
        assert len(made) == HALF_OPEN
        for _ in range(3):
            await ask()


async def test_slow_bodies_take_no_place_from_others(server: Server) -> None:
    async with (
        attacked(server) as ask,
        attacks.connections(server.http, SLOW_BODIES, first=SLOW) as made,
    ):
        assert len(made) == SLOW_BODIES
        for _ in range(10):
            for _, writer in made:
                writer.write(b" ")
            await ask()


async def test_bodies_without_an_end(server: Server) -> None:
    head = SLOW.replace(b"content-length: 1000", b"transfer-encoding: chunked")[:-1]
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"

    async def upload(source: int) -> None:
        _, writer = await attacks.connect(server.http, source=source)
        writer.write(head)
        try:
            async with asyncio.timeout(UPLOAD_S):
                while True:
                    writer.write(chunk)
                    await writer.drain()
        except OSError:
            return
        finally:
            writer.transport.abort()

    async with attacked(server):
        await asyncio.gather(*map(upload, range(8)))


async def test_twenty_thousand_bad_http_requests(server: Server) -> None:
    statuses = Counter[tuple[str, str]]()

    async def send(number: int) -> None:
        kind, data = bad_requests.http_request(number)
        reader, writer = await attacks.connect(server.http, source=number)
        writer.write(data)
        try:
            async with asyncio.timeout(60):
                line = await reader.readline()
        except ConnectionResetError:
            line = b"HTTP/1.1 400 it was closed\r\n"
        finally:
            writer.transport.abort()
        statuses[kind, line.decode("latin-1")[9:12]] += 1

    async with attacked(server):
        await in_turn(send, BAD_REQUESTS)
    # Serve's proxy refuses what arrives faster than the router takes it.
    assert all(status[:1] == "4" for _, status in statuses), statuses


async def test_twenty_thousand_bad_grpc_calls(server: Server) -> None:
    codes = Counter[grpc.StatusCode]()
    usual = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:

        async def send(number: int) -> None:
            method, data = bad_requests.grpc_request(number)
            path = f"/cascade.v1.GenerationService/{method}"
            streamed = method == "GenerateStream"
            make: Any = channel.unary_stream if streamed else channel.unary_unary
            call = make(path)(data, timeout=HONEST_S)
            with suppress(grpc.aio.AioRpcError):
                if streamed:
                    async for _ in call:
                        pass
            codes[await call.code()] += 1

        async with attacked(server):
            await in_turn(send, BAD_REQUESTS)
    assert set(codes) <= usual | {grpc.StatusCode.RESOURCE_EXHAUSTED}, codes


async def in_turn(send: Callable[[int], Any], count: int) -> None:
    """Call `send` with so many numbers, some of them at the same time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await send(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(worker())


each_flood = pytest.mark.parametrize(
    ("attack", "count"),
    [
        (attacks.rapid_resets, FRAMES),
        (attacks.open_calls, FRAMES),
        (attacks.large_metadata, 300),
        (attacks.endless_metadata, 5_000),
        (attacks.settings, FRAMES),
        (attacks.pings, FRAMES),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)


@pytest.mark.parametrize("place", ["door", "tier"])
@each_flood
async def test_floods_of_http2_frames(
    server: Server, place: str, attack: Callable[[str, int], Iterator[bytes]], count: int
) -> None:
    port, path = (server.grpc, DOOR) if place == "door" else (server.tiers["expert"], TIER)
    async with attacked(server):
        await asyncio.gather(
            *(attacks.send_all(port, attack(path, count), source=number) for number in range(4))
        )


@pytest.fixture(scope="module")
def nginx(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    if NGINX is None:
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("nginx")
    doors = f"127.0.0.1:{server.http}", f"127.0.0.1:{server.grpc}"
    with proxy(folder, *doors) as made:
        wait_for(made)
        yield made


@each_flood
async def test_behind_a_proxy_a_flood_of_frames_refuses_no_honest_caller(
    server: Server, nginx: Proxy, attack: Callable[[str, int], Iterator[bytes]], count: int
) -> None:
    """It ends a connection after a thousand calls, so attackers come again and again."""
    tls = nginx.trust
    tls.set_alpn_protocols(["h2"])

    async def send(number: int) -> None:
        await attacks.send_all(nginx.port, attack(DOOR, count), source=number, tls=tls)

    async with attacked(server, behind=nginx):
        await in_turn(send, CONNECTIONS)


async def test_messages_without_a_key_that_are_too_large(server: Server) -> None:
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc}", options=options) as channel:

        async def send(_: int) -> None:
            call: Any = channel.unary_unary(DOOR)(b"\x12" + bytes(4 * MESSAGE_BYTES))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        async with attacked(server):
            await in_turn(send, 64)
