"""`cascade tune`: the setting that meets a target, as YAML for a cluster."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer
from rich.console import Console

from cascade.cli.evaluate import failed
from cascade.cli.stages import stages
from cascade.errors import CascadeError, InvalidMeasurement, wanted


def tune(  # noqa: PLR0913 - one parameter an option
    results: Annotated[Path, typer.Argument(help="The folder of `cascade evaluate`")],
    *,
    target: Annotated[
        list[str],
        typer.Option(help="'quality >= expert - 0.5', 'expert_passes <= 60%'; repeat for more"),
    ],
    family: Annotated[str | None, typer.Option(help="Items to consider; all if absent")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of serving; required if several were measured")
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(help="What to optimize: quality, rejections, expert_passes, latency"),
    ] = None,
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Least probability that the targets are met")
    ] = 0.5,
    out: Annotated[
        Path | None, typer.Option(help="YAML file to write; standard output if absent")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Page to write; tune.html in the folder of results if absent"),
    ] = None,
) -> None:
    """Choose the rule and its dial that meet the targets, and say how sure the choice is.

    The YAML goes under `args:` of the application in a cluster/*.yaml.
    """
    try:
        with stages() as show:
            show("loading the libraries")
            # Imported late: `cascade ask` does not need torch.
            from cascade.evaluation.results import load  # noqa: PLC0415 - as above
            from cascade.evaluation.tune import (  # noqa: PLC0415 - as above
                Goal,
                chosen,
                judged,
                parse,
                yaml_fragment,
            )
            from cascade.evaluation.tune_report import page  # noqa: PLC0415 - as above

            if goal is not None and goal not in set(Goal):
                raise InvalidMeasurement(f"--goal is {goal!r}; {wanted(goal, Goal)}")
            show(f"reading {results}")
            measured = load(results)
            show(f"judging {len(measured.cells)} settings")
            choices = judged(
                measured,
                [parse(text) for text in target],
                group=family or measured.groups[0],
                temperature=temperature,
                goal=Goal(goal) if goal else None,
            )
            show("writing the report")
            report = report or results / "tune.html"
            _write(report, page(measured, choices, confidence=confidence).html())
        Console(stderr=True, soft_wrap=True).print(f"written: {report}", markup=False)
        choice = chosen(choices, confidence=confidence)
        for warning in choice.warnings:
            Console(stderr=True, soft_wrap=True).print(warning, style="yellow", markup=False)
        fragment = yaml_fragment(choice, measured)
        if out is None:
            typer.echo(fragment, nl=False)
            return
        _write(out, fragment)
    except CascadeError as error:
        raise failed(error) from error
    Console(highlight=False).print(
        f"{choice.setting.name}, with probability {choice.probability:.2f}; written to {out}",
        markup=False,
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidMeasurement(f"{path} cannot be written: {error.strerror}") from error
