"""Models with different tokenizers form a cascade: the text is the expert's own all the same."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.generation import greedy_answer
from tests.support.vocabulary_pairs import (
    TOKENIZERS,
    VocabularyPair,
    llama_2_like,
    llama_like,
    make_pair,
    qwen_like,
)

from cascade.api import build_request
from cascade.api.schema import CompletionBody
from cascade.engine.settings import VocabularyWay
from cascade.errors import InvalidRequest, StartupError
from cascade.local import LocalServer, local_server
from cascade.rules import Chow, Lossless, Opt, TokenV3
from cascade.settings import Application
from cascade.types import (
    Coupling,
    DecodingParams,
    Grammar,
    GrammarKind,
    Mode,
    Origin,
    OutputChunk,
    Request,
    SamplingParams,
    Statistics,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from cascade.replica.options import ReplicaOptions

GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))

SEEDED = DecodingParams(
    sampling=SamplingParams(temperature=0.9, top_p=0.95), coupling=Coupling.GUMBEL, seed=11
)

LONGEST = 32


def settings(pair: VocabularyPair, way: str = "auto") -> Any:
    model = {"model": str(pair.drafter.path), "engine": {"threads": 1}, "vocabulary": way}
    return pair.settings(drafter=model, router={"draft_deadline_s": 120, "draft_pause_s": 0.001})


async def answer(server: LocalServer, request: Request) -> tuple[tuple[int, ...], Statistics]:
    chunks: list[OutputChunk] = [chunk async for chunk in server.router.generate(request)]
    statistics = chunks[-1].statistics
    assert statistics is not None
    return tuple(token for chunk in chunks for token in chunk.tokens), statistics


async def answers(
    server: LocalServer, prompts: Sequence[tuple[int, ...]], policy: DecodingParams, **more: Any
) -> tuple[list[tuple[int, ...]], list[Statistics]]:
    defaults: dict[str, Any] = {"mode": Mode.SPECULATIVE, "max_tokens": LONGEST} | more
    requests = [Request(prompt=prompt, policy=policy, **defaults) for prompt in prompts]
    found = await asyncio.gather(*(answer(server, request) for request in requests))
    return [text for text, _ in found], [statistics for _, statistics in found]


def greedy(pair: VocabularyPair) -> list[tuple[int, ...]]:
    """Return the expert's own answers."""
    model: Any = pair.expert.model
    return [greedy_answer(model, prompt, max_tokens=LONGEST) for prompt in pair.prompts()]


def total(statistics: Sequence[Statistics], name: str) -> float:
    return sum(getattr(one, name) for one in statistics)


RULE = {"kind": "opt", "alpha": 0.1}

FAST = {("unigram_like", "llama_like")}


@pytest.mark.parametrize(
    ("drafter", "expert"),
    [
        pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow)
        for pair in permutations(TOKENIZERS, 2)
    ],
)
async def test_greedy_text_is_the_experts_own_between_any_two_tokenizers(
    drafter: str, expert: str, tmp_path: Path
) -> None:
    """By token-level intersection and by text."""
    pair = make_pair(tmp_path, TOKENIZERS[drafter](), TOKENIZERS[expert]())
    expected = greedy(pair)
    for way in ("tli", "slem"):
        async with local_server(settings(pair, way), direct=True) as server:
            for length in (1, 5, None):
                texts, statistics = await answers(
                    server, pair.prompts(), GREEDY, draft_tokens=length
                )
                assert texts == expected
                assert total(statistics, "accepted") > 0
                lost = total(statistics, "lost_mass")
                assert 0 < lost < total(statistics, "drafted") if way == "tli" else lost == 0
                assert not any(one.failover_causes for one in statistics)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> VocabularyPair:
    return make_pair(tmp_path_factory.mktemp("pair"), qwen_like(), llama_like())


@pytest.fixture(scope="module")
async def server(pair: VocabularyPair) -> AsyncIterator[LocalServer]:
    async with local_server(settings(pair)) as running:
        yield running


def test_the_way_is_chosen_by_what_the_vocabularies_share(pair: VocabularyPair) -> None:
    assert settings(pair).pair().vocabulary.way is VocabularyWay.TLI


async def test_sampled_text_is_the_experts_own_whatever_is_drafted(
    server: LocalServer, pair: VocabularyPair
) -> None:
    alone, _ = await answers(server, pair.prompts(), SEEDED, mode=Mode.EXPERT_ONLY)
    texts, statistics = await answers(server, pair.prompts(), SEEDED)

    assert texts == alone
    assert total(statistics, "accepted") > 0


