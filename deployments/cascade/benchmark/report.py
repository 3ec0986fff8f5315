"""A contest written down: JSON for machines, a table for people, a plot for both."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.evaluation.scoring import extra

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cascade.benchmark.runner import Contest
    from cascade.evaluation.environment import Provenance

Json: TypeAlias = dict[str, Any]

_HEADINGS = (
    "contender", "tokens/s", "ratio", "TTFT ms", "TPOT ms", "p50 / p95 / p99 ms", "tokens/pass",
    "drafted", "accepted", "bytes/token", "busy", "hidden", "goodput/s", "other text",
)  # fmt: skip


def document(
    contest: Contest, *, baseline: str, notes: Sequence[str], provenance: Provenance, **more: Any
) -> Json:
    """Return all of a contest as JSON values.

    Args:
        contest: What was measured.
        baseline: The contender that ratios and texts are held against.
        notes: What a reader must know, such as that a model is cost-padded.
        provenance: Where it was measured.
        more: How requests came, and whatever else belongs to it.
    """
    return {
        "provenance": asdict(provenance),
        "notes": list(notes),
        "baseline": baseline,
        **more,
        "contenders": [
            {
                "name": one.name,
                "median": asdict(one.middle),
                "ratio": asdict(contest.ratio(one.name, baseline)),
                "other_texts": contest.differences(one.name, baseline),
                "rounds": [asdict(figures) for figures in one.rounds],
            }
            for one in contest.standings
        ],
    }


def table(told: Json, *, headed: bool = True) -> str:
    """Return a document as Markdown: its notes, where it was measured, and a line a contender."""
    rounds = len(told["contenders"][0]["rounds"])
    lines = [
        *(f"> {note}" for note in told["notes"]),
        *(("", heading(told["provenance"])) if headed else ()),
        "",
        f"Medians of {rounds} interleaved rounds; ratios are of tokens/s, paired by round, over",
        f"{told['baseline']}.",
        *("", _row(_HEADINGS), _row(["---"] + ["---:"] * (len(_HEADINGS) - 1))),
    ]
    lines += [_row(_cells(one)) for one in told["contenders"]]
    return "\n".join(lines).strip() + "\n"


def heading(where: Json) -> str:
    """Return command, machine, commit and versions as Markdown."""
    machine = f"{where['cores']} cores of {where['cpu']}, {where['memory_gib']} GiB"
    gpus = "".join(f", {name}" for name in where["gpus"])
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"`{where['command']}`\n\n{machine}{gpus}; commit {where['commit'] or 'unknown'};"
        f" {where['at']}; load before it {where['load']}; {versions}.\n"
    )


def write(told: Json, *, folder: Path, name: str) -> list[Path]:
    """Write a document as JSON, table and plot into a folder; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}{suffix}" for suffix in (".json", ".md", ".png")]
    paths[0].write_text(json.dumps(told, indent=1))
    paths[1].write_text(table(told))
    plot(told, paths[2])
    return paths


def plot(told: Json, path: Path) -> None:
    """Draw tokens per second: a bar is the median, a dot a round."""
    extra("matplotlib").use("agg")
    figure, axes = extra("matplotlib.pyplot").subplots(
        figsize=(9, 1.2 + 0.42 * len(told["contenders"])), layout="constrained"
    )
    names = [one["name"] for one in told["contenders"]]
    axes.barh(names, [one["median"]["tokens_per_s"] for one in told["contenders"]], color="#7aa6c2")
    for one in told["contenders"]:
        speeds = [figures["tokens_per_s"] for figures in one["rounds"]]
        axes.plot(speeds, [one["name"]] * len(speeds), "k.", markersize=4)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, all requests together (bar: median, dots: rounds)")
    axes.set_title(" ".join(told["notes"]), fontsize=8, wrap=True)
    figure.savefig(path, dpi=150)
    extra("matplotlib.pyplot").close(figure)


def _cells(one: Json) -> list[str]:
    middle, ratio = one["median"], one["ratio"]
    latency = middle["latency"]
    return [
        one["name"],
        f"{middle['tokens_per_s']:.1f}",
        f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})",
        f"{middle['ttft']['p50_ms']:.0f}",
        f"{middle['tpot']['p50_ms']:.1f}",
        f"{latency['p50_ms']:.0f} / {latency['p95_ms']:.0f} / {latency['p99_ms']:.0f}",
        _number(middle["tokens_per_expert_pass"]),
        _number(middle["drafted_per_round"]),
        _number(middle["acceptance"]),
        _number(middle["bytes_per_token"], digits=0),
        ", ".join(f"{tier} {share:.2f}" for tier, share in middle["busy"].items()) or "-",
        _number(middle["hidden"]),
        f"{middle['goodput_per_s']:.2f}",
        str(len(one["other_texts"])),
    ]


def _number(value: float | None, *, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
