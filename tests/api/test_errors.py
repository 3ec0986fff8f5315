"""Errors, as OpenAI's client classifies them and as bytes (conformance 28 to 32)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from cascade import errors
from cascade.api.http import create_app
from cascade.api.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.scripted_generator import ScriptedGenerator

    from cascade.api.context import ServingContext
    from cascade.types import Request


class Case(NamedTuple):
    """An error and how a client sees it."""

    error: errors.CascadeError
    kind: type[openai.APIStatusError]
    status: int
    type: str
    code: str | None


CASES = [
    Case(
        errors.InvalidRequest("x", param="n"),
        openai.BadRequestError,
        400,
        "invalid_request_error",
        None,
    ),
    Case(
        errors.ContextTooLong("x"),
        openai.BadRequestError,
        400,
        "invalid_request_error",
        "context_length_exceeded",
    ),
    Case(
        errors.UnsupportedParameter("x", param="tools"),
        openai.BadRequestError,
        400,
        "invalid_request_error",
        "unsupported_parameter",
    ),
    Case(
        errors.BodyTooLarge("x"),
        openai.APIStatusError,
        413,
        "invalid_request_error",
        "body_too_large",
    ),
    Case(
        errors.BodyTooSlow("x"),
        openai.APIStatusError,
        408,
        "invalid_request_error",
        "body_too_slow",
    ),
    Case(
        errors.Unauthenticated("x"),
        openai.AuthenticationError,
        401,
        "authentication_error",
        "invalid_api_key",
    ),
    Case(
        errors.ModelNotFound("x"),
        openai.NotFoundError,
        404,
        "invalid_request_error",
        "model_not_found",
    ),
    Case(errors.Overloaded("x"), openai.RateLimitError, 429, "rate_limit_error", "overloaded"),
    Case(
        errors.QuotaExceeded("x"),
        openai.RateLimitError,
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
    ),
    Case(
        errors.DeadlineExceeded("x"),
        openai.InternalServerError,
        504,
        "server_error",
        "deadline_exceeded",
    ),
    Case(
        errors.DrafterUnavailable("x"),
        openai.InternalServerError,
        503,
        "server_error",
        "drafter_unavailable",
    ),
    Case(
        errors.ExpertUnavailable("x"),
        openai.InternalServerError,
        503,
        "server_error",
        "expert_unavailable",
    ),
    Case(errors.Internal("x"), openai.InternalServerError, 500, "server_error", "internal_error"),
    Case(
        errors.InvalidLogits("x"),
        openai.InternalServerError,
        500,
        "server_error",
        "invalid_logits",
    ),
]


def failing(error: Exception, *, times: int = 10**9) -> Callable[[Request, int], Awaitable[None]]:
    left = [error] * min(times, 100)

    async def pause(_request: Request, _position: int) -> None:
        if left:
            raise left.pop()

    return pause


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case.error).__name__)
@pytest.mark.parametrize("stream", [False, True])
async def test_each_error_has_its_exception_status_and_code(
    client: AsyncOpenAI, generator: ScriptedGenerator, case: Case, *, stream: bool
) -> None:
    """Conformance 28: streamed or not, as no token was sent yet."""
    generator.pause = failing(case.error)
    with pytest.raises(case.kind) as caught:
        await client.completions.create(model="pair", prompt="Buzz", stream=stream)
    got = caught.value
    assert (got.status_code, got.type, got.code) == (case.status, case.type, case.code)
    assert got.param == case.error.param
    assert got.request_id
    assert isinstance(got.body, dict)
    assert set(got.body) == {"message", "type", "param", "code"}


def test_the_cases_are_all_errors_that_a_client_can_get() -> None:
    """All but `Cancelled`, whose client has left, and startup errors."""
    kinds: list[type[errors.CascadeError]] = [errors.CascadeError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    never = {errors.CascadeError, errors.Unavailable, errors.Cancelled}
    possible = {kind for kind in kinds if not issubclass(kind, errors.StartupError)} - never
    assert possible == {type(case.error) for case in CASES}


async def test_a_429_says_when_to_retry(client: AsyncOpenAI, generator: ScriptedGenerator) -> None:
    """Conformance 31: in milliseconds and in whole seconds."""
    generator.pause = failing(errors.Overloaded("full", retry_after_s=0.25))
    with pytest.raises(openai.RateLimitError) as caught:
        await client.completions.create(model="pair", prompt="Buzz")
    headers = caught.value.response.headers
    assert (headers["retry-after-ms"], headers["retry-after"]) == ("250", "1")


@pytest.mark.parametrize("kind", [errors.Overloaded, errors.ExpertUnavailable])
async def test_openais_client_retries_until_it_succeeds(
    service: ServingContext, generator: ScriptedGenerator, kind: type[errors.Overloaded]
) -> None:
    """Conformance 31: the client retries twice by default."""
    generator.pause = failing(kind("busy", retry_after_s=0.001), times=2)
    transport = httpx2.ASGITransport(app=create_app(service))
    async with AsyncOpenAI(
        api_key="any",
        base_url="http://server/v1",
        http_client=httpx2.AsyncClient(transport=transport),
    ) as client:
        response = await client.completions.create(model="pair", prompt="Buzz")
    assert response.choices[0].text
    assert len(generator.requests) == 3


@pytest.mark.parametrize(
    "error", [errors.Internal("x"), errors.DeadlineExceeded("x"), KeyError("x")]
)
async def test_openais_client_does_not_retry_work_that_was_done(
    service: ServingContext, generator: ScriptedGenerator, error: Exception
) -> None:
    """Conformance 32."""
    generator.pause = failing(error)
    transport = httpx2.ASGITransport(app=create_app(service))
    async with AsyncOpenAI(
        api_key="any",
        base_url="http://server/v1",
        http_client=httpx2.AsyncClient(transport=transport),
    ) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="pair", prompt="Buzz")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(generator.requests) == 1


@pytest.mark.parametrize("kind", [ZeroDivisionError, errors.Internal])
async def test_an_internal_error_is_logged_and_its_text_hidden(
    http: httpx2.AsyncClient,
    generator: ScriptedGenerator,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
) -> None:
    generator.pause = failing(kind("a secret of the server"))
    response = await http.post(
        "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "me"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert "request me" in response.text
    assert "Request me failed" in caplog.text
    assert "a secret of the server" in caplog.text


@pytest.mark.parametrize(
    "given",
    [None, "", "mine-1", "with spaces", "\u00e9", "\u65e5\u672c", "x" * 129, "x" * 5000, "\t;"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
async def test_a_request_has_one_id_everywhere(
    http: httpx2.AsyncClient, generator: ScriptedGenerator, given: str | None, encoding: str
) -> None:
    """The caller's own, whatever it is: in the header, the body and the log."""
    if encoding == "latin-1" and given == "\u65e5\u672c":
        return
    sent = [] if given is None else [(b"x-request-id", given.encode(encoding))]
    good = await http.post("/v1/completions", json={"prompt": "x"}, headers=sent)
    bad = await http.get("/nowhere", headers=sent)
    for response in (good, bad):
        ((_, header),) = [one for one in response.headers.raw if one[0].lower() == b"x-request-id"]
        assert header.decode(encoding) == (given or header.decode())
        assert header
    request_id = generator.requests[0].name
    assert request_id == (given or request_id)
    assert good.json()["id"] == f"cmpl-{request_id}"


