"""The command line: `cascade ask`, `doctor`, `tier` and `router`."""

from __future__ import annotations

import typer

from cascade.cli.ask import ask
from cascade.cli.doctor import doctor
from cascade.cli.router import router
from cascade.cli.tier import tier

app = typer.Typer(
    name="cascade",
    help="Serve a pair of language models as a speculative cascade, and talk to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(ask)
app.command()(doctor)
app.command()(tier)
app.command()(router)


def main() -> None:
    """Run the command line."""
    app()
