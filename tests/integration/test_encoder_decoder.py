"""Encoder-decoders through the whole loop: drafter, expert, router and both APIs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import grpc
import httpx2
import pytest
import torch
from scipy import stats
from tests.support.answers import generate, generate_all
from tests.support.encoder_decoder_pairs import (
    PENALTY,
    EncoderDecoderPair,
    greedy_answers,
    save_pair,
    sources,
)
from transformers import AutoTokenizer

from cascade.api.grpc import GenerationServicer
from cascade.api.http import create_app
from cascade.drafter.drafter import Drafter
from cascade.errors import MismatchedPair, UnsupportedModel
from cascade.expert.expert import Expert
from cascade.local import ANY_PORT, LocalServer, local_server
from cascade.protocol import services
from cascade.protocol.client import ReplicaClients
from cascade.router.leases import FixedLeases
from cascade.router.tier_session import TierClient
from cascade.rules import Chow, Diff, Lossless, Opt, TokenV1, TokenV2, TokenV3
from cascade.settings import Application
from cascade.types import (
    Bonus,
    Coupling,
    DecodingParams,
    Mode,
    Request,
    SamplingParams,
    TokenConstraints,
    Verification,
)
from cascade.v1 import cascade_pb2, cascade_pb2_grpc, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from cascade.rules import Rule

GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0, repetition_penalty=PENALTY))
SEEDED = DecodingParams(
    sampling=SamplingParams(temperature=0.9, top_p=0.95), coupling=Coupling.GUMBEL, seed=11
)
LONGEST = 20
USER = {"role": "user", "content": "tell me."}
LENGTHS = range(1, 9)  # of drafts


@dataclass(frozen=True)
class Case:
    """A pair, sources, and the expert's own greedy answers."""

    pair: EncoderDecoderPair
    sources: list[tuple[int, ...]]
    expected: list[tuple[int, ...]]

    def request(self, number: int, policy: DecodingParams, **more: Any) -> Request:
        defaults: dict[str, Any] = {"mode": Mode.SPECULATIVE, "max_tokens": LONGEST - number % 5}
        return Request(
            prompt=self.pair.start_ids,
            source=self.sources[number],
            policy=replace(policy, stop_ids=(self.pair.stop_id,)),
            **(defaults | more),
        )

    def requests(self, policy: DecodingParams, **more: Any) -> list[Request]:
        return [self.request(number, policy, **more) for number in range(len(self.sources))]

    def mixed_lengths(self, shift: int) -> list[Request]:
        """Return greedy requests whose draft lengths go through 1 .. 8, from a source on."""
        return [
            self.request(number, GREEDY, draft_tokens=LENGTHS[(number + shift) % len(LENGTHS)])
            for number in range(len(self.sources))
        ]

    def greedy(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        pairs = zip(self.expected, requests, strict=True)
        return [answer[: request.max_tokens] for answer, request in pairs]


def case(folder: Path, name: str, count: int, **settings: Any) -> Case:
    pair = save_pair(folder, name, **settings)
    given = sources(count)
    return Case(pair, given, greedy_answers(pair.load(), given, longest=LONGEST))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("t5"), "t5", 16)


@pytest.fixture(scope="module")
async def server(t5: Case) -> AsyncIterator[LocalServer]:
    async with local_server(t5.pair.settings()) as running:
        yield running


@pytest.mark.parametrize("shift", [0, 3])
async def test_greedy_text_is_what_transformers_generates_at_every_draft_length(
    t5: Case, server: LocalServer, shift: int
) -> None:
    requests = t5.mixed_lengths(shift)
    answers = await generate_all(server, requests)
    assert answers == t5.greedy(requests)
    assert len(set(answers)) > len(answers) // 2, "the sources matter"
    distinct = sum(len(set(answer)) for answer in answers)
    assert distinct > sum(map(len, answers)) // 2, "so do the tokens before"
    assert await generate(server, requests[shift]) == answers[shift]


