"""Writes comparisons and suites down: JSON for machines, Markdown tables and a plot for people."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.benchmark.systems import Role
from cascade.errors import InvalidMeasurement
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
    drafted = document.get("llama_drafted")
    columns = [name for name in _COLUMNS if drafted or name != "to llama.cpp"]
    rows = [_cells(system, columns) for system in document["contenders"]]
    rounds = len(document["contenders"][0]["rounds"])
    to_llama = f'; "to llama.cpp" over "{drafted}"' if drafted else ""
    lines = [
        *(f"> {note}" for note in document["notes"]),
        *(("", heading(document["provenance"])) if with_heading else ()),
        "",
        f"Medians of {rounds} interleaved rounds; ratios are of tokens/s, paired by round, over",
        f'"{document["baseline"]}"{to_llama}.',
        "",
        *_markdown(columns, rows, right=columns[1:]),
    ]
    return "\n".join(lines).strip() + "\n"


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


def write(document: Json, *, folder: Path, name: str) -> list[Path]:
    """Write a document as JSON, table and plot.

    Args:
        document: What `document` returned.
        folder: Made if it does not exist.
        name: Of the files, without suffix.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}{suffix}" for suffix in (".json", ".md", ".png")]
    paths[0].write_text(json.dumps(document, indent=1))
    paths[1].write_text(table(document))
    _plot(document, paths[2])
    return paths


def write_suite(
    name: str, result: CaseResult, *, folder: Path, provenance: Provenance
) -> list[Path]:
    """Write the result of one case as JSON and as Markdown; results of other cases are kept.

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
    paths = [folder / "suite.json", folder / "suite.md"]
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
    return paths


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
    rows: list[list[str]] = []
    for case in cases.values():
        when = f"{case['provenance']['commit'] or 'unknown'}, {case['provenance']['at'][:16]}"
        for claim in case["claims"]:
            bounds = (("at least", claim["least"]), ("at most", claim["most"]))
            wanted = ", ".join(f"{word} {bound:.3g}" for word, bound in bounds if bound is not None)
            held = "yes" if claim["held"] else "**no**"
            measured = f"{claim['measured']:.3g}"
            rows.append([claim["case"], claim["says"], wanted, measured, held, when])
    headings = ("case", "what", "wanted", "measured", "held", "commit, UTC")
    parts = ["\n".join(_markdown(headings, rows, right=("wanted", "measured"))) + "\n"]
    if with_headings:
        parts += [f"**{name}**: {heading(case['provenance'])}" for name, case in cases.items()]
    return "\n".join(parts)


def _markdown(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str]
) -> list[str]:
    """Return the lines of a table; the columns in `right` are aligned to the right."""
    rule = ["---:" if name in right else "---" for name in headings]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def _plot(document: Json, path: Path) -> None:
    """Draw tokens per second: a bar is the median, a dot a round."""
    import_extra("matplotlib").use("agg")
    pyplot, systems = import_extra("matplotlib.pyplot"), document["contenders"]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(systems)), layout="constrained")
    medians = [system["median"]["tokens_per_s"] for system in systems]
    axes.barh([system["name"] for system in systems], medians, color="#7aa6c2")
    for system in systems:
        speeds = [metrics["tokens_per_s"] for metrics in system["rounds"]]
        axes.plot(speeds, [system["name"]] * len(speeds), "k.", markersize=4)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, all requests together (bar: median, dots: rounds)")
    axes.set_title(" ".join(document["notes"]), fontsize=8, wrap=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
