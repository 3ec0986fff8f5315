"""How long an expert takes to judge a block over a large vocabulary, beside a model's pass.

Rows of logits are random: like those of a trained model, or normally distributed, which is flatter
than any text. Blocks are drafted from rows that resemble the expert's, with the probabilities that
a drafter sends under the rule.

Shapes: `N` rows of logits, `V` vocabulary.
"""

from __future__ import annotations

import timeit
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cascade.benchmark.microbench import StepBenchmark
from cascade.engine import threads
from cascade.engine.model_loader import adopt
from cascade.engine.settings import EngineSettings
from cascade.rules import Chow, Diff, Lossless, Opt, TokenV1, TokenV2, TokenV3
from cascade.speculation.draft import DraftTask, block_of, draft_step
from cascade.speculation.verify import VerifyTask, rows_needed, verify
from cascade.types import DecodingParams, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from cascade.rules import Rule

BLOCK = 5  # drafted tokens
_WARM_UP = 3
_LIKELY, _TAIL_STD = 20, 1.7  # tokens of a trained row that stand out, and the spread of the others
_LIKENESS = 0.8  # correlation of the drafter's logits with the expert's

# Standard deviations of normally distributed logits; None: like a trained model's.
SHAPES: dict[str, float | None] = {"trained": None, "sd 4": 4.0, "sd 2": 2.0, "sd 1": 1.0}
RULES: dict[str, Rule] = {
    "lossless": Lossless(),
    "chow": Chow(alpha=0.3),
    "diff": Diff(alpha=0.1),
    "opt": Opt(alpha=0.1),
    "token_v1": TokenV1(alpha=0.1),
    "token_v2": TokenV2(alpha=0.1),
    "token_v3": TokenV3(alpha=0.5),
}
SAMPLINGS: dict[str, SamplingParams] = {
    "top_p 0.9": SamplingParams(top_p=0.9),
    "top_p 0.5": SamplingParams(top_p=0.5),
    "top_p 0.99": SamplingParams(top_p=0.99),
    "temperature 0.7, top_p 0.9": SamplingParams(temperature=0.7, top_p=0.9),
    "temperature 1.3, top_p 0.9": SamplingParams(temperature=1.3, top_p=0.9),
    "top_k 64, top_p 0.9": SamplingParams(top_k=64, top_p=0.9),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "temperature 1": SamplingParams(),
}
# The smallest models that people serve with so many tokens: hidden, intermediate, layers, heads.
_SIZES = {
    262_144: (640, 2048, 18, 10),
    152_064: (896, 4864, 24, 14),
    128_256: (2048, 8192, 16, 32),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgingTime:
    """Milliseconds that judging one block takes, by rule."""

    vocabulary: int
    shape: str
    sampling: str
    by_rule: dict[str, float]


def measure(  # noqa: PLR0913 - what is combined
    *,
    vocabularies: Sequence[int],
    shapes: Sequence[str],
    samplings: Sequence[str],
    rules: Sequence[str],
    repeats: int,
    cores: int,
) -> Iterator[JudgingTime]:
    """Time the judging of a block of `BLOCK` tokens and what follows it; medians.

    Args:
        vocabularies: Numbers of tokens.
        shapes: Names of `SHAPES`.
        samplings: Names of `SAMPLINGS`.
        rules: Names of `RULES`.
        repeats: Timed calls of each.
        cores: Threads; 0: torch's default.
    """
    threads.apply(threads=cores)
    for vocabulary in vocabularies:
        for shape in shapes:
            drafter_NV, expert_NV = _logits(shape, vocabulary)
            for sampling in samplings:
                by_rule = {
                    rule: _judging_ms(
                        drafter_NV,
                        expert_NV,
                        DecodingParams(rule=RULES[rule], sampling=SAMPLINGS[sampling], seed=3),
                        repeats=repeats,
                    )
                    for rule in rules
                }
                yield JudgingTime(
                    vocabulary=vocabulary, shape=shape, sampling=sampling, by_rule=by_rule
                )


def pass_ms(vocabulary: int, *, cores: int, repeats: int) -> float:
    """Return the median time of a random model's pass over a block, without judging it.

    Args:
        vocabulary: A key of `_SIZES`, which says how large the model is; else the first counts.
        cores: Threads; 0: torch's default.
        repeats: Timed passes.
    """
    hidden, intermediate, layers, heads = _SIZES.get(vocabulary, _SIZES[262_144])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).bfloat16()
    timed = StepBenchmark(adopt(model), settings=EngineSettings(threads=cores)).time(
        sessions=1, block_tokens=BLOCK, passes=repeats
    )
    return timed.step_ms - timed.handler_ms


def _logits(shape: str, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return rows of a drafter and of an expert, [N, V] each."""
    generator = torch.Generator().manual_seed(0)
    std = SHAPES[shape]

    def rows() -> Tensor:
        return (std or _TAIL_STD) * torch.randn(BLOCK + 1, vocabulary, generator=generator)

    expert_NV, other_NV = rows(), rows()
    drafter_NV = _LIKENESS * expert_NV + (1 - _LIKENESS**2) ** 0.5 * other_NV
    if std is None:
        top_NK = torch.randint(vocabulary, (BLOCK + 1, _LIKELY), generator=generator)
        heights_NK = 14 + 2.5 * torch.randn(BLOCK + 1, _LIKELY, generator=generator)
        expert_NV.scatter_(1, top_NK, heights_NK)
        noise_NK = torch.randn(BLOCK + 1, _LIKELY, generator=generator)
        drafter_NV.scatter_(1, top_NK, heights_NK + noise_NK)
    return drafter_NV, expert_NV


@torch.inference_mode()
def _judging_ms(
    drafter_NV: Tensor, expert_NV: Tensor, policy: DecodingParams, *, repeats: int
) -> float:
    tasks = [DraftTask(policy=policy, position=i, block_start=0) for i in range(BLOCK)]
    block = block_of(draft_step(drafter_NV[:BLOCK], tasks))
    task = VerifyTask(policy=policy, position=0, block=block)
    rows_NV = expert_NV[: rows_needed(policy, block.tokens)]
    seconds = timeit.repeat(
        lambda: verify(rows_NV, [task]), number=1, repeat=_WARM_UP + max(1, repeats)
    )
    return 1e3 * median(seconds[_WARM_UP:])
