"""`cascade plan`: what models need of a GPU's memory, and how many replicas a load needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cascade.cli.evaluate import failed
from cascade.cli.stages import stages
from cascade.errors import CascadeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.engine.memory_plan import MemoryPlan

GIB = 2**30


class DType(StrEnum):
    """Values of `engine.dtype`."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of the two tiers."""

    answers: int  # written at once
    session_tokens: int  # of each, prompt and answer together
    draft_tokens: int  # of a block
    max_sessions: int  # of a replica


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOnGpu:
    """One model, and what a replica of it has of its GPU."""

    memory: MemoryPlan
    gpu_bytes: int
    utilization: float  # of the GPU's memory
    bytes_per_s: float | None  # that the replica reads when all that share its GPU are busy

    def sessions(self, session_tokens: int) -> int:
        """Return how many sessions the cache of a replica holds at once."""
        return self.memory.sessions(
            self.gpu_bytes, utilization=self.utilization, session_tokens=session_tokens
        )

    def pass_s(self, sessions: float, session_tokens: int) -> float | None:
        """Return the shortest time of a forward pass: weights and caches are read once."""
        if self.bytes_per_s is None:
            return None
        cached = sessions * session_tokens * self.memory.token_bytes
        return (self.memory.weights_bytes + cached) / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    """The replicas of one tier."""

    replicas: int
    decided_by: str
    sessions: int  # of each
    pass_s: float | None

    @classmethod
    def of(cls, model: ModelOnGpu, load: Load, *, replicas: int, decided_by: str) -> TierPlan:
        """Return the plan of so many replicas."""
        sessions = math.ceil(load.answers / replicas)
        pass_s = model.pass_s(load.answers / replicas, load.session_tokens)
        return cls(replicas=replicas, decided_by=decided_by, sessions=sessions, pass_s=pass_s)


def plan_tiers(drafter: ModelOnGpu, expert: ModelOnGpu, load: Load) -> tuple[TierPlan, TierPlan]:
    """Return how many drafters and experts a load needs.

    Each tier needs cache for all sessions. Where it is known how fast memory is read, drafters also
    have to keep up: all passes of a block within one pass of the expert.

    Raises:
        ValueError: A replica of a tier does not hold one session.
    """
    experts, drafters = _for_cache("expert", expert, load), _for_cache("drafter", drafter, load)
    if experts.pass_s is None or drafters.pass_s is None:
        return drafters, experts
    for replicas in range(drafters.replicas, load.answers + 1):  # with more, some have no session
        more = TierPlan.of(drafter, load, replicas=replicas, decided_by="the expert's pace")
        assert more.pass_s is not None, "as above"
        if load.draft_tokens * more.pass_s <= experts.pass_s:
            return (more if replicas > drafters.replicas else drafters), experts
    return replace(drafters, decided_by=f"{drafters.decided_by}; slower than the expert"), experts


def _for_cache(tier: str, model: ModelOnGpu, load: Load) -> TierPlan:
    held = model.sessions(load.session_tokens)
    if not held:
        raise ValueError(f"a replica of the {tier} does not hold one session")
    return TierPlan.of(
        model,
        load,
        replicas=math.ceil(load.answers / min(held, load.max_sessions)),
        decided_by="its cache" if held <= load.max_sessions else "--max-sessions",
    )


