"""Chooses the setting that meets a target, says how sure that is, and writes it as YAML defaults.

A target is `METRIC >= BOUND` or `METRIC <= BOUND`:

| metric | unit |
|---|---|
| `quality`, `valid`, `fields`, `tool` | points, 0 to 100 |
| `rejections`, `deferrals` | rates, in % |
| `expert_passes`, `drafter_passes`, `tokens`, `bytes` | per answer |
| `latency` | modelled; the expert alone is 1 |

and a bound a number (`85`), a baseline's value (`expert`, `drafter`, `lossless`), one with units
added or subtracted (`expert - 0.5`), or a share of one (`60% of lossless`; `60%` alone is of the
expert). So "at least the expert's quality minus 0.5 points" is `quality >= expert - 0.5`, and
"at most 60 % of its expert passes" is `expert_passes <= 60%`.

How sure: the share of bootstrap resamples of the items in which every target is met.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from cascade.errors import InvalidMeasurement, wanted
from cascade.evaluation.compare import MARGIN, MIN_ITEMS, count_items, few_items
from cascade.evaluation.grid import DRAFTER, EXPERT, LOSSLESS
from cascade.evaluation.results import Estimate, estimate
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from cascade.evaluation.grid import Setting
    from cascade.evaluation.results import Cell, GroupMetrics, Results

    Floats = NDArray[np.float64]

METRICS = {
    "quality": ("quality", 1.0),
    "valid": ("valid", 1.0),
    "fields": ("fields", 1.0),
    "tool": ("tool", 1.0),
    "rejections": ("rejection_rate", 100.0),
    "deferrals": ("deferral_rate", 100.0),
    "expert_passes": ("expert_passes", 1.0),
    "drafter_passes": ("drafter_passes", 1.0),
    "tokens": ("tokens", 1.0),
    "bytes": ("bytes", 1.0),
    "latency": ("latency", 1.0),
}
"""A target's metrics: the name in `results` and the factor to a target's unit."""

BASELINES = {"expert": EXPERT, "drafter": DRAFTER, "lossless": LOSSLESS}

_TARGET = re.compile(
    r"(?P<metric>\w+)\s*(?P<sign>[<>]=)\s*"
    r"(?:(?P<share>\d+(?:\.\d+)?)\s*%(?:\s*of\s+(?:the\s+)?(?P<of>\w+))?"
    r"|(?P<baseline>[a-z]+)(?:\s*(?P<change>[+-]\s*\d+(?:\.\d+)?))?"
    r"|(?P<number>-?\d+(?:\.\d+)?))"
)


class Goal(StrEnum):
    """What is optimized among the settings that meet the targets."""

    QUALITY = "quality"  # highest
    REJECTIONS = "rejections"  # lowest, as all others
    EXPERT_PASSES = "expert_passes"
    LATENCY = "latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A metric and its bound: share * baseline + change, or `change` alone."""

    text: str
    metric: str
    at_least: bool
    baseline: str | None = None
    share: float = 1.0
    change: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """How far a setting is inside a target, in the metric's unit; below zero it misses."""

    target: Target
    value: Estimate  # of the metric
    inside: Estimate

    def __str__(self) -> str:
        by, side = self.inside, "inside"
        if by.value < 0:
            by, side = Estimate(value=-by.value, low=-by.high, high=-by.low), "short"
        return f"{self.target.text}: {self.value}, {side} by {by}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A setting, and how surely it meets all targets together."""

    cell: Cell
    group: str
    items: int
    margins: tuple[Margin, ...]
    probability: float
    goal: Goal
    reached: Estimate  # of the goal's metric

    @property
    def setting(self) -> Setting:
        """Return the setting."""
        return self.cell.setting

    @property
    def is_inside(self) -> bool:
        """Return whether all targets are met as measured."""
        return all(one.inside.value >= 0 for one in self.margins)

    @property
    def warnings(self) -> list[str]:
        """Return what makes the choice unsure: few items, or a wide interval of the quality."""
        if self.items < MIN_ITEMS:
            return [few_items(self.items)]
        return [
            f"Warning: `{one.target.text}` may be missed by {-one.inside.low:.1f} points, more than"
            f" the margin of {MARGIN:g}; evaluate more than {count_items(self.items)}."
            for one in self.margins
            if one.target.metric == "quality" and one.inside.low < -MARGIN
        ]


