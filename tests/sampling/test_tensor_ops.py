"""Tensor helpers, and how often sampling and speculation read from a device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.bigram_models import Answer, Bigrams
from torch.overrides import TorchFunctionMode

from cascade.rules import Chow, DiffLog, Ensemble, Lossless, Opt, TokenV1, TokenV3
from cascade.sampling import tensor_ops
from cascade.speculation.draft import DraftTask, draft_step
from cascade.speculation.verify import verify
from cascade.types import Bonus, Coupling, DecodingParams, RowFormat, SamplingParams, Verification

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.rules import Rule

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@settings(deadline=None, max_examples=40)
@given(
    vocab=st.integers(1, 5000),
    levels=st.integers(1, 4000),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
)
def test_argmax_is_the_lowest_index_of_the_largest_values(
    vocab: int, levels: int, seed: int, dtype: torch.dtype
) -> None:
    """With many ties, and on a slice of longer rows."""
    generator = torch.Generator().manual_seed(seed)
    rows_NV = torch.randint(-levels, levels, (3, vocab + 7), generator=generator).to(dtype)[
        :, :vocab
    ]

    found_N = tensor_ops.argmax(rows_NV)

    values = rows_NV.double().tolist()
    assert found_N.tolist() == [row.index(max(row)) for row in values]


@pytest.mark.parametrize(("rows", "vocab"), [(0, 9), (1, 9), (7, 400_000), (40, 90_000)])
def test_chunks_are_all_rows_in_order(rows: int, vocab: int) -> None:
    numbers_NV = torch.arange(rows)[:, None].expand(rows, vocab)

    chunks = tensor_ops.row_chunks(numbers_NV.shape, numbers_NV.device)
    parts = [numbers_NV[chunk] for chunk in chunks]

    assert torch.equal(torch.cat(parts), numbers_NV)
    assert max(part.numel() for part in parts) <= max(tensor_ops.CHUNK_SIZE, vocab)


PAIR = Bigrams.random()

RULES: list[Rule] = [
    Lossless(),
    Chow(alpha=0.3),
    Opt(alpha=0.2),
    DiffLog(alpha=0.1),
    TokenV1(alpha=0.1),
    TokenV3(alpha=0.4),
    Ensemble(weight=0.5),
]

READING = {
    *("tolist", "item", "cpu", "nonzero", "masked_select", "unique"),
    *("__bool__", "__int__", "__float__", "__index__"),
}


class CountReads(TorchFunctionMode):
    """Counts the calls that make Python wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        self.count += name in READING
        if name == "__getitem__":
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.count += any(
                isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize(
    ("policy", "most"),
    [
        (DecodingParams(sampling=SamplingParams(temperature=0)), 2),
        (DecodingParams(sampling=SamplingParams(temperature=0), bonus=Bonus.TARGET), 2),
        (DecodingParams(), 3),
        (DecodingParams(sampling=SamplingParams(temperature=0.7, top_k=4, min_p=0.1)), 3),
        (DecodingParams(verification=Verification.BLOCK), 5),
        (DecodingParams(coupling=Coupling.GUMBEL), 2),
    ],
    ids=["greedy", "greedy target", "sampled", "truncated", "block", "gumbel"],
)
def test_the_number_of_reads_does_not_grow_with_sessions(
    rule: Rule, policy: DecodingParams, most: int
) -> None:
    """An ensemble samples at temperature 0 too, which is one more read."""
    policy = replace(policy, rule=rule, rows=RowFormat.SPARSE, row_entries=8)
    most += policy.sampling.greedy and isinstance(rule, Ensemble)
    for sessions in (1, 9):
        answers = [Answer(policy=replace(policy, seed=i), prompt=(i, 3)) for i in range(sessions)]
        blocks = PAIR.blocks(answers, counts=[3] * sessions)
        tasks = [w.task(block) for w, block in zip(answers, blocks, strict=True)]
        rows = [
            PAIR.rows(w.policy, w.prompt, block.tokens)
            for w, block in zip(answers, blocks, strict=True)
        ]
        before, logits_NV = tensor_ops.device_reads(), torch.cat(rows)
        with CountReads() as counted:
            verify(logits_NV, tasks)

        assert tensor_ops.device_reads() - before <= most
        assert counted.count == tensor_ops.device_reads() - before


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("temperature", [0, 1])
def test_drafting_reads_through_the_counted_functions(rule: Rule, temperature: float) -> None:
    policy = DecodingParams(rule=rule, sampling=SamplingParams(temperature=temperature))
    tasks = [DraftTask(policy=replace(policy, seed=i), position=4, block_start=2) for i in range(5)]
    logits_BV = torch.stack([PAIR.drafter([i]) for i in range(5)])
    before = tensor_ops.device_reads()

    with CountReads() as counted:
        draft_step(logits_BV, tasks)

    assert 1 <= tensor_ops.device_reads() - before == counted.count <= 8
