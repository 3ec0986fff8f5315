"""The HTTP API: OpenAI's routes over a `ServingContext`, and their OpenAPI description."""

from __future__ import annotations

import asyncio
import importlib.metadata
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Header, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema

from cascade.api import build_request, middleware, playground, responses, tokenization
from cascade.api.bodies import THREAD_BYTES
from cascade.api.body import Body, parse
from cascade.api.completion import Completions
from cascade.api.prompts import check_model
from cascade.api.responses import ChatCompletionFormat, ResponseFormat, TextCompletionFormat
from cascade.api.responses_body import ResponsesBody, response_call
from cascade.api.responses_events import ResponsesFormat
from cascade.api.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from cascade.api.sse import CompletionStream, EventResponse, while_connected
from cascade.api.structured import check_grammar
from cascade.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi.responses import Response

    from cascade.api.build_request import CompletionCall
    from cascade.api.context import Cors, ServingContext
    from cascade.types import Caller

B = TypeVar("B", bound=Body)
T = TypeVar("T")


_REF = "#/components/schemas/{model}"

_CHUNK = {"type": "string", "description": "If `stream` is true: one chunk per event"}
_EVENTS = {"schema": {"type": "object", "required": ["data"], "properties": {"data": _CHUNK}}}

_NULLABLE = ["string", "null"]
_ERROR_FIELDS = {"message": "string", "type": "string", "param": _NULLABLE, "code": _NULLABLE}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": [*_ERROR_FIELDS],
            "properties": {name: {"type": kind} for name, kind in _ERROR_FIELDS.items()},
        }
    },
}


def create_app(
    service: ServingContext | None = None,
    *,
    add_request_id: bool = True,
    cors: Cors | None = None,
    has_playground: bool = True,
) -> FastAPI:
    """Return the HTTP API.

    Args:
        service: What to serve; without it requests get 503 until `app.state.service` is set.
        add_request_id: Whether responses get an `x-request-id` here. Under Ray Serve they must not:
            its own layer adds one, and clients would read two as `a, a`.
        cors: Which web pages may call; by default what the service says.
        has_playground: Whether `/` is a page to try the server out.
    """
    # FastAPI's documentation pages load their scripts from the internet: blank where there is none.
    app = FastAPI(title="Speculative Cascades", version="1", docs_url=None, redoc_url=None)
    app.state.service = service
    guarded = [Depends(_authenticate)]
    for path, endpoint, dependencies in (
        ("/health", health, []),
        ("/healthz", health, []),
        ("/ping", health, []),
        ("/health/ready", health, []),
        ("/health/live", liveness, []),
        ("/livez", liveness, []),
        ("/version", version, guarded),
        ("/metrics", metrics, guarded),
        ("/v1/models", models, guarded),
        ("/v1/models/{name:path}", model, guarded),
    ):
        media = PlainTextResponse if endpoint is metrics else JSONResponse
        described = {"response_model": None, "response_class": media}
        route = partial(app.api_route, path, dependencies=dependencies, **described)
        route(methods=["GET"])(endpoint)
        route(methods=["HEAD"], include_in_schema=False)(endpoint)
    for path, body_type, endpoint in (
        ("/v1/completions", CompletionBody, completions),
        ("/v1/chat/completions", ChatBody, chat_completions),
        ("/v1/responses", ResponsesBody, create_response),
        ("/tokenize", TokenizeBody, tokenize),
        ("/detokenize", DetokenizeBody, detokenize),
    ):
        content = {"application/json": {"schema": {"$ref": _REF.format(model=body_type.__name__)}}}
        extra = {"requestBody": {"required": True, "content": content}}
        app.post(path, dependencies=guarded, response_model=None, openapi_extra=extra)(endpoint)
    if has_playground:
        playground.install(
            app, evaluation=lambda: app.state.service.evaluation, dependencies=guarded
        )
    middleware.install(app, add_request_id=add_request_id, cors=cors or (service and service.cors))
    app.openapi = partial(_openapi, app)
    return app


async def health(request: Request) -> Response:
    """Say whether requests can be answered now: whether a load balancer should send any."""
    if not _service(request).ready():
        raise Unavailable("No expert replica answers yet, or any more")
    warnings = _service(request).warnings()
    found: dict[str, Any] = {"warnings": warnings} if warnings else {}
    return responses.JsonResponse({"status": "ok"} | found)


async def liveness() -> Response:
    """Say that this router runs, with or without models: only a restart mends one that does not."""
    return responses.JsonResponse({"status": "ok"})


