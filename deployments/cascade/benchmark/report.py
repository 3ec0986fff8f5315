"""Writes comparisons and suites down: JSON for machines, Markdown and an HTML page for people."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.benchmark.systems import Role
from cascade.errors import InvalidMeasurement
from cascade.evaluation import page
from cascade.evaluation.page import Finding, Page, Section, Table, provenance_table
from cascade.evaluation.scoring import import_extra

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from cascade.benchmark.runner import Comparison
    from cascade.benchmark.suite import CaseResult
    from cascade.evaluation.environment import Provenance

Json: TypeAlias = dict[str, Any]


# The columns of a table, and how each is written from a system's part of a document.
_COLUMNS = {
    "system": "{name}",
    "tokens/s": "{median[tokens_per_s]:.1f}",
    "ratio": "{ratio[median]:.2f} ({ratio[least]:.2f} to {ratio[most]:.2f})",
    "to llama.cpp": "{to_llama[median]:.2f} ({to_llama[least]:.2f} to {to_llama[most]:.2f})",
    "TTFT ms": "{median[ttft][p50_ms]:.0f}",
    "TPOT ms": "{median[tpot][p50_ms]:.1f}",
    "p50 / p95 / p99 ms": "{latency[p50_ms]:.0f} / {latency[p95_ms]:.0f} / {latency[p99_ms]:.0f}",
    "tokens/pass": "{median[tokens_per_expert_pass]:.2f}",
    "drafted": "{median[drafted_per_round]:.2f}",
    "accepted": "{median[acceptance]:.2f}",
    "bytes/token": "{median[bytes_per_token]:.0f}",
    "busy": "{busy}",
    "hidden": "{median[hidden]:.2f}",
    "goodput/s": "{median[goodput_per_s]:.2f}",
    "other text": "{num_other_texts} of {median[requests]}",
}


def document(
    comparison: Comparison, *, notes: Sequence[str], provenance: Provenance, **more: Any
) -> Json:
    """Return a comparison as JSON values.

    Ratios are over the fastest system that runs the expert alone, and over llama.cpp with the
    drafter where it was asked.

    Args:
        comparison: What was measured.
        notes: What a reader must know, such as that a model is synthetic.
        provenance: Where it was measured.
        more: Further entries, such as how requests came.
    """
    first, baseline = next(iter(comparison.systems)), comparison.baseline
    drafted = comparison.fastest(Role.LLAMA_DRAFTED)
    return {
        "provenance": asdict(provenance),
        "notes": [*notes, *comparison.notes],
        "baseline": baseline,
        "llama_drafted": drafted,
        "texts_of": first,
        **more,
        "contenders": [
            {
                "name": name,
                "role": system.role,
                "median": asdict(system.median),
                "ratio": asdict(comparison.ratio(name, baseline)),
                "to_llama": asdict(comparison.ratio(name, drafted)) if drafted else None,
                "other_texts": comparison.differences(name, first),
                "rounds": [asdict(metrics) for metrics in system.rounds],
            }
            for name, system in comparison.systems.items()
        ],
    }


def table(document: Json, *, with_heading: bool = True) -> str:
    """Return a document as Markdown: its notes, where it was measured, and one line per system."""
    columns = _columns(document)
    lines = [
        *(f"> {note}" for note in document["notes"]),
        *(("", heading(document["provenance"])) if with_heading else ()),
        "",
        _how_counted(document),
        "",
        *_markdown(columns, _rows(document), right=columns[1:]),
    ]
    return "\n".join(lines).strip() + "\n"


def _columns(document: Json) -> list[str]:
    return [name for name in _COLUMNS if document.get("llama_drafted") or name != "to llama.cpp"]


def _rows(document: Json) -> list[list[str]]:
    return [_cells(system, _columns(document)) for system in document["contenders"]]


def _how_counted(document: Json) -> str:
    rounds = len(document["contenders"][0]["rounds"])
    drafted = document.get("llama_drafted")
    to_llama = f'; "to llama.cpp" over "{drafted}"' if drafted else ""
    return (
        f"Medians of {rounds} interleaved rounds; ratios are of tokens/s, paired by round, over\n"
        f'"{document["baseline"]}"{to_llama}.'
    )


def _cells(system: Json, columns: Iterable[str]) -> list[str]:
    median = system["median"]
    busy = ", ".join(f"{tier} {share:.2f}" for tier, share in median["busy"].items()) or "-"
    differing = len(system["other_texts"])
    values = {**system, "latency": median["latency"], "busy": busy, "num_other_texts": differing}
    cells: list[str] = []
    for column in columns:
        try:
            cells.append(_COLUMNS[column].format(**values))
        except TypeError:  # a metric without a value, which is None, has no digits
            cells.append("-")
    return cells


def heading(provenance: Json) -> str:
    """Return command, machine, commit and versions as Markdown."""
    machine = f"{provenance['cores']} cores of {provenance['cpu']}, {provenance['memory_gib']} GiB"
    gpus = "".join(f", {name}" for name in provenance["gpus"])
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return (
        f"`{provenance['command']}`\n\n{machine}{gpus}; commit {provenance['commit'] or 'unknown'};"
        f" {provenance['at']}; load before it {provenance['load']}; {versions}.\n"
    )


def conclusion(document: Json) -> Finding:
    """Return which system is fastest, against which, and whether it writes the same text."""
    systems = {one["name"]: one for one in document["contenders"]}
    baseline = systems[document["baseline"]]
    best = max(systems.values(), key=lambda one: one["ratio"]["median"])
    ratio, median = best["ratio"], best["median"]
    rounds, speed = len(best["rounds"]), f"{median['tokens_per_s']:.1f} tokens/s"
    times = f"{rounds} round{'' if rounds == 1 else 's'} of {median['requests']} requests"
    alone = "the expert alone" if baseline["role"] == Role.EXPERT_ALONE else "the first system"
    over = f"{alone} ({baseline['name']})"
    warnings = [_differing(best, systems[document["texts_of"]]), _failing(document)]
    if best is baseline:
        return Finding(
            headline=f"Nothing is faster than {over}: {speed}, {times}.",
            warning=" ".join(filter(None, warnings)),
        )
    if ratio["least"] <= 1:
        warnings.append("Not in every round is it faster: this may be noise.")
    return Finding(
        headline=f"{best['name']}: {ratio['median']:.2f} times the tokens/s of {over}, {times}.",
        detail=(
            f"{speed} against {baseline['median']['tokens_per_s']:.1f}; the ratio is"
            f" {ratio['least']:.2f} to {ratio['most']:.2f} over the rounds."
        ),
        warning=" ".join(filter(None, warnings)),
    )


def _differing(system: Json, first: Json) -> str:
    differing = len(system["other_texts"])
    requests = f"{differing} of {system['median']['requests']}"
    return f"{requests} texts are not those of {first['name']}." if differing else ""


def _failing(document: Json) -> str:
    failed = {one["name"]: one["median"]["failed"] for one in document["contenders"]}
    told = ", ".join(f"{count} of {name}" for name, count in failed.items() if count)
    return f"Requests failed: {told}." if told else ""


def write(document: Json, *, folder: Path, name: str) -> list[Path]:
    """Write a document as JSON, table, plot and page.

    Args:
        document: What `document` returned.
        folder: Made if it does not exist.
        name: Of the files, without suffix.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}{suffix}" for suffix in (".json", ".md", ".png", ".html")]
    paths[0].write_text(json.dumps(document, indent=1))
    paths[1].write_text(table(document))
    _figure(document).savefig(paths[2], dpi=150)
    about = {"notes": document["notes"], "arrivals": document.get("arrivals", "")}
    written = Page(
        title="Benchmark",
        findings=(conclusion(document),),
        sections=(_contest("Tokens per second", document),),
        provenance=provenance_table(document["provenance"] | about),
    )
    paths[3].write_text(written.html(), encoding="utf-8")
    return paths


