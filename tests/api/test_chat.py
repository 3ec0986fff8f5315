"""`/v1/chat/completions`, with OpenAI's own client and its strict types (conformance 8 to 12)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion
    from tests.support.scripted_generator import ScriptedGenerator

    from cascade.api.context import ServingContext

HI: Any = [{"role": "user", "content": "hi"}]


async def ask(client: AsyncOpenAI, **fields: Any) -> ChatCompletion:
    told: dict[str, Any] = {"model": "pair", "messages": HI, "seed": 7} | fields
    return await client.chat.completions.create(**told)


async def refused(client: AsyncOpenAI, **fields: Any) -> str | None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, **fields)
    return caught.value.param


async def test_every_role_and_text_in_parts_is_heard(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext
) -> None:
    """Conformance 8."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages: Any = [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]
    answer = await ask(client, messages=messages)
    assert answer.choices[0].message.role == "assistant"
    prompt = service.tokenizer.decode(generator.heard[0].prompt)
    assert prompt == "system: dsystem: suser: uassistant: tool: t"


async def test_a_part_that_is_no_text_is_refused(client: AsyncOpenAI) -> None:
    """Conformance 8."""
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    param = await refused(client, messages=[{"role": "user", "content": image}])
    assert param == "messages[0].content[0].type"


async def test_the_limit_has_two_names(client: AsyncOpenAI) -> None:
    """Conformance 9."""
    for name in ("max_tokens", "max_completion_tokens"):
        answer = await ask(client, **{name: 3})
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
    assert await refused(client, max_tokens=3, max_completion_tokens=4) == "max_tokens"


async def test_an_answer_without_a_limit_goes_to_its_end(client: AsyncOpenAI) -> None:
    assert (await ask(client)).choices[0].finish_reason == "stop"


async def test_alternatives_need_log_probabilities_and_are_twenty_at_most(
    client: AsyncOpenAI,
) -> None:
    """Conformance 10."""
    assert await refused(client, top_logprobs=2) == "top_logprobs"
    assert await refused(client, logprobs=True, top_logprobs=21) == "top_logprobs"
    for count in (0, 20):
        answer = await ask(client, logprobs=True, top_logprobs=count)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert {len(token.top_logprobs) for token in logprobs.content or []} == {count}


async def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(client: AsyncOpenAI) -> None:
    """Conformance 10. Characters of several tokens are in every answer."""
    answer = await ask(client, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    data = b"".join(bytes(token.bytes or []) for token in content)
    assert data.decode() == "".join(token.token for token in content) == choice.message.content


@pytest.mark.parametrize("temperature", [0, 1, 2])
async def test_temperatures_up_to_two(
    client: AsyncOpenAI, generator: ScriptedGenerator, temperature: float
) -> None:
    """Conformance 11."""
    await ask(client, temperature=temperature)
    assert generator.heard[0].policy.sampling.temperature == temperature


async def test_and_no_further(client: AsyncOpenAI) -> None:
    """Conformance 11."""
    assert await refused(client, temperature=2.1) == "temperature"
    assert await refused(client, top_p=1.1) == "top_p"
    for top_p in (0, 1):
        assert await ask(client, top_p=top_p)


async def test_a_conversation_that_the_template_refuses_is_a_bad_request(
    client: AsyncOpenAI,
) -> None:
    assert await refused(client, messages=[{"role": "assistant", "content": "a"}]) == "messages"


async def test_a_prediction_is_a_draft(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext
) -> None:
    answer = await ask(client, prediction={"type": "content", "content": "on the Moon"})
    assert service.tokenizer.decode(generator.heard[0].prediction) == "on the Moon"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    # The script keeps nothing of it, and says so in OpenAI's counters.
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("reasoning_effort", "low"),
    ],
)
async def test_what_is_not_there_is_not_ignored(client: AsyncOpenAI, name: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, **{name: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)
