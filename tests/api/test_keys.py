"""API keys in a file, and the quotas of their callers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import openai
import pytest
from tests.api.test_grpc import FakeContext, whole
from tests.support.clock import FakeClock
from typer.testing import CliRunner

from cascade.api.grpc import GenerationServicer
from cascade.api.keys import ApiKey, Keys, Quotas, as_yaml, hash_of, new_key, read_keys
from cascade.cli import app
from cascade.errors import ContextTooLong, QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from openai import AsyncOpenAI

    from cascade.api.context import ServingContext


def api_key(name: str = "one", **quotas: Any) -> ApiKey:
    return ApiKey(name=name, sha256=hash_of(name), **quotas)


def key_file(path: Path, *keys: ApiKey) -> str:
    path.write_text("".join(map(as_yaml, keys)))
    return str(path)


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    keys = Keys(path=key_file(path, api_key("one")))
    found = keys.find("one")
    assert found is not None
    assert (found.name, keys.find("two")) == ("one", None)
    key_file(path, api_key("two"))
    assert (keys.find("one"), keys.find("two")) == (None, api_key("two"))


def test_a_file_that_is_broken_leaves_the_keys_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    keys = Keys(path=key_file(path, api_key("one")))
    path.write_text("- sk-a-key-by-mistake")
    assert keys.find("one") is not None
    path.unlink()
    assert keys.find("one") is not None
    assert "Keeping the API keys read before" in caplog.text
    assert "sk-a-key-by-mistake" not in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wanted a list of keys"),
        ("[]", "has no keys"),
        ("- {name: a, sha256: short}", r"0.sha256.*wanted a list"),
        (f"- {{name: a b, sha256: {'a' * 64}}}", r"0.name"),
        (f"- {{name: a, sha256: {'a' * 64}, answer: 3}}", r"0.answer.*not permitted"),
        (f"- {{name: a, sha256: {'a' * 64}, answers: 0}}", r"0.answers"),
        (f"- {{name: a, sha256: {'a' * 64}}}\n" * 2, "two keys have the name a"),
    ],
)
def test_a_file_that_is_wrong_says_where(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_keys(str(path))


def test_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) > 40


def test_the_command_prints_a_key_and_what_the_file_has_of_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["key", "search", "--answers", "4", "--weight", "2"])
    assert result.exit_code == 0
    secret, path = result.stderr.strip(), tmp_path / "keys.yaml"
    path.write_text(result.stdout)
    assert secret not in result.stdout
    wanted = ApiKey(name="search", sha256=hash_of(secret), answers=4, weight=2)
    assert Keys(path=str(path)).find(secret) == wanted


def test_the_command_refuses_what_the_file_would() -> None:
    result = CliRunner().invoke(app, ["key", "a name", "--answers", "0"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "name: got a name" in result.output


def test_requests_fill_up_evenly_again() -> None:
    clock = FakeClock()
    quotas, key = Quotas(clock=clock), api_key(requests_per_minute=2)
    for _ in range(2):
        with quotas.admit(key, answers=1, context_tokens=1):
            pass
    with (
        pytest.raises(QuotaExceeded, match=r"2 requests a minute.* 30\.0 s") as refused,
        quotas.admit(key, answers=1, context_tokens=1),
    ):
        pass
    assert refused.value.retry_after_s == pytest.approx(30)
    clock.now_s += 30
    with quotas.admit(key, answers=1, context_tokens=1):
        pass


def test_tokens_beyond_the_quota_delay_the_next_call() -> None:
    clock = FakeClock()
    quotas, key = Quotas(clock=clock), api_key(tokens_per_minute=60)
    with quotas.admit(key, answers=1, context_tokens=1) as spend:
        spend(90)
    with (
        pytest.raises(QuotaExceeded, match=r"60 tokens a minute.* 31\.0 s"),
        quotas.admit(key, answers=1, context_tokens=1),
    ):
        pass


def test_answers_count_until_they_end_however_they_end() -> None:
    quotas, key = Quotas(), api_key(answers=2)
    with (
        pytest.raises(QuotaExceeded, match=r"2 answers at the same time; 1 run .* wants 2"),
        quotas.admit(key, answers=1, context_tokens=1),
        quotas.admit(key, answers=2, context_tokens=1),
    ):
        pass
    with quotas.admit(key, answers=2, context_tokens=1):
        pass


def test_an_answer_may_not_be_longer_than_the_key_allows() -> None:
    with (
        pytest.raises(ContextTooLong, match="up to 9 tokens; this key may use 8"),
        Quotas().admit(api_key(context_tokens=8), answers=1, context_tokens=9),
    ):
        pass


def test_callers_have_quotas_of_their_own() -> None:
    quotas = Quotas()
    for name in ("one", "two"):
        with quotas.admit(api_key(name, requests_per_minute=1), answers=1, context_tokens=1):
            pass
    with quotas.admit(None, answers=1000, context_tokens=10**6):
        pass


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(path=key_file(tmp_path / "keys.yaml", api_key("one", requests_per_minute=1)))


@pytest.mark.parametrize("stream", [True, False])
async def test_over_http_the_second_call_gets_429_and_when_to_come_back(
    connect: Callable[..., AsyncOpenAI], keys: Keys, *, stream: bool
) -> None:
    client = connect(keys=keys).with_options(api_key="one", max_retries=0)
    await client.completions.create(model="org/pair", prompt="x", max_tokens=1)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.completions.create(model="org/pair", prompt="x", max_tokens=1, stream=stream)
    assert caught.value.code == "rate_limit_exceeded"
    assert "1 requests a minute" in caught.value.message
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("quota", "named"),
    [
        ({"requests_per_minute": 1}, "1 requests a minute"),
        ({"tokens_per_minute": 1}, "1 tokens a minute"),
        ({"answers": 1}, "1 answers at the same time"),
    ],
)
async def test_a_429_names_its_quota(
    connect: Callable[..., AsyncOpenAI], tmp_path: Path, quota: dict[str, int], named: str
) -> None:
    keys = Keys(path=key_file(tmp_path / "keys.yaml", api_key("one", **quota)))
    client = connect(keys=keys, quotas=Quotas()).with_options(api_key="one", max_retries=0)
    await client.completions.create(model="org/pair", prompt="x", max_tokens=4)
    with pytest.raises(openai.RateLimitError, match=named):
        await client.completions.create(model="org/pair", prompt="x", max_tokens=4, n=2)


async def test_over_grpc_the_second_call_is_refused_by_a_quota_that_is_named(
    service: ServingContext, keys: Keys
) -> None:
    servicer = GenerationServicer(lambda: replace(service, keys=keys, quotas=quotas))
    quotas, contexts = Quotas(), [FakeContext(("authorization", "Bearer one")) for _ in range(2)]
    for context in contexts:
        await servicer.Generate(whole(), context)
    assert [one.code for one in contexts] == [None, grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert "1 requests a minute" in contexts[1].details
