"""The gRPC door: `GenerationService` and the health check, over the same `Service` as HTTP.

The methods have the names of the RPCs, because Ray Serve's proxy calls its ingress by them; a plain
`grpc.aio` server takes a `GrpcDoor` as its servicer.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from grpc_health.v1 import health_pb2, health_pb2_grpc

from cascade.api import grpc_convert
from cascade.api.completion import Completions
from cascade.api.middleware import REQUEST_ID, authenticate, defect, told
from cascade.errors import CascadeError, ModelNotFound, Unavailable
from cascade.protocol import grpc_status
from cascade.v1 import cascade_pb2 as pb
from cascade.v1 import cascade_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterable

    from cascade.api.context import ServingContext

logger = logging.getLogger(__name__)

_SERVICES = ("", "cascade.v1.GenerationService")

_FAILED = pb.GenerateStreamResponse(choices=[pb.Choice(finish_reason=pb.FINISH_REASON_ERROR)])


class Context(grpc_status.Context, Protocol):
    """What `grpc.aio` and Ray Serve both tell of a call."""

    def invocation_metadata(self) -> Iterable[tuple[str, Any]] | None:
        """Return what the client sent beside its message."""
        ...


class GenerationServicer(
    cascade_pb2_grpc.GenerationServiceServicer, health_pb2_grpc.HealthServicer
):
    """Answers the RPCs. `service` is asked for at each call, so it may come later."""

    def __init__(self, service: Callable[[], ServingContext | None]) -> None:
        self._given = service

    async def Generate(  # noqa: N802 - the RPC's name
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        """Return whole answers; of a failed call, the status and an empty message."""
        answer = self._generate(request, context)
        return await grpc_status.guard(context, answer, failed=pb.GenerateResponse())

    async def GenerateStream(  # noqa: N802 - the RPC's name
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse]:
        """Yield answers piece by piece; if the call fails, one more frame with the status."""
        frames = self._stream(request, context)
        async with aclosing(frames):
            async for frame in grpc_status.guard_stream(context, frames, failed=_FAILED):
                yield frame

    async def ListModels(  # noqa: N802 - the RPC's name
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Return the models."""
        del request
        return await grpc_status.guard(
            context, self._models(context), failed=pb.ListModelsResponse()
        )

    async def Check(  # noqa: N802 - the RPC's name
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Say whether requests can be served now (`grpc.health.v1`)."""
        failed = health_pb2.HealthCheckResponse()
        return await grpc_status.guard(context, self._check(request), failed=failed)

    async def _generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        name = _request_id(context)
        with _sealed(name):
            service = self._service(context)
            call = grpc_convert.call(request.generation, service)
            answers = Completions(call, service, name=name)
            created = grpc_convert.timestamp(service.clock())
            await answers.run()
            return pb.GenerateResponse(
                request_id=name,
                create_time=created,
                model=answers.call.model,
                choices=[grpc_convert.choice(answer, answer.output) for answer in answers.all],
                usage=grpc_convert.usage(answers.usage),
            )

    async def _stream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse]:
        name = _request_id(context)
        with _sealed(name):
            service = self._service(context)
            call = grpc_convert.call(request.generation, service)
            answers = Completions(call, service, name=name)
            frame = pb.GenerateStreamResponse(
                request_id=name,
                create_time=grpc_convert.timestamp(service.clock()),
                model=answers.call.model,
            )
            async with aclosing(answers.stream()) as deltas:
                async for item in deltas:
                    if item is not None:
                        yield _with(frame, choices=[grpc_convert.choice(*item)])
            yield _with(frame, usage=grpc_convert.usage(answers.usage))

    async def _models(self, context: Context) -> pb.ListModelsResponse:
        service = self._service(context)
        return pb.ListModelsResponse(
            models=[
                pb.Model(
                    name=name,
                    create_time=grpc_convert.timestamp(service.created),
                    context_length=service.limits.context_tokens,
                )
                for name in service.models
            ]
        )

    async def _check(
        self, request: health_pb2.HealthCheckRequest
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in _SERVICES:
            raise ModelNotFound(f"No service `{request.service}` here; ask for {_SERVICES[1]}")
        service = self._given()
        ready = service is not None and service.ready()
        answer = health_pb2.HealthCheckResponse
        return answer(status=answer.SERVING if ready else answer.NOT_SERVING)

    def _service(self, context: Context) -> ServingContext:
        service = self._given()
        if service is None:
            raise Unavailable("The server is starting")
        authenticate(service, _metadata(context).get("authorization"))
        return service


def _with(frame: pb.GenerateStreamResponse, **fields: Any) -> pb.GenerateStreamResponse:
    """Return a frame with more in it."""
    more = pb.GenerateStreamResponse(**fields)
    more.MergeFrom(frame)
    return more


def _metadata(context: Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if value}


def _request_id(context: Context) -> str:
    """Return the caller's name of the call, or Ray Serve's, or a new one."""
    told = _metadata(context)
    return told.get(REQUEST_ID) or told.get("request_id") or secrets.token_hex(12)


@contextmanager
def _sealed(request_id: str) -> Generator[None]:
    """Let no exception of another kind than ours out."""
    try:
        yield
    except CascadeError as error:
        raise told(error, request_id) from None
    except Exception as error:
        logger.exception("Request %s failed", request_id)
        raise defect(request_id) from error
