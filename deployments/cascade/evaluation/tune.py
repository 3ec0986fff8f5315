"""The setting that meets a target, how sure that is, and the YAML that makes it the default.

A target is `METRIC >= BOUND` or `METRIC <= BOUND`:

| metric | unit |
|---|---|
| `quality` | points, 0 to 100 |
| `rejections`, `deferrals` | rates, in % |
| `expert_passes`, `drafter_passes`, `tokens`, `bytes` | per answer |
| `latency` | modelled; the expert alone is 1 |

and a bound a number (`85`), a baseline's value (`expert`, `drafter`, `lossless`), one with units
added or taken off (`expert - 0.5`), or a share of one (`60% of lossless`; `60%` alone is of the
expert). So "at least the expert's quality less 0.5 points" is `quality >= expert - 0.5`, and
"at most 60 % of its expert passes" is `expert_passes <= 60%`.

How sure: the share of the bootstrap's resamples of the items in which every target is met.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from cascade.errors import InvalidMeasurement
from cascade.evaluation.grid import DRAFTER, EXPERT, LOSSLESS
from cascade.evaluation.results import Figure, figure
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cascade.evaluation.grid import Setting
    from cascade.evaluation.results import Cell, Draws, Results

    Floats = NDArray[np.float64]

METRICS = {
    "quality": ("quality", 1.0),
    "rejections": ("rejection_rate", 100.0),
    "deferrals": ("deferral_rate", 100.0),
    "expert_passes": ("expert_passes", 1.0),
    "drafter_passes": ("drafter_passes", 1.0),
    "tokens": ("tokens", 1.0),
    "bytes": ("bytes", 1.0),
    "latency": ("latency", 1.0),
}

"""A target's metrics: the name in `results` and what it is multiplied with."""

_USUAL_BASELINE = "expert"

BASELINES = {"expert": EXPERT, "drafter": DRAFTER, "lossless": LOSSLESS}

_TARGET = re.compile(
    r"(?P<metric>\w+)\s*(?P<sign>[<>]=)\s*"
    r"(?:(?P<share>\d+(?:\.\d+)?)\s*%(?:\s*of\s+(?:the\s+)?(?P<of>\w+))?"
    r"|(?P<baseline>[a-z]+)(?:\s*(?P<way>[+-])\s*(?P<change>\d+(?:\.\d+)?))?"
    r"|(?P<number>-?\d+(?:\.\d+)?))"
)


