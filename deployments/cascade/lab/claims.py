"""Promises of speed, each with what was measured of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.errors import InvalidMeasurement
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


def write(name: str, outcome: Outcome, *, folder: Path, provenance: Provenance) -> list[Path]:
    """Write what a case found as JSON and as Markdown; return the paths.

    What other cases found before stays, each with where and when it was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "suite.json", folder / "suite.md"]
    known: Json = read(paths[0])["cases"] if paths[0].exists() else {}
    told = {"cases": known | {name: _told(outcome, provenance)}}
    paths[0].write_text(json.dumps(told, indent=1))
    paths[1].write_text(report(told))
    return paths


def read(path: Path) -> Json:
    """Return what `write` wrote.

    Raises:
        InvalidMeasurement: The file is no such thing.
    """
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidMeasurement(f"{path} cannot be read: {error}") from error
    if not isinstance(told, dict) or "cases" not in told:
        raise InvalidMeasurement(
            f"{path} is no report of `cascade bench suite`; choose another --out, or remove it"
        )
    return told  # pyright: ignore[reportUnknownVariableType] - JSON


def report(told: Json) -> str:
    """Return all that a suite found as Markdown: its claims, and the contests behind them."""
    parts = [summary(told)]
    for name, case in told["cases"].items():
        parts += [f"## {name}", heading(case["provenance"])]
        parts += [
            f"### {contest}\n\n{table(found, headed=False)}"
            for contest, found in case["contests"].items()
        ]
    return "\n".join(parts)


def summary(told: Json) -> str:
    """Return the claims of all cases as Markdown, a line each."""
    rows = [
        (_claim(one), _when(case["provenance"]))
        for case in told["cases"].values()
        for one in case["claims"]
    ]
    return claim_table([claim for claim, _ in rows], [when for _, when in rows])


def promised(told: Json) -> str:
    """Return the claims of all cases as Markdown, and how each case was measured."""
    if not told["cases"]:
        return ""
    parts = [f"**{name}**: {heading(case['provenance'])}" for name, case in told["cases"].items()]
    return "\n".join([summary(told), *parts])


def claim_table(claims: Sequence[Claim], measured_at: Sequence[str] = ()) -> str:
    """Return claims as Markdown, a line each; `measured_at` says at which commit and when."""
    lines = ["| case | what | wanted | measured | held |", "| --- | --- | ---: | ---: | --- |"]
    lines += [
        f"| {claim.case} | {claim.says} | {_wanted(claim)} | {claim.measured:.3g} |"
        f" {'yes' if claim.held else '**no**'} |"
        for claim in claims
    ]
    if measured_at:
        more = [" commit, UTC |", " --- |", *(f" {where} |" for where in measured_at)]
        lines = [line + end for line, end in zip(lines, more, strict=True)]
    return "\n".join(lines) + "\n"


def _told(outcome: Outcome, provenance: Provenance) -> Json:
    return {
        "provenance": asdict(provenance),
        "claims": [asdict(claim) | {"held": claim.held} for claim in outcome.claims],
        "contests": {
            name: document(
                contest,
                baseline=contest.standings[0].name,
                notes=[note] if note else [],
                provenance=provenance,
            )
            for name, (contest, note) in outcome.contests.items()
        },
    }


def _when(provenance: Json) -> str:
    return f"{provenance['commit'] or 'unknown'}, {provenance['at'][:16]}"


def _claim(told: Json) -> Claim:
    return Claim(**{name: value for name, value in told.items() if name != "held"})


def _wanted(claim: Claim) -> str:
    bounds = (("at least", claim.least), ("at most", claim.most))
    return ", ".join(f"{word} {bound:.3g}" for word, bound in bounds if bound is not None)