def _contest(title: str, document: Json) -> Section:
    """Return the bars and the table of a document."""
    return Section(
        title=title,
        text=" ".join(document["notes"]),
        figures=(page.draw(f"{title}: bar, median; dots, rounds", _figure(document)),),
        tables=(
            Table(
                title="Every system",
                headings=tuple(_columns(document)),
                rows=tuple(map(tuple, _rows(document))),
                note=_how_counted(document),
                marked=frozenset({document["baseline"]}),
            ),
        ),
    )


def write_suite(
    name: str, result: CaseResult, *, folder: Path, provenance: Provenance
) -> list[Path]:
    """Write the result of one case as JSON, Markdown and a page; results of others are kept.

    Args:
        name: Of the case.
        result: What was measured.
        folder: Made if it does not exist.
        provenance: Where and when it was measured.

    Returns:
        The paths of the files.

    Raises:
        InvalidMeasurement: The folder has another `suite.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "suite.json", folder / "suite.md", folder / "suite.html"]
    cases: Json = read_suite(paths[0])["cases"] if paths[0].exists() else {}
    cases[name] = {
        "provenance": asdict(provenance),
        "claims": [asdict(claim) | {"held": claim.held} for claim in result.claims],
        "contests": {
            title: document(comparison, notes=[note] if note else [], provenance=provenance)
            for title, (comparison, note) in result.comparisons.items()
        },
    }
    paths[0].write_text(json.dumps({"cases": cases}, indent=1))
    parts = [suite_claims({"cases": cases})]
    for case_name, case in cases.items():
        parts += [f"## {case_name}", heading(case["provenance"])]
        parts += [
            f"### {title}\n\n{table(comparison, with_heading=False)}"
            for title, comparison in case["contests"].items()
        ]
    paths[1].write_text("\n".join(parts))
    paths[2].write_text(_suite_page(cases).html(), encoding="utf-8")
    return paths


def _suite_page(cases: Json) -> Page:
    claims = [claim for case in cases.values() for claim in case["claims"]]
    failed = [f"{claim['case']}: {claim['says']}" for claim in claims if not claim["held"]]
    return Page(
        title="Benchmark suite",
        findings=(
            Finding(
                headline=f"{len(claims) - len(failed)} of {len(claims)} targets are met.",
                warning=f"Missed: {'; '.join(failed)}." if failed else "",
            ),
        ),
        sections=(
            Section(
                title="Targets",
                tables=(Table(title="Wanted and measured", headings=_CLAIMS, rows=_claims(cases)),),
            ),
            *(
                _contest(f"{name}: {title}", comparison)
                for name, case in cases.items()
                for title, comparison in case["contests"].items()
            ),
        ),
        provenance=Table(
            title="How and where each case was measured",
            headings=("case", *next(iter(cases.values()))["provenance"]),
            rows=tuple(
                (name, *(_plain(value) for value in case["provenance"].values()))
                for name, case in cases.items()
            ),
        ),
    )


def _plain(value: Any) -> str:
    """Return a value of the provenance as text."""
    return ", ".join(page.flattened({"": value} if not isinstance(value, dict) else value).values())


def read_suite(path: Path) -> Json:
    """Return the `suite.json` that `write_suite` wrote.

    Raises:
        InvalidMeasurement: The file cannot be read, or is something else.
    """
    try:
        suite: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidMeasurement(f"{path} cannot be read: {error}") from error
    if not isinstance(suite, dict) or "cases" not in suite:
        raise InvalidMeasurement(
            f"{path} is not a report of `cascade bench suite`; choose another --out, or remove it"
        )
    return suite  # pyright: ignore[reportUnknownVariableType] - JSON


def suite_claims(suite: Json, *, only: str | None = None, with_headings: bool = False) -> str:
    """Return the claims of cases as Markdown.

    Args:
        suite: What `read_suite` returned.
        only: The case to return, if not all.
        with_headings: Whether to say how each case was measured.
    """
    cases = {name: case for name, case in suite["cases"].items() if only in (None, name)}
    if not cases:
        return ""
    lines = _markdown(_CLAIMS, _claims(cases, no="**no**"), right=("wanted", "measured"))
    parts = ["\n".join(lines) + "\n"]
    if with_headings:
        parts += [f"**{name}**: {heading(case['provenance'])}" for name, case in cases.items()]
    return "\n".join(parts)


_CLAIMS = ("case", "what", "wanted", "measured", "held", "commit, UTC")


def _claims(cases: Json, *, no: str = "no") -> tuple[tuple[str, ...], ...]:
    rows: list[tuple[str, ...]] = []
    for case in cases.values():
        when = f"{case['provenance']['commit'] or 'unknown'}, {case['provenance']['at'][:16]}"
        for claim in case["claims"]:
            bounds = (("at least", claim["least"]), ("at most", claim["most"]))
            wanted = ", ".join(f"{word} {bound:.3g}" for word, bound in bounds if bound is not None)
            held = "yes" if claim["held"] else no
            measured = f"{claim['measured']:.3g}"
            rows.append((claim["case"], claim["says"], wanted, measured, held, when))
    return tuple(rows)


def _markdown(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str]
) -> list[str]:
    """Return the lines of a table; the columns in `right` are aligned to the right."""
    rule = ["---:" if name in right else "---" for name in headings]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def _figure(document: Json) -> Any:
    """Draw tokens per second: a bar is the median, a dot a round; names stand above the bars."""
    systems = document["contenders"]
    figures = import_extra("matplotlib.figure")
    figure = figures.Figure(figsize=(5.0, 0.9 + 0.55 * len(systems)), layout="constrained")
    axes = figure.subplots()
    for row, system in enumerate(systems):
        color = "#b9c2cc" if system["name"] == document["baseline"] else "#5b93b8"
        axes.barh(row, system["median"]["tokens_per_s"], height=0.4, color=color)
        speeds = [metrics["tokens_per_s"] for metrics in system["rounds"]]
        axes.plot(speeds, [row] * len(speeds), "k.", markersize=4)
        label = f"{system['name']}  {system['median']['tokens_per_s']:.1f}"
        axes.text(0, row - 0.27, label, fontsize=9, verticalalignment="bottom")
    axes.set_yticks([])
    axes.set_ylim(len(systems) - 0.6, -0.8)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.set_xlabel("tokens/s, all requests together")
    return figure
