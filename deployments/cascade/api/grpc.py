"""The gRPC API: `GenerationService` and the health check over the same `ServingContext` as HTTP.

The methods have the names of the RPCs, because Ray Serve's proxy calls its ingress by them; a plain
`grpc.aio` server takes a `GenerationServicer` as its servicer.

Ray Serve's proxy forwards what a call sets on its context only when a message passes. So a failed
unary call sets the status and returns an empty message, and a failed stream sets it and yields one
more message. A stream that only sets it and returns reaches the client as success.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from grpc_health.v1 import health_pb2, health_pb2_grpc

from cascade.api import grpc_convert
from cascade.api.bodies import THREAD_BYTES
from cascade.api.completion import Completions
from cascade.api.grpc_door import Unreadable
from cascade.api.middleware import REQUEST_ID, authenticate, caller, public_error
from cascade.api.structured import check_grammar
from cascade.errors import BodyTooLarge, InvalidRequest, ModelNotFound, Unavailable
from cascade.protocol import grpc_status
from cascade.protocol.services import health_list
from cascade.v1 import cascade_pb2 as pb
from cascade.v1 import cascade_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

    import grpc
    from google.protobuf.message import Message

    from cascade.api.context import ServingContext
    from cascade.api.keys import ApiKey

T = TypeVar("T")

_Response: TypeAlias = pb.GenerateResponse | pb.GenerateStreamResponse

# Names that health checks ask for. All but the last say whether requests can be answered now.
_READINESS = ("", "cascade.v1.GenerationService", "readiness")
_LIVENESS = "liveness"

_MAX_ID_LENGTH = 1024  # it is returned in the trailing metadata, which clients limit to 8 KiB

_FAILED = pb.GenerateStreamResponse(choices=[pb.Choice(finish_reason=pb.FINISH_REASON_ERROR)])


class Context(Protocol):
    """What the contexts of `grpc.aio` and Ray Serve have in common."""

    def invocation_metadata(self) -> Iterable[tuple[str, Any]] | None:
        """Return the client's metadata."""
        ...

    def peer(self) -> str:
        """Return the client's address, such as `ipv4:127.0.0.1:50051`."""
        ...

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status code."""
        ...

    def set_details(self, details: str) -> None:
        """Set the status text."""
        ...

    def trailing_metadata(self) -> Iterable[tuple[str, Any]] | None:
        """Return the metadata after the last message, so far."""
        ...

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Set the metadata after the last message."""
        ...


_GRAMMARS = {"tools": "chat.tools"}  # fields that have a grammar, where it is not `grammar`


