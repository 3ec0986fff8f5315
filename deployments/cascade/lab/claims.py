"""Promises of speed, each with what was measured of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.lab.standings import document, heading, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from cascade.lab.bench import Contest
    from cascade.lab.machine import Provenance

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One promise, and what was measured."""

    case: str
    says: str
    measured: float
    least: float | None = None
    most: float | None = None

    @property
    def held(self) -> bool:
        """Whether it is so."""
        return (self.least is None or self.measured >= self.least) and (
            self.most is None or self.measured <= self.most
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a case found; `contests` by name, with what a reader must know of each."""

    claims: tuple[Claim, ...]
    contests: Mapping[str, tuple[Contest, str]]


def write(outcomes: Sequence[Outcome], *, folder: Path, provenance: Provenance) -> list[Path]:
    """Write all claims and the contests behind them as JSON and as Markdown; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contests = {
        name: document(
            contest,
            baseline=contest.standings[0].name,
            notes=[note] if note else [],
            provenance=provenance,
        )
        for outcome in outcomes
        for name, (contest, note) in outcome.contests.items()
    }
    claims = [claim for outcome in outcomes for claim in outcome.claims]
    told = {
        "provenance": asdict(provenance),
        "claims": [asdict(claim) | {"held": claim.held} for claim in claims],
        "contests": contests,
    }
    paths = [folder / "suite.json", folder / "suite.md"]
    paths[0].write_text(json.dumps(told, indent=1))
    parts = [heading(asdict(provenance)), claim_table(claims)]
    parts += [f"## {name}\n\n{table(contest, headed=False)}" for name, contest in contests.items()]
    paths[1].write_text("\n".join(parts))
    return paths


def claim_table(claims: Sequence[Claim]) -> str:
    """Return the claims as Markdown, a line each."""
    lines = ["| case | what | wanted | measured | held |", "| --- | --- | ---: | ---: | --- |"]
    lines += [
        f"| {claim.case} | {claim.says} | {_wanted(claim)} | {claim.measured:.3g} |"
        f" {'yes' if claim.held else '**no**'} |"
        for claim in claims
    ]
    return "\n".join(lines) + "\n"


def _wanted(claim: Claim) -> str:
    bounds = (("at least", claim.least), ("at most", claim.most))
    return ", ".join(f"{word} {bound:.3g}" for word, bound in bounds if bound is not None)
