"""A scenario: replicas, requests, network conditions and faults, all drawn from one seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from tests.simulation.fake_replicas import STOP, VOCABULARY
from tests.simulation.network import NetworkConditions

from cascade.rules import Chow, Lossless, Rule, TokenV3
from cascade.speculation.draft_length import DraftPlan
from cascade.types import (
    DecodingParams,
    DrafterLoss,
    ExpertLoss,
    Mode,
    Request,
    SamplingParams,
)

if TYPE_CHECKING:
    from cascade.speculation.cost_model import RoundSample

FAULTS = ("kill", "silent", "cut", "stall", "streams", "leases", "router")
TRANSIENT = ("streams", "leases")  # faults after which the replica serves as before
MODES: tuple[tuple[Mode, Rule], ...] = (
    (Mode.SPECULATIVE, Lossless()),
    (Mode.SPECULATIVE, Lossless()),
    (Mode.EXPERT_ONLY, Lossless()),
    (Mode.CASCADE, TokenV3(alpha=0.5)),
    (Mode.CASCADE, Chow(alpha=0.5)),
    (Mode.TOKEN_CASCADE, Chow(alpha=0.5)),
    (Mode.DRAFTER_ONLY, Lossless()),
)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What happens in one run of the simulator."""

    seed: int
    rng: Random  # of everything that is drawn later
    conditions: NetworkConditions
    counts: dict[str, int]  # replicas of each tier
    faults: tuple[str, ...]
    span_s: float  # requests and faults begin within it
    full_prob: float  # that an engine has no cache space for a session
    max_leases: int  # of a replica

    @classmethod
    def of(cls, seed: int) -> Scenario:
        rng = Random(seed)  # noqa: S311 - no secret
        mild = rng.random() < 0.3
        lossy = rng.random() < 0.5
        conditions = NetworkConditions(
            delay_s=rng.choice([0.0005, 0.002, 0.02]),
            dropped=rng.choice([0, 0.02, 0.1]) if lossy and not mild else 0,
            repeated=rng.choice([0, 0.05, 0.3]) if lossy else 0,
            reordered=rng.choice([0, 0.1, 0.5]) if lossy and not mild else 0,
        )
        count = rng.choice([0, 1, 1, 2, 4])
        return cls(
            seed=seed,
            rng=rng,
            conditions=conditions,
            counts={
                "drafter": rng.choice([1, 2] if mild else [0, 1, 1, 2]),
                "expert": rng.choice([1, 2, 3]),
            },
            faults=tuple(rng.choices(TRANSIENT if mild else FAULTS, k=count)),
            span_s=rng.choice([0.02, 0.1, 1.0]),
            full_prob=0 if mild else rng.choice([0, 0, 0.1]),
            max_leases=8 if mild else rng.choice([1, 2, 8]),
        )

    @property
    def mild(self) -> bool:
        """Whether no fault can cost a session more than one failover."""
        conditions = self.conditions
        calm = conditions.dropped == conditions.reordered == self.full_prob == 0
        enough = self.max_leases >= 8 and min(self.counts.values()) > 0
        return calm and enough and set(self.faults) <= set(TRANSIENT)

    def request(self) -> Request:
        """Return the next request."""
        rng = self.rng
        mode, rule = rng.choice(MODES)
        stop_ids = (STOP,) if rng.random() < 0.3 else ()
        policy = DecodingParams(
            sampling=SamplingParams(temperature=0.0), rule=rule, stop_ids=stop_ids
        )
        return Request(
            prompt=tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 6]))),
            policy=policy,
            mode=mode,
            max_tokens=rng.choice([1, 6, 12]),
            on_expert_loss=rng.choice([ExpertLoss.FAIL, ExpertLoss.FAIL, ExpertLoss.DRAFTER]),
            on_drafter_loss=DrafterLoss.EXPERT if self.seed % 4 else DrafterLoss.WAIT,
            trace=True,
        )


@dataclass(kw_only=True)
class RandomDraftLength:
    """Random draft lengths, instead of adaptive ones."""

    rng: Random

    def next(self, *, budget: int) -> DraftPlan:
        """Return any length within the budget."""
        tokens = max(0, min(budget, self.rng.choice([0, 1, 2, 3, 5])))
        return DraftPlan(tokens=tokens, reason="random", expert_tokens=self.rng.choice([1, 2, 4]))

    def learn(self, sample: RoundSample) -> None:
        """Learn nothing."""
