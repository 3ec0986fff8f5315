"""The counts of each answer, and the folder that keeps the answers of finished settings.

Every rate is a quotient of sums of counts over answers. By mode:

| mode | offered | rejected |
|---|---|---|
| cascade, speculative | drafts judged, to a block's first rejection | rejected drafts |
| token_cascade | tokens of the answer | those that the drafter deferred to the expert |
| sequence_cascade | tokens of the draft | all of them if the expert answered anew, else none |
| drafter_only | tokens of the answer | none |
| expert_only | tokens of the answer | all: the expert wrote each |

rejection rate = rejected / offered = 1 - accepted / judged, the axis of the paper's Gemma figures
(arXiv 2405.19261); its notebook judges one draft a step, where this is rejections over tokens.
deferral rate = deferred / judged: the share of judged positions that the rule gave to the expert.
A deferred token is still accepted where the expert agrees, so there are fewer rejections.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from cascade.errors import InvalidMeasurement
from cascade.evaluation.structured import ToolCall
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cascade.evaluation.client import CompletionResult
    from cascade.evaluation.grid import Setting
    from cascade.evaluation.scoring import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The numbers of one answer; the columns of `results.json`."""

    quality: float
    bleu: float | None = None  # this and what follows as `Score` has it
    valid: float | None = None
    fields: float | None = None
    tool: float | None = None
    tokens: int = 0
    offered: int = 0
    rejected: int = 0
    judged: int = 0
    deferred: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    kept_tokens: int = 0
    expert_tokens: int = 0
    drafter_passes: int = 0
    expert_passes: int = 0
    bytes: int = 0
    latency_s: float = 0.0  # measured while other requests were running too
    ttft_s: float = 0.0


COLUMNS = tuple(field.name for field in fields(Counts))

OPTIONAL = ("bleu", "valid", "fields", "tool")
"""Columns that some items have."""

_FROM_STATISTICS = ("judged", "deferred", "rounds", "drafted", "accepted", "kept_tokens",
                    "expert_tokens", "drafter_passes", "expert_passes")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The answer to one item under one setting."""

    item: str
    text: str
    calls: tuple[ToolCall, ...] = ()
    counts: Counts


def count(answer: CompletionResult, setting: Setting, score: Score) -> Counts:
    """Return the numbers of an answer; zeros where the server sent no statistics.

    Args:
        answer: What the client returned.
        setting: How it was asked; its mode says what counts as offered.
        score: Of the answer.
    """
    statistics = answer.statistics
    offered, rejected = _offered_and_rejected(answer, setting.mode)
    return Counts(
        **asdict(score),
        tokens=answer.completion_tokens,
        offered=offered,
        rejected=rejected,
        bytes=statistics.get("sent_bytes", 0) + statistics.get("received_bytes", 0),
        latency_s=answer.latency_s,
        ttft_s=answer.ttft_s,
        **{name: statistics.get(name, 0) for name in _FROM_STATISTICS},
    )


def _offered_and_rejected(answer: CompletionResult, mode: Mode) -> tuple[int, int]:
    tokens = answer.completion_tokens
    drafted, judged, accepted, by_expert = (
        answer.statistics.get(name, 0)
        for name in ("drafted", "judged", "accepted", "expert_tokens")
    )
    match mode:
        case Mode.EXPERT_ONLY:
            return tokens, tokens
        case Mode.DRAFTER_ONLY:
            return tokens, 0
        case Mode.TOKEN_CASCADE:
            return tokens, by_expert
        case Mode.SEQUENCE_CASCADE:
            return drafted, drafted if by_expert else 0
        case Mode.CASCADE | Mode.SPECULATIVE:
            return judged, max(judged - accepted, 0)


class Store:
    """A folder with a manifest and one file per finished setting, so that a run can be resumed."""

    def __init__(self, folder: Path, *, manifest: Mapping[str, Any]) -> None:
        """Open or make the folder.

        Raises:
            InvalidMeasurement: It holds another evaluation, or cannot be written.
        """
        self._cells = folder / "cells"
        self._costs = folder / "costs.json"
        try:
            self._cells.mkdir(parents=True, exist_ok=True)
            _check_manifest(folder / "run.json", manifest)
        except OSError as error:
            raise InvalidMeasurement(f"{folder} cannot be written: {error.strerror}") from error

    def is_finished(self, setting: Setting) -> bool:
        """Return whether all of a setting's records are stored."""
        return self._path(setting).exists()

    def write(self, setting: Setting, records: list[Record]) -> None:
        """Store all of a setting's records."""
        _write(self._path(setting), [asdict(record) for record in records])

    def read(self, setting: Setting) -> list[Record]:
        """Return a finished setting's records."""
        rows = json.loads(self._path(setting).read_text(encoding="utf-8"))
        return [
            Record(
                item=row["item"],
                text=row["text"],
                calls=tuple(ToolCall(*call) for call in row["calls"]),
                counts=Counts(**row["counts"]),
            )
            for row in rows
        ]

    def read_costs(self) -> dict[str, Any] | None:
        """Return the costs that an earlier run measured."""
        if not self._costs.exists():
            return None
        return json.loads(self._costs.read_text(encoding="utf-8"))

    def write_costs(self, costs: Mapping[str, Any]) -> None:
        """Store measured costs."""
        _write(self._costs, costs)

    def _path(self, setting: Setting) -> Path:
        return self._cells / f"{setting.key}.json"


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or compare it with the stored one."""
    if not path.exists():
        _write(path, manifest)
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    changes = "; ".join(
        f"{name} was {old.get(name)!r}, is {value!r}"
        for name, value in manifest.items()
        if old.get(name) != value
    )
    if changes:
        raise InvalidMeasurement(
            f"{path.parent} holds another evaluation ({changes}); name a new folder with --out, or"
            " delete this one"
        )


def _write(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    os.replace(part, path)  # noqa: PTH105 - atomic, and says so
