"""What a benchmark compares, from the words of the command line to running systems.

A variant is written `CURVE[:DIAL][@DRAFT_TOKENS]` with the curves of `evaluation.grid`:
`expert_only`, `lossless`, `lossless@4`, `token_v3:0.9@auto`, `chow:0.6`.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.benchmark import llama_server, transformers_baselines
from cascade.benchmark.load import ClosedLoop
from cascade.benchmark.runner import compare
from cascade.benchmark.systems import Role, System, joined, one_process
from cascade.errors import InvalidMeasurement, wanted
from cascade.evaluation.grid import Setting, validated
from cascade.evaluation.tasks import TaskFamily, held_out
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cascade.benchmark.load import Load
    from cascade.benchmark.metrics import Slo
    from cascade.benchmark.runner import Comparison, RoundProbe
    from cascade.benchmark.systems import Deployment
    from cascade.evaluation.tasks import Level
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]

VARIANTS = ("expert_only", "lossless")
BASELINES = ("assisted", "batched", "continuous", "llama-server")

# The families whose answers are long enough to time.
LONG_ANSWERS = (TaskFamily.PROBLEMS, TaskFamily.FUNCTIONS, TaskFamily.FACTS, TaskFamily.REPORTS)

ANSWER_TOKENS = 96

_NO_REUSE = "No system that this run started keeps the KV cache of an earlier request."
_CACHE_TOKENS_PER_REQUEST = 1024  # of continuous batching


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to compare, under which load."""

    settings: Application
    bodies: Sequence[Json]
    load: Load
    rounds: int
    variants: Sequence[str] = VARIANTS
    deployments: Sequence[Deployment] = (one_process,)
    rtts_ms: Sequence[float] = (0.0,)
    baselines: Sequence[str] = ()
    slo: Slo | None = None
    probe: RoundProbe | None = None


def parse_variant(text: str) -> Json:
    """Return the `cascade` object of the requests of a variant.

    Raises:
        InvalidMeasurement: There is no such curve, dial or draft length.
    """
    rest, _, length = text.partition("@")
    curve, _, dial = rest.partition(":")
    try:
        setting = Setting(
            curve=curve,
            temperature=0.0,
            dial=float(dial) if dial else None,
            draft_tokens=int(length) if length not in {"", "auto"} else None,
        )
    except ValueError as error:
        raise InvalidMeasurement(
            f"cannot read {text!r}; write CURVE[:DIAL][@DRAFT_TOKENS], such as lossless,"
            " lossless@4 or token_v3:0.9"
        ) from error
    options = validated(setting).options()
    if setting.draft_tokens is None and setting.mode in {Mode.CASCADE, Mode.SPECULATIVE}:
        options["draft_tokens"] = "auto"
    return options


def held_out_requests(
    *, count: int, levels: Sequence[Level], families: Sequence[TaskFamily] = LONG_ANSWERS
) -> list[Json]:
    """Return greedy requests of held-out items; families alternate.

    Args:
        count: Items of each family.
        levels: How hard the items are.
        families: Which kinds of items.

    Raises:
        InvalidMeasurement: A family has fewer items.
    """
    try:
        drawn = [held_out(family, count=count, levels=levels) for family in families]
    except ValueError as error:
        raise InvalidMeasurement(f"the workload is too small: {error}") from error
    return [greedy(item.prompt) for items in zip(*drawn, strict=True) for item in items]


def greedy(prompt: str) -> Json:
    """Return a chat request of one turn at temperature 0."""
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS}


def with_engine(settings: Application, tier: str, **fields: Any) -> Application:
    """Return the settings with some fields of a tier's engine changed."""
    old = getattr(settings, tier)
    changed = old.model_copy(update={"engine": replace(old.engine, **fields)})
    return settings.model_copy(update={tier: changed})


