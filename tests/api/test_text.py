"""The text of an answer follows the prompt's, whatever the tokenizer and the kind of response."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from tests.support.scripted_generator import ScriptedGenerator
from tests.support.toy_tokenizers import KINDS, wrap

from cascade.api import grpc_convert
from cascade.api.completion import Completions
from cascade.types import TokenLogprob
from cascade.v1 import cascade_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    import httpx2

    from cascade.api.context import ServingContext
    from cascade.engine.tokenizer import Tokenizer
    from cascade.types import OutputChunk, Request

ANSWER = "hello world, the cat 你好 🙂 e\u0301 \ufffd end"

TEMPLATE = "{% for message in messages %}<s>{{ message.content }}{% endfor %}"


@cache
def toy(name: str) -> Tokenizer:
    return wrap(KINDS[name](), chat_template=TEMPLATE)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return toy(request.param)


@pytest.fixture
def script(tokenizer: Tokenizer) -> Callable[[Request], list[int]]:
    ids = list(tokenizer.encode(ANSWER, add_special=False))
    return lambda _: [*ids, *ids, *tokenizer.stop_ids]


def decoded(service: ServingContext, prompt: str, script: list[int]) -> str:
    """Return what the whole text has behind the prompt's."""
    tokenizer = service.tokenizer
    ids = tokenizer.encode(prompt)
    whole, before = tokenizer.decode([*ids, *script]), tokenizer.decode(ids)
    assert whole.startswith(before)
    return whole[len(before) :]


async def complete(http: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "the cat", "max_tokens": 200, "logprobs": 2} | fields
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def test_every_response_has_the_text_that_follows_the_prompt(
    http: httpx2.AsyncClient,
    service: ServingContext,
    script: Callable[[Any], list[int]],
    events: Callable[[str], list[Any]],
) -> None:
    """Whole, streamed, echoed, over gRPC and as chat: the text, and the texts of its tokens."""
    expected = decoded(service, "the cat", script(None))

    choice = await complete(http)
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == expected

    echoed = await complete(http, echo=True)
    assert echoed["text"] == "the cat" + expected
    offsets, tokens = echoed["logprobs"]["text_offset"], echoed["logprobs"]["tokens"]
    assert "".join(tokens) == echoed["text"]
    for at, token in zip(offsets, tokens, strict=True):
        assert echoed["text"][at : at + len(token)] == token

    body = {"prompt": "the cat", "max_tokens": 200, "stream": True}
    stream = events((await http.post("/v1/completions", json=body)).text)
    assert "".join(event["choices"][0]["text"] for event in stream[:-1]) == expected

    generation = pb.Generation(text="the cat", max_tokens=200, logprob_count=1)
    completions = Completions(grpc_convert.call(generation, service), service)
    await completions.run()
    (completion,) = completions.all
    assert grpc_convert.choice(completion, completion.output).text == expected

    said = {"messages": [{"role": "user", "content": "the cat"}], "logprobs": True}
    (answer,) = (await http.post("/v1/chat/completions", json=said)).json()["choices"]
    prompt = service.tokenizer.chat([{"role": "user", "content": "the cat"}])
    before = service.tokenizer.decode(prompt)
    whole = service.tokenizer.decode([*prompt, *script(None)])
    assert answer["message"]["content"] == whole[len(before) :]
    data = b"".join(bytes(token["bytes"]) for token in answer["logprobs"]["content"])
    assert data.decode() == answer["message"]["content"]


@pytest.mark.parametrize("stop", [" world", "t 你", "lo wor", "🙂", "\u0301"])
async def test_a_stop_string_is_found_in_the_text_as_it_is_shown(
    http: httpx2.AsyncClient,
    generator: ScriptedGenerator,
    service: ServingContext,
    script: Callable[[Any], list[int]],
    stop: str,
) -> None:
    expected = decoded(service, "the cat", script(None)).split(stop)[0]
    for blocks in [(1,), (3, 1, 4)]:
        generator.blocks = blocks
        assert (await complete(http, stop=stop))["text"] == expected


@pytest.mark.parametrize("prompt", ["a</s>b", "a <s> \nb", "</s>", "<unk>你\ufffd B  "])
async def test_echo_repeats_the_prompt_as_it_was_given(
    http: httpx2.AsyncClient, prompt: str
) -> None:
    """With special tokens, unknown characters, capitals and spaces, and nothing that was added."""
    choice = await complete(http, prompt=prompt, echo=True, max_tokens=0)
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == prompt
    assert (await complete(http, prompt=prompt, echo=True))["text"].startswith(prompt)


async def test_echo_of_ids_shows_their_special_tokens(
    http: httpx2.AsyncClient, service: ServingContext
) -> None:
    ids = [*service.tokenizer.encode("the cat"), *service.tokenizer.stop_ids]
    choice = await complete(http, prompt=ids, echo=True, max_tokens=0)
    assert choice["text"] == service.tokenizer.decode(ids, skip_special=False)
    assert "</s>" in choice["text"]


@pytest.mark.parametrize("tokenizer", ["llama_2", "byte_level"], indirect=True)
@pytest.mark.parametrize("kept", [1, 2, 3])
async def test_a_character_that_the_prompt_begins_is_the_answers(
    http: httpx2.AsyncClient, generator: ScriptedGenerator, tokenizer: Tokenizer, kept: int
) -> None:
    ids = tokenizer.encode("🙂", add_special=False)[-4:]
    generator.script = lambda _: [*ids[kept:], *tokenizer.encode("!", add_special=False)[-1:]]
    prompt = [*tokenizer.encode("the"), *ids[:kept]]

    choice = await complete(http, prompt=prompt, max_tokens=5 - kept)
    echoed = await complete(http, prompt=prompt, max_tokens=5 - kept, echo=True)
    alone = await complete(http, prompt=prompt, max_tokens=0, echo=True)

    assert choice["text"].startswith("🙂")
    assert echoed["text"] == tokenizer.decode(prompt[:-kept], skip_special=False) + choice["text"]
    assert alone["text"] == tokenizer.decode(prompt, skip_special=False)


class Alternatives(ScriptedGenerator):
    """Reports the same alternatives for every token."""

    top: ClassVar[tuple[tuple[int, float], ...]]

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        """Yield the script in blocks."""
        async for chunk in super().generate(request):
            found = [
                TokenLogprob(token=token, logprob=dict(self.top)[token], top=self.top)
                for token in chunk.tokens
            ]
            yield replace(chunk, logprobs=tuple(found))


@pytest.mark.parametrize("tokenizer", ["llama_2"], indirect=True)
async def test_of_alternatives_with_one_text_the_likeliest_counts(
    raw: Callable[..., httpx2.AsyncClient], tokenizer: Tokenizer
) -> None:
    """As a byte and as a letter; also where the token itself is the less likely one."""
    ids = {text: id_ for id_, text in tokenizer.tokens.items()}
    Alternatives.top = ((ids["<0x68>"], -1.0), (ids["e"], -2.0), (ids["h"], -3.0))
    generator = Alternatives(script=lambda _: [ids["h"], ids["<0x68>"], ids["e"]])
    http = raw(generator=generator)
    choice = await complete(http, max_tokens=3, logprobs=3)
    assert choice["text"] == "hhe"
    assert choice["logprobs"]["token_logprobs"] == [-3.0, -1.0, -2.0]
    assert choice["logprobs"]["top_logprobs"] == [{"h": -1.0, "e": -2.0}] * 3
