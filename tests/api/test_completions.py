"""`/v1/completions`, with OpenAI's client (conformance 1 to 7, 13 to 16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

from cascade.types import Origin

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Completion
    from tests.support.scripted_generator import ScriptedGenerator

    from cascade.api.context import ServingContext


async def complete(client: AsyncOpenAI, **fields: Any) -> Completion:
    body: dict[str, Any] = {"model": "pair", "prompt": "Buzz", "seed": 7} | fields
    return await client.completions.create(**body)


def texts(response: Completion) -> list[str]:
    return [choice.text for choice in response.choices]


async def test_every_form_of_prompt_gets_its_choices_in_order(
    client: AsyncOpenAI, service: ServingContext
) -> None:
    """Conformance 1: the index of a choice is its prompt's index times n plus its number."""
    buzz, moon = (list(service.tokenizer.encode(text)) for text in ("Buzz", "Moon"))
    alone = [texts(await complete(client, prompt=prompt, n=2)) for prompt in ("Buzz", "Moon")]
    for prompt in (["Buzz", "Moon"], [buzz, moon]):
        response = await complete(client, prompt=prompt, n=2)
        assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
        assert texts(response) == alone[0] + alone[1]
    assert texts(await complete(client, prompt=buzz, n=2)) == alone[0]


async def test_max_tokens_is_16_by_default(client: AsyncOpenAI) -> None:
    """Conformance 2, and 16: `length` at exactly the limit."""
    response = await complete(client)
    assert response.usage is not None
    assert response.usage.completion_tokens == 16
    assert response.choices[0].finish_reason == "length"


async def test_echo_begins_with_the_prompt(client: AsyncOpenAI) -> None:
    """Conformance 3: with a completion, and alone."""
    said = texts(await complete(client))[0]
    assert texts(await complete(client, echo=True)) == ["Buzz" + said]
    alone = await complete(client, echo=True, max_tokens=0)
    assert texts(alone) == ["Buzz"]
    assert alone.choices[0].finish_reason == "length"
    assert alone.usage is not None
    assert alone.usage.completion_tokens == 0


async def test_max_tokens_may_be_0(client: AsyncOpenAI) -> None:
    """Without echo this only fills caches."""
    assert texts(await complete(client, max_tokens=0)) == [""]


@pytest.mark.parametrize("max_tokens", [0, 8])
async def test_echo_has_the_logprobs_of_the_prompt(
    lenient: AsyncOpenAI, service: ServingContext, max_tokens: int
) -> None:
    """Conformance 3: the first has none, as in OpenAI's service but not in its client's types."""
    prompt = "Buzz \N{CRESCENT MOON} Moon"
    response = await complete(lenient, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens)
    logprobs = response.choices[0].logprobs
    assert logprobs is not None
    count = len(service.tokenizer.encode(prompt)) + max_tokens
    assert (logprobs.token_logprobs or [])[0] is None
    assert (logprobs.top_logprobs or [])[0] is None
    assert None not in (logprobs.token_logprobs or [])[1:]
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == count
    assert "".join(logprobs.tokens or []) == response.choices[0].text


async def test_echo_is_streamed_too(lenient: AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 9}
    said = texts(await complete(lenient, **fields))[0]
    stream: Any = await complete(lenient, stream=True, **fields)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == said


@pytest.mark.parametrize("count", range(6))
async def test_logprobs_agree_with_the_text(client: AsyncOpenAI, count: int) -> None:
    """Conformance 4. The texts have characters of several tokens."""
    response = await complete(client, logprobs=count, max_tokens=40, n=3)
    for choice in response.choices:
        logprobs = choice.logprobs
        assert logprobs is not None
        tokens, offsets = logprobs.tokens or [], logprobs.text_offset or []
        assert "".join(tokens) == choice.text
        assert [
            choice.text[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)
        ] == tokens
        for token, logprob, tops in zip(
            tokens, logprobs.token_logprobs or [], logprobs.top_logprobs or [], strict=True
        ):
            assert tops[token] == logprob
            assert len(tops) <= count + 1


async def test_logprobs_are_absent_by_default(client: AsyncOpenAI) -> None:
    assert (await complete(client)).choices[0].logprobs is None


async def test_a_seed_repeats_choices_that_differ_from_each_other(client: AsyncOpenAI) -> None:
    """Conformance 5."""
    first, second = [texts(await complete(client, n=3, seed=7)) for _ in range(2)]
    assert len(set(first)) == 3
    assert first == second


async def test_usage_counts_a_prompt_once_and_sums_its_choices(
    client: AsyncOpenAI, service: ServingContext
) -> None:
    """Conformance 6."""
    response = await complete(client, prompt=["Buzz", "on the Moon"], n=3, max_tokens=5)
    assert response.usage is not None
    prompts = sum(len(service.tokenizer.encode(text)) for text in ("Buzz", "on the Moon"))
    assert response.usage.prompt_tokens == prompts
    assert response.usage.completion_tokens == 2 * 3 * 5
    assert response.usage.total_tokens == prompts + 30


