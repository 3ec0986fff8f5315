"""The HTTP door: OpenAI's routes over a `Service`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response

from cascade.api import build_request, middleware, responses
from cascade.api.completion import Completions
from cascade.api.middleware import authenticate
from cascade.api.openapi import describe, request_body
from cascade.api.responses import ChatCompletionFormat, ResponseFormat, TextCompletionFormat
from cascade.api.schema import ChatBody, CompletionBody
from cascade.api.sse import CompletionStream, EventResponse, while_connected
from cascade.api.validation import parse
from cascade.errors import InvalidRequest, ModelNotFound, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.api.build_request import CompletionCall
    from cascade.api.context import ServingContext

_DRAINED_BODIES = 16  # a body this many times too large is not even read to its end

_THREAD_BYTES = 2**16  # from this size on, tokenizing would hold other streams up


def create_app(service: ServingContext | None = None, *, add_request_id: bool = True) -> FastAPI:
    """Return the door.

    Args:
        service: What to serve; without it the answer is 503 until `app.state.service` is set.
        add_request_id: Whether answers get an `x-request-id` here. Ray Serve's own layer in front
            adds one to every answer: two would reach clients as one name, `a, a`.
    """
    app = FastAPI(title="Speculative Cascades", version="1")
    app.state.service = service
    guarded = [Depends(_authenticate)]
    app.get("/health", response_model=None)(health)
    app.get("/healthz", response_model=None)(health)
    app.get("/v1/models", dependencies=guarded, response_model=None)(models)
    app.get("/v1/models/{name:path}", dependencies=guarded, response_model=None)(model)
    for path, kind, endpoint in (
        ("/v1/completions", CompletionBody, completions),
        ("/v1/chat/completions", ChatBody, chat_completions),
    ):
        extra = request_body(kind)
        app.post(path, dependencies=guarded, response_model=None, openapi_extra=extra)(endpoint)
    middleware.install(app, names_answers=add_request_id)
    describe(app)
    return app


async def health(request: Request) -> Response:
    """Say whether requests can be served now."""
    _ready(request)
    return JSONResponse({"status": "ok"})


async def models(request: Request) -> Response:
    """List the models."""
    service = _service(request)
    data = [responses.model(name, service) for name in service.models]
    return JSONResponse({"object": "list", "data": data})


async def model(request: Request, name: str) -> Response:
    """Describe one model."""
    service = _service(request)
    if name not in service.models:
        served = ", ".join(service.models)
        raise ModelNotFound(f"No model `{name}` here; this server has {served}", param="model")
    return JSONResponse(responses.model(name, service))


async def completions(request: Request) -> Response:
    """Continue a prompt."""
    service = _service(request)
    data = await _body(request, most=service.limits.body_bytes)
    call = await _translate(
        data, lambda: build_request.completion(parse(data, CompletionBody), service)
    )
    return await _answer(request, service, call, TextCompletionFormat(service.tokenizer))


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service = _service(request)
    data = await _body(request, most=service.limits.body_bytes)
    call = await _translate(data, lambda: build_request.chat(parse(data, ChatBody), service))
    return await _answer(request, service, call, ChatCompletionFormat(service.tokenizer))


async def _answer(
    request: Request, service: ServingContext, call: CompletionCall, shape: ResponseFormat
) -> Response:
    name, created = request.state.request_id, int(service.clock())
    answers = Completions(call, service, name=name)
    if not call.stream:
        await while_connected(request.receive, answers.run())
        id_ = f"{shape.prefix}-{name}"
        return JSONResponse(responses.completion(answers, shape, id_=id_, created=created))
    stream = CompletionStream(
        answers, shape, request_id=name, created=created, tick_s=service.keep_alive_s
    )
    await while_connected(request.receive, stream.begin())
    return EventResponse(stream.events())


async def _translate(data: bytes, work: Callable[[], CompletionCall]) -> CompletionCall:
    return work() if len(data) < _THREAD_BYTES else await asyncio.to_thread(work)


async def _body(request: Request, *, most: int) -> bytes:
    """Return the body. One that is too large is read on for a while: so its sender hears why."""
    size, parts = 0, list[bytes]()
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        elif size > _DRAINED_BODIES * most:
            break
    if size > most:
        raise InvalidRequest(f"The body has more than {most} bytes, the most this server reads")
    return b"".join(parts)


def _service(request: Request) -> ServingContext:
    service: ServingContext | None = request.app.state.service
    if service is None:
        raise Unavailable("The server is starting")
    return service


def _ready(request: Request) -> None:
    if not _service(request).ready():
        raise Unavailable("The models are not there yet")


async def _authenticate(
    request: Request, authorization: Annotated[str | None, Header()] = None
) -> None:
    """Refuse a caller without one of the service's keys, if it has any."""
    authenticate(_service(request), authorization)