async def run_plan(plan: Plan, *, progress: Callable[[str], object] = lambda _: None) -> Comparison:
    """Start all systems of a plan and compare them.

    Prompts repeat from round to round. Baselines compute each prompt anew; if there are any, so do
    our tiers.

    Raises:
        InvalidMeasurement: The plan has an unknown variant or baseline, or a request is refused.
        StartupError: A pair cannot be served.
    """
    variants = {variant: parse_variant(variant) for variant in plan.variants}
    baselines = _commands(plan.baselines)
    settings = plan.settings
    if baselines:
        settings = with_engine(settings, "drafter", prefix_reuse=False)
        settings = with_engine(settings, "expert", prefix_reuse=False)
    async with AsyncExitStack() as cleanup:
        progress("starting the pair")
        systems = [
            replace(base, name=joined(variant, base.name), options=options, role=_role_of(options))
            for start in plan.deployments
            for base in await cleanup.enter_async_context(start(settings, plan.rtts_ms))
            for variant, options in variants.items()
        ]
        if baselines:
            progress(f"starting {', '.join(baselines)}")
            systems += await _baseline_systems(plan, baselines, cleanup, progress)
        comparison = await compare(
            systems,
            plan.bodies,
            plan.load,
            rounds=plan.rounds,
            slo=plan.slo,
            probe=plan.probe,
            progress=progress,
        )
        notes = (_NO_REUSE, *comparison.notes) if baselines else comparison.notes
        return replace(comparison, notes=notes)


def _commands(baselines: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the baselines by name, with the command of those that are programs.

    Raises:
        InvalidMeasurement: There is no such baseline or program, or a package is missing.
    """
    commands: dict[str, tuple[str, ...]] = {}
    for baseline in baselines:
        name, equals, path = baseline.partition("=")
        if name not in BASELINES:
            raise InvalidMeasurement(f"no peer {name!r}; {wanted(name, BASELINES)}")
        if equals and (name != "llama-server" or not path):
            raise InvalidMeasurement(
                f"cannot read the peer {baseline!r}; only llama-server takes a path, as in"
                " llama-server=/usr/bin/llama-server"
            )
        commands[name] = llama_server.command_of(path) if name == "llama-server" else ()
    return commands


def _role_of(options: Json) -> Role:
    return Role.EXPERT_ALONE if options.get("mode") == Mode.EXPERT_ONLY else Role.OTHER


async def _baseline_systems(
    plan: Plan,
    baselines: Mapping[str, tuple[str, ...]],
    cleanup: AsyncExitStack,
    progress: Callable[[str], object],
) -> list[System]:
    """Start the same models under `transformers` and llama.cpp, in the ways that the plan names."""
    load = plan.load
    limit = load.concurrency if isinstance(load, ClosedLoop) else len(plan.bodies)
    systems: list[System] = []
    if baselines.keys() - {"llama-server"}:
        pair = transformers_baselines.load_pair(plan.settings)
        if "assisted" in baselines:
            systems.append(await _best_assisted(pair, plan.bodies[:3], progress))
        alone: list[transformers_baselines.Generate | transformers_baselines.Continuous] = []
        if "batched" in baselines:
            alone.append(transformers_baselines.Generate(pair, limit=limit))
        if "continuous" in baselines:
            tokens = limit * _CACHE_TOKENS_PER_REQUEST
            started = transformers_baselines.continuous(pair, tokens=tokens)
            alone.append(await cleanup.enter_async_context(started))
        systems += [
            System(name=client.name, client=client, role=Role.EXPERT_ALONE) for client in alone
        ]
    if "llama-server" in baselines:
        started = llama_server.llama_systems(
            plan.settings,
            plan.bodies,
            command=baselines["llama-server"],
            concurrency=limit,
            progress=progress,
        )
        systems += await cleanup.enter_async_context(started)
    return systems


async def _best_assisted(
    pair: transformers_baselines.Pair, bodies: Sequence[Json], progress: Callable[[str], object]
) -> System:
    """Return assisted generation with the fastest of the drafting schedules on a few requests."""
    clients = [
        transformers_baselines.Generate(pair, assistance=assistance)
        for assistance in transformers_baselines.ASSISTANCE
    ]
    systems = {client.name: System(name=client.name, client=client) for client in clients}
    comparison = await compare(list(systems.values()), bodies, ClosedLoop(), rounds=1)
    speeds = {name: one.median.tokens_per_s for name, one in comparison.systems.items()}
    for name, tokens_per_s in speeds.items():
        progress(f"{name}: {tokens_per_s:.1f} tokens/s")
    return systems[max(speeds, key=lambda name: speeds[name])]
