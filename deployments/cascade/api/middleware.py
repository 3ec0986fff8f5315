"""The outermost layer of the HTTP door: a name for each request, and one shape for every error."""

from __future__ import annotations

import hmac
import logging
import math
import re
import secrets
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from cascade.api import responses
from cascade.errors import CascadeError, DeadlineExceeded, Internal, InvalidRequest, Unauthenticated

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cascade.api.context import ServingContext

_SCHEME = "bearer "


def authenticate(service: ServingContext, authorization: str | None) -> None:
    """Let a caller pass that has one of the service's keys, or any caller if there are none.

    Raises:
        Unauthenticated: The header is absent, of another scheme, or has no known key.
    """
    if not service.api_keys:
        return
    header = authorization or ""
    given = header[len(_SCHEME) :] if header[: len(_SCHEME)].lower() == _SCHEME else ""
    # Compared with each key in full, so that the time taken tells nothing.
    known = [hmac.compare_digest(given.encode(), key.encode()) for key in service.api_keys]
    if not any(known):
        raise Unauthenticated("No valid API key: send `Authorization: Bearer <key>`")


logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"

_SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")


class ErrorMiddleware:
    """ASGI middleware: every request has a name, and no exception ends without a body."""

    def __init__(self, app: ASGIApp, *, names_answers: bool) -> None:
        self._app = app
        self._names_answers = names_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = name
        started = False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._names_answers:
                    MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        try:
            await self._app(scope, receive, named)
        except ClientDisconnect:
            return
        except Exception:
            logger.exception("Request %s failed", name)
            if not started:
                await response(defect(name))(scope, receive, named)


def defect(request_id: str) -> Internal:
    """Return what a client is told of a defect of ours: where to look, and nothing else."""
    return Internal(f"Something broke in the server; its log has more under request {request_id}")


def told(error: CascadeError, request_id: str) -> CascadeError:
    """Return what a client hears of an error; of a defect of ours, the log hears the rest."""
    if not isinstance(error, Internal):
        return error
    logger.error("Request %s failed: %s", request_id, error.message, exc_info=error)
    return defect(request_id)


def response(error: CascadeError, *, status: int | None = None) -> JSONResponse:
    """Return an error as OpenAI's clients expect it, with what their retries need to know."""
    return JSONResponse(
        responses.error(error), status_code=status or error.http, headers=_retry_headers(error)
    )


def install(app: FastAPI, *, names_answers: bool) -> None:
    """Give every error of the app its shape, and answers the header with their request's name."""
    app.add_exception_handler(CascadeError, _ours)
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_middleware(ErrorMiddleware, names_answers=names_answers)


def _request_id(headers: Headers) -> str:
    """Return the caller's name of a request if it is a sane one, else a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if _SANE_ID.fullmatch(given) else secrets.token_hex(12)


def _retry_headers(error: CascadeError) -> dict[str, str]:
    if error.retry_after_s is not None:
        return {
            "retry-after": str(math.ceil(error.retry_after_s)),
            "retry-after-ms": str(math.ceil(error.retry_after_s * 1000)),
        }
    if isinstance(error, Unauthenticated):
        return {"www-authenticate": "Bearer"}
    # Work was done: to repeat it unasked, as clients do after any 5xx, would do it again.
    return {"x-should-retry": "false"} if isinstance(error, Internal | DeadlineExceeded) else {}


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, CascadeError)
    return response(told(error, request.state.request_id))


async def _routing(request: Request, error: Exception) -> JSONResponse:
    """Answer an unknown route or a wrong method, which Starlette finds before our code runs."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}; /openapi.json lists the routes"
    answer = response(InvalidRequest(what), status=error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _validation(_request: Request, error: Exception) -> JSONResponse:
    return response(InvalidRequest(str(error)))