def plan(  # noqa: PLR0913 - one parameter an option
    models: Annotated[
        list[str],
        typer.Argument(
            help="Directories or Hugging Face repositories; with --answers drafter and expert"
        ),
    ],
    *,
    gpu: Annotated[
        list[float] | None,
        typer.Option(
            min=0.1,
            help="Memory of the GPU in GiB, for all models or each; this machine's if absent",
        ),
    ] = None,
    num_gpus: Annotated[
        list[float] | None,
        typer.Option(
            min=0.01,
            max=1,
            help="Share of the GPU that a replica takes, for each model; 1 if absent",
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Of weights and cache; auto: the checkpoint's own")
    ] = DType.AUTO,
    session_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a session, prompt and answer together")
    ] = 4096,
    answers: Annotated[
        int | None, typer.Option(min=1, help="Load to plan replicas for: answers written at once")
    ] = None,
    bandwidth: Annotated[
        list[float] | None,
        typer.Option(
            min=1,
            help="Of the GPU's memory in GB/s, for all models or each: drafters then keep up",
        ),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a block")] = 5,
    max_sessions: Annotated[
        int, typer.Option(min=1, help="Sessions at once on a replica (max_ongoing_requests)")
    ] = 128,
) -> None:
    """Print the memory of each model's weights and cache, and how many sessions fit a GPU.

    With --answers also how many drafters and experts that load needs. Reads configurations, and the
    file sizes of quantised weights; loads and downloads no weights.
    """
    with stages() as show:
        show("loading torch and transformers")
        # Imported late: `cascade ask` does not need torch.
        import torch  # noqa: PLC0415 - as above

        from cascade.engine.memory_plan import plan_memory  # noqa: PLC0415 - as above
        from cascade.engine.settings import EngineSettings  # noqa: PLC0415 - as above

        def memory_of(model: str) -> MemoryPlan:
            show(f"reading the configuration of {model}")
            return plan_memory(model, dtype=chosen)

        if gpu is None and not torch.cuda.is_available():
            raise typer.BadParameter(
                "this machine has no GPU; say how large it is", param_hint="--gpu"
            )
        if answers is not None and len(models) != len(("drafter", "expert")):
            raise typer.BadParameter("give two models, the drafter's and the expert's")
        here = torch.cuda.mem_get_info()[1] / GIB if gpu is None else 0
        utilization = EngineSettings().gpu_memory_utilization
        chosen = None if dtype is DType.AUTO else getattr(torch, dtype)
        try:
            planned = [
                ModelOnGpu(
                    memory=memory_of(model),
                    gpu_bytes=int(memory * GIB),
                    utilization=utilization * share,
                    bytes_per_s=speed * 1e9 * share if speed else None,
                )
                for model, memory, share, speed in zip(
                    models,
                    _each(gpu or [here], models, "--gpu"),
                    _each(num_gpus or [1.0], models, "--num-gpus"),
                    _each(bandwidth or [0.0], models, "--bandwidth"),
                    strict=True,
                )
            ]
        except CascadeError as error:
            raise failed(error) from error
    console = Console(highlight=False)
    console.print(_memory_table(models, planned, session_tokens))
    if answers is None:
        return
    try:
        drafter, expert = plan_tiers(
            planned[0],
            planned[1],
            Load(
                answers=answers,
                session_tokens=session_tokens,
                draft_tokens=draft_tokens,
                max_sessions=max_sessions,
            ),
        )
    except ValueError as error:
        raise typer.BadParameter(f"{error}; give it a larger GPU, or --session-tokens") from error
    console.print(_tier_table(drafter, expert, answers))


def _each(values: Sequence[float], models: Sequence[str], option: str) -> list[float]:
    """Return a value for each model: those given, or the one given for all."""
    if len(values) not in {1, len(models)}:
        raise typer.BadParameter(f"give one, or one for each of {len(models)}", param_hint=option)
    return [value for _, value in zip_longest(models, values, fillvalue=values[0])]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _memory_table(models: list[str], planned: list[ModelOnGpu], session_tokens: int) -> Table:
    shares = dict.fromkeys(
        f"{one.utilization:.0%} of a GPU of {one.gpu_bytes / GIB:.0f} GiB" for one in planned
    )
    title = f"{' and '.join(shares)}, sessions of {session_tokens} tokens"
    names = ("model", "parameters", "weights", "cache per token", "cache tokens", "sessions")
    table = _table(title, *names)
    for model, one in zip(models, planned, strict=True):
        total, share = one.gpu_bytes, one.utilization
        table.add_row(
            model,
            f"{one.memory.parameters:,}",
            f"{one.memory.weights_bytes / GIB:.2f} GiB",
            f"{one.memory.token_bytes / 1024:.1f} KiB",
            f"{one.memory.cache_tokens(total, utilization=share):,}",
            f"{one.sessions(session_tokens):,}",
        )
    return table


def _tier_table(drafter: TierPlan, expert: TierPlan, answers: int) -> Table:
    table = _table(
        f"{answers} answers at once", "tier", "replicas", "decided by", "sessions each", "pass"
    )
    for name, one in (("drafter", drafter), ("expert", expert)):
        shortest = "" if one.pass_s is None else f"{one.pass_s * 1e3:.1f} ms or more"
        table.add_row(name, f"{one.replicas}", one.decided_by, f"{one.sessions}", shortest)
    return table
