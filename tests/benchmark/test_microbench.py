"""Engine steps alone: what a step consists of, and that its time is measured."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cascade import demo
from cascade.benchmark.microbench import GrammarText, StepBenchmark, draft_bytes, greedy_logits
from cascade.engine.model_loader import load
from cascade.engine.settings import EngineSettings
from cascade.engine.tokenizer import load as load_tokenizer
from cascade.rules import Diff, TokenV3
from cascade.structured.grammar import GrammarCompiler, TokenTexts
from cascade.types import DecodingParams, Grammar, GrammarKind, RowFormat, SamplingParams


@pytest.mark.parametrize(("block_tokens", "step_tokens"), [(None, 1), (3, 4)])
@pytest.mark.parametrize("temperature", [0, 1])
def test_steps_of_one_and_of_several_sessions_are_timed(
    block_tokens: int | None, step_tokens: int, temperature: float
) -> None:
    bench = StepBenchmark(
        str(demo.DRAFTER),
        policy=DecodingParams(sampling=SamplingParams(temperature=temperature)),
        settings=EngineSettings(threads=1, cache_tokens=2048),
    )
    for sessions in (1, 3):
        found = bench.time(
            sessions=sessions, block_tokens=block_tokens, context_tokens=20, passes=2
        )
        assert found.step_tokens == step_tokens
        assert 0 < found.handler_ms < found.step_ms
        assert found.mean_ms > 0
        assert 0 < found.handler_share < 1


def test_the_masks_of_a_grammar_are_timed_within_verification() -> None:
    tokenizer = load_tokenizer(str(demo.DRAFTER))
    compiler = GrammarCompiler(TokenTexts.of(tokenizer, tokenizer.size))
    grammar = Grammar(kind=GrammarKind.REGEX, text="(yes|no|maybe, ){20}")
    text = GrammarText.random(compiler, grammar, length=20)
    spoken = b"".join(map(tokenizer.bytes_of, text.tokens)).decode()
    assert re.match("(yes|no|maybe, )+", spoken)
    bench = StepBenchmark(
        str(demo.DRAFTER), settings=EngineSettings(threads=1, cache_tokens=2048), text=text
    )
    found = bench.time(sessions=3, block_tokens=3, context_tokens=20, passes=2)
    assert 0 < found.mask_ms < found.handler_ms
    assert 0 < found.mask_share < found.handler_share


def test_a_draft_is_as_large_as_what_its_rule_reads() -> None:
    """Ids, a few tokens of q, or most of it; at temperature 0 an id is enough."""
    model = load(str(demo.DRAFTER), device="cpu", dtype="float32")
    logits = greedy_logits(model, [(5, 6, 7)], tokens=4)

    def size(temperature: float, policy: DecodingParams) -> float:
        policy = replace(policy, sampling=SamplingParams(temperature=temperature))
        return draft_bytes(logits, policy=policy)

    ids, few, most = DecodingParams(rule=TokenV3(alpha=0.9)), DecodingParams(), Diff(alpha=0.0)
    exact = DecodingParams(rule=most)
    assert max(size(0.0, ids), size(0.0, few), size(1.5, ids)) < 16 < size(0.0, exact) < 40
    assert size(1.5, few) < 500 < size(1.5, exact)
    assert size(0.1, exact) < size(1.5, exact) <= size(1.5, replace(exact, rows=RowFormat.FULL))
    assert size(1.5, exact) < 2 * model.vocabulary + 50