@pytest.mark.parametrize("name", [pytest.param("flan-t5", marks=pytest.mark.slow), "bart"])
async def test_greedy_text_of_other_families_is_that_of_transformers_too(
    tmp_path: Path, name: str
) -> None:
    other = case(tmp_path, name, 12)
    async with local_server(other.pair.settings()) as server:
        requests = other.mixed_lengths(0)
        assert await generate_all(server, requests) == other.greedy(requests)


async def test_drafts_are_accepted_and_the_source_is_read_from_the_cache(
    t5: Case, server: LocalServer
) -> None:
    request = t5.request(0, GREEDY, draft_tokens=4, max_tokens=LONGEST)
    await generate(server, request)
    *_, last = [chunk async for chunk in server.router.generate(request)]

    assert last.statistics is not None
    assert last.statistics.accepted > 0
    assert last.statistics.cached_prompt_tokens >= len(request.source)


async def test_seeded_gumbel_text_depends_on_the_expert_alone(
    t5: Case, server: LocalServer
) -> None:
    """Draft length, batch, neighbours and drafting change nothing."""
    expected = await generate_all(server, t5.requests(SEEDED, mode=Mode.EXPERT_ONLY))
    assert await generate_all(server, t5.requests(SEEDED, draft_tokens=4)) == expected
    assert await generate(server, t5.request(3, SEEDED)) == expected[3]
    assert await generate_all(server, t5.requests(replace(SEEDED, seed=12))) != expected


async def test_caches_too_small_for_all_sessions_change_no_token(t5: Case) -> None:
    """They hold one source, and two answers: all others are encoded and computed again."""
    small = {"source_tokens": 100, "answer_tokens": 100}
    settings = t5.pair.settings(**small, source_cache_tokens=128, cache_tokens=256)
    async with local_server(settings) as server:
        requests = t5.mixed_lengths(2)
        answers = await generate_all(server, requests[:6])
        assert answers == t5.greedy(requests)[:6]
        assert server.expert.engine.stats().preemptions > 0


async def test_a_stream_goes_on_at_another_expert_which_encodes_its_source_again(
    t5: Case,
) -> None:
    settings, token = t5.pair.settings(), "lease"
    drafter = await Drafter.start(settings.drafter_options(), address=ANY_PORT, token=token)
    experts = [
        await Expert.start(settings.expert.options(), address=ANY_PORT, token=token)
        for _ in range(2)
    ]
    tiers = [
        TierClient(
            leases=FixedLeases([one.address for one in replicas], token=token),
            clients=ReplicaClients(kind),
        )
        for kind, replicas in ((services.DRAFTER, [drafter]), (services.EXPERT, experts))
    ]
    for tier in tiers:
        await tier.connect()
    router = settings.router.loop(drafters=tiers[0], experts=tiers[1])
    try:
        request = t5.request(0, GREEDY, draft_tokens=2, max_tokens=LONGEST)
        tokens: list[int] = []
        failovers = 0
        async for chunk in router.generate(request):
            tokens += chunk.tokens
            if len(tokens) >= 6 and len(experts) == 2:
                busy = next(one for one in experts if one.num_sessions)
                experts.remove(busy)
                await busy.stop()
            if chunk.statistics is not None:
                failovers = chunk.statistics.failovers
    finally:
        for tier in tiers:
            await tier.clients.close()
        for replica in (drafter, *experts):
            await replica.stop()
    assert failovers == 1
    assert tuple(tokens) == t5.expected[0]


