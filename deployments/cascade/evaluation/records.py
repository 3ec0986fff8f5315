"""What one answer showed, and where the answers of finished settings are kept.

Counts of an answer, from which every rate is a quotient of sums over answers:

| mode | offered | rejected |
|---|---|---|
| cascade, speculative | drafts judged: up to and with a block's first refusal | the refused |
| token_cascade | tokens of the answer | those the drafter deferred, the expert's |
| sequence_cascade | tokens of the draft | all of them if the expert answered anew, else none |
| drafter_only | tokens of the answer | none |
| expert_only | tokens of the answer | all: each is the expert's |

rejection rate = rejected / offered = 1 - accepted / judged, the axis of the paper's Gemma figures
(arXiv 2405.19261); its notebook judges one draft a step, where this is refusals over tokens.
deferral rate = deferred / judged: positions the rule gave to the expert, of those it decided on. A
deferred draft is still accepted where the expert happens to agree, so rejections are fewer.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from cascade.errors import InvalidMeasurement
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cascade.evaluation.client import Answer
    from cascade.evaluation.grid import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The numbers of one answer; the columns of `results.json`."""

    quality: float
    bleu: float | None = None  # of the sentence, where BLEU is a second figure
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
    latency_s: float = 0.0  # measured while others were answered too
    ttft_s: float = 0.0


COLUMNS = tuple(field.name for field in fields(Counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One item answered under one setting."""

    item: str
    text: str
    counts: Counts


def counts(
    answer: Answer, setting: Setting, *, quality: float, bleu: float | None = None
) -> Counts:
    """Return the numbers of an answer; zeros where a server tells none."""
    told = answer.statistics
    offered, rejected = _offers(answer, setting)
    same = ("judged", "deferred", "rounds", "drafted", "accepted", "kept_tokens",
            "expert_tokens", "drafter_passes", "expert_passes")  # fmt: skip
    return Counts(
        quality=quality,
        bleu=bleu,
        tokens=answer.completion_tokens,
        offered=offered,
        rejected=rejected,
        bytes=told.get("sent_bytes", 0) + told.get("received_bytes", 0),
        latency_s=answer.latency_s,
        ttft_s=answer.ttft_s,
        **{name: told.get(name, 0) for name in same},
    )


def _offers(answer: Answer, setting: Setting) -> tuple[int, int]:
    """Return the tokens that the drafter offered and those of them that did not stand."""
    told, tokens = answer.statistics, answer.completion_tokens
    match setting.mode:
        case Mode.EXPERT_ONLY:
            return tokens, tokens
        case Mode.DRAFTER_ONLY:
            return tokens, 0
        case Mode.TOKEN_CASCADE:
            return tokens, told.get("expert_tokens", 0)
        case Mode.SEQUENCE_CASCADE:
            drafted = told.get("drafted", 0)
            return drafted, drafted if told.get("expert_tokens", 0) else 0
        case Mode.CASCADE | Mode.SPECULATIVE:
            judged = told.get("judged", 0)
            return judged, max(judged - told.get("accepted", 0), 0)


class Store:
    """A folder with a manifest and one file a finished setting: a run that was cut goes on."""

    def __init__(self, folder: Path, *, manifest: Mapping[str, Any]) -> None:
        """Open or make the folder.

        Raises:
            InvalidMeasurement: It holds another evaluation, or cannot be written.
        """
        self._cells = folder / "cells"
        self._costs = folder / "costs.json"
        try:
            self._cells.mkdir(parents=True, exist_ok=True)
            _same(folder / "run.json", manifest)
        except OSError as error:
            raise InvalidMeasurement(f"{folder} cannot be written: {error.strerror}") from error

    def finished(self, setting: Setting) -> bool:
        """Say whether all of a setting's records are there."""
        return self._path(setting).exists()

    def write(self, setting: Setting, records: list[Record]) -> None:
        """Keep a setting's records, all at once."""
        _write(self._path(setting), [asdict(record) for record in records])

    def read(self, setting: Setting) -> list[Record]:
        """Return a finished setting's records."""
        told = json.loads(self._path(setting).read_text(encoding="utf-8"))
        return [Record(**record | {"counts": Counts(**record["counts"])}) for record in told]

    def read_costs(self) -> dict[str, Any] | None:
        """Return the costs that an earlier run measured."""
        if not self._costs.exists():
            return None
        return json.loads(self._costs.read_text(encoding="utf-8"))

    def write_costs(self, costs: Mapping[str, Any]) -> None:
        """Keep measured costs."""
        _write(self._costs, costs)

    def _path(self, setting: Setting) -> Path:
        return self._cells / f"{setting.key}.json"


def _same(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or compare it with the one that is there."""
    if not path.exists():
        _write(path, manifest)
        return
    was = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in manifest if was.get(name) != manifest[name]]
    if changed:
        told = "; ".join(f"{name} was {was.get(name)!r}, is {manifest[name]!r}" for name in changed)
        raise InvalidMeasurement(
            f"{path.parent} holds another evaluation ({told}); name a new folder with --out, or"
            " delete this one"
        )


def _write(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    os.replace(part, path)  # noqa: PTH105 - atomic, and says so