@pytest.mark.parametrize("header", ["authorization", "content-type", "accept", "traceparent"])
@pytest.mark.parametrize("value", [b"\xff", b"Bearer \xe9", "日本".encode(), b"\x80" * 200])
async def test_no_header_is_a_500(http: httpx2.AsyncClient, header: str, value: bytes) -> None:
    sent = [(header.encode(), value)]
    response = await http.post("/v1/completions", content=b'{"prompt": "x"}', headers=sent)
    assert response.status_code in {200, 400, 401}


async def test_a_key_may_have_any_characters(raw: Callable[..., httpx2.AsyncClient]) -> None:
    http = raw(keys=Keys(["schlüssel"]))
    for key, status in (("schlüssel", 200), ("schlussel", 401)):
        headers = [(b"authorization", f"Bearer {key}".encode())]
        assert (await http.get("/v1/models", headers=headers)).status_code == status


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
async def test_unknown_routes_and_wrong_methods_have_an_error_object(
    http: httpx2.AsyncClient, method: str, path: str, status: int
) -> None:
    """Conformance 30."""
    response = await http.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert path in error["message"]
    assert ("allow" in response.headers) == (status == 405)


INVALID_BODIES: list[tuple[bytes, str | None]] = [
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


@pytest.mark.parametrize(("data", "param"), INVALID_BODIES)
async def test_an_invalid_body_is_a_400_that_names_the_field(
    http: httpx2.AsyncClient, generator: ScriptedGenerator, data: bytes, param: str | None
) -> None:
    """Conformance 29: never FastAPI's 422, and nothing is generated."""
    response = await http.post("/v1/completions", content=data)
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert not generator.requests


async def test_an_unknown_model_is_a_404(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.completions.create(model="other", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("size", [200_001, 10_000_000])
async def test_a_too_large_body_is_a_413(listen: Callable[..., Awaitable[str]], size: int) -> None:
    """Over a real connection: the client can send it all and reads the error."""
    async with httpx2.AsyncClient(base_url=await listen()) as http:
        response = await http.post("/v1/completions", content=b"x" * size)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert "200000 bytes" in response.json()["error"]["message"]
        after = await http.post("/v1/completions", json={"prompt": "x"})
        assert after.status_code == 200


async def test_a_large_body_is_parsed_like_a_small_one(http: httpx2.AsyncClient) -> None:
    """In a thread."""
    body: dict[str, Any] = {"prompt": "x", "metadata": {"note": "y" * 100_000}}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    body["n"] = 0
    assert (await http.post("/v1/completions", json=body)).json()["error"]["param"] == "n"
