"""The measurements, as a Markdown table and as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cascade.evaluation.environment import provenance


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of one scenario."""

    scenario: str
    what: str
    value: float | str
    unit: str = ""


@dataclass(kw_only=True)
class Report:
    """All measurements of a run."""

    rows: list[Row] = field(default_factory=list[Row])

    def add(self, scenario: str, what: str, value: float | str, unit: str = "") -> None:
        """Add a figure."""
        value = round(value, 3) if isinstance(value, float) else value
        self.rows.append(Row(scenario=scenario, what=what, value=value, unit=unit))

    def table(self) -> str:
        """Return the figures as lines of Markdown."""
        lines = ["| scenario | what | value |", "|---|---|---|"]
        lines += [f"| {one.scenario} | {one.what} | {one.value} {one.unit} |" for one in self.rows]
        return "\n".join(lines)

    def json(self) -> str:
        """Return the figures and the machine on which they were measured."""
        report = {"machine": asdict(provenance()), "rows": [asdict(one) for one in self.rows]}
        return json.dumps(report, indent=1)

    def publish(self) -> str:
        """Write `chaos.json` and `chaos.md` to the folder CHAOS_REPORT, if named; return both."""
        if folder := os.environ.get("CHAOS_REPORT"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, "chaos.json").write_text(self.json() + "\n")
            Path(folder, "chaos.md").write_text(self.table() + "\n")
        return f"{self.table()}\n\n{self.json()}"


def quantile(values: list[float], share: float) -> float:
    """Return the value below which that share of the values lies; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


REPORT = Report()
