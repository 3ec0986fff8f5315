"""`cascade plan`: what models need of a GPU's memory."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cascade.cli.evaluate import failed
from cascade.errors import CascadeError

GIB = 2**30


class DType(StrEnum):
    """Values of `engine.dtype`."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def plan(
    models: Annotated[list[str], typer.Argument(help="Directories or Hugging Face repositories")],
    *,
    gpu: Annotated[
        float | None,
        typer.Option(min=0.1, help="Memory of the GPU in GiB; that of this machine's if absent"),
    ] = None,
    num_gpus: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the GPU that a replica takes")
    ] = 1.0,
    dtype: Annotated[
        DType, typer.Option(help="Of weights and cache; auto: the checkpoint's own")
    ] = DType.AUTO,
    session_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a session, prompt and answer together")
    ] = 4096,
) -> None:
    """Print the memory of each model's weights and cache, and how many sessions fit a GPU.

    Reads configurations, and the file sizes of quantised weights; loads and downloads no weights.
    """
    # Imported late: `cascade ask` does not need torch.
    import torch  # noqa: PLC0415 - as above

    from cascade.engine.memory_plan import plan_memory  # noqa: PLC0415 - as above
    from cascade.engine.settings import EngineSettings  # noqa: PLC0415 - as above

    if gpu is None and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no GPU; say how large it is", param_hint="--gpu")
    total = int(gpu * GIB) if gpu else torch.cuda.mem_get_info()[1]
    utilization = EngineSettings().gpu_memory_utilization * num_gpus
    chosen = None if dtype is DType.AUTO else getattr(torch, dtype)
    try:
        plans = [plan_memory(model, dtype=chosen) for model in models]
    except CascadeError as error:
        raise failed(error) from error
    share = f"{utilization:.0%} of a GPU of {total / GIB:.0f} GiB"
    table = Table(title=f"{share}, sessions of {session_tokens} tokens")
    for column in ("model", "parameters", "weights", "cache per token", "cache tokens", "sessions"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for model, one in zip(models, plans, strict=True):
        cache = one.cache_tokens(total, utilization=utilization)
        table.add_row(
            model,
            f"{one.parameters:,}",
            f"{one.weights_bytes / GIB:.2f} GiB",
            f"{one.token_bytes / 1024:.1f} KiB",
            f"{cache:,}",
            f"{one.sessions(total, utilization=utilization, session_tokens=session_tokens):,}",
        )
    Console(highlight=False).print(table)
