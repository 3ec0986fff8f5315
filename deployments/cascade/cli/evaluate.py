"""`cascade evaluate`: what each setting of the server scores and costs on a workload."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from cascade.cli.ask import Key  # noqa: TC001 - typer reads the annotations
from cascade.cli.tier import application as read
from cascade.errors import CascadeError, InvalidMeasurement, StartupError

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from cascade.evaluation import report
    from cascade.evaluation.client import Answerer
    from cascade.evaluation.grid import Setting
    from cascade.evaluation.results import Results
    from cascade.evaluation.workloads import Workload
    from cascade.settings import Application

_INTERRUPTED = 130
_FILE_COLUMNS = 160  # of what goes to a file or a pipe


def evaluate(  # noqa: PLR0913 - one parameter an option
    workload: Annotated[
        str, typer.Argument(help="A JSONL file, `families`, or the name of one family")
    ],
    *,
    url: Annotated[
        str | None, typer.Option(help="A running server; absent, the pair runs in this process")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="In process: a cluster/*.yaml whose args to take")
    ] = None,
    api_key: Key = None,
    model: Annotated[str | None, typer.Option(help="A served model; the first if absent")] = None,
    grid: Annotated[
        Path | None, typer.Option(help="YAML of temperatures, draft_tokens and curves")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="A curve to try, such as token_v3; repeat for more")
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="A dial of each --rule; repeat for more")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0, max=2, help="Repeat for more; 0 if absent")
    ] = None,
    draft_tokens: Annotated[
        list[int] | None, typer.Option(min=1, max=32, help="Of a block; repeat for more; 5")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Items of each family; 100, or a file's all")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Answers under way at once")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of items and answers")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results")] = Path("evaluation"),
) -> None:
    """Measure quality and cost over a grid of rules, and draw the curves.

    Every finished setting is kept in the folder at once: the same command goes on where it was cut.
    """
    try:
        chosen = _settings(grid, rule, alpha, temperature, draft_tokens)
        results = asyncio.run(
            _evaluate(
                _workload(workload, count, seed),
                chosen,
                _answering(url, config, api_key, model),
                out,
                {"seed": seed, "concurrency": concurrency},
            )
        )
        show(results, out)
    except CascadeError as error:
        raise failed(error) from error
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"stopped; finished settings are in {out}, and the same command goes on", markup=False
        )
        raise typer.Exit(_INTERRUPTED) from None


def failed(error: CascadeError) -> typer.Exit:
    """Print an error and return what ends the program: 2 where the caller can mend it, else 1."""
    console = Console(stderr=True, soft_wrap=True)
    console.print("error", style="bold red", end=" ")
    console.print(error.message, markup=False, highlight=False)
    return typer.Exit(2 if isinstance(error, StartupError) else 1)


def _settings(
    grid: Path | None,
    rules: list[str] | None,
    alphas: list[float] | None,
    temperatures: list[float] | None,
    draft_tokens: list[int] | None,
) -> list[Setting]:
    """Return the grid of a file, or the one that the options span."""
    from cascade.evaluation.grid import Block, joined, read_grid  # noqa: PLC0415 - see `_evaluate`

    given = rules or alphas or temperatures or draft_tokens
    if grid is not None:
        if given:
            raise InvalidMeasurement(
                "--grid says all; leave out --rule, --alpha, --temperature and --draft-tokens"
            )
        return read_grid(grid)
    if bool(rules) != bool(alphas):
        raise InvalidMeasurement("--rule and --alpha go together: which curves, and which dials")
    spanned: dict[str, Any] = {
        "temperatures": temperatures,
        "draft_tokens": draft_tokens,
        "curves": dict.fromkeys(rules, alphas) if rules else None,
    }
    return joined([Block(**{name: value for name, value in spanned.items() if value})])


def _workload(name: str, count: int | None, seed: int) -> Workload:
    from cascade.evaluation import workloads  # noqa: PLC0415 - see `_evaluate`

    return workloads.load(name, count=count, seed=seed)


def _answering(
    url: str | None, config: Path | None, api_key: str | None, model: str | None
) -> AbstractAsyncContextManager[Answerer]:
    from cascade.evaluation.client import in_process, over_http  # noqa: PLC0415 - see `_evaluate`

    if url is None:
        return in_process(application(config))
    if config is not None:
        raise InvalidMeasurement("--url asks a running server, --config starts one; give one")
    return over_http(url, api_key=api_key, model=model)


def application(config: Path | None) -> Application:
    """Return the settings in a Serve YAML, or the defaults.

    Raises:
        InvalidMeasurement: The file is none.
    """
    import yaml  # noqa: PLC0415 - see `_evaluate`
    from pydantic import ValidationError  # noqa: PLC0415 - see `_evaluate`

    try:
        return read(config)
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InvalidMeasurement(f"{config} cannot be taken: {error}") from error
    except (KeyError, IndexError, TypeError) as error:
        raise InvalidMeasurement(
            f"{config} has no `applications`; wanted a file like cluster/local.yaml"
        ) from error


async def _evaluate(
    workload: Workload,
    settings: list[Setting],
    answering: AbstractAsyncContextManager[Answerer],
    out: Path,
    options: dict[str, int],
) -> Results:
    # Imported late, as all of the lab: `cascade ask` need not wait for torch.
    from cascade.evaluation import evaluate as lab  # noqa: PLC0415 - as said

    run = lab.Run(folder=out, **options)
    async with answering as answerer:
        total = lab.unfinished(workload, settings, answerer, run=run)
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("answers", total=total)
            return await lab.evaluate(
                workload, settings, answerer, run=run, told=lambda: progress.advance(task)
            )


def show(results: Results, folder: Path) -> None:
    """Write the files, and print the findings and the table of all items together."""
    from cascade.evaluation import evaluate as lab  # noqa: PLC0415 - see `_evaluate`
    from cascade.evaluation import report  # noqa: PLC0415 - see `_evaluate`

    written = lab.write(results, folder)
    overall = [
        report.settings_table(results, results.groups[0], temperature=temperature, brief=True)
        for temperature in results.temperatures
    ]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_COLUMNS
    for table in (*overall, *report.finding_tables(results)):
        _print(table, console)
    console.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True)


def _print(table: report.Table, console: Console) -> None:
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(table.headings):
        drawn.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in table.rows:
        drawn.add_row(*row)
    console.print(f"\n{table.title}", style="bold")
    if table.note:
        console.print(table.note, style="dim")
    console.print(drawn)