async def test_tokens_that_run_before_they_are_read_are_those_that_are_drafted(
    server: LocalServer, pair: VocabularyPair
) -> None:
    """On a GPU the drafter's own ids stay on the device; on a CPU each is read."""
    found: list[Any] = []
    engine = server.drafter.engine
    for decodes_ahead, reads_each in ((False, False), (True, False), (True, True)):
        engine.decodes_ahead, engine.reads_each = decodes_ahead, reads_each
        for policy in (GREEDY, SEEDED):
            texts, statistics = await answers(server, pair.prompts()[:1], policy, draft_tokens=4)
            found.append((texts, [one.accepted_lengths for one in statistics]))
    assert engine.decodes_ahead, "a pass that fails turns it off"
    assert found[:2] == found[2:4] == found[4:]


async def test_ahead_and_on_branches_the_drafter_drafts_what_it_would_on_request(
    pair: VocabularyPair,
) -> None:
    found: list[Any] = []
    for blocks, branches in ((0, 0), (2, 4)):
        overlap = {"overlap_blocks": blocks, "overlap_branches": branches}
        routed = settings(pair)
        routed = routed.model_copy(update={"router": replace(routed.router, **overlap)})
        async with local_server(routed, direct=True) as running:
            texts, statistics = await answers(running, pair.prompts(), SEEDED, draft_tokens=3)
            found.append((texts, [one.accepted_lengths for one in statistics]))

    assert found[0] == found[1]


@pytest.mark.parametrize("rule", [Chow(alpha=0.987), Opt(alpha=0.1)], ids=str)
async def test_a_cascade_keeps_only_tokens_that_the_drafter_has(
    server: LocalServer, pair: VocabularyPair, rule: Any
) -> None:
    policy = replace(GREEDY, rule=rule)
    requests = [
        Request(prompt=one, policy=policy, mode=Mode.CASCADE, max_tokens=LONGEST)
        for one in pair.prompts()
    ]
    written = list[tuple[int, Origin]]()
    for request in requests:
        async for chunk in server.router.generate(request):
            written += zip(chunk.tokens, chunk.origins, strict=True)
    by_drafter = [token for token, origin in written if origin is not Origin.EXPERT]
    assert pair.vocabulary.pairs.keys() >= set(by_drafter)
    assert 0 < len(by_drafter) < len(written)


async def test_a_drafter_alone_writes_in_the_experts_tokens(
    server: LocalServer, pair: VocabularyPair
) -> None:
    texts, _ = await answers(server, pair.prompts(), GREEDY, mode=Mode.DRAFTER_ONLY)

    assert all(token in pair.vocabulary.pairs for text in texts for token in text)
    assert all(len(text) == LONGEST for text in texts)


async def test_an_answer_matches_its_grammar(server: LocalServer, pair: VocabularyPair) -> None:
    """Masks are the expert's at both tiers."""
    grammar = Grammar(kind=GrammarKind.REGEX, text="(committee|mean) [a-z]{4}[0-9]{2}")
    policy = replace(GREEDY, grammar=grammar, stop_ids=pair.tokenizer.stop_ids)
    alone, _ = await answers(server, pair.prompts(), policy, mode=Mode.EXPERT_ONLY)
    texts, statistics = await answers(server, pair.prompts(), policy, draft_tokens=3)
    kept, _ = await answers(server, pair.prompts(), policy, mode=Mode.DRAFTER_ONLY)

    assert texts == alone
    assert total(statistics, "drafted") > 0
    for text in [*texts, *kept]:
        assert text[-1] in pair.tokenizer.stop_ids
        written = pair.tokenizer.decode(text)
        assert written[:5] in {"commi", "mean "}
        assert written[-2:].isdecimal()


async def test_the_drafters_end_of_text_ends_the_answer(tmp_path: Path) -> None:
    """Its name is another than the expert's."""
    made = make_pair(tmp_path, qwen_like(), llama_2_like())
    ends = made.vocabulary.drafter.tokenizer.stop_ids[0]
    made.drafter.model.lm_head.weight.data[ends] = 100.0
    made.drafter.model.save_pretrained(made.drafter.path)
    policy = replace(GREEDY, stop_ids=made.tokenizer.stop_ids)
    async with local_server(settings(made), direct=True) as running:
        texts, _ = await answers(running, made.prompts(), policy, mode=Mode.DRAFTER_ONLY)

    assert any(text[-1:] == made.tokenizer.stop_ids for text in texts)


async def test_a_prompt_is_found_in_the_drafters_cache(
    server: LocalServer, pair: VocabularyPair
) -> None:
    prompt = pair.tokenizer.encode("To solve the equation, first move the constant: x = 5. " * 3)
    before = server.drafter.engine.stats().prefix_tokens
    for _ in range(2):
        await answers(server, [prompt], GREEDY, draft_tokens=3)

    own = len(pair.vocabulary.prompt_to_drafter(prompt))
    assert server.drafter.engine.stats().prefix_tokens - before >= own - 1