def parse(text: str) -> Target:
    """Return the target that a text describes.

    Raises:
        InvalidMeasurement: It describes none.
    """
    match = _TARGET.fullmatch(text.strip().lower())
    if match is None:
        raise InvalidMeasurement(
            f"`{text}` is not a target; wanted one like `quality >= expert - 0.5`,"
            " `expert_passes <= 60%` or `rejections <= 60% of lossless`"
        )
    baseline = match["of"] or match["baseline"] or ("expert" if match["share"] else None)
    named = [("metric", match["metric"], METRICS)]
    named += [] if baseline is None else [("baseline", baseline, BASELINES)]
    for kind, name, known in named:
        if name not in known:
            raise InvalidMeasurement(f"`{text}` has no {kind} `{name}`; {wanted(name, known)}")
    return Target(
        text=text,
        metric=match["metric"],
        at_least=match["sign"] == ">=",
        baseline=baseline,
        share=float(match["share"] or 100) / 100,
        change=float(re.sub(r"\s", "", match["number"] or match["change"] or "0")),
    )


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
        temperature: Of sampling; the results' only one if absent.
        goal: What to optimize: rejections if a target bounds quality, otherwise quality.
        confidence: The least probability that a setting meets the targets. A setting must also meet
            them as measured.

    Raises:
        InvalidMeasurement: No setting meets the targets (the message names the nearest), or the
            results lack the group or temperature.
    """
    choices = judged(results, targets, group=group, temperature=temperature, goal=goal)
    return chosen(choices, confidence=confidence)


def judged(
    results: Results,
    targets: Sequence[Target],
    *,
    group: str,
    temperature: float | None = None,
    goal: Goal | None = None,
) -> list[Choice]:
    """Return every setting but the expert alone, by how surely it meets the targets.

    Args:
        results: Of an evaluation.
        targets: All must be met.
        group: A family, or `all`.
        temperature: Of sampling; the results' only one if absent.
        goal: What to optimize: rejections if a target bounds quality, otherwise quality.

    Raises:
        InvalidMeasurement: The results lack the group or temperature.
    """
    if group not in results.groups:
        raise InvalidMeasurement(
            f"the results have no family `{group}`; {wanted(group, results.groups)}"
        )
    temperature = _temperature(results, temperature)
    if goal is None:
        bounds_quality = any(target.metric == "quality" for target in targets)
        goal = Goal.REJECTIONS if bounds_quality else Goal.QUALITY
    return [
        _choice(results, cell, targets, group=group, goal=goal)
        for cell in results.cells
        if cell.setting.temperature == temperature and cell.setting.mode is not Mode.EXPERT_ONLY
    ]


def chosen(choices: Sequence[Choice], *, confidence: float) -> Choice:
    """Return the best of the choices that meet every target.

    Args:
        choices: What `judged` returned.
        confidence: The least probability that the targets are met.

    Raises:
        InvalidMeasurement: None does; the message names the nearest.
    """
    meeting = [one for one in choices if one.probability >= confidence and one.is_inside]
    if not meeting:
        raise InvalidMeasurement(_describe_nearest(choices, confidence))
    sign = -1 if meeting[0].goal is Goal.QUALITY else 1
    return min(meeting, key=lambda c: (sign * c.reached.value, -c.probability))


def _temperature(results: Results, wanted: float | None) -> float:
    measured = ", ".join(f"{known:g}" for known in results.temperatures)
    if wanted is None:
        if len(results.temperatures) > 1:
            raise InvalidMeasurement(
                f"the results have temperatures {measured}; name the one you serve with"
                " --temperature"
            )
        wanted = min(results.temperatures)
    if wanted not in results.temperatures:
        raise InvalidMeasurement(
            f"the results have no temperature {wanted:g}; wanted one of {measured}"
        )
    return wanted


def _choice(
    results: Results, cell: Cell, targets: Iterable[Target], *, group: str, goal: Goal
) -> Choice:
    metrics = results.metrics[group]
    margins: list[Margin] = []
    is_met_R = np.ones(len(results.resamples) - 1, dtype=bool)
    for target in targets:
        value_R = _scaled(metrics, cell, target.metric)
        bound_R: Floats | float = target.change
        if target.baseline is not None:
            baseline = results.find(
                BASELINES[target.baseline],
                temperature=cell.setting.temperature,
                draft_tokens=cell.setting.draft_tokens or results.lengths[0],
            )
            bound_R = target.share * _scaled(metrics, baseline, target.metric) + target.change
        inside_R = value_R - bound_R if target.at_least else bound_R - value_R
        is_met_R &= inside_R[1:] >= 0
        margins.append(Margin(target=target, value=estimate(value_R), inside=estimate(inside_R)))
    return Choice(
        cell=cell,
        group=group,
        items=metrics.items,
        margins=tuple(margins),
        probability=float(is_met_R.mean()),
        goal=goal,
        reached=estimate(_scaled(metrics, cell, goal.value)),
    )


def _scaled(metrics: GroupMetrics, cell: Cell, metric: str) -> Floats:
    """Return a metric in a target's unit; a rate whose divisor is zero counts as zero."""
    name, scale = METRICS[metric]
    return scale * np.nan_to_num(metrics.resampled(cell, name))


