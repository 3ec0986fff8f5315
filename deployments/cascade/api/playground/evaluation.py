"""The curve of an evaluation, which the page draws: what `cascade evaluate --out` wrote.

The file is read once, when the server starts. Of its settings only those are taken that the page's
controls can express.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cascade.errors import StartupError

FORMAT = 2  # of `evaluation.results`, which nothing that serves may import
MOST_BYTES = 2**26
MOST_POINTS = 2000


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Estimate(_Part):
    """A value and its confidence interval, which very few items do not have."""

    value: float
    low: float | None = None
    high: float | None = None


class Point(_Part):
    """A setting, and its quality and cost over all items."""

    name: str
    curve: str
    dial: float | None
    temperature: float
    draft_tokens: int | None
    bonus: str | None
    quality: Estimate
    expert_passes: Estimate
    latency: Estimate | None  # modelled, of the expert's alone


class Evaluation(_Part):
    """What the page draws."""

    items: int
    workload: str
    points: tuple[Point, ...]


class _Cell(_Part):
    key: str
    curve: str
    dial: float | None = None
    temperature: float
    draft_tokens: int | None = None
    bonus: str | None = None
    phases: list[Any] = []


class _Figure(_Part):
    setting: str
    group: str
    quality: dict[str, float | None]
    expert_passes: dict[str, float | None]
    latency: dict[str, float | None]


class _Document(_Part):
    about: dict[str, Any]
    families: Annotated[list[str], Field(min_length=1)]
    cells: Annotated[list[_Cell], Field(max_length=MOST_POINTS)]
    figures: list[_Figure]


def read(folder: str) -> Evaluation:
    """Return the curve of the evaluation in a folder.

    Raises:
        StartupError: It has no `results.json` of this version, or one that is too large.
    """
    path = Path(folder) / "results.json"
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise StartupError(
                f"`evaluation`: {path} has {size} bytes, more than {MOST_BYTES}; evaluate fewer"
                " items or settings"
            )
        text = path.read_bytes()
    except OSError as error:
        raise StartupError(
            f"`evaluation`: {path} cannot be read ({error.strerror}); name the folder that"
            " `cascade evaluate --out` wrote, on the node of each router"
        ) from error
    try:
        found = _Versioned.model_validate_json(text)
        if found.format != FORMAT:
            raise StartupError(
                f"`evaluation`: {path} has format {found.format}, not {FORMAT}; evaluate again"
            )
        return _curve(_Document.model_validate_json(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise StartupError(
            f"`evaluation`: {path} is no results.json of `cascade evaluate`: {where} {first['msg']}"
        ) from error


class _Versioned(_Part):
    format: int


def _curve(document: _Document) -> Evaluation:
    families = set(document.families)
    whole = "all" if len(families) > 1 else families.pop()
    figures = {one.setting: one for one in document.figures if one.group == whole}
    points = [
        _point(cell, figures[cell.key])
        for cell in document.cells
        if cell.key in figures and not cell.phases
    ]
    return Evaluation(
        items=len(document.families),
        workload=str(document.about.get("workload", "")),
        points=tuple(one for one in points if one is not None),
    )


def _point(cell: _Cell, figure: _Figure) -> Point | None:
    quality, passes = _estimate(figure.quality), _estimate(figure.expert_passes)
    if quality is None or passes is None:
        return None
    return Point(
        name=cell.curve if cell.dial is None else f"{cell.curve} {cell.dial:g}",
        quality=quality,
        expert_passes=passes,
        latency=_estimate(figure.latency),
        **cell.model_dump(exclude={"key", "phases"}),
    )


def _estimate(parts: dict[str, float | None]) -> Estimate | None:
    value = parts.get("value")
    if value is None:
        return None
    return Estimate(value=value, low=parts.get("low"), high=parts.get("high"))
