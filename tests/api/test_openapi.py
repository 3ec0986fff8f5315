"""The OpenAPI description, and fuzzing of the server with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from cascade.api.http import create_app

if TYPE_CHECKING:
    from cascade.api.context import ServingContext

OPERATIONS = [
    ("/health", "GET"),
    ("/healthz", "GET"),
    ("/livez", "GET"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
]

BOUNDED = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)


@pytest.fixture
def schema(service: ServingContext) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(service))


def test_every_route_is_described(schema: Any) -> None:
    found = [(one.ok().path, one.ok().method.upper()) for one in schema.get_all_operations()]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_valid_request_breaks_the_server(schema: Any, path: str, method: str) -> None:
    """No 5xx, and every response is as described; limits can still make it a 400."""
    cases = schema[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE)

    @BOUNDED
    @given(case=cases)
    def check(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_invalid_request_breaks_the_server(schema: Any, path: str) -> None:
    """No 5xx, and every response is as described."""
    cases = schema[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @BOUNDED
    @given(case=cases)
    def check(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate()

    check()
