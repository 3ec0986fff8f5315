"""Answers under a grammar are what `transformers` generates with the same mask, whatever drafts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import torch
import xgrammar as xgr

from cascade.expert.expert import Expert
from cascade.local import local_server
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
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import Folder, Pair

    from cascade.local import LocalServer

STOP, LENGTH = 6, 16
WORDS = "ABCDEFGH"  # the first is a special token, which no text has

PROMPTS: tuple[tuple[int, ...], ...] = ((3, 1, 4), (7, 7, 0), (2, 0), (5, 6, 3))

GREEDY = SamplingParams(temperature=0.0)

GRAMMARS = {
    "choices": Grammar(kind=GrammarKind.REGEX, text="(BCD|BCEF|HHDE|DDDDDD){1,4}"),
    "brackets": Grammar(kind=GrammarKind.EBNF, text='root ::= "B" root "C" | "DE" | "H" [DEF]*'),
    "runs": Grammar(kind=GrammarKind.REGEX, text="B[CD]CCCCC(DE){3}F?"),
}


def generated(model: Folder, prompt: Sequence[int], grammar: Grammar) -> tuple[int, ...]:
    """Return what `transformers` generates greedily under a grammar."""
    vocabulary = [b"", *(word.encode() for word in WORDS[1:])]
    info = xgr.TokenizerInfo(vocabulary, xgr.VocabType.RAW, stop_token_ids=[STOP])
    compiler = xgr.GrammarCompiler(info)
    regex = grammar.kind is GrammarKind.REGEX
    compiled = (compiler.compile_regex if regex else compiler.compile_grammar)(grammar.text)
    ids = torch.tensor([prompt])
    plain: Any = model.model
    found = plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=STOP,
        pad_token_id=0,
        logits_processor=[xgr.contrib.hf.LogitsProcessor(compiled)],
    )
    return tuple(found[0, len(prompt) :].tolist())


def request(prompt: tuple[int, ...], grammar: Grammar, **more: Any) -> Request:
    settings: dict[str, Any] = {"sampling": GREEDY, "stop_ids": (STOP,), "grammar": grammar}
    settings |= more.pop("policy", {})
    defaults: dict[str, Any] = {"mode": Mode.SPECULATIVE, "max_tokens": LENGTH}
    return Request(prompt=prompt, policy=DecodingParams(**settings), **defaults | more)


async def served(server: LocalServer, asked: Request) -> list[OutputChunk]:
    return [chunk async for chunk in server.router.generate(asked)]


def tokens(chunks: Sequence[OutputChunk]) -> tuple[int, ...]:
    return tuple(token for chunk in chunks for token in chunk.tokens)


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
async def test_greedy_text_is_that_of_generate_at_every_block_length(
    toy: Pair, toy_stack: LocalServer, grammar: Grammar
) -> None:
    """In shared batches, under both couplings; without a drafter too."""
    expected = [generated(toy.expert, prompt, grammar) for prompt in PROMPTS]
    hows: list[dict[str, Any]] = [{"draft_tokens": count} for count in (1, 2, 5, 8)]
    hows += [{"draft_tokens": 3, "policy": {"coupling": Coupling.GUMBEL}}]
    for how in (*hows, {"mode": Mode.EXPERT_ONLY}):
        asked = [request(prompt, grammar, **how) for prompt in PROMPTS]
        found = await asyncio.gather(*(served(toy_stack, one) for one in asked))
        assert [tokens(chunks) for chunks in found] == expected, how


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
async def test_the_drafter_alone_writes_what_generate_writes(
    toy: Pair, toy_stack: LocalServer, grammar: Grammar
) -> None:
    for prompt in PROMPTS:
        found = await served(toy_stack, request(prompt, grammar, mode=Mode.DRAFTER_ONLY))
        assert tokens(found) == generated(toy.drafter, prompt, grammar)


async def test_an_expert_that_dies_changes_no_token(toy: Pair) -> None:
    """The next replica follows the grammar from the committed tokens."""
    grammar, prompt = GRAMMARS["choices"], PROMPTS[0]
    reborn: Expert | None = None
    chunks = list[OutputChunk]()
    async with local_server(toy.settings(router={"draft_deadline_s": 120})) as server:
        async for chunk in server.router.generate(request(prompt, grammar, draft_tokens=2)):
            chunks.append(chunk)
            if len(chunks) == 2:
                await server.expert.stop()
                reborn = await Expert.start(
                    toy.settings().expert.options(),
                    address=server.expert.address,
                    token=server.token,
                )
    assert reborn is not None
    await reborn.stop()
    assert chunks[-1].statistics is not None
    assert chunks[-1].statistics.failovers >= 1
    assert tokens(chunks) == generated(toy.expert, prompt, grammar)


@pytest.mark.parametrize("mode", [Mode.SPECULATIVE, Mode.EXPERT_ONLY, Mode.DRAFTER_ONLY])
async def test_tokens_without_an_alternative_are_forced_and_cost_no_pass(
    toy_stack: LocalServer, mode: Mode
) -> None:
    """All but the choices of the grammar; `length` ends what is longer than the answer."""
    asked = request(PROMPTS[0], GRAMMARS["runs"], mode=mode, draft_tokens=6)
    if mode is not Mode.SPECULATIVE:
        asked = request(PROMPTS[0], GRAMMARS["runs"], mode=mode)
    chunks = await served(toy_stack, asked)
    origins = [origin for chunk in chunks for origin in chunk.origins]
    free = [at for at, origin in enumerate(origins) if origin is not Origin.FORCED]
    assert free == [1, 13]
    statistics = chunks[-1].statistics
    assert statistics is not None
    assert statistics.forced_tokens == len(origins) - 2
    if mode is Mode.SPECULATIVE:
        assert statistics.drafter_passes <= 6
        assert statistics.drafted > 2 * statistics.drafter_passes


async def test_a_run_of_forced_tokens_takes_one_round_however_short_blocks_are(
    toy_stack: LocalServer,
) -> None:
    asked = request(PROMPTS[0], GRAMMARS["runs"], mode=Mode.SPECULATIVE, draft_tokens=1)
    chunks = await served(toy_stack, asked)
    statistics = chunks[-1].statistics
    assert statistics is not None
    assert len(tokens(chunks)) >= 14
    assert statistics.rounds <= 3
    assert statistics.accepted >= 12
