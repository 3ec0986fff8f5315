"""Nothing leaves the device but through one door, and little does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cascade.decoding import host
from cascade.decoding.drafting import DraftTask, draft_step
from cascade.decoding.rules import Chow, DiffLog, Ensemble, Lossless, Opt, TokenV1, TokenV3
from cascade.decoding.session import Bonus, Coupling, Policy, RowFormat, Sampling, Verification
from cascade.decoding.verification import judge

from .toy import Bigrams, Writing

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.decoding.rules import Rule

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
        (Policy(sampling=Sampling(temperature=0)), 2),
        (Policy(sampling=Sampling(temperature=0), bonus=Bonus.TARGET), 2),
        (Policy(), 3),
        (Policy(sampling=Sampling(temperature=0.7, top_k=4, min_p=0.1)), 3),
        (Policy(verification=Verification.BLOCK), 5),
        (Policy(coupling=Coupling.GUMBEL), 2),
    ],
    ids=["greedy", "greedy target", "sampled", "truncated", "block", "gumbel"],
)
def test_verdicts_on_many_sessions_wait_a_few_times(rule: Rule, policy: Policy, most: int) -> None:
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
        before, logits_NV = host.reads(), torch.cat(rows)
        with Waits() as waits:
            judge(logits_NV, tasks)

        assert host.reads() - before <= most
        assert waits.count == host.reads() - before


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("temperature", [0, 1])
def test_drafting_reads_through_the_same_door(rule: Rule, temperature: float) -> None:
    policy = Policy(rule=rule, sampling=Sampling(temperature=temperature))
    tasks = [DraftTask(policy=replace(policy, seed=i), position=4, start=2) for i in range(5)]
    logits_BV = torch.stack([PAIR.drafter([i]) for i in range(5)])
    before = host.reads()

    with Waits() as waits:
        draft_step(logits_BV, tasks)

    assert 1 <= host.reads() - before == waits.count <= 8
