"""`cascade evaluate`: the quality and cost of each setting of the server on a workload."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cascade.cli.ask import Key, server_url
from cascade.cli.serve import failed, read_settings
from cascade.cli.stages import stages
from cascade.errors import CascadeError, InvalidMeasurement

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from cascade.evaluation.client import Client
    from cascade.evaluation.grid import Setting
    from cascade.evaluation.results import Results
    from cascade.evaluation.run import OnProgress, Run
    from cascade.evaluation.workloads import Workload

_INTERRUPTED = 130
_FILE_COLUMNS = 160  # of a table that is written to a file or a pipe


def evaluate(  # noqa: PLR0913 - one parameter an option
    workload: Annotated[
        str,
        typer.Argument(
            help="A JSONL file, `families`, `structured`, or names of some, with commas"
        ),
    ],
    *,
    url: Annotated[
        str | None, typer.Option(help="A running server; if absent, the pair runs in this process")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="In process: a cluster/*.yaml whose args to use")
    ] = None,
    api_key: Key = None,
    model: Annotated[str | None, typer.Option(help="A served model; the first if absent")] = None,
    grid: Annotated[
        Path | None, typer.Option(help="YAML of temperatures, draft_tokens and curves")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="A curve to evaluate, such as token_v3; repeat for more"),
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="A dial of each --rule; repeat for more")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0, max=2, help="Repeat for more; 0 if absent")
    ] = None,
    draft_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, max=32, help="Drafted tokens of a block; repeat for more; 5 if absent"),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Items of each family; 100, or a whole file, if absent"),
    ] = None,
    free: Annotated[
        bool,
        typer.Option("--free", help="Ask items with a schema or tools once more without a grammar"),
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of items and answers")] = 0,
    margin: Annotated[
        float, typer.Option(min=0, help="Loss of quality, in points, that does not matter")
    ] = 2.0,
    out: Annotated[Path, typer.Option(help="Folder of the results")] = Path("evaluation"),
) -> None:
    """Measure quality and cost over a grid of rules, and plot the curves.

    Every finished setting is stored at once, so the same command resumes an interrupted run.
    """
    try:
        with stages() as show:
            show("loading torch and transformers")
            # Imported late, as all of the evaluation: `cascade ask` does not need torch.
            from cascade.evaluation import workloads  # noqa: PLC0415 - as above
            from cascade.evaluation.run import Run  # noqa: PLC0415 - as above

            settings = _settings(grid, rule, alpha, temperature, draft_tokens)
            items = workloads.load(workload, count=count, seed=seed, free=free)
            client = _client(url, config, api_key, model)
            run = Run(folder=out, seed=seed, concurrency=concurrency)
            show(f"connecting to {url}" if url else "loading the pair")
            results = asyncio.run(_evaluate(items, settings, client, run, show))
            show("writing the report")
            paths = _write(results, out, margin)
        _print(results, paths, margin)
    except CascadeError as error:
        raise failed(error) from error
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"stopped; finished settings are in {out}, and the same command resumes", markup=False
        )
        raise typer.Exit(_INTERRUPTED) from None


def _settings(
    grid: Path | None,
    rules: list[str] | None,
    alphas: list[float] | None,
    temperatures: list[float] | None,
    draft_tokens: list[int] | None,
) -> list[Setting]:
    """Return the grid of a file, or the one that the options define."""
    from cascade.evaluation.grid import (  # noqa: PLC0415 - as above
        GridBlock,
        merge_blocks,
        read_grid,
    )

    if grid is not None:
        if rules or alphas or temperatures or draft_tokens:
            raise InvalidMeasurement(
                "--grid excludes --rule, --alpha, --temperature and --draft-tokens"
            )
        return read_grid(grid)
    if bool(rules) != bool(alphas):
        raise InvalidMeasurement("--rule and --alpha go together: which curves, and which dials")
    options: dict[str, Any] = {
        "temperatures": temperatures,
        "draft_tokens": draft_tokens,
        "curves": dict.fromkeys(rules, alphas) if rules else None,
    }
    return merge_blocks([GridBlock(**{name: value for name, value in options.items() if value})])


def _client(
    url: str | None, config: Path | None, api_key: str | None, model: str | None
) -> AbstractAsyncContextManager[Client]:
    from cascade.evaluation.client import connect_http, start_in_process  # noqa: PLC0415 - as above

    if url is not None:
        if config is not None:
            raise InvalidMeasurement("--url uses a running server, --config starts one; give one")
        return connect_http(server_url(url), api_key=api_key, model=model)
    return start_in_process(read_settings(config))


async def _evaluate(
    workload: Workload,
    settings: list[Setting],
    starting: AbstractAsyncContextManager[Client],
    run: Run,
    show: OnProgress,
) -> Results:
    from cascade.evaluation.run import evaluate  # noqa: PLC0415 - as above

    async with starting as client:
        return await evaluate(workload, settings, client, run=run, on_progress=show)


def _write(results: Results, folder: Path, margin: float) -> list[Path]:
    from cascade.evaluation.run import write  # noqa: PLC0415 - as above

    return write(results, folder, margin=margin)


def _print(results: Results, paths: list[Path], margin: float) -> None:
    """Print the conclusions, the table of all items together and the comparisons."""
    from cascade.evaluation import report  # noqa: PLC0415 - as above

    overall = [
        report.settings_table(results, results.groups[0], temperature=temperature, brief=True)
        for temperature in results.temperatures
    ]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_COLUMNS
    for found in report.conclusions(results, margin=margin):
        console.print(found.headline, style="bold", markup=False)
        console.print(found.detail, markup=False)
        if found.warning:
            console.print(found.warning, style="yellow", markup=False)
    for table in (*overall, *report.finding_tables(results, margin=margin)):
        drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
        for number, (heading, right) in enumerate(
            zip(table.headings, table.is_numeric, strict=True)
        ):
            drawn.add_column(heading, justify="right" if right else "left", no_wrap=not number)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(f"\n{table.title}", style="bold")
        if table.note:
            console.print(table.note, style="dim")
        console.print(drawn)
    console.print("written: " + ", ".join(str(path) for path in paths), soft_wrap=True)