async def test_another_drafter_goes_on_in_the_middle_of_an_answer(
    server: LocalServer, pair: VocabularyPair
) -> None:
    """It opens the session with prompt and answer so far, in the expert's tokens."""
    request = Request(
        prompt=pair.prompts()[0],
        policy=GREEDY,
        mode=Mode.SPECULATIVE,
        max_tokens=LONGEST,
        draft_tokens=2,
    )
    undisturbed, before = await answer(server, request)
    tokens, statistics = list[int](), Statistics()
    async for chunk in server.router.generate(request):
        tokens += chunk.tokens
        statistics = chunk.statistics or statistics
        if statistics.rounds == 3:
            sessions = list(server.drafter._sessions.values())  # pyright: ignore[reportPrivateUsage] - a replica's sessions die with its process only
            for session in sessions:
                server.drafter._end_lease(session.lease)  # pyright: ignore[reportPrivateUsage] - as above

    assert tuple(tokens) == undisturbed == greedy(pair)[0]
    assert statistics.failover_causes == {"drafter lost": 1}
    assert statistics.accepted > before.accepted / 2


async def test_a_drafter_that_does_not_know_its_expert_is_warned_of(
    server: LocalServer, pair: VocabularyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was started by hand for another expert."""

    def of_the_tier_alone(self: Application) -> ReplicaOptions:
        return self.drafter.options()

    monkeypatch.setattr(Application, "drafter_options", of_the_tier_alone)
    async with local_server(settings(pair), direct=True) as running:
        assert any("the same token ids" in one for one in running.router.warnings())
    assert not any("the same token ids" in one for one in server.router.warnings())


@pytest.fixture(scope="module")
async def by_text(pair: VocabularyPair) -> AsyncIterator[LocalServer]:
    async with local_server(settings(pair, "slem")) as running:
        yield running


async def test_sampled_text_is_the_experts_own_whatever_text_is_drafted(
    by_text: LocalServer, pair: VocabularyPair
) -> None:
    """Also with another rule's verification, penalties, and a grammar."""
    grammar = Grammar(kind=GrammarKind.REGEX, text="(committee|mean) [a-z]{4}[0-9]{2}")
    penalised = replace(SEEDED.sampling, presence_penalty=0.5, logit_bias=((3, 2.0),))
    for policy in (
        replace(SEEDED, sampling=penalised),
        replace(GREEDY, verification=Verification.BLOCK),
        replace(GREEDY, grammar=grammar, stop_ids=pair.tokenizer.stop_ids),
    ):
        alone, _ = await answers(by_text, pair.prompts(), policy, mode=Mode.EXPERT_ONLY)
        texts, statistics = await answers(by_text, pair.prompts(), policy, draft_tokens=4)

        assert texts == alone
        assert total(statistics, "drafted") > 0


async def test_text_that_the_expert_finds_likely_enough_is_kept(
    by_text: LocalServer, pair: VocabularyPair
) -> None:
    sampling = SamplingParams(temperature=0.7)
    policy = DecodingParams(sampling=sampling, rule=TokenV3(alpha=0.9), seed=3)
    _, strict = await answers(by_text, pair.prompts(), replace(policy, rule=Lossless()))
    texts, lenient = await answers(
        by_text, pair.prompts(), policy, mode=Mode.CASCADE, draft_tokens=4
    )

    assert all(len(text) == LONGEST for text in texts)
    assert total(lenient, "kept_tokens") > total(strict, "kept_tokens") == 0


async def test_a_rule_that_reads_the_drafter_is_refused_at_both_tiers(
    by_text: LocalServer, pair: VocabularyPair
) -> None:
    policy = replace(GREEDY, rule=Opt(alpha=0.1))
    with pytest.raises(InvalidRequest, match="use lossless or token_v3"):
        await answers(by_text, pair.prompts()[:1], policy, mode=Mode.CASCADE, draft_tokens=2)
    body = CompletionBody.model_validate({"prompt": "The", "cascade": {"rule": RULE}})
    with pytest.raises(InvalidRequest, match="few tokens in common"):
        build_request.completion(body, by_text.service)


def test_defaults_that_text_cannot_serve_stop_the_server(pair: VocabularyPair) -> None:
    whole = settings(pair, "slem")
    defaults = replace(whole.defaults, rule=Chow(alpha=0.5))
    with pytest.raises(StartupError, match=r"`defaults.rule` is `chow`, but drafter and expert"):
        whole.model_copy(update={"defaults": defaults}).pair()
