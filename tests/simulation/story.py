"""What a seed says will happen."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from tests.simulation.network import Weather
from tests.simulation.toys import STOP, VOCABULARY

from cascade.rules import Chow, Lossless, Rule, TokenV3
from cascade.speculation.draft_length import DraftPlan
from cascade.types import DecodingParams, ExpertLoss, Mode, Request, SamplingParams

if TYPE_CHECKING:
    from cascade.speculation.cost_model import RoundSample

TROUBLES = ("kill", "silent", "cut", "stall", "streams", "leases", "router")
MENDED = ("streams", "leases")  # troubles after which the replica is there as before
WAYS: tuple[tuple[Mode, Rule], ...] = (
    (Mode.SPECULATIVE, Lossless()),
    (Mode.SPECULATIVE, Lossless()),
    (Mode.EXPERT_ONLY, Lossless()),
    (Mode.CASCADE, TokenV3(alpha=0.5)),
    (Mode.CASCADE, Chow(alpha=0.5)),
    (Mode.TOKEN_CASCADE, Chow(alpha=0.5)),
    (Mode.DRAFTER_ONLY, Lossless()),
)


@dataclass(frozen=True, kw_only=True)
class Story:
    """What happens, drawn from a seed."""

    seed: int
    chance: Random
    weather: Weather
    counts: dict[str, int]  # replicas of each tier
    troubles: tuple[str, ...]
    span_s: float  # in which they come
    full: float  # chance that an engine has no room for a session
    most: int  # leases of a replica

    @classmethod
    def of(cls, seed: int) -> Story:
        chance = Random(seed)  # noqa: S311 - a story, no secret
        mild = chance.random() < 0.3
        foul = chance.random() < 0.5
        weather = Weather(
            delay_s=chance.choice([0.0005, 0.002, 0.02]),
            dropped=chance.choice([0, 0.02, 0.1]) if foul and not mild else 0,
            repeated=chance.choice([0, 0.05, 0.3]) if foul else 0,
            reordered=chance.choice([0, 0.1, 0.5]) if foul and not mild else 0,
        )
        count = chance.choice([0, 1, 1, 2, 4])
        return cls(
            seed=seed,
            chance=chance,
            weather=weather,
            counts={
                "drafter": chance.choice([1, 2] if mild else [0, 1, 1, 2]),
                "expert": chance.choice([1, 2, 3]),
            },
            troubles=tuple(chance.choices(MENDED if mild else TROUBLES, k=count)),
            span_s=chance.choice([0.02, 0.1, 1.0]),
            full=0 if mild else chance.choice([0, 0, 0.1]),
            most=8 if mild else chance.choice([1, 2, 8]),
        )

    @property
    def mild(self) -> bool:
        """Whether nothing happens that could cost a session more than one move."""
        calm = self.weather.dropped == self.weather.reordered == self.full == 0
        there = self.most >= 8 and min(self.counts.values()) > 0
        return calm and there and set(self.troubles) <= set(MENDED)

    def request(self) -> Request:
        """Return what somebody asks."""
        chance = self.chance
        mode, rule = chance.choice(WAYS)
        stop_ids = (STOP,) if chance.random() < 0.3 else ()
        policy = DecodingParams(
            sampling=SamplingParams(temperature=0.0), rule=rule, stop_ids=stop_ids
        )
        return Request(
            prompt=tuple(chance.randrange(VOCABULARY) for _ in range(chance.choice([1, 2, 6]))),
            policy=policy,
            mode=mode,
            max_tokens=chance.choice([1, 6, 12]),
            on_expert_loss=chance.choice([ExpertLoss.FAIL, ExpertLoss.FAIL, ExpertLoss.DRAFTER]),
        )


@dataclass(kw_only=True)
class Whim:
    """Draft lengths of no reason."""

    chance: Random

    def next(self, *, room: int) -> DraftPlan:
        """Return any length."""
        tokens = max(0, min(room, self.chance.choice([0, 1, 2, 3, 5])))
        return DraftPlan(tokens=tokens, reason="whim", alone=self.chance.choice([1, 2, 4]))

    def learn(self, lesson: RoundSample) -> None:
        """Learn nothing."""
