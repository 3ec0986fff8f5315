"""Contenders against each other: interleaved rounds, medians and paired ratios.

Machines drift, so contenders take turns: every round runs each of them once over the same requests,
in an order that rotates. A figure is the median over rounds; a ratio is the median of the ratios
within rounds, so that what slows a whole round cancels. A first turn of everyone is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.benchmark.load import Closed, drive
from cascade.benchmark.metrics import Figures, Spread, figures
from cascade.errors import InvalidMeasurement

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cascade.benchmark.load import Arrivals
    from cascade.benchmark.metrics import Objective
    from cascade.benchmark.systems import Contender

Json: TypeAlias = dict[str, Any]

Gauge: TypeAlias = "Callable[[Mapping[str, Figures]], float]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one contender did: its rounds, and what it said in the last."""

    name: str
    rounds: tuple[Figures, ...]
    texts: tuple[str | None, ...]  # None where a request failed

    @property
    def middle(self) -> Figures:
        """Return the median of each figure over the rounds; of counts, those of the last round."""
        return Figures(**{part.name: _middle(self.rounds, part.name) for part in fields(Figures)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One contender's tokens per second over another's, paired by round."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What a contest came to."""

    standings: tuple[Standing, ...]
    gauged: tuple[float, ...] = ()  # what a gauge said after each round

    def __getitem__(self, name: str) -> Standing:
        for standing in self.standings:
            if standing.name == name:
                return standing
        known = ", ".join(standing.name for standing in self.standings)
        raise InvalidMeasurement(f"there is no contender {name!r}; there are {known}")

    def ratio(self, name: str, over: str) -> Ratio:
        """Return how many times the tokens per second of `over` contender `name` reached."""
        pairs = zip(self[name].rounds, self[over].rounds, strict=True)
        found = [mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in pairs]
        return Ratio(median=median(found), least=min(found), most=max(found))

    def differences(self, name: str, other: str) -> list[int]:
        """Return the requests to which two contenders gave different texts."""
        pairs = zip(self[name].texts, self[other].texts, strict=True)
        return [number for number, (one, two) in enumerate(pairs) if one != two]


async def compete(  # noqa: PLR0913 - a contest has as many sides
    contenders: Sequence[Contender],
    bodies: Sequence[Json],
    arrivals: Arrivals,
    *,
    rounds: int,
    objective: Objective | None = None,
    gauge: Gauge | None = None,
    told: Callable[[str], object] = lambda _: None,
) -> Contest:
    """Let all contenders answer all requests in every round.

    Args:
        contenders: Who; names must differ.
        bodies: Requests, without a `cascade` object.
        arrivals: When they start.
        rounds: How often, after a first time that does not count.
        objective: What makes an answer good.
        gauge: Measures something else of the machine at the end of every round, from that round's
            figures by contender, so that it can be paired with them.
        told: Called with a line after each turn.

    Raises:
        InvalidMeasurement: A contender answered nothing, or refuses a request.
    """
    if len({one.name for one in contenders}) < len(contenders):
        raise InvalidMeasurement("two contenders have one name; name them apart")
    for one in contenders:
        await drive(one.answerer, _asked(one, bodies[: _warm(arrivals)]), _unpaced(arrivals))
        told(f"{one.name}: warm")
    found: dict[str, list[Figures]] = {one.name: [] for one in contenders}
    gauged: list[float] = []
    texts: dict[str, tuple[str | None, ...]] = {}
    for number in range(rounds):
        for one in (
            *contenders[number % len(contenders) :],
            *contenders[: number % len(contenders)],
        ):
            before = one.busy_s()
            run = await drive(one.answerer, _asked(one, bodies), arrivals)
            busy_s = {tier: spent - before[tier] for tier, spent in one.busy_s().items()}
            found[one.name].append(figures(run, objective=objective, busy_s=busy_s))
            texts[one.name] = tuple(
                None if asked.answer is None else asked.answer.text for asked in run.asked
            )
            told(f"{one.name}: round {number + 1}, {found[one.name][-1].tokens_per_s:.1f} tokens/s")
        if gauge is not None:
            gauged.append(gauge({name: figures[-1] for name, figures in found.items()}))
    return Contest(
        gauged=tuple(gauged),
        standings=tuple(
            Standing(name=one.name, rounds=tuple(found[one.name]), texts=texts[one.name])
            for one in contenders
        ),
    )


def _asked(contender: Contender, bodies: Sequence[Json]) -> list[Json]:
    if not contender.cascade:
        return list(bodies)
    return [{**body, "cascade": body.get("cascade", {}) | contender.cascade} for body in bodies]


def _warm(arrivals: Arrivals) -> int:
    return 2 * arrivals.concurrency if isinstance(arrivals, Closed) else 2


def _unpaced(arrivals: Arrivals) -> Closed:
    return arrivals if isinstance(arrivals, Closed) else Closed()


def _middle(rounds: Sequence[Figures], name: str) -> Any:
    values = [getattr(figure, name) for figure in rounds]
    match values[-1]:
        case Spread():
            parts = {
                part.name: median(getattr(v, part.name) for v in values) for part in fields(Spread)
            }
            return Spread(**parts)
        case float():
            return median(value for value in values if value is not None)
        case dict() if name == "busy":
            return {tier: median(value[tier] for value in values) for tier in values[-1]}
        case last:
            return last
