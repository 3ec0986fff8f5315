"""The services as Ray Serve's proxies have them: what cannot be parsed is the client's mistake."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from cascade.api.grpc import GenerationServicer
from cascade.api.grpc_door import (
    add_GenerationServiceServicer_to_server,
    add_HealthServicer_to_server,
)
from cascade.v1 import cascade_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cascade.api.context import ServingContext

NO_MESSAGE = b"\x0b"  # a group without an end
COMPLETIONS = "/cascade.v1.GenerationService"
HEALTH = "/grpc.health.v1.Health"


@asynccontextmanager
async def door(service: ServingContext) -> AsyncGenerator[grpc.aio.Channel]:
    server = grpc.aio.server()
    servicer = GenerationServicer(lambda: service)
    add_GenerationServiceServicer_to_server(servicer, server)
    add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def ask(channel: grpc.aio.Channel, path: str, data: bytes) -> None:
    if path.endswith(("Stream", "Watch")):
        stream: Any = channel.unary_stream(path)(data)
        async for _ in stream:
            pass
    else:
        unary: Any = channel.unary_unary(path)(data)
        await unary


@pytest.mark.parametrize(
    "path",
    [
        *(
            f"{COMPLETIONS}/{one}"
            for one in ("Generate", "GenerateStream", "Tokenize", "Detokenize")
        ),
        *(f"{HEALTH}/{one}" for one in ("Check", "Watch")),
    ],
)
async def test_what_is_no_message_is_an_invalid_argument(
    service: ServingContext, path: str
) -> None:
    async with door(service) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, path, NO_MESSAGE)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no message of this call" in (caught.value.details() or "")


async def test_a_message_larger_than_a_body_may_be_is_refused(service: ServingContext) -> None:
    small = replace(service, limits=replace(service.limits, body_bytes=1000))
    request = pb.GenerateRequest(generation=pb.Generation(text="x" * 2000))
    async with door(small) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, f"{COMPLETIONS}/Generate", request.SerializeToString())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "1000" in (caught.value.details() or "")


async def test_a_message_is_served(service: ServingContext) -> None:
    request = pb.GenerateRequest(generation=pb.Generation(text="ab", max_tokens=1))
    async with door(service) as channel:
        await ask(channel, f"{COMPLETIONS}/Generate", request.SerializeToString())
