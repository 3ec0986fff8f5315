"""`cascade tune`: the setting that meets a target, as YAML for a cluster."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cascade.cli.evaluate import failed
from cascade.errors import CascadeError, InvalidMeasurement

if TYPE_CHECKING:
    from cascade.evaluation.results import Results
    from cascade.evaluation.tune import Choice, Goal


def tune(  # noqa: PLR0913 - one parameter an option
    results: Annotated[Path, typer.Argument(help="The folder of `cascade evaluate`")],
    *,
    target: Annotated[
        list[str],
        typer.Option(help="'quality >= expert - 0.5', 'expert_passes <= 60%'; repeat, all are met"),
    ],
    family: Annotated[str | None, typer.Option(help="Of the items; all together if absent")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="That you serve; needed where several were measured")
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(help="Best of those that meet: quality, rejections, expert_passes, latency"),
    ] = None,
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Least probability that the targets are met")
    ] = 0.5,
    out: Annotated[
        Path | None, typer.Option(help="File of the YAML; standard output if absent")
    ] = None,
) -> None:
    """Choose the rule and its dial that meet a stated target, and say how sure that is.

    The YAML goes under `args:` of the application in a cluster/*.yaml.
    """
    from cascade.evaluation import results as lab  # noqa: PLC0415 - `cascade ask` need not wait for it
    from cascade.evaluation import tune as tuning  # noqa: PLC0415 - as above

    try:
        found = lab.load(results)
        choice = tuning.tune(
            found,
            [tuning.parse(told) for told in target],
            group=family or found.groups[0],
            temperature=temperature,
            goal=_goal(goal),
            confidence=confidence,
        )
        _tell(choice, found, out)
    except CascadeError as error:
        raise failed(error) from error


def _goal(name: str | None) -> Goal | None:
    from cascade.evaluation import tune as tuning  # noqa: PLC0415 - as above

    if name is None:
        return None
    if name not in set(tuning.Goal):
        known = ", ".join(tuning.Goal)
        raise InvalidMeasurement(f"--goal is {name!r}; wanted one of {known}")
    return tuning.Goal(name)


def _tell(choice: Choice, results: Results, out: Path | None) -> None:
    from cascade.evaluation.tune import fragment  # noqa: PLC0415 - as above

    text = fragment(choice, results)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidMeasurement(f"{out} cannot be written: {error.strerror}") from error
    Console(highlight=False).print(
        f"{choice.setting.name}, sure to {choice.probability:.2f}; written to {out}", markup=False
    )
