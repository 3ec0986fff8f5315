"""The same load through the gRPC API."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
from tests.chaos.load import HANG_S, Answer

from cascade.v1 import cascade_pb2, cascade_pb2_grpc, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from tests.chaos.load import Body


class GrpcClients:
    """Sends requests over one channel; an answer's status is a gRPC code, 0 if all is well."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = cascade_pb2_grpc.GenerationServiceStub(self._channel)

    async def complete(
        self,
        body: Body,
        *,
        until: Callable[[Answer], bool] | None = None,
        into: list[Answer] | None = None,
    ) -> Answer:
        """Return what was received to the end, or until the client leaves.

        Args:
            body: The request, as the HTTP API takes it.
            until: Whether the client leaves, after each frame.
            into: The answer is appended when the request is sent.
        """
        answer = Answer(body=body, began_s=time.monotonic())
        if into is not None:
            into.append(answer)
        request = cascade_pb2.GenerateStreamRequest(generation=generation(body))
        try:
            async for frame in self._stub.GenerateStream(request, timeout=HANG_S):
                for choice in frame.choices:
                    answer.text += choice.text
                    if choice.text:
                        answer.chunk_times_s.append(time.monotonic())
                if until is not None and until(answer):
                    break
            else:
                answer.done = True
        except grpc.aio.AioRpcError as error:
            answer.status = error.code().value[0]
            answer.error = f"{error.code().name}: {error.details()}"
        finally:
            answer.ended_s = time.monotonic()
        return answer

    async def close(self) -> None:
        await self._channel.close()


@asynccontextmanager
async def open_grpc_clients(address: str) -> AsyncGenerator[GrpcClients]:
    """Open a channel, and close it at the end."""
    made = GrpcClients(address)
    try:
        yield made
    finally:
        await asyncio.shield(made.close())


def generation(body: Body) -> cascade_pb2.Generation:
    """Return a request of `load.greedy` or `load.seeded` as the gRPC API takes it."""
    options = body["cascade"]
    made = cascade_pb2.Generation(
        text=body["prompt"],
        sampling=tokens_pb2.Sampling(temperature=body["temperature"]),
        max_tokens=body["max_tokens"],
        ignore_eos=body["ignore_eos"],
        mode=cascade_pb2.MODE_SPECULATIVE,
        rule=tokens_pb2.Rule(lossless=tokens_pb2.Lossless()),
        fixed_draft_length=options["draft_tokens"],
    )
    if "seed" in body:
        made.seed = body["seed"]
        made.coupling = tokens_pb2.COUPLING_GUMBEL
    return made
