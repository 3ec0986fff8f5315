"""`/v1/completions`, with OpenAI's own client (conformance 1 to 7, 13 to 16)."""

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


async def ask(client: AsyncOpenAI, **fields: Any) -> Completion:
    told: dict[str, Any] = {"model": "pair", "prompt": "Buzz", "seed": 7} | fields
    return await client.completions.create(**told)


def texts(answer: Completion) -> list[str]:
    return [choice.text for choice in answer.choices]


async def test_every_form_of_prompt_is_answered_in_order(
    client: AsyncOpenAI, service: ServingContext
) -> None:
    """Conformance 1: the index of a choice is its prompt's index times n plus its number."""
    buzz, moon = (list(service.tokenizer.encode(text)) for text in ("Buzz", "Moon"))
    alone = [texts(await ask(client, prompt=prompt, n=2)) for prompt in ("Buzz", "Moon")]
    for prompt in (["Buzz", "Moon"], [buzz, moon]):
        answer = await ask(client, prompt=prompt, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert texts(answer) == alone[0] + alone[1]
    assert texts(await ask(client, prompt=buzz, n=2)) == alone[0]


async def test_sixteen_tokens_unless_told(client: AsyncOpenAI) -> None:
    """Conformance 2, and 16: `length` at exactly the limit."""
    answer = await ask(client)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


async def test_an_echo_begins_with_the_prompt(client: AsyncOpenAI) -> None:
    """Conformance 3: with an answer, and alone."""
    said = texts(await ask(client))[0]
    assert texts(await ask(client, echo=True)) == ["Buzz" + said]
    alone = await ask(client, echo=True, max_tokens=0)
    assert texts(alone) == ["Buzz"]
    assert alone.choices[0].finish_reason == "length"
    assert alone.usage is not None
    assert alone.usage.completion_tokens == 0


async def test_nothing_at_all_can_be_asked_for(client: AsyncOpenAI) -> None:
    """`max_tokens` 0 without echo fills caches and says nothing."""
    assert texts(await ask(client, max_tokens=0)) == [""]


@pytest.mark.parametrize("max_tokens", [0, 8])
async def test_an_echo_has_the_log_probabilities_of_the_prompt(
    loose: AsyncOpenAI, service: ServingContext, max_tokens: int
) -> None:
    """Conformance 3: the first token has none; OpenAI's types rule that out, its service does."""
    prompt = "Buzz \N{CRESCENT MOON} Moon"
    answer = await ask(loose, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    count = len(service.tokenizer.encode(prompt)) + max_tokens
    assert (logprobs.token_logprobs or [])[0] is None
    assert (logprobs.top_logprobs or [])[0] is None
    assert None not in (logprobs.token_logprobs or [])[1:]
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == count
    assert "".join(logprobs.tokens or []) == answer.choices[0].text


async def test_an_echo_is_streamed_too(loose: AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 9}
    said = texts(await ask(loose, **fields))[0]
    stream: Any = await ask(loose, stream=True, **fields)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == said


@pytest.mark.parametrize("count", range(6))
async def test_log_probabilities_agree_with_the_text_character_by_character(
    client: AsyncOpenAI, count: int
) -> None:
    """Conformance 4. The texts have characters of several tokens each."""
    answer = await ask(client, logprobs=count, max_tokens=40, n=3)
    for choice in answer.choices:
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


async def test_log_probabilities_are_absent_unless_asked_for(client: AsyncOpenAI) -> None:
    assert (await ask(client)).choices[0].logprobs is None


async def test_a_seed_gives_different_choices_and_the_same_ones_again(client: AsyncOpenAI) -> None:
    """Conformance 5."""
    first, second = [texts(await ask(client, n=3, seed=7)) for _ in range(2)]
    assert len(set(first)) == 3
    assert first == second


async def test_a_prompt_is_counted_once_and_answers_are_summed(
    client: AsyncOpenAI, service: ServingContext
) -> None:
    """Conformance 6."""
    answer = await ask(client, prompt=["Buzz", "on the Moon"], n=3, max_tokens=5)
    assert answer.usage is not None
    prompts = sum(len(service.tokenizer.encode(text)) for text in ("Buzz", "on the Moon"))
    assert answer.usage.prompt_tokens == prompts
    assert answer.usage.completion_tokens == 2 * 3 * 5
    assert answer.usage.total_tokens == prompts + 30


@pytest.mark.parametrize(("name", "value"), [("suffix", "end"), ("best_of", 3)])
async def test_what_would_change_the_text_is_not_ignored(
    client: AsyncOpenAI, name: str, value: Any
) -> None:
    """Conformance 7."""
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, **{name: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)


async def test_sampling_reaches_the_generator(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    await ask(client, logit_bias={"9": -100}, presence_penalty=1, temperature=0)
    sampling = generator.heard[0].policy.sampling
    assert (sampling.logit_bias, sampling.presence_penalty) == (((9, -100.0),), 1.0)
    assert sampling.greedy


@pytest.mark.parametrize("blocks", [(1,), (2,), (3, 1, 4), (40,)])
@pytest.mark.parametrize("stop", ["Moon", " M", "oon the", "ż", "日本語", "\N{ADULT}"])
async def test_a_stop_string_never_shows_wherever_blocks_end(
    loose: AsyncOpenAI, generator: ScriptedGenerator, blocks: tuple[int, ...], stop: str
) -> None:
    """Conformance 13, 14: within a token, over tokens, over blocks and over chunks."""
    generator.blocks = blocks
    whole = texts(await ask(loose, max_tokens=60))[0]
    answer = await ask(loose, max_tokens=60, stop=stop)
    assert texts(answer) == [whole.split(stop)[0]]
    stream: Any = await ask(loose, max_tokens=60, stop=stop, stream=True)
    streamed = ""
    async for chunk in stream:
        streamed += chunk.choices[0].text
        assert whole.split(stop)[0].startswith(streamed)
    assert streamed == texts(answer)[0]


async def test_four_stop_strings_are_allowed_and_five_are_not(client: AsyncOpenAI) -> None:
    """Conformance 13."""
    assert await ask(client, stop=["1", "2", "3", "4"])
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, stop=["1", "2", "3", "4", "5"])
    assert caught.value.param == "stop"


async def test_nothing_counts_after_the_token_that_completes_a_stop_string(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext
) -> None:
    """Conformance 15: inside an accepted block, for text, log-probabilities, usage and origins."""
    generator.blocks = (60,)
    answer = await ask(client, max_tokens=60, stop="Moon", logprobs=0)
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert answer.usage is not None
    script = generator.script(generator.heard[0])
    counts = range(1, len(script))
    until = next(at for at in counts if "Moon" in service.tokenizer.decode(script[:at]))
    assert answer.usage.completion_tokens == until < len(script)
    assert len(choice.logprobs.tokens or []) == until
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert len((choice.model_extra or {})["cascade"]["origins"]) == until
    assert (choice.finish_reason, (choice.model_extra or {})["stop_reason"]) == ("stop", "Moon")
    assert generator.open == 0


async def test_nothing_counts_after_the_end_of_text(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext
) -> None:
    """Conformance 15: the end of text counts as a token and has no text."""
    end = service.tokenizer.stop_ids
    generator.script = lambda _: [*service.tokenizer.encode("Moon"), *end, 9, 9]
    answer = await ask(client, logprobs=0)
    assert answer.usage is not None
    assert texts(answer) == ["Moon"]
    assert answer.usage.completion_tokens == len(service.tokenizer.encode("Moon")) + 1
    assert answer.choices[0].finish_reason == "stop"
    assert "stop_reason" not in (answer.choices[0].model_extra or {})


async def test_a_stop_token_of_the_callers_is_told(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    generator.script = lambda _: [8, 9, 10]
    answer = await ask(client, extra_body={"stop_token_ids": [9]})
    assert (answer.choices[0].model_extra or {})["stop_reason"] == 9


@pytest.mark.parametrize("ending", ["text", "token"])
async def test_stop_wins_where_the_limit_applies_too(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext, ending: str
) -> None:
    """Conformance 16."""
    moon = service.tokenizer.encode("on the Moon")
    script = [*moon, *service.tokenizer.stop_ids] if ending == "token" else list(moon)
    generator.script = lambda _: script
    stop = "Moon" if ending == "text" else None
    answer = await ask(client, max_tokens=len(script), stop=stop)
    assert answer.choices[0].finish_reason == "stop"


async def test_ends_of_text_can_be_ignored(
    client: AsyncOpenAI, generator: ScriptedGenerator, service: ServingContext
) -> None:
    moon = service.tokenizer.encode("Moon")
    generator.script = lambda _: [*moon, *service.tokenizer.stop_ids, *moon]
    answer = await ask(client, extra_body={"ignore_eos": True})
    assert texts(answer) == ["MoonMoon"]


async def test_token_ids_are_returned_if_asked_for(
    client: AsyncOpenAI, service: ServingContext
) -> None:
    answer = await ask(client, extra_body={"return_token_ids": True})
    extra = answer.choices[0].model_extra or {}
    assert extra["prompt_token_ids"] == list(service.tokenizer.encode("Buzz"))
    assert service.tokenizer.decode(extra["token_ids"]) == answer.choices[0].text


async def test_the_expert_alone_has_written_every_token(client: AsyncOpenAI) -> None:
    answer = await ask(client, extra_body={"cascade": {"mode": "expert_only"}})
    origins = (answer.choices[0].model_extra or {})["cascade"]["origins"]
    assert set(origins) == {Origin.EXPERT}
