"""All commands of `cascade` as one Typer application."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cascade.cli.ask import ask
from cascade.cli.bench import bench
from cascade.cli.certs import certs
from cascade.cli.check import check
from cascade.cli.doctor import doctor
from cascade.cli.evaluate import evaluate
from cascade.cli.key import key
from cascade.cli.plan import plan
from cascade.cli.serve import router, tier
from cascade.cli.tour import tour
from cascade.cli.tune import tune
from cascade.errors import wanted

app = typer.Typer(
    name="cascade",
    help="Serve a pair of language models as a speculative cascade, and talk to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Command(TyperCommand):
    """A command whose error about a mistyped choice names the nearest one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if found := re.search(r"'(.*)' is not one of (.*)\.", error.message):
                given, choices = found[1], re.findall(r"'([^']*)'", found[2])
                error.message = f"{given!r}: {wanted(given, choices)}"
            raise


def _print_version(value: bool) -> None:  # noqa: FBT001 - typer calls it by position
    if value:
        typer.echo(f"cascade {metadata.version('speculative-cascades')}")
        raise typer.Exit


@app.callback()
def cascade(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit"
        ),
    ] = False,
) -> None:
    """Serve a pair of language models as a speculative cascade, and talk to it."""
    del version  # its callback has printed it


for command in (ask, certs, check, doctor, evaluate, key, plan, tier, router, tour, tune):
    app.command(cls=_Command)(command)
app.add_typer(bench, name="bench")