RULES: list[Rule] = [
    *(Lossless(), Chow(alpha=0.3), Diff(alpha=0.3), Opt(alpha=0.3)),
    *(TokenV1(alpha=0.3), TokenV2(alpha=0.3), TokenV3(alpha=0.3)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
async def test_every_rule_and_bonus_and_block_verification_run(
    t5: Case, server: LocalServer, rule: Rule
) -> None:
    """Their laws are proved by enumeration, whatever engine gives the logits."""
    options: list[dict[str, Any]] = [{"bonus": bonus} for bonus in Bonus]
    if isinstance(rule, Lossless):
        options.append({"verification": Verification.BLOCK})
    policies = [DecodingParams(rule=rule, seed=7, logprobs=2, **more) for more in options]
    requests = [
        t5.request(number, policy, mode=Mode.CASCADE, draft_tokens=4)
        for policy in policies
        for number in range(4)
    ]
    answers = await generate_all(server, requests)
    assert all(answers)


ALLOWED = (20, 21, 22, 23)  # the only tokens that are sampled, so that few answers are possible
SAMPLES = 400


@pytest.mark.parametrize(
    "verification",
    [Verification.TOKEN, pytest.param(Verification.BLOCK, marks=pytest.mark.slow)],
)
async def test_sampled_answers_follow_the_experts_own_distribution(
    t5: Case, server: LocalServer, verification: Verification
) -> None:
    """A chi-square test of the first two tokens at temperature 1."""
    constraints = TokenConstraints(allowed_ids=ALLOWED)
    requests = [
        Request(
            prompt=t5.pair.start_ids,
            source=t5.sources[1],
            policy=DecodingParams(seed=seed, constraints=constraints, verification=verification),
            mode=Mode.SPECULATIVE,
            max_tokens=3,
            draft_tokens=2,
        )
        for seed in range(SAMPLES)
    ]
    answers = await generate_all(server, requests, concurrency=50)
    model, exact = t5.pair.load(), dict[tuple[int, ...], float]()
    source = torch.tensor([t5.sources[1]])
    for first, second in product(ALLOWED, repeat=2):
        ids = torch.tensor([[*t5.pair.start_ids, first]])
        with torch.inference_mode():
            logits = model(input_ids=source, decoder_input_ids=ids).logits[0][:, list(ALLOWED)]
        probs = logits.double().softmax(-1)
        at = ALLOWED.index(first), ALLOWED.index(second)
        exact[first, second] = float(probs[0, at[0]] * probs[1, at[1]])
    counts = Counter(answer[:2] for answer in answers)
    observed = [counts[pair] for pair in exact]
    expected = [SAMPLES * probability for probability in exact.values()]
    assert sum(observed) == SAMPLES
    assert min(expected) > 5, "a chi-square test needs some of each"
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", ["t5", "flan-t5", "mt5", "bart", "mbart", "pegasus", "marian", "m2m100"]
)
async def test_a_hundred_sources_at_every_draft_length(tmp_path: Path, name: str) -> None:
    """Every source at every length in shared batches, and at one length alone."""
    many = case(tmp_path, name, 100)
    async with local_server(many.pair.settings()) as server:
        for shift in range(len(LENGTHS)):
            requests = many.mixed_lengths(shift)
            assert await generate_all(server, requests) == many.greedy(requests)
        requests = many.mixed_lengths(0)
        alone = [await generate(server, request) for request in requests]
        assert alone == many.greedy(requests)


@pytest.fixture
async def client(server: LocalServer) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=create_app(server.service))
    async with httpx2.AsyncClient(transport=transport, base_url="http://server/v1") as made:
        yield made


async def complete(client: httpx2.AsyncClient, path: str = "/completions", **body: Any) -> Any:
    response = await client.post(path, json=body)
    return response.status_code, response.json()


async def test_the_prompt_of_a_completion_is_the_source(
    t5: Case, client: httpx2.AsyncClient
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(t5.pair.expert)
    prompt = "translate this, please."
    source = tuple(tokenizer(prompt)["input_ids"])
    assert source[-1] == t5.pair.stop_id, "the encoder reads the end of the text too"
    (expected,) = greedy_answers(t5.pair.load(), [source], longest=LONGEST)

    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": LONGEST,
        "temperature": 0,
        "return_token_ids": True,
    }
    code, found = await complete(client, **body, repetition_penalty=PENALTY, n=2, logprobs=1)

    assert code == 200
    for choice in found["choices"]:
        assert tuple(choice["token_ids"]) == expected
        assert choice["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert tuple(found["choices"][0]["prompt_token_ids"]) == source
    assert found["usage"]["prompt_tokens"] == len(source)


async def test_a_prompt_over_grpc_is_the_source_too(t5: Case, server: LocalServer) -> None:
    rpc = grpc.aio.server()
    servicer = GenerationServicer(lambda: server.service)
    cascade_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, rpc)  # pyright: ignore[reportArgumentType] - a servicer by its methods, as Serve takes it
    port = rpc.add_insecure_port("127.0.0.1:0")
    await rpc.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = cascade_pb2_grpc.GenerationServiceStub(channel)
        generation = cascade_pb2.Generation(
            tokens=cascade_pb2.TokenIds(token_ids=t5.sources[0]),
            sampling=tokens_pb2.Sampling(temperature=0, repetition_penalty=PENALTY),
            max_tokens=LONGEST,
        )
        response = await stub.Generate(cascade_pb2.GenerateRequest(generation=generation))
        generation.echo = True
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(cascade_pb2.GenerateRequest(generation=generation))
    await rpc.stop(None)
    assert tuple(response.choices[0].token_ids) == t5.expected[0]
    assert response.usage.prompt_token_count == len(t5.sources[0])
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "encoder-decoder" in (refused.value.details() or "")


