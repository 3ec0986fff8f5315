"""Errors, as OpenAI's client sorts them and as they lie on the wire (conformance 28 to 32)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from cascade import errors
from cascade.api.http import create_app

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.scripted_generator import ScriptedGenerator

    from cascade.api.context import ServingContext
    from cascade.types import Request


class Row(NamedTuple):
    """How an error of ours arrives."""

    error: errors.CascadeError
    kind: type[openai.APIStatusError]
    status: int
    type: str
    code: str | None


TABLE = [
    Row(
        errors.InvalidRequest("x", param="n"),
        openai.BadRequestError,
        400,
        "invalid_request_error",
        None,
    ),
    Row(
        errors.ContextTooLong("x"),
        openai.BadRequestError,
        400,
        "invalid_request_error",
        "context_length_exceeded",
    ),
    Row(
        errors.UnsupportedParameter("x", param="tools"),
        openai.BadRequestError,
        400,
        "invalid_request_error",
        "unsupported_parameter",
    ),
    Row(
        errors.Unauthenticated("x"),
        openai.AuthenticationError,
        401,
        "authentication_error",
        "invalid_api_key",
    ),
    Row(
        errors.ModelNotFound("x"),
        openai.NotFoundError,
        404,
        "invalid_request_error",
        "model_not_found",
    ),
    Row(errors.Overloaded("x"), openai.RateLimitError, 429, "rate_limit_error", "overloaded"),
    Row(
        errors.DeadlineExceeded("x"),
        openai.InternalServerError,
        504,
        "server_error",
        "deadline_exceeded",
    ),
    Row(
        errors.DrafterUnavailable("x"),
        openai.InternalServerError,
        503,
        "server_error",
        "drafter_unavailable",
    ),
    Row(
        errors.ExpertUnavailable("x"),
        openai.InternalServerError,
        503,
        "server_error",
        "expert_unavailable",
    ),
    Row(errors.Internal("x"), openai.InternalServerError, 500, "server_error", "internal_error"),
]


def failing(error: Exception, *, times: int = 10**9) -> Callable[[Request, int], Awaitable[None]]:
    left = [error] * min(times, 100)

    async def pause(_request: Request, _position: int) -> None:
        if left:
            raise left.pop()

    return pause


@pytest.mark.parametrize("row", TABLE, ids=lambda row: type(row.error).__name__)
@pytest.mark.parametrize("stream", [False, True])
async def test_each_error_has_its_exception_and_its_codes(
    client: AsyncOpenAI, generator: ScriptedGenerator, row: Row, *, stream: bool
) -> None:
    """Conformance 28: streamed or not, since nothing was said yet."""
    generator.pause = failing(row.error)
    with pytest.raises(row.kind) as caught:
        await client.completions.create(model="pair", prompt="Buzz", stream=stream)
    got = caught.value
    assert (got.status_code, got.type, got.code) == (row.status, row.type, row.code)
    assert got.param == row.error.param
    assert got.request_id
    assert isinstance(got.body, dict)
    assert set(got.body) == {"message", "type", "param", "code"}


def test_the_table_has_every_error_that_a_caller_can_meet() -> None:
    """Besides `Cancelled`, whose caller is gone, and what stops a server before it serves."""
    kinds: list[type[errors.CascadeError]] = [errors.CascadeError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    unmet = {errors.CascadeError, errors.Unavailable, errors.Cancelled}
    met = {kind for kind in kinds if not issubclass(kind, errors.StartupError)} - unmet
    assert met == {type(row.error) for row in TABLE}


async def test_retries_are_told_when(client: AsyncOpenAI, generator: ScriptedGenerator) -> None:
    """Conformance 31: in milliseconds and in whole seconds."""
    generator.pause = failing(errors.Overloaded("full", retry_after_s=0.25))
    with pytest.raises(openai.RateLimitError) as caught:
        await client.completions.create(model="pair", prompt="Buzz")
    headers = caught.value.response.headers
    assert (headers["retry-after-ms"], headers["retry-after"]) == ("250", "1")


@pytest.mark.parametrize("kind", [errors.Overloaded, errors.ExpertUnavailable])
async def test_a_client_that_retries_succeeds(
    service: ServingContext, generator: ScriptedGenerator, kind: type[errors.Overloaded]
) -> None:
    """Conformance 31: the client of openai retries twice unless told otherwise."""
    generator.pause = failing(kind("busy", retry_after_s=0.001), times=2)
    transport = httpx2.ASGITransport(app=create_app(service))
    async with AsyncOpenAI(
        api_key="any",
        base_url="http://door/v1",
        http_client=httpx2.AsyncClient(transport=transport),
    ) as client:
        answer = await client.completions.create(model="pair", prompt="Buzz")
    assert answer.choices[0].text
    assert len(generator.heard) == 3


@pytest.mark.parametrize(
    "error", [errors.Internal("x"), errors.DeadlineExceeded("x"), KeyError("x")]
)
async def test_work_that_was_done_is_not_done_again(
    service: ServingContext, generator: ScriptedGenerator, error: Exception
) -> None:
    """Conformance 32: a client that retries by itself does not."""
    generator.pause = failing(error)
    transport = httpx2.ASGITransport(app=create_app(service))
    async with AsyncOpenAI(
        api_key="any",
        base_url="http://door/v1",
        http_client=httpx2.AsyncClient(transport=transport),
    ) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="pair", prompt="Buzz")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(generator.heard) == 1


@pytest.mark.parametrize("kind", [ZeroDivisionError, errors.Internal])
async def test_a_defect_is_logged_and_keeps_its_secrets(
    http: httpx2.AsyncClient,
    generator: ScriptedGenerator,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
) -> None:
    generator.pause = failing(kind("a secret of the server"))
    answer = await http.post(
        "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "me"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "under request me" in answer.text
    assert "Request me failed" in caplog.text
    assert "a secret of the server" in caplog.text


@pytest.mark.parametrize("given", [None, "mine-1", "no spaces please", "\u00e9", "x" * 129])
async def test_every_answer_has_a_name(http: httpx2.AsyncClient, given: str | None) -> None:
    """The caller's own if it is a sane one."""
    headers: Any = {} if given is None else {"x-request-id": given.encode()}
    good = await http.get("/v1/models", headers=headers)
    bad = await http.get("/nowhere", headers=headers)
    for answer in (good, bad):
        name = answer.headers["x-request-id"]
        assert (name == given) == (given == "mine-1")
        assert 1 <= len(name) <= 128


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/nowhere", 404),
        ("POST", "/v1/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
    ],
)
async def test_unknown_routes_and_wrong_methods_have_the_same_shape(
    http: httpx2.AsyncClient, method: str, path: str, status: int
) -> None:
    """Conformance 30."""
    answer = await http.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert path in error["message"]
    assert ("allow" in answer.headers) == (status == 405)