def nearest(choices: Sequence[Choice]) -> Choice:
    """Return the choice that is nearest to meeting every target."""

    def worst_margin(choice: Choice) -> float:
        """Return the margin furthest outside, as a share of the metric's value."""
        return min(m.inside.value / max(abs(m.value.value), 1e-9) for m in choice.margins)

    return max(choices, key=lambda choice: (choice.probability, worst_margin(choice)))


def _describe_nearest(choices: Sequence[Choice], confidence: float) -> str:
    best = nearest(choices)
    margins = "; ".join(map(str, best.margins))
    return (
        f"no setting meets the targets on {best.group} with probability {confidence:g} or more; the"
        f" nearest is {best.setting.name} with {best.probability:.2f} ({margins})."
        " Loosen a target, or evaluate more settings"
    )


def defaults(setting: Setting) -> dict[str, Any]:
    """Return the setting as `args.defaults` of a `cluster/*.yaml`."""
    is_sequence = setting.mode is Mode.SEQUENCE_CASCADE
    values = {
        "mode": setting.mode.value,
        "rule": setting.rule,
        "confidence": "mean" if is_sequence else None,
        "confidence_threshold": setting.dial if is_sequence else None,
        "draft_tokens": setting.draft_tokens,
        "bonus": setting.bonus and str(setting.bonus),
        "temperature": setting.temperature,
    }
    return {name: value for name, value in values.items() if value is not None}


def yaml_fragment(choice: Choice, results: Results) -> str:
    """Return YAML for `args:` of an application, with comments that say how sure it is."""
    phases = choice.setting.options().get("phases")
    found = f"{choice.setting.name}: {choice.goal.value} {choice.reached}"
    items = f"{count_items(choice.items)} of {choice.group} in {results.about['workload']}"
    comments = [
        f"{found} on {items}; intervals of 95 %",
        *map(str, choice.margins),
        f"all met with probability {choice.probability:.2f}",
        *choice.warnings,
        *([f"send `cascade.phases` with each request: {json.dumps(phases)}"] if phases else []),
    ]
    body = yaml.safe_dump(
        {"defaults": defaults(choice.setting)}, sort_keys=False, default_flow_style=None
    )
    return "".join(f"# {comment}\n" for comment in comments) + body