async def test_answers_match_a_grammar(client: httpx2.AsyncClient) -> None:
    body: dict[str, Any] = {"prompt": "abc", "max_tokens": 8, "temperature": 1, "seed": 3}
    _, found = await complete(client, **body, structured_outputs={"regex": "[ab]{3}"})
    assert re.fullmatch(" ?[ab]{3}", found["choices"][0]["text"])


@pytest.mark.parametrize(
    ("path", "body", "param", "reason"),
    [
        ("/completions", {"prompt": "abc", "echo": True}, "echo", "is an encoder-decoder"),
        ("/completions", {"prompt": "abc", "prompt_logprobs": 1}, "prompt_logprobs", "leave it"),
        ("/completions", {"prompt": [5] * 1025}, "prompt", "1024 tokens of prompt.*has 1025"),
        ("/completions", {"prompt": "ab", "max_tokens": 1024}, "max_tokens", "at most 1023"),
        ("/chat/completions", {"messages": [USER]}, "messages", "no chat template"),
    ],
)
async def test_what_an_encoder_decoder_cannot_do_is_a_clear_400(
    client: httpx2.AsyncClient, path: str, body: dict[str, Any], param: str, reason: str
) -> None:
    code, found = await complete(client, path, **body)
    assert code == 400
    assert found["error"]["param"] == param
    assert re.search(reason, found["error"]["message"])


async def test_a_chat_is_the_source_in_the_chat_template(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "t5")
    tokenizer: Any = AutoTokenizer.from_pretrained(pair.expert)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}</s>"
    for folder in (pair.drafter, pair.expert):
        tokenizer.save_pretrained(folder)
    source = tuple(tokenizer(USER["content"])["input_ids"])
    (expected,) = greedy_answers(pair.load(), [source], longest=6)
    async with local_server(pair.settings()) as server:
        transport = httpx2.ASGITransport(app=create_app(server.service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server/v1") as client:
            code, found = await complete(
                client,
                "/chat/completions",
                messages=[USER],
                max_tokens=6,
                temperature=0,
                repetition_penalty=PENALTY,
            )
    assert code == 200
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert found["choices"][0]["message"]["content"] == text
    assert found["usage"]["prompt_tokens"] == len(source)


def test_pairs_that_cannot_write_the_same_answers_are_refused(t5: Case, tmp_path: Path) -> None:
    bart = save_pair(tmp_path / "bart", "bart")
    mixed = Application.model_validate({"drafter": {"model": str(t5.pair.drafter)}})
    with pytest.raises(MismatchedPair, match=r"drafter is an encoder-decoder.* decoder-only"):
        mixed.pair()
    other = Application.model_validate(
        {"drafter": {"model": str(t5.pair.drafter)}, "expert": {"model": str(bart.expert)}}
    )
    with pytest.raises(MismatchedPair, match=r"begin with the token ids \[0\].* with \[2\]"):
        other.pair()
    sharded = t5.pair.settings(tensor_parallel=2)
    with pytest.raises(UnsupportedModel, match="tensor_parallel is 2, but an encoder-decoder"):
        sharded.pair()
