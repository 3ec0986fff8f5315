"""The OpenAPI description, and fuzzing of the server with it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from cascade.api import build_request
from cascade.api.body import Body, parse
from cascade.api.context import Defaults, Limits
from cascade.api.http import create_app
from cascade.api.responses_body import ResponsesBody, response_call
from cascade.api.schema import ChatBody, CompletionBody
from cascade.errors import InvalidRequest
from cascade.protocol.codec import decode_client_message, encode_frame, parse_frame
from cascade.protocol.messages import Open
from cascade.protocol.server import check_limits
from cascade.protocol.services import EXPERT, Description
from cascade.types import Session, SessionId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cascade.api.build_request import CompletionCall
    from cascade.api.context import ServingContext
    from cascade.types import Request

OPERATIONS = [
    ("/health", "GET"),
    ("/healthz", "GET"),
    ("/health/ready", "GET"),
    ("/health/live", "GET"),
    ("/livez", "GET"),
    ("/ping", "GET"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/responses", "POST"),
    ("/version", "GET"),
    ("/metrics", "GET"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
]

BOUNDED = settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
        HealthCheck.function_scoped_fixture,
    ],
)


@pytest.fixture
def described(service: ServingContext) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(service))


def test_every_route_is_described(described: Any) -> None:
    found = [(one.ok().path, one.ok().method.upper()) for one in described.get_all_operations()]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_valid_request_breaks_the_server(described: Any, path: str, method: str) -> None:
    """No 5xx, and every response is as described; limits can still make it a 400."""
    cases = described[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE)

    @BOUNDED
    @given(case=cases)
    def check(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_invalid_request_breaks_the_server(described: Any, path: str) -> None:
    """No 5xx, and every response is as described."""
    cases = described[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @BOUNDED
    @given(case=cases)
    def check(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate()

    check()


EDGES = [sign * 2**bits for bits in (0, 7, 15, 31, 32, 53, 63, 64, 100) for sign in (1, -1)]
INTEGERS = sorted({edge + step for edge in EDGES for step in (-1, 0, 1)})
FLOATS = [
    *(5e-324, 1e-320, 1e-46, 1.2e-38, 1e-30, 1e-7, 0.5, 0.9999999999999999, 1.0000000000000002),
    *(1.5, 2.0, 10.0, 100.0, 65505.0, 3.4028234663852886e38, 3.5e38, 1e300, 1.7976931348623157e308),
]
NUMBERS = [*INTEGERS, *FLOATS, *(-number for number in FLOATS)]


class Places:
    """Finds in a JSON schema every place of a number: what makes a value with one there."""

    def __init__(self, described: dict[str, Any]) -> None:
        self._definitions = described["$defs"]

    def find(self, described: Any) -> Iterator[Callable[[float], Any]]:
        """Yield a function for each place of a number."""
        described = self._resolved(described)
        for option in (*described.get("anyOf", ()), *described.get("oneOf", ())):
            yield from self.find(option)
        match described.get("type"):
            case "integer" | "number" if "const" not in described:
                yield lambda number: number
            case "array":
                for inner in self.find(described["items"]):
                    yield lambda number, inner=inner: [inner(number)]
            case "object":
                yield from self._in_object(described)
            case _:
                pass

    def _in_object(self, described: dict[str, Any]) -> Iterator[Callable[[float], Any]]:
        least = self.least(described)
        for name, one in described.get("properties", {}).items():
            for inner in self.find(one):
                yield lambda number, name=name, inner=inner: least | {name: inner(number)}
        extra = described.get("additionalProperties")
        if isinstance(extra, dict) and extra.get("type") == "number":  # `logit_bias`
            yield lambda number: {str(number): 1.0}
            yield lambda number: {"5": number}

    def least(self, described: Any) -> Any:
        """Return a valid value with as little as possible."""
        described = self._resolved(described)
        options = described.get("anyOf") or described.get("oneOf")
        match described.get("type"):
            case _ if options:
                return self.least(options[0])
            case _ if "const" in described or "enum" in described:
                return described.get("const") or described["enum"][0]
            case "object":
                properties = described.get("properties", {})
                required = {*described.get("required", ()), "kind"} & {*properties}
                return {name: self.least(properties[name]) for name in required}
            case "array":
                return [self.least(described["items"])]
            case "string":
                return "Buzz"
            case _:
                return 0.5

    def _resolved(self, described: Any) -> dict[str, Any]:
        name = described.get("$ref", "").removeprefix("#/$defs/")
        if name == "JsonValue":
            return {}
        return self._definitions[name] if name else described


def places(kind: type[Body]) -> list[Callable[[float], Any]]:
    described = TypeAdapter(kind).json_schema()
    return list(Places(described).find(described))


BUILD: dict[type[Body], Any] = {
    CompletionBody: build_request.completion,
    ChatBody: build_request.chat,
    ResponsesBody: response_call,
}
BODIES = [(kind, place) for kind in BUILD for place in places(kind)]


def call_of(
    kind: type[Body], body: dict[str, Any], service: ServingContext
) -> CompletionCall | None:
    """Return what the server would generate; None if the body is refused, and names a field."""
    if "messages" in body:
        body = body | {"messages": [{"role": "user", "content": "hi"}]}
    try:
        return BUILD[kind](parse(json.dumps(body).encode(), kind), service)
    except InvalidRequest as error:
        if not error.param:
            raise
        return None


def check_carried(request: Request, service: ServingContext) -> None:
    """Check that the wire to the tiers carries the request, and float32 holds its numbers."""
    session = Session(id=SessionId("s"), prompt=request.prompt, policy=request.policy)
    message = Open(session=session, epoch=0, lease="", traceparent="")
    (item,) = parse_frame(encode_frame(message, EXPERT.request), EXPERT.request)
    assert decode_client_message(item) == message
    described: Any = {"model": "", "context_length": 512, "tokenizer_fingerprint": ""}
    limits = Description(vocab_size=service.tokenizer.vocabulary, **described)
    check_limits(message, limits)
    assert (request.draft_tokens or 0) <= limits.draft_limit
    policy = request.policy
    values = [getattr(policy.rule, field.name) for field in fields(policy.rule)]
    values += [getattr(policy.sampling, field.name) for field in fields(policy.sampling)]
    for number in (value for value in values if isinstance(value, float)):
        with np.errstate(over="ignore", under="ignore"):
            assert np.isfinite(np.float32(number))


def test_every_number_of_a_request_has_a_place() -> None:
    """The walk finds those that are known to be there, deep ones too."""
    bodies = [json.dumps(place(77)) for _, place in BODIES]
    for name in (
        "top_k",
        "seed",
        "n",
        "draft_tokens",
        "alpha",
        "epsilon",
        "threshold",
        "deadline_s",
    ):
        assert any(f'"{name}": 77' in body for body in bodies)
    assert any('"logit_bias": {"77": 1.0}' in body for body in bodies)
    assert any('"prompt": [[77]]' in body for body in bodies)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_the_door_lets_in_the_wire_carries(service: ServingContext, number: float) -> None:
    """Every number of a request, at the edges of every type: carried, or refused by name."""
    for kind, place in BODIES:
        call = call_of(kind, place(number), service)
        for request in call.requests if call is not None else ():
            check_carried(request, service)


@given(place=st.sampled_from(BODIES), number=st.integers() | st.floats(allow_nan=False))
@BOUNDED
def test_the_wire_carries_any_number(
    service: ServingContext, place: tuple[type[Body], Callable[[float], Any]], number: float
) -> None:
    kind, make = place
    call = call_of(kind, make(number), service)
    for request in call.requests if call is not None else ():
        check_carried(request, service)


@pytest.mark.parametrize("number", [number for number in INTEGERS if number > 0])
def test_the_wire_carries_what_the_settings_allow(service: ServingContext, number: int) -> None:
    for name in ("top_k", "row_entries", "draft_tokens"):
        with suppress(ValidationError):  # what it forbids cannot be reached
            defaults = TypeAdapter(Defaults).validate_python({name: number})
            check_set({}, replace(service, defaults=defaults))
    with suppress(ValidationError):
        limits = TypeAdapter(Limits).validate_python({"draft_tokens": number})
        asked = {"draft_tokens": number}
        check_set({"cascade": asked}, replace(service, limits=limits))


def check_set(body: dict[str, Any], service: ServingContext) -> None:
    call = call_of(CompletionBody, {"prompt": "x", **body}, service)
    assert call is not None
    check_carried(call.requests[0], service)
