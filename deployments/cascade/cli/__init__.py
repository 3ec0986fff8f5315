"""The command line: `cascade ask`, `bench`, `doctor`, `evaluate`, `tier`, `router` and `tune`."""

from __future__ import annotations

import typer

from cascade.cli.ask import ask
from cascade.cli.bench import bench
from cascade.cli.doctor import doctor
from cascade.cli.evaluate import evaluate
from cascade.cli.serve import router, tier
from cascade.cli.tune import tune

app = typer.Typer(
    name="cascade",
    help="Serve a pair of language models as a speculative cascade, and talk to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (ask, doctor, evaluate, tier, router, tune):
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line."""
    app()