@pytest.mark.parametrize(("name", "value"), [("suffix", "end"), ("best_of", 3)])
async def test_suffix_and_best_of_are_unsupported(
    client: AsyncOpenAI, name: str, value: Any
) -> None:
    """Conformance 7."""
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(client, **{name: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)


async def test_sampling_parameters_reach_the_generator(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    await complete(client, logit_bias={"9": -100}, presence_penalty=1, temperature=0)
    sampling = generator.requests[0].policy.sampling
    assert (sampling.logit_bias, sampling.presence_penalty) == (((9, -100.0),), 1.0)
    assert sampling.greedy


@pytest.mark.parametrize("blocks", [(1,), (2,), (3, 1, 4), (40,)])
@pytest.mark.parametrize("stop", ["Moon", " M", "oon the", "ż", "日本語", "\N{ADULT}"])
async def test_a_stop_string_never_shows_wherever_blocks_end(
    lenient: AsyncOpenAI, generator: ScriptedGenerator, blocks: tuple[int, ...], stop: str
) -> None:
    """Conformance 13, 14: within a token, over tokens, over blocks and over chunks."""
    generator.blocks = blocks
    whole = texts(await complete(lenient, max_tokens=60))[0]
    response = await complete(lenient, max_tokens=60, stop=stop)
    assert texts(response) == [whole.split(stop)[0]]
    stream: Any = await complete(lenient, max_tokens=60, stop=stop, stream=True)
    streamed = ""
    async for chunk in stream:
        streamed += chunk.choices[0].text
        assert whole.split(stop)[0].startswith(streamed)
    assert streamed == texts(response)[0]


async def test_more_stop_strings_are_allowed_than_openai_has(client: AsyncOpenAI) -> None:
    """Conformance 13."""
    assert await complete(client, stop=[str(number) for number in range(64)])
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(client, stop=[str(number) for number in range(65)])
    assert caught.value.param == "stop"


async def test_tokens_after_a_stop_string_are_not_counted(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext
) -> None:
    """Conformance 15: inside an accepted block, for text, log-probabilities, usage and origins."""
    generator.blocks = (60,)
    response = await complete(client, max_tokens=60, stop="Moon", logprobs=0)
    (choice,) = response.choices
    assert choice.logprobs is not None
    assert response.usage is not None
    script = generator.script(generator.requests[0])
    counts = range(1, len(script))
    until = next(at for at in counts if "Moon" in service.tokenizer.decode(script[:at]))
    assert response.usage.completion_tokens == until < len(script)
    assert len(choice.logprobs.tokens or []) == until
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert len((choice.model_extra or {})["cascade"]["origins"]) == until
    assert (choice.finish_reason, (choice.model_extra or {})["stop_reason"]) == ("stop", "Moon")
    assert generator.open == 0


async def test_tokens_after_the_stop_token_are_not_counted(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext
) -> None:
    """Conformance 15: the end of text counts as a token and has no text."""
    end = service.tokenizer.stop_ids
    generator.script = lambda _: [*service.tokenizer.encode("Moon"), *end, 9, 9]
    response = await complete(client, logprobs=0)
    assert response.usage is not None
    assert texts(response) == ["Moon"]
    assert response.usage.completion_tokens == len(service.tokenizer.encode("Moon")) + 1
    assert response.choices[0].finish_reason == "stop"
    assert "stop_reason" not in (response.choices[0].model_extra or {})


async def test_a_stop_token_of_the_request_is_the_stop_reason(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    generator.script = lambda _: [8, 9, 10]
    response = await complete(client, extra_body={"stop_token_ids": [9]})
    assert (response.choices[0].model_extra or {})["stop_reason"] == 9


@pytest.mark.parametrize("ending", ["text", "token"])
async def test_the_finish_reason_is_stop_where_the_limit_applies_too(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext, ending: str
) -> None:
    """Conformance 16."""
    moon = service.tokenizer.encode("on the Moon")
    script = [*moon, *service.tokenizer.stop_ids] if ending == "token" else list(moon)
    generator.script = lambda _: script
    stop = "Moon" if ending == "text" else None
    response = await complete(client, max_tokens=len(script), stop=stop)
    assert response.choices[0].finish_reason == "stop"


async def test_ignore_eos_generates_past_the_stop_token(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext
) -> None:
    moon = service.tokenizer.encode("Moon")
    generator.script = lambda _: [*moon, *service.tokenizer.stop_ids, *moon]
    response = await complete(client, extra_body={"ignore_eos": True})
    assert texts(response) == ["MoonMoon"]


async def test_return_token_ids_returns_them(client: AsyncOpenAI, service: ServingContext) -> None:
    response = await complete(client, extra_body={"return_token_ids": True})
    extra = response.choices[0].model_extra or {}
    assert extra["prompt_token_ids"] == list(service.tokenizer.encode("Buzz"))
    assert service.tokenizer.decode(extra["token_ids"]) == response.choices[0].text


async def test_in_expert_only_mode_every_token_is_the_experts(client: AsyncOpenAI) -> None:
    response = await complete(client, extra_body={"cascade": {"mode": "expert_only"}})
    origins = (response.choices[0].model_extra or {})["cascade"]["origins"]
    assert set(origins) == {Origin.EXPERT}
