"""Nothing leaves the device but through one door, and little does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.bigram_models import Bigrams, Writing
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
def test_the_first_of_the_largest_is_found(
    vocab: int, levels: int, seed: int, dtype: torch.dtype
) -> None:
    """Few levels make many ties; a slice of longer rows is no trouble."""
    chance = torch.Generator().manual_seed(seed)
    rows_NV = torch.randint(-levels, levels, (3, vocab + 7), generator=chance).to(dtype)[:, :vocab]

    found_N = tensor_ops.argmax(rows_NV)

    values = rows_NV.double().tolist()
    assert found_N.tolist() == [row.index(max(row)) for row in values]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peak_and_norm_are_the_rows_own(temperature: float, dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(1)
    logits_NV = 5 * torch.randn(4, 3000, generator=chance, dtype=dtype)
    inverse_N1 = torch.full((4, 1), 1 / temperature, dtype=dtype)

    peak_N1, norm_N1 = tensor_ops.peak_and_norm(logits_NV, None if temperature == 1 else inverse_N1)

    assert torch.equal(peak_N1, logits_NV.amax(1, keepdim=True))
    wanted_N1 = ((logits_NV - peak_N1) / temperature).logsumexp(1, keepdim=True)
    torch.testing.assert_close(norm_N1, wanted_N1, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("rows", "vocab"), [(0, 9), (1, 9), (7, 400_000), (40, 90_000)])
def test_pieces_are_all_rows_in_order(rows: int, vocab: int) -> None:
    numbers_NV = torch.arange(rows)[:, None].expand(rows, vocab)

    parts = [numbers_NV[some] for some in tensor_ops.pieces(numbers_NV)]

    assert torch.equal(torch.cat(parts), numbers_NV)
    assert max(part.numel() for part in parts) <= max(tensor_ops.PIECE, vocab)


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

WAITING = {
    *("tolist", "item", "cpu", "nonzero", "masked_select", "unique"),
    *("__bool__", "__int__", "__float__", "__index__"),
}


class Waits(TorchFunctionMode):
    """Counts what would make Python wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        self.count += name in WAITING
        if name == "__getitem__":
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.count += any(
                isinstance(place, torch.Tensor) and place.dtype == torch.bool for place in places
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
def test_verdicts_on_many_sessions_wait_a_few_times(
    rule: Rule, policy: DecodingParams, most: int
) -> None:
    """However many sessions there are; a mixture has coins at temperature 0 too."""
    policy = replace(policy, rule=rule, rows=RowFormat.SPARSE, row_entries=8)
    most += policy.sampling.greedy and isinstance(rule, Ensemble)
    for sessions in (1, 9):
        writings = [Writing(policy=replace(policy, seed=i), prompt=(i, 3)) for i in range(sessions)]
        blocks = PAIR.blocks(writings, counts=[3] * sessions)
        tasks = [w.task(block) for w, block in zip(writings, blocks, strict=True)]
        rows = [
            PAIR.rows(w.policy, w.prompt, block.tokens)
            for w, block in zip(writings, blocks, strict=True)
        ]
        before, logits_NV = tensor_ops.reads(), torch.cat(rows)
        with Waits() as waits:
            verify(logits_NV, tasks)

        assert tensor_ops.reads() - before <= most
        assert waits.count == tensor_ops.reads() - before


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("temperature", [0, 1])
def test_drafting_reads_through_the_same_door(rule: Rule, temperature: float) -> None:
    policy = DecodingParams(rule=rule, sampling=SamplingParams(temperature=temperature))
    tasks = [DraftTask(policy=replace(policy, seed=i), position=4, start=2) for i in range(5)]
    logits_BV = torch.stack([PAIR.drafter([i]) for i in range(5)])
    before = tensor_ops.reads()

    with Waits() as waits:
        draft_step(logits_BV, tasks)

    assert 1 <= tensor_ops.reads() - before == waits.count <= 8