class GenerationServicer(
    cascade_pb2_grpc.GenerationServiceServicer, health_pb2_grpc.HealthServicer
):
    """Serves the RPCs. `service` is called for each, so it may return None at first."""

    def __init__(
        self,
        service: Callable[[], ServingContext | None],
        *,
        polls: int = 60,
        poll_s: float = 1.0,
    ) -> None:
        """Prepare the servicer.

        Args:
            service: Returns what to serve.
            polls: How often a `Watch` looks for a change before it ends. Clients begin the next
                one at once; a longer one would keep a replica that is to stop.
            poll_s: Seconds between two looks.
        """
        self._get_service = service
        self._polls = polls
        self._poll_s = poll_s

    async def Generate(  # noqa: N802 - the RPC's name
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        """Return finished completions."""
        request_id = _request_id(context)
        response = self._generate(request, context, request_id)
        return await _guard(context, response, pb.GenerateResponse(), request_id=request_id)

    async def GenerateStream(  # noqa: N802 - the RPC's name
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse]:
        """Yield completions delta by delta, then the usage."""
        request_id = _request_id(context)
        try:
            frame = pb.GenerateStreamResponse(request_id=request_id)
            completions = await self._start(request, context, frame)
            async with aclosing(completions.stream()) as deltas:
                async for item in deltas:
                    if item is not None:
                        response = pb.GenerateStreamResponse(choices=[grpc_convert.choice(*item)])
                        response.MergeFrom(frame)
                        yield response
            frame.usage.CopyFrom(grpc_convert.usage(completions.usage))
            yield frame
        except Exception as error:  # noqa: BLE001 - `_fail` logs what is not ours
            _fail(context, request_id, error)
            yield _FAILED

    async def ListModels(  # noqa: N802 - the RPC's name
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Return the models."""
        del request
        return await _guard(context, self._models(context), pb.ListModelsResponse())

    async def Tokenize(  # noqa: N802 - the RPC's name
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse:
        """Return the tokens of a prompt."""
        return await _guard(context, self._tokenize(request, context), pb.TokenizeResponse())

    async def Detokenize(  # noqa: N802 - the RPC's name
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        """Return the text of tokens."""
        return await _guard(context, self._detokenize(request, context), pb.DetokenizeResponse())

    async def Check(  # noqa: N802 - the RPC's name
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Say whether requests can be answered now, or whether the router lives at all."""
        return await _guard(context, self._check(request), health_pb2.HealthCheckResponse())

    async def List(  # noqa: N802 - the RPC's name
        self, request: Message, context: Context
    ) -> Message:
        """Return what `Check` says of every name."""
        del request
        return await _guard(context, self._list(), health_list([]))

    async def Watch(  # noqa: N802 - the RPC's name
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse]:
        """Yield what `Check` says now and after every change; an unknown name may appear later."""
        response = health_pb2.HealthCheckResponse
        last: health_pb2.HealthCheckResponse.ServingStatus | None = None
        try:
            _check_readable(request)
            for _ in range(self._polls):
                try:
                    status = self._status(request.service)
                except ModelNotFound:
                    status = response.SERVICE_UNKNOWN
                if status != last:
                    yield response(status=status)
                last = status
                await asyncio.sleep(self._poll_s)
        except Exception as error:  # noqa: BLE001 - `_fail` logs what is not ours
            _fail(context, _request_id(context), error)
            yield response(status=response.NOT_SERVING)

    async def _generate(
        self, request: pb.GenerateRequest, context: Context, request_id: str
    ) -> pb.GenerateResponse:
        response = pb.GenerateResponse(request_id=request_id)
        completions = await self._start(request, context, response)
        await completions.run()
        response.choices.extend(grpc_convert.choice(each, each.output) for each in completions.all)
        response.usage.CopyFrom(grpc_convert.usage(completions.usage))
        return response

    async def _start(
        self,
        request: pb.GenerateRequest | pb.GenerateStreamRequest,
        context: Context,
        response: _Response,
    ) -> Completions:
        """Return the completions of a call, and fill in what every response has."""
        service, key = self._authenticated(context)
        size = _check_size(request, service)
        stream = isinstance(response, pb.GenerateStreamResponse)
        build = partial(grpc_convert.call, request.generation, service, stream=stream)
        call = await asyncio.to_thread(build) if size >= THREAD_BYTES else build()
        await check_grammar(
            call.requests[0], _GRAMMARS.get(call.grammar_param, "grammar.text"), service
        )
        response.model = call.model
        response.create_time.CopyFrom(grpc_convert.timestamp(service.clock()))
        who = caller(key, context.peer().partition(":")[2])
        return Completions(call, service, request_id=response.request_id, caller=who, key=key)

    async def _models(self, context: Context) -> pb.ListModelsResponse:
        service = self._service(context)
        created = grpc_convert.timestamp(service.created)
        response, length = pb.ListModelsResponse(), service.context_tokens
        for name in service.models:
            response.models.add(name=name, create_time=created, context_length=length)
        return response

    async def _tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        service = self._service(context)
        _check_size(request, service)
        return await asyncio.to_thread(grpc_convert.tokenize, request, service)

    async def _detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        service = self._service(context)
        _check_size(request, service)
        return await asyncio.to_thread(grpc_convert.detokenize, request, service)

    async def _check(
        self, request: health_pb2.HealthCheckRequest
    ) -> health_pb2.HealthCheckResponse:
        _check_readable(request)
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def _list(self) -> Message:
        return health_list((name, self._status(name)) for name in (*_READINESS, _LIVENESS))

    def _status(self, name: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        """Return the health of a name; raises ModelNotFound for a name without one."""
        response = health_pb2.HealthCheckResponse
        if name == _LIVENESS:
            return response.SERVING
        if name not in _READINESS:
            raise ModelNotFound(f"No service `{name}` here; there is {_READINESS[1]}")
        service = self._get_service()
        ready = service is not None and service.ready()
        return response.SERVING if ready else response.NOT_SERVING

    def _service(self, context: Context) -> ServingContext:
        return self._authenticated(context)[0]

    def _authenticated(self, context: Context) -> tuple[ServingContext, ApiKey | None]:
        service = self._get_service()
        if service is None:
            raise Unavailable("The server is starting")
        return service, authenticate(service, _metadata(context).get("authorization"))


def _check_readable(request: Message | Unreadable) -> None:
    """Raise InvalidRequest if the proxy could not parse the message of a call."""
    if isinstance(request, Unreadable):
        raise InvalidRequest(request.reason)


def _check_size(request: Message, service: ServingContext) -> int:
    """Return the size of a message; raises BodyTooLarge, as the HTTP API does."""
    _check_readable(request)
    size = request.ByteSize()
    if size > service.limits.body_bytes:
        raise BodyTooLarge(
            f"The message has {size} bytes; this server reads up to {service.limits.body_bytes}"
        )
    return size


async def _guard(context: Context, call: Awaitable[T], failed: T, *, request_id: str = "") -> T:
    """Return the result of a unary call, or `failed` with the status set."""
    try:
        return await call
    except Exception as error:  # noqa: BLE001 - `_fail` logs what is not ours
        _fail(context, request_id or _request_id(context), error)
        return failed


def _fail(context: Context, request_id: str, error: Exception) -> None:
    problem = public_error(error, request_id)
    context.set_code(grpc_status.code(problem))
    context.set_details(grpc_status.message(problem))
    _set_trailing(context, request_id, *grpc_status.trailing_metadata(problem))


def _set_trailing(context: Context, request_id: str, *more: tuple[str, str | bytes]) -> None:
    # A list: Ray Serve's context appends it to one of its own.
    context.set_trailing_metadata([(REQUEST_ID, request_id), *more])


def _metadata(context: Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if value}


def _request_id(context: Context) -> str:
    """Return the caller's id of the call, or Ray Serve's, or a new one; the client gets it too."""
    metadata = dict(context.trailing_metadata() or ()) | _metadata(context)
    given = metadata.get(REQUEST_ID) or metadata.get("request_id") or ""
    request_id = given if 0 < len(given) <= _MAX_ID_LENGTH else secrets.token_hex(12)
    _set_trailing(context, request_id)
    return request_id
