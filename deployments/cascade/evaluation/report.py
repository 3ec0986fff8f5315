"""Findings, Markdown tables and one HTML page of an evaluation's results."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Any

from cascade.evaluation import compare, plots
from cascade.evaluation.compare import MARGIN, View
from cascade.evaluation.grid import LOSSY, LOSSY_SOLVED
from cascade.evaluation.page import Figure, Finding, Page, Section, Table, provenance_table
from cascade.evaluation.records import OPTIONAL
from cascade.evaluation.results import ALL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cascade.evaluation.results import Estimate, Results

# Of each metric: heading, decimals, and whether tables show its interval.
_METRICS = {
    "quality": ("quality", 1, True),
    "valid": ("valid", 1, True),
    "fields": ("fields right", 1, False),
    "tool": ("tool right", 1, False),
    "rejection_rate": ("rejected", 3, True),
    "deferral_rate": ("deferred", 3, False),
    "tokens_per_expert_pass": ("tokens / expert pass", 2, False),
    "latency": ("latency, modelled", 2, True),
    "expert_passes": ("expert passes", 2, False),
    "drafter_passes": ("drafter passes", 2, False),
    "tokens": ("tokens", 2, False),
    "bytes": ("bytes", 0, False),
    "wall_s": ("s under load", 2, False),
}

_BRIEF = (
    "quality", "valid", "fields", "tool", "rejection_rate", "deferral_rate",
    "tokens_per_expert_pass", "latency", "bytes",
)  # fmt: skip

_BETTER_SHOWN = 3


def estimates(results: Results) -> list[dict[str, Any]]:
    """Return every metric of every setting in every group, with its interval, as JSON values."""
    found: list[dict[str, Any]] = []
    for group, cell in product(results.groups, results.cells):
        names = [
            name for name in (*_METRICS, "bleu") if name not in OPTIONAL or name in cell.columns
        ]
        entry: dict[str, Any] = {"setting": cell.setting.key, "group": group}
        for name in names:
            interval = asdict(results.metrics[group].estimate(cell, name))
            entry[name] = {
                part: round(value, 6) if math.isfinite(value) else None
                for part, value in interval.items()
            }
        if group in cell.corpus_bleu:
            entry["corpus_bleu"] = cell.corpus_bleu[group]
        found.append(entry)
    return found


def settings_table(
    results: Results,
    group: str,
    *,
    temperature: float,
    brief: bool = False,
    margin: float = MARGIN,
) -> Table:
    """Return what every setting scored and cost; the recommended ones are marked.

    Args:
        results: Of an evaluation.
        group: Of items.
        temperature: Of sampling.
        brief: Whether to leave out the less important metrics.
        margin: The equivalence margin, in points.
    """
    metrics = results.metrics[group]
    cells = [cell for cell in results.cells if cell.setting.temperature == temperature]
    names = [name for name in (_BRIEF if brief else _METRICS) if metrics.has(cells, name)]
    # Each column: its heading and a text for each cell.
    columns = [("setting", [cell.setting.name for cell in cells])]
    if len(results.lengths) > 1:
        columns.append(("draft", [str(cell.setting.draft_tokens or "") for cell in cells]))
    for name in names:
        shown = [_format(metrics.estimate(cell, name), name) for cell in cells]
        columns.append((_METRICS[name][0], shown))
    if any(group in cell.corpus_bleu for cell in cells):
        columns.append(("BLEU", [f"{cell.corpus_bleu[group]:.1f}" for cell in cells]))
    headings, texts = zip(*columns, strict=True)
    return Table(
        title=f"{group}, temperature {temperature:g}, {compare.count_items(metrics.items)}",
        headings=headings,
        rows=tuple(zip(*texts, strict=True)),
        marked=frozenset(
            compare.recommended(view).setting.name
            for of_groups in views(results, margin=margin)
            for view in of_groups
            if (view.group, view.temperature) == (group, temperature)
        ),
    )


def _format(estimate: Estimate, metric: str) -> str:
    if not math.isfinite(estimate.value):
        return ""
    _, decimals, with_interval = _METRICS[metric]
    if with_interval:
        return _with_interval(estimate, f".{decimals}f")
    return f"{estimate.value:.{decimals}f}"


def _with_interval(estimate: Estimate, spec: str = "+.1f") -> str:
    return f"{estimate.value:{spec}} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


def views(results: Results, *, margin: float = MARGIN) -> list[list[View]]:
    """Return the views of every group, for each temperature and draft length."""
    return [
        [
            View(
                results=results,
                group=group,
                temperature=temperature,
                draft_tokens=length,
                margin=margin,
            )
            for group in results.groups
        ]
        for temperature, length in product(results.temperatures, results.lengths)
    ]


def conclusions(results: Results, *, margin: float = MARGIN) -> list[Finding]:
    """Return a finding for each temperature and draft length: what to use, and why.

    Args:
        results: Of an evaluation.
        margin: The equivalence margin, in points.
    """
    return [_conclusion(of_groups[0]) for of_groups in views(results, margin=margin)]


def _conclusion(view: View) -> Finding:
    metrics, cell = view.metrics, compare.recommended(view)
    quality, latency = metrics.estimate(cell, "quality"), metrics.estimate(cell, "latency")
    expert = metrics.estimate(view.expert, "quality")
    passes = [float(metrics.resampled(one, "expert_passes")[0]) for one in (cell, view.expert)]
    share = f"{passes[0] / passes[1]:.2f} of the expert's passes"
    items, few = compare.count_items(metrics.items), metrics.items < compare.MIN_ITEMS
    points = f"{view.margin:g} point{'' if view.margin == 1 else 's'}"
    if cell not in (view.lossless, view.expert):
        difference = _with_interval(metrics.difference(cell, view.expert))
        found = f"same quality within {points}, {share}"
        why = f"Proven by the interval of the paired difference to the expert, {difference}."
    elif cell is view.lossless:
        found = f"the expert's own distribution, {share}"
        why = f"No faster setting is proven to be at most {points} below the expert."
    else:
        found = "nothing faster keeps its quality"
        why = (
            "Lossless speculation takes longer by the model of latency, and no other setting is"
            f" proven to be at most {points} below."
        )
    return Finding(
        headline=f"Use {cell.setting.name}: {found}, {items}.",
        detail=(
            f"Temperature {view.temperature:g}, {view.draft_tokens} drafted tokens a block:"
            f" quality {quality.value:.1f} points (the expert alone: {expert.value:.1f}),"
            f" {latency.value:.2f} of the expert's modelled latency. {why}"
        ),
        warning=compare.few_items(metrics.items) if few else "",
    )


def finding_tables(results: Results, *, margin: float = MARGIN) -> list[Table]:
    """Return the tables of the comparisons in `compare`, those with any rows.

    Args:
        results: Of an evaluation.
        margin: The equivalence margin, in points.
    """
    tables: list[Table] = []
    for of_groups in views(results, margin=margin):
        tables += [
            _matched_table(of_groups),
            _share_table(of_groups),
            *(_equal_table(of_groups, lossy) for lossy in (LOSSY, LOSSY_SOLVED)),
            _better_table(of_groups),
        ]
    return [table for table in tables if table.rows]


def _title(text: str, views: Sequence[View]) -> str:
    temperature, length = views[0].temperature, views[0].draft_tokens
    return f"{text}: temperature {temperature:g}, {length} drafted tokens a block"


def _matched_table(views: Sequence[View]) -> Table:
    found = [compare.matched(view) for view in views]
    families = [one for one in found if one.group != ALL or len(found) == 1]
    paying = sum(one.pays for one in families)
    margin = f"at most {views[0].margin:g} points below the expert"
    few = [one for one in found if one.items < compare.MIN_ITEMS]
    return Table(
        title=_title(f"Fewest rejections {margin}", views),
        note=(
            f"At most {compare.FEWER:g} of the rejections of lossless speculation on {paying} of"
            f" {len(families)} families. A setting counts if the 95 % interval of its paired"
            f" difference lies above -{views[0].margin:g}; with few items no setting does. The last"
            " two columns: a setting chosen by its measured quality on one half of the items,"
            " measured on the other."
        ) + "".join(f" {one.group}: {compare.few_items(one.items)}" for one in few),
        headings=("family", "items", "setting", "quality minus the expert's", "rejected",
                  "lossless rejects", "share", "share, other half", "difference, other half"),
        rows=tuple(_matched_row(one) for one in found),
    )  # fmt: skip


def _matched_row(one: compare.Matched) -> tuple[str, ...]:
    lossless = f"{one.lossless_rate.value:.3f}"
    if one.cell is None:
        return (one.group, str(one.items), "none proven", "", "", lossless, "", "", "")
    ratio, difference = one.halves or (math.nan, math.nan)
    return (
        one.group,
        str(one.items),
        one.cell.setting.name,
        _with_interval(one.difference),
        f"{one.rejection_rate.value:.3f}",
        lossless,
        _with_interval(one.ratio, ".2f") if math.isfinite(one.ratio.value) else "",
        f"{ratio:.2f}" if math.isfinite(ratio) else "",
        "" if math.isnan(difference) else f"{difference:+.1f}",
    )


def _share_table(views: Sequence[View]) -> Table:
    rows: list[tuple[str, ...]] = []
    for rule in compare.rules(views[0].results):
        found = [compare.matched(view, curve=rule) for view in views]
        rows.append((rule, *(_share(one) for one in found)))
    return Table(
        title=_title(
            f"Share of lossless rejections at most {views[0].margin:g} points below the expert",
            views,
        ),
        note="Where the share is 1 or more, or missing, the rule does not pay.",
        headings=("rule", *(view.group for view in views)),
        rows=tuple(rows),
    )


def _share(found: compare.Matched) -> str:
    """Return the share; nothing if no setting is proven, or if lossless rejects nothing."""
    known = found.cell is not None and math.isfinite(found.ratio.value)
    return f"{found.ratio.value:.2f}" if known else "-"


def _equal_table(views: Sequence[View], lossy: str) -> Table:
    rows: list[tuple[str, ...]] = []
    best: dict[str, float] = {}
    for rule in compare.rules(views[0].results):
        found = [compare.equal(view, curve=rule, lossy=lossy) for view in views]
        for one in found:
            if one and one.group != ALL:
                best[one.group] = max(best.get(one.group, -math.inf), one.difference.value)
        if any(found):
            rows.append((rule, *(_with_interval(one.difference) if one else "" for one in found)))
    no_lower = sum(value >= 0 for value in best.values())
    return Table(
        title=_title(f"Quality minus {lossy}'s at equal rejections", views),
        note=(
            f"The best rule scores no lower than {lossy} on {no_lower} of {len(best)} families:"
            " points, averaged over the rejection rates that both curves reach."
        ),
        headings=("rule", *(view.group for view in views)),
        rows=tuple(rows),
    )


def _better_table(views: Sequence[View]) -> Table:
    return Table(
        title=_title("Above the expert itself", views),
        note=(
            f"Settings whose 95 % interval is above zero, at most {_BETTER_SHOWN} a family; by"
            f" chance alone, one in forty of the {len(views[0].cascades())} settings would be."
        ),
        headings=("family", "setting", "quality minus the expert's", "rejected"),
        rows=tuple(
            (view.group, cell.setting.name, _with_interval(difference),
             f"{view.metrics.estimate(cell, 'rejection_rate').value:.3f}")
            for view in views
            for cell, difference in compare.better(view)[:_BETTER_SHOWN]
        ),
    )  # fmt: skip


_CURVES = """A curve joins the settings of one rule; bars are 95 % bootstrap intervals over items.
The expert rejects all drafts by definition, so its quality is a line where the axis is rejections.
Latency is modelled: the passes of each model times the cost of a pass on this machine, one request
at a time, relative to the expert alone."""

_SETTINGS = """Quality in points with its 95 % interval. Rejected: the share of judged drafted
tokens that the expert rejected; for a token cascade the tokens it deferred, for a sequence cascade
the drafts it discarded. Deferred: the share of judged positions that the rule gave to the expert.
Passes, tokens and bytes between the tiers are means per answer. Seconds are measured while other
requests were running: compare them only within this run."""


def write(results: Results, folder: Path, *, margin: float = MARGIN) -> list[Path]:
    """Write `tables.md` and `report.html`; return both.

    Args:
        results: Of an evaluation.
        folder: Where to.
        margin: The equivalence margin, in points.
    """
    found = conclusions(results, margin=margin)
    comparisons = finding_tables(results, margin=margin)
    settings = [
        settings_table(results, group, temperature=temperature, margin=margin)
        for group, temperature in product(results.groups, results.temperatures)
    ]
    tables, page = folder / "tables.md", folder / "report.html"
    parts = (*map(str, found), *(table.markdown() for table in (*comparisons, *settings)))
    tables.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    together, *families = zip(*views(results, margin=margin), strict=True)
    about = {name: value for name, value in results.about.items() if name != "provenance"}
    written = Page(
        title=f"Evaluation of {results.about['workload']}",
        findings=tuple(found),
        sections=(
            Section(title="The curve", text=_CURVES, figures=_panels(together)),
            *(
                Section(title=f"The curve of {one[0].group}", figures=_panels(one))
                for one in families
            ),
            Section(title="Findings", tables=tuple(comparisons)),
            Section(title="Settings", text=_SETTINGS, tables=tuple(settings)),
        ),
        provenance=provenance_table(results.about.get("provenance", {}) | about),
    )
    page.write_text(written.html(), encoding="utf-8")
    return [tables, page]


def _panels(views: Sequence[View]) -> tuple[Figure, ...]:
    """Return the curves of a group over both axes, with what is recommended circled."""
    return tuple(
        plots.panel(view, axis=axis, chosen=compare.recommended(view))
        for view in views
        for axis in ("latency", "rejection_rate")
    )