BAD: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b"null", None),
    (b'{"prompt": "\xff\xfe"}', None),
    (b'{"prompt": "\\ud800"}', None),
    (b"[" * 5000, None),
    (b'{"prompt": 5}', "prompt"),
    (b'{"prompt": ""}', "prompt"),
    (b'{"prompt": []}', "prompt"),
    (b'{"prompt": [999999]}', "prompt"),
    (b'{"prompt": [-1]}', "prompt"),
    (b'{"prompt": [99999999999999999999999]}', "prompt"),
    (b'{"prompt": "x", "temperature": NaN}', "temperature"),
    (b'{"prompt": "x", "temperature": "hot"}', "temperature"),
    (b'{"prompt": "x", "cascade": {"rule": {"kind": "magic"}}}', "cascade.rule"),
    (b'{"prompt": "x", "cascade": {"rule": {"kind": "chow", "alpha": 7}}}', "cascade.rule.alpha"),
    (b'{"prompt": "x", "cascade": {"rule": {"kind": "chow", "alpha": NaN}}}', "cascade.rule.alpha"),
    (b'{"prompt": "x", "cascade": {"speed": 11}}', "cascade.speed"),
    (b'{"prompt": "x", "speed": 11}', "speed"),
    (b'{"prompt": "x", "max_tokens": 9999999}', "max_tokens"),
    (b'{"prompt": "' + b"Buzz " * 5000 + b'"}', "prompt"),
]


@pytest.mark.parametrize(("data", "param"), BAD)
async def test_bad_bodies_are_bad_requests_that_name_the_field(
    http: httpx2.AsyncClient, generator: ScriptedGenerator, data: bytes, param: str | None
) -> None:
    """Conformance 29: never FastAPI's 422, and nothing is generated."""
    answer = await http.post("/v1/completions", content=data)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not generator.heard


async def test_an_unknown_model_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.completions.create(model="other", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("size", [200_001, 10_000_000])
async def test_a_body_too_large_is_refused_and_the_server_goes_on(
    listen: Callable[..., Awaitable[str]], size: int
) -> None:
    """Over a real connection: its sender can finish sending and hears why."""
    async with httpx2.AsyncClient(base_url=await listen()) as http:
        answer = await http.post("/v1/completions", content=b"x" * size)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, None)
        assert "200000 bytes" in answer.json()["error"]["message"]
        after = await http.post("/v1/completions", json={"prompt": "x"})
        assert after.status_code == 200


async def test_a_large_body_is_read_elsewhere(http: httpx2.AsyncClient) -> None:
    """It goes to a thread; the answer is the same."""
    body: dict[str, Any] = {"prompt": "x", "metadata": {"note": "y" * 100_000}}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    body["n"] = 0
    assert (await http.post("/v1/completions", json=body)).json()["error"]["param"] == "n"
