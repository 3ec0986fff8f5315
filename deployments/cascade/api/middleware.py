"""Request ids, authentication, and one response format for every error of the HTTP API."""

from __future__ import annotations

import logging
import math
import secrets
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request

from cascade.api import responses
from cascade.errors import (
    BodyTooSlow,
    CascadeError,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Unauthenticated,
)
from cascade.types import Caller

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cascade.api.context import Cors, ServingContext
    from cascade.api.keys import ApiKey

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
EXPOSED_HEADERS = (REQUEST_ID, "retry-after", "retry-after-ms", "x-should-retry")


def authenticate(service: ServingContext, authorization: str | None) -> ApiKey | None:
    """Return the caller's API key, or None if the service has none.

    Raises:
        Unauthenticated: The header is absent, of another scheme, or has no known key.
    """
    if service.keys is None:
        return None
    scheme, sent = get_authorization_scheme_param(authorization)
    given = sent if scheme.lower() == "bearer" else ""
    found = service.keys.find(_text(given))
    if found is None:
        raise Unauthenticated("No valid API key: send `Authorization: Bearer <key>`")
    return found


def caller(key: ApiKey | None, peer: str) -> Caller:
    """Return who sent an authenticated call, for its share of a queue.

    Args:
        key: Of the caller, if callers have keys.
        peer: `host:port` of the connection.
    """
    if key is None:
        return Caller(name=peer.rpartition(":")[0], connection=peer)
    return Caller(name=key.name, connection=peer, weight=key.weight, has_key=True)


def public_error(error: Exception, request_id: str) -> CascadeError:
    """Return the error that a client may see; internal errors are logged and their text hidden."""
    if isinstance(error, CascadeError) and type(error) is not Internal:
        return error
    logger.error("Request %s failed: %s", request_id, error, exc_info=error)
    return Internal(f"Internal error; the server's log has the details of request {request_id}")


class ErrorMiddleware:
    """ASGI middleware: gives every request an id, and a response to every unexpected exception.

    The id is the caller's, whatever it looks like: Ray Serve returns that one in the header.
    """

    def __init__(self, app: ASGIApp, *, add_request_id: bool) -> None:
        self._app = app
        self._add_request_id = add_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = Headers(scope=scope).get(REQUEST_ID, "") or secrets.token_hex(12)
        request_id = _text(header)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._add_request_id:
                    MutableHeaders(scope=message)[REQUEST_ID] = header
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - `public_error` logs it
            problem = public_error(error, request_id)
            if not started:
                await _response(problem)(scope, receive, send_with_id)


def _text(header: str) -> str:
    """Return a header's value as text: ASGI servers decode its bytes as Latin-1."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeDecodeError:
        return header


def install(app: FastAPI, *, add_request_id: bool, cors: Cors | None = None) -> None:
    """Add the middleware and the handlers that turn exceptions into OpenAI's error objects.

    Args:
        app: The application.
        add_request_id: Whether responses get their id here.
        cors: Which web pages may call from a browser; none by default.
    """
    for kind in (CascadeError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(ErrorMiddleware, add_request_id=add_request_id)
    if cors is not None and (cors.allow_origins or cors.allow_origin_regex):
        # Outermost, so that a page can read errors too.
        app.add_middleware(CORSMiddleware, **asdict(cors), expose_headers=EXPOSED_HEADERS)


def _response(error: CascadeError, *, status: int | None = None) -> Response:
    return responses.JsonResponse(
        responses.error(error), status_code=status or error.http, headers=_retry_headers(error)
    )


def _retry_headers(error: CascadeError) -> dict[str, str]:
    if error.retry_after_s is not None:
        return {
            "retry-after": str(math.ceil(error.retry_after_s)),
            "retry-after-ms": str(math.ceil(error.retry_after_s * 1000)),
        }
    if isinstance(error, Unauthenticated):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, BodyTooSlow):
        return {"connection": "close"}  # the rest of the body is not waited for
    # Clients retry after any 5xx; these requests have used the models already.
    return {"x-should-retry": "false"} if isinstance(error, Internal | DeadlineExceeded) else {}


async def _on_error(request: Request, error: Exception) -> Response:
    match error:
        case HTTPException():  # of Starlette's router: an unknown route or a wrong method
            what = f"{request.method} {request.url.path}: {error.detail}"
            problem = InvalidRequest(f"{what}; /openapi.json lists the routes")
            response = _response(problem, status=error.status_code)
            response.headers.update(error.headers or {})
            return response
        case RequestValidationError():
            return _response(InvalidRequest(str(error)))
        case _:
            return _response(public_error(error, request.state.request_id))
