"""The page of `cascade tune`: what was chosen, among what, and how sure that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.errors import InvalidMeasurement
from cascade.evaluation import plots
from cascade.evaluation.compare import View, count_items
from cascade.evaluation.environment import provenance
from cascade.evaluation.page import Finding, Page, Section, Table, provenance_table
from cascade.evaluation.tune import Choice, chosen, nearest, yaml_fragment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.evaluation.page import Figure
    from cascade.evaluation.results import Results


def page(results: Results, choices: Sequence[Choice], *, confidence: float) -> Page:
    """Return the page, which also says so if no setting meets the targets.

    Args:
        results: Of an evaluation.
        choices: What `judged` returned.
        confidence: The least probability that the targets are met.
    """
    try:
        choice = chosen(choices, confidence=confidence)
    except InvalidMeasurement:
        choice, missed = nearest(choices), True
    else:
        missed = False
    where = (
        f"{count_items(choice.items)} of {choice.group}, temperature {choice.setting.temperature:g}"
    )
    targets = " and ".join(one.target.text for one in choice.margins)
    likely = f"probability {choice.probability:.2f}"
    if missed:
        headline = f"No setting meets {targets}; the nearest is {choice.setting.name}, {likely}."
    else:
        headline = f"Use {choice.setting.name}: {targets} met with {likely}, {where}."
    code = "" if missed else yaml_fragment(choice, results)
    applied = (Section(title="Under args: of the application", code=code),) if code else ()
    return Page(
        title=f"Choice for {results.about['workload']}",
        findings=(
            Finding(
                headline=headline,
                detail=f"{choice.goal.value} {choice.reached} on {where}. "
                + " ".join(f"{one}." for one in choice.margins),
                warning=" ".join(choice.warnings),
            ),
        ),
        sections=(
            Section(title="The curve", figures=_panels(results, choice)),
            *applied,
            Section(title="Settings", tables=(_table(choices, choice),)),
        ),
        provenance=provenance_table(
            {
                "command": provenance().command,
                "least probability": confidence,
                "evaluation": {**results.about.get("provenance", {}), **_about(results)},
            }
        ),
    )


def _about(results: Results) -> dict[str, object]:
    return {name: value for name, value in results.about.items() if name != "provenance"}


def _panels(results: Results, choice: Choice) -> tuple[Figure, ...]:
    view = View(
        results=results,
        group=choice.group,
        temperature=choice.setting.temperature,
        draft_tokens=choice.setting.draft_tokens or results.lengths[0],
    )
    return tuple(
        plots.panel(view, axis=axis, chosen=choice.cell) for axis in ("latency", "rejection_rate")
    )


def _table(choices: Sequence[Choice], choice: Choice) -> Table:
    """Return every setting: those that meet the targets most surely come first."""
    ordered = sorted(choices, key=lambda one: (-one.is_inside, -one.probability))
    targets = [one.target for one in choice.margins]
    several = len({one.setting.draft_tokens for one in choices} - {None}) > 1
    return Table(
        title=f"{choice.group}, temperature {choice.setting.temperature:g}",
        headings=(
            "setting",
            *(("draft",) if several else ()),
            "all met",
            "probability",
            *(text for target in targets for text in (target.metric, f"inside {target.text}")),
            choice.goal.value,
        ),
        rows=tuple(
            (
                one.setting.name,
                *((str(one.setting.draft_tokens or ""),) if several else ()),
                "yes" if one.is_inside else "no",
                f"{one.probability:.2f}",
                *(str(part) for margin in one.margins for part in (margin.value, margin.inside)),
                str(one.reached),
            )
            for one in ordered
        ),
        note="The probability is the share of resamples of the items in which all targets are met.",
        marked=frozenset({choice.setting.name}),
    )
