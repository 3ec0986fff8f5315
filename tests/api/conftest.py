"""A tiny byte-level tokenizer, a scripted generator, and OpenAI's client of both."""

from __future__ import annotations

import hashlib
import json
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from openai import AsyncOpenAI
from tests.support.http_server import serve_http
from tests.support.scripted_generator import ScriptedGenerator
from tokenizers import Tokenizer as Trained
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cascade.api.context import Limits, ServingContext
from cascade.api.http import create_app
from cascade.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from cascade.types import Request

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"

WORDS = [
    "Buzz",
    "Aldrin",
    "walked",
    "on",
    "the",
    "Moon",
    "with",
    "naïve",
    "café",
    "🌙",
    "Ärger",
    "日本語",
    "and",
    "🧑\u200d🚀",
    "zażółć",
]

TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.last and message.role == 'assistant' %}"
    "{{ raise_exception('the last message is the assistant\\'s own') }}{% endif %}"
    f"{USER}{{{{ message.role }}}}: {{{{ message.content }}}}{END}"
    f"{{% endfor %}}{ASSISTANT}"
)

CORPUS = [" ".join(WORDS[at:] + WORDS[:at]) for at in range(len(WORDS))] * 3


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=TEMPLATE,
    )
    return Tokenizer(fast)


@pytest.fixture
def script(tokenizer: Tokenizer) -> Callable[[Request], list[int]]:
    """Return the tokens that the generator yields: all words, ordered by prompt and seed."""

    def words(request: Request) -> list[int]:
        key = f"{request.prompt} {request.policy.seed}"
        order = sorted(WORDS, key=lambda word: hashlib.sha256((key + word).encode()).digest())
        return [*tokenizer.encode(" ".join(order)), *tokenizer.stop_ids]

    return words


@pytest.fixture
def generator(script: Callable[[Request], list[int]]) -> ScriptedGenerator:
    return ScriptedGenerator(script=script)


@pytest.fixture
def service(tokenizer: Tokenizer, generator: ScriptedGenerator) -> ServingContext:
    numbers = iter(range(1, 1_000_000))
    return ServingContext(
        generator=generator,
        tokenizer=tokenizer,
        models=("pair", "org/pair"),
        limits=Limits(context_tokens=512, body_bytes=200_000),
        keep_alive_s=60.0,
        created=1_700_000_000,
        clock=lambda: 1_800_000_000.5,
        draw_seed=numbers.__next__,
    )


@pytest.fixture
async def connect(service: ServingContext) -> AsyncIterator[Callable[..., AsyncOpenAI]]:
    """Return OpenAI's client of the service with some fields changed."""
    clients: list[AsyncOpenAI] = []

    def client(*, strict: bool = True, **changes: Any) -> AsyncOpenAI:
        app = create_app(replace(service, **changes))
        transport = httpx2.ASGITransport(app=app)
        clients.append(
            AsyncOpenAI(
                api_key="any",
                base_url="http://server/v1",
                http_client=httpx2.AsyncClient(transport=transport),
                max_retries=0,
                _strict_response_validation=strict,
            )
        )
        return clients[-1]

    yield client
    for one in clients:
        await one.close()


@pytest.fixture
async def client(connect: Callable[..., AsyncOpenAI]) -> AsyncOpenAI:
    return connect()


@pytest.fixture
async def lenient(connect: Callable[..., AsyncOpenAI]) -> AsyncOpenAI:
    """The client without strict types, which are stricter than OpenAI's service in two places."""
    return connect(strict=False)


@pytest.fixture
async def raw(service: ServingContext) -> AsyncIterator[Callable[..., httpx2.AsyncClient]]:
    """Return a plain HTTP client of the service with some fields changed."""
    clients: list[httpx2.AsyncClient] = []

    def client(**changes: Any) -> httpx2.AsyncClient:
        transport = httpx2.ASGITransport(app=create_app(replace(service, **changes)))
        clients.append(httpx2.AsyncClient(transport=transport, base_url="http://server"))
        return clients[-1]

    yield client
    for one in clients:
        await one.aclose()


@pytest.fixture
async def http(raw: Callable[..., httpx2.AsyncClient]) -> httpx2.AsyncClient:
    return raw()


@pytest.fixture
async def listen(service: ServingContext) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Return what serves the service, with some fields changed, on a real port; gives the URL."""
    async with AsyncExitStack() as servers:

        async def serve(**changes: Any) -> str:
            app = create_app(replace(service, **changes))
            return await servers.enter_async_context(serve_http(app))

        yield serve


@pytest.fixture
def events() -> Callable[[str], list[Any]]:
    """Return what parses a stream: its events in order, comments too."""

    def parse(text: str) -> list[Any]:
        parts = [part for part in text.split("\n\n") if part]
        return [
            json.loads(part[6:]) if part.startswith("data: {") else part.removeprefix("data: ")
            for part in parts
        ]

    return parse
