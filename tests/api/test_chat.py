"""`/v1/chat/completions`, with OpenAI's client and its strict types (conformance 8 to 12)."""

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


async def complete(client: AsyncOpenAI, **fields: Any) -> ChatCompletion:
    body: dict[str, Any] = {"model": "pair", "messages": HI, "seed": 7} | fields
    return await client.chat.completions.create(**body)


async def refused_param(client: AsyncOpenAI, **fields: Any) -> str | None:
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(client, **fields)
    return caught.value.param


async def test_every_role_and_text_parts_reach_the_prompt(
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
    response = await complete(client, messages=messages)
    assert response.choices[0].message.role == "assistant"
    prompt = service.tokenizer.decode(generator.requests[0].prompt)
    assert prompt == "system: dsystem: suser: uassistant: tool: t"


async def test_a_content_part_other_than_text_is_a_400(client: AsyncOpenAI) -> None:
    """Conformance 8."""
    for kind in ("image_url", "input_audio", "file", "video_url"):
        messages: list[Any] = [{"role": "user", "content": [{"type": kind, kind: {"url": "x"}}]}]
        with pytest.raises(openai.BadRequestError, match=f"'{kind}' is no text") as caught:
            await complete(client, messages=messages)
        assert caught.value.param == "messages[0].content[0].type"


async def test_max_tokens_and_max_completion_tokens_mean_the_same(client: AsyncOpenAI) -> None:
    """Conformance 9."""
    for name in ("max_tokens", "max_completion_tokens"):
        response = await complete(client, **{name: 3})
        assert response.usage is not None
        assert response.usage.completion_tokens == 3
    assert await refused_param(client, max_tokens=3, max_completion_tokens=4) == "max_tokens"


async def test_without_a_limit_a_chat_ends_at_its_stop_token(client: AsyncOpenAI) -> None:
    assert (await complete(client)).choices[0].finish_reason == "stop"


async def test_top_logprobs_needs_logprobs_and_is_at_most_20(
    client: AsyncOpenAI,
) -> None:
    """Conformance 10."""
    assert await refused_param(client, top_logprobs=2) == "top_logprobs"
    assert await refused_param(client, logprobs=True, top_logprobs=21) == "top_logprobs"
    for count in (0, 20):
        response = await complete(client, logprobs=True, top_logprobs=count)
        logprobs = response.choices[0].logprobs
        assert logprobs is not None
        assert {len(token.top_logprobs) for token in logprobs.content or []} == {count}


async def test_the_bytes_of_the_logprobs_are_the_bytes_of_the_text(client: AsyncOpenAI) -> None:
    """Conformance 10. Every completion has characters of several tokens."""
    response = await complete(client, logprobs=True, top_logprobs=3)
    (choice,) = response.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    data = b"".join(bytes(token.bytes or []) for token in content)
    assert data.decode() == "".join(token.token for token in content) == choice.message.content


@pytest.mark.parametrize("temperature", [0, 1, 2])
async def test_temperatures_from_0_to_2_are_accepted(
    client: AsyncOpenAI, generator: ScriptedGenerator, temperature: float
) -> None:
    """Conformance 11."""
    await complete(client, temperature=temperature)
    assert generator.requests[0].policy.sampling.temperature == temperature


async def test_temperature_above_2_and_top_p_above_1_are_a_400(client: AsyncOpenAI) -> None:
    """Conformance 11."""
    assert await refused_param(client, temperature=2.1) == "temperature"
    assert await refused_param(client, top_p=1.1) == "top_p"
    for top_p in (0, 1):
        assert await complete(client, top_p=top_p)


async def test_a_conversation_that_the_template_rejects_is_a_400(client: AsyncOpenAI) -> None:
    assert (
        await refused_param(client, messages=[{"role": "assistant", "content": "a"}]) == "messages"
    )


async def test_a_prediction_reaches_the_generator(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext
) -> None:
    response = await complete(client, prediction={"type": "content", "content": "on the Moon"})
    assert service.tokenizer.decode(generator.requests[0].prediction) == "on the Moon"
    assert response.usage is not None
    assert response.usage.completion_tokens_details is not None
    # The scripted generator accepts nothing of it.
    assert response.usage.completion_tokens_details.accepted_prediction_tokens == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("verbosity", "low"),
    ],
)
async def test_unsupported_parameters_are_a_400(client: AsyncOpenAI, name: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(client, **{name: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)
