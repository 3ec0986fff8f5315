"""`cascade key`: a new API key, and the lines of `api_keys_file` that let its holder in."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import ValidationError

from cascade.cli.serve import failed
from cascade.errors import StartupError


def key(  # noqa: PLR0913 - one parameter an option
    name: Annotated[str, typer.Argument(help="Of the caller, in logs and metrics")],
    *,
    weight: Annotated[int, typer.Option(help="Its turns for one of another caller")] = 1,
    answers: Annotated[int | None, typer.Option(help="At the same time")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="Longest prompt and answer")] = None,
    requests_per_minute: Annotated[int | None, typer.Option()] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Of prompts and answers")] = None,
) -> None:
    """Print a new API key to standard error, and what `api_keys_file` holds of it.

    The key is shown once: the file has its hash only.
    """
    from cascade.api.keys import ApiKey, as_yaml, hash_of, new_key  # noqa: PLC0415 - slow to import

    secret = new_key()
    quotas = {
        "weight": weight,
        "answers": answers,
        "context_tokens": context_tokens,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
    }
    try:
        lines = as_yaml(ApiKey.model_validate({"name": name, "sha256": hash_of(secret)} | quotas))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise failed(StartupError(f"{where}: got {first['input']}; {first['msg']}")) from error
    typer.echo(secret, err=True)
    typer.echo(lines, nl=False)