class Goal(StrEnum):
    """What is made best among the settings that meet the targets."""

    QUALITY = "quality"  # highest
    REJECTIONS = "rejections"  # lowest, as all others
    EXPERT_PASSES = "expert_passes"
    LATENCY = "latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A metric and where it must be: bound = share * baseline + change, or `change` alone."""

    told: str
    metric: str
    at_least: bool
    baseline: str | None = None
    share: float = 1.0
    change: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """How far inside a target a setting is, in the metric's units; below zero it misses."""

    target: Target
    value: Figure  # of the metric
    inside: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A setting, and how surely it meets all targets together."""

    setting: Setting
    group: str
    margins: tuple[Margin, ...]
    probability: float
    goal: Goal
    reached: Figure  # of the goal's metric


def parse(told: str) -> Target:
    """Return the target that a text says.

    Raises:
        InvalidMeasurement: It says none.
    """
    found = _TARGET.fullmatch(told.strip().lower())
    if found is None:
        raise InvalidMeasurement(
            f"`{told}` is no target; wanted one like `quality >= expert - 0.5`,"
            " `expert_passes <= 60%` or `rejections <= 60% of lossless`"
        )
    metric = _known(found["metric"], METRICS, "metric", told)
    sign = {"+": 1.0, "-": -1.0, None: 0.0}[found["way"]]
    named = found["of"] or found["baseline"] or (_USUAL_BASELINE if found["share"] else None)
    return Target(
        told=told,
        metric=metric,
        at_least=found["sign"] == ">=",
        baseline=None if named is None else _known(named, BASELINES, "baseline", told),
        share=float(found["share"] or 100) / 100,
        change=float(found["number"] or sign * float(found["change"] or 0)),
    )


def _known(name: str, known: Any, what: str, told: str) -> str:
    if name not in known:
        raise InvalidMeasurement(
            f"`{told}` has no {what} `{name}`; wanted one of {', '.join(known)}"
        )
    return name


def tune(  # noqa: PLR0913 - a question and where to look for its answer
    results: Results,
    targets: Sequence[Target],
    *,
    group: str,
    temperature: float | None = None,
    goal: Goal | None = None,
    confidence: float = 0.5,
) -> Choice:
    """Return the best setting among those that meet every target.

    Args:
        results: Of an evaluation.
        targets: All must be met.
        group: A family, or `all`.
        temperature: At which answers are to be sampled; the results' only one if absent.
        goal: What to make best: rejections, unless a target bounds costs, then quality.
        confidence: The least probability that a setting meets the targets. A setting must also meet
            them as measured.

    Raises:
        InvalidMeasurement: No setting does; the nearest is told.
    """
    _check(results, group, temperature)
    wanted = results.temperatures[0] if temperature is None else temperature
    aim = goal or _goal(targets)
    cells = [
        cell
        for cell in results.cells
        if cell.setting.temperature == wanted and cell.setting.mode is not Mode.EXPERT_ONLY
    ]
    choices = [_choice(results, cell, targets, group=group, goal=aim) for cell in cells]
    meeting = [
        choice
        for choice in choices
        if choice.probability >= confidence and all(m.inside.value >= 0 for m in choice.margins)
    ]
    if not meeting:
        raise InvalidMeasurement(_missed(choices, group, confidence))
    sign = -1 if aim is Goal.QUALITY else 1
    return min(meeting, key=lambda c: (sign * c.reached.value, -c.probability))


def _check(results: Results, group: str, temperature: float | None) -> None:
    if group not in results.groups:
        raise InvalidMeasurement(
            f"the results have no family `{group}`; wanted one of {', '.join(results.groups)}"
        )
    measured = ", ".join(f"{known:g}" for known in results.temperatures)
    if temperature is None and len(results.temperatures) > 1:
        raise InvalidMeasurement(
            f"the results have temperatures {measured}; name the one you serve with --temperature"
        )
    if temperature is not None and temperature not in results.temperatures:
        raise InvalidMeasurement(
            f"the results have no temperature {temperature:g}; wanted one of {measured}"
        )


def _goal(targets: Sequence[Target]) -> Goal:
    bounds_quality = any(target.metric == "quality" for target in targets)
    return Goal.REJECTIONS if bounds_quality else Goal.QUALITY


def _choice(
    results: Results, cell: Cell, targets: Sequence[Target], *, group: str, goal: Goal
) -> Choice:
    draws = results.draws[group]
    inside = [_inside(results, draws, cell, target) for target in targets]
    met_R = np.all([margin_R[1:] >= 0 for margin_R in inside], axis=0)
    return Choice(
        setting=cell.setting,
        group=group,
        margins=tuple(
            Margin(
                target=target,
                value=figure(_scaled(draws, cell, target.metric)),
                inside=figure(margin_R),
            )
            for target, margin_R in zip(targets, inside, strict=True)
        ),
        probability=float(met_R.mean()),
        goal=goal,
        reached=figure(_scaled(draws, cell, goal.value)),
    )


def _inside(results: Results, draws: Draws, cell: Cell, target: Target) -> Floats:
    """Return how far inside a target a setting is, over resamples; below zero it misses."""
    value_R = _scaled(draws, cell, target.metric)
    bound_R: Floats | float = target.change
    if target.baseline is not None:
        reference = _baseline(results, cell.setting, BASELINES[target.baseline])
        bound_R = target.share * _scaled(draws, reference, target.metric) + target.change
    return value_R - bound_R if target.at_least else bound_R - value_R


def _baseline(results: Results, setting: Setting, curve: str) -> Cell:
    if curve == LOSSLESS:
        return results.lossless(setting)
    return results.find(curve, temperature=setting.temperature)


def _scaled(draws: Draws, cell: Cell, metric: str) -> Floats:
    """Return a metric in a target's units; a rate with nothing to divide by is nought."""
    name, scale = METRICS[metric]
    return scale * np.nan_to_num(draws.metric(cell, name))


def _missed(choices: Sequence[Choice], group: str, confidence: float) -> str:
    nearest = max(choices, key=lambda c: (c.probability, _worst(c)))
    told = "; ".join(
        f"{m.target.told}: {m.value.value:.3g}, "
        + (f"inside by {m.inside.value:.3g}" if m.inside.value >= 0
           else f"short by {-m.inside.value:.3g}")
        for m in nearest.margins
    )  # fmt: skip
    return (
        f"no setting meets the targets on {group} with probability {confidence:g} or more; the"
        f" nearest is {nearest.setting.name} with {nearest.probability:.2f} ({told})."
        " Loosen a target, or evaluate more settings"
    )


def _worst(choice: Choice) -> float:
    """Return the margin furthest outside, as a share of the metric's value."""
    return min(m.inside.value / max(abs(m.value.value), 1e-9) for m in choice.margins)


def defaults(setting: Setting) -> dict[str, Any]:
    """Return the setting as `args.defaults` of a `cluster/*.yaml`."""
    told: dict[str, Any] = {"mode": setting.mode.value}
    if setting.rule is not None:
        told["rule"] = setting.rule
    if setting.mode is Mode.SEQUENCE_CASCADE:
        told |= {"confidence": "mean", "confidence_threshold": setting.dial}
    if setting.draft_tokens is not None:
        told["draft_tokens"] = setting.draft_tokens
    if setting.bonus is not None:
        told["bonus"] = setting.bonus.value
    return told | {"temperature": setting.temperature}


def fragment(choice: Choice, results: Results) -> str:
    """Return YAML that goes under `args:` of an application, its comments saying how sure it is."""
    count = sum(choice.group in ("all", family) for family in results.families)
    name, workload = choice.setting.name, results.about["workload"]
    where = f"{count} items of {choice.group} in {workload}"
    told = [f"{name}: {choice.goal.value} {choice.reached} on {where}; intervals of 95 %"]
    for margin in choice.margins:
        side = "inside" if margin.inside.value >= 0 else "short"
        told.append(f"{margin.target.told}: {margin.value}, {side} by {margin.inside}")
    told.append(f"all met with probability {choice.probability:.2f}")
    comments = "".join(f"# {line}\n" for line in told)
    body = yaml.safe_dump(
        {"defaults": defaults(choice.setting)}, sort_keys=False, default_flow_style=None
    )
    return comments + body