async def version() -> Response:
    """Say which version of the server this is."""
    return responses.JsonResponse({"version": importlib.metadata.version("speculative-cascades")})


async def metrics(request: Request) -> Response:
    """Return metrics in Prometheus' text format."""
    text = await _service(request).metrics()
    return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


async def models(request: Request) -> Response:
    """List the models."""
    service = _service(request)
    data = [responses.model(name, service) for name in service.models]
    return responses.JsonResponse({"object": "list", "data": data})


async def model(request: Request, name: str) -> Response:
    """Describe one model."""
    service = _service(request)
    check_model(name, service)
    return responses.JsonResponse(responses.model(name, service))


async def completions(request: Request) -> Response:
    """Continue a prompt."""
    return await _complete(request, CompletionBody, build_request.completion, TextCompletionFormat)


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _complete(request, ChatBody, build_request.chat, ChatCompletionFormat)


async def create_response(request: Request) -> Response:
    """Answer a conversation, in the newer form of OpenAI's API; nothing is stored."""

    def build(
        body: ResponsesBody, service: ServingContext
    ) -> tuple[CompletionCall, ResponsesFormat]:
        response_format = ResponsesFormat(service, request.state.request_id, body)
        return response_call(body, service), response_format

    return await _answer(request, *await _build(request, ResponsesBody, build))


async def tokenize(request: Request) -> Response:
    """Return the tokens of a prompt or of a conversation."""
    return responses.JsonResponse(await _build(request, TokenizeBody, tokenization.tokenize))


async def detokenize(request: Request) -> Response:
    """Return the text of tokens."""
    return responses.JsonResponse(await _build(request, DetokenizeBody, tokenization.detokenize))


async def _build(
    request: Request, body_type: type[B], build: Callable[[B, ServingContext], T]
) -> T:
    """Return what `build` makes of the body."""
    service = _service(request)
    caller = _caller(request).name
    limits = service.limits
    data = await service.bodies.read(
        request,
        caller=caller,
        most_bytes=limits.body_bytes,
        most_bodies=limits.bodies,
        within_s=limits.body_s,
    )

    def made() -> T:
        return build(parse(data, body_type), service)

    return await asyncio.to_thread(made) if len(data) >= THREAD_BYTES else made()


async def _complete(
    request: Request,
    body_type: type[B],
    build: Callable[[B, ServingContext], CompletionCall],
    format_type: type[ResponseFormat],
) -> Response:
    call = await _build(request, body_type, build)
    response_format = format_type(_service(request), request.state.request_id)
    return await _answer(request, call, response_format)


async def _answer(
    request: Request, call: CompletionCall, response_format: ResponseFormat
) -> Response:
    service, request_id = _service(request), request.state.request_id
    await check_grammar(call.requests[0], call.grammar_param, service)
    completions = Completions(
        call, service, request_id=request_id, caller=_caller(request), key=request.state.key
    )
    if not call.stream:
        await while_connected(request.receive, completions.run())
        return responses.JsonResponse(response_format.response(completions))
    stream = CompletionStream(completions, response_format, keep_alive_s=service.keep_alive_s)
    await while_connected(request.receive, stream.begin())
    return EventResponse(stream.events())


def _caller(request: Request) -> Caller:
    peer = "" if request.client is None else f"{request.client.host}:{request.client.port}"
    return middleware.caller(request.state.key, peer)


def _service(request: Request) -> ServingContext:
    service: ServingContext | None = request.app.state.service
    if service is None:
        raise Unavailable("The server is starting")
    return service


async def _authenticate(
    request: Request, authorization: Annotated[str | None, Header()] = None
) -> None:
    request.state.key = middleware.authenticate(_service(request), authorization)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description, made on the first call: bodies as they are parsed."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    app.openapi_schema = schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    bodies = (ChatBody, CompletionBody, ResponsesBody, TokenizeBody, DetokenizeBody)
    _, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=_REF
    )
    schema["components"] = {"schemas": definitions["$defs"] | {"Error": _ERROR}}
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    operations = [(path, one) for path, of in schema["paths"].items() for one in of.values()]
    for path, operation in operations:
        operation["responses"].pop("422", None)
        operation["responses"]["default"] = {"description": "An error", "content": content}
        if path.endswith(("/completions", "/responses")):
            operation["responses"]["200"]["content"]["text/event-stream"] = _EVENTS
    return schema
