"""From what a person asks of a benchmark to contenders, and a contest of them.

A way of asking is written `CURVE[:DIAL][@DRAFT_TOKENS]` with the curves of `lab.grid`:
`expert_only`, `lossless`, `lossless@4`, `token_v3:0.9@auto`, `chow:0.6`.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

import torch
from transformers import AutoConfig

from cascade.benchmark import synthetic_model, transformers_baselines
from cascade.benchmark.load import Closed
from cascade.benchmark.runner import compete
from cascade.benchmark.systems import Contender, apart, direct, together
from cascade.errors import InvalidMeasurement
from cascade.evaluation.client import over_http
from cascade.evaluation.grid import Setting, checked
from cascade.evaluation.tasks import Family, held_out
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence

    from cascade.benchmark.load import Arrivals
    from cascade.benchmark.metrics import Objective
    from cascade.benchmark.runner import Contest, Gauge
    from cascade.benchmark.systems import Running
    from cascade.evaluation.tasks import Level
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]

ASKS = ("expert_only", "lossless")

PEERS = ("assisted", "batched", "continuous")

WORDY = (Family.PROBLEMS, Family.FUNCTIONS, Family.FACTS, Family.REPORTS)

"""The families whose answers are long enough to time."""

ANSWER_TOKENS = 96

_CACHE_TOKENS_OF_A_SESSION = 1024  # of a peer's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """Both tiers in this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Direct:
    """Both tiers in this process, called without gRPC and without a round trip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """Each tier in a process of its own, on the given cores."""

    cores: Mapping[str, Collection[int]] = field(default_factory=dict[str, list[int]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that runs already."""

    url: str
    api_key: str | None = None


Where: TypeAlias = Here | Direct | Apart | Server


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to compare, on what."""

    settings: Application
    bodies: Sequence[Json]
    arrivals: Arrivals
    rounds: int
    asks: Sequence[str] = ASKS
    where: Sequence[Where] = (Here(),)
    rtts_ms: Sequence[float] = (0.0,)
    peers: Sequence[str] = ()
    objective: Objective | None = None
    gauge: Gauge | None = None


def parse_ask(text: str) -> Json:
    """Return the `cascade` object that a way of asking stands for.

    Raises:
        InvalidMeasurement: No such curve, dial or length.
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
            f"{text!r} is no way of asking; write CURVE[:DIAL][@DRAFT_TOKENS], such as lossless,"
            " lossless@4 or token_v3:0.9"
        ) from error
    told = checked(setting).options()
    if setting.draft_tokens is None and setting.mode in {Mode.CASCADE, Mode.SPECULATIVE}:
        told["draft_tokens"] = "auto"
    return told


def questions(
    *, count: int, levels: Sequence[Level], families: Sequence[Family] = WORDY
) -> list[Json]:
    """Return greedy requests: `count` held-out items of each family, families taking turns.

    Raises:
        InvalidMeasurement: A family has fewer.
    """
    try:
        drawn = [held_out(family, count=count, levels=levels) for family in families]
    except ValueError as error:
        raise InvalidMeasurement(f"the workload is too small: {error}") from error
    return [greedy(item.prompt) for same in zip(*drawn, strict=True) for item in same]


def greedy(prompt: str) -> Json:
    """Return a chat request of one turn at temperature 0."""
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS}


def padded_expert(settings: Application, *, parameters: str) -> Application:
    """Return the settings with the expert cost-padded to a size; made once, and then kept.

    Raises:
        UnsupportedModel: The expert cannot be padded, or `parameters` is no number.
    """
    source = settings.expert.model_path
    count = synthetic_model.parse_parameters(parameters)
    shape = synthetic_model.shape_for(count, AutoConfig.from_pretrained(source))
    dtype = settings.expert.engine.dtype
    stored = torch.float32 if dtype in {"auto", "float32"} else getattr(torch, dtype)
    folder = _cache() / f"{parameters}-{dtype}-{_digest(Path(source), shape)}"
    if not (folder / "config.json").exists():
        synthetic_model.pad(source, out=folder, shape=shape, dtype=stored)
    expert = settings.expert.model_copy(update={"model": str(folder)})
    return settings.model_copy(update={"expert": expert})


async def execute(plan: Plan, *, told: Callable[[str], object] = lambda _: None) -> Contest:
    """Open all contenders of a plan and let them compete.

    Raises:
        InvalidMeasurement: The plan asks for what there is not.
        StartupError: A pair cannot be served.
    """
    async with AsyncExitStack() as cleanup:
        contenders: list[Contender] = []
        for where in plan.where:
            contenders += await cleanup.enter_async_context(_ours(plan, where))
        if plan.peers:
            contenders += await cleanup.enter_async_context(_theirs(plan, told=told))
        return await compete(
            contenders,
            plan.bodies,
            plan.arrivals,
            rounds=plan.rounds,
            objective=plan.objective,
            gauge=plan.gauge,
            told=told,
        )


@asynccontextmanager
async def _ours(plan: Plan, where: Where) -> AsyncGenerator[list[Contender]]:
    """Open our own contenders: every way of asking, over every round trip."""
    async with AsyncExitStack() as cleanup:
        match where:
            case Server(url=url, api_key=api_key):
                answerer = await cleanup.enter_async_context(over_http(url, api_key=api_key))
                bases = [Contender(name="", answerer=answerer)]
            case Here():
                running = await cleanup.enter_async_context(together(plan.settings))
                bases = await _delayed(plan, running, "", cleanup)
            case Direct():
                bases = [await cleanup.enter_async_context(direct(plan.settings))]
            case Apart(cores=cores):
                running = await cleanup.enter_async_context(apart(plan.settings, cores=cores))
                bases = await _delayed(plan, running, "apart", cleanup)
            case _:
                assert_never(where)
        yield [
            base.asked(", ".join(filter(None, (ask, base.name))), **parse_ask(ask))
            for base in bases
            for ask in plan.asks
        ]


async def _delayed(
    plan: Plan, running: Running, name: str, cleanup: AsyncExitStack
) -> list[Contender]:
    """Return a contender for each round trip, named after it; half of it is added each way."""
    found: list[Contender] = []
    for rtt_ms in plan.rtts_ms:
        named = ", ".join(filter(None, (name, f"{rtt_ms:g} ms" if rtt_ms else "")))
        opened = running.contender(named, delay_s=rtt_ms / 2e3)
        found.append(await cleanup.enter_async_context(opened))
    return found


@asynccontextmanager
async def _theirs(plan: Plan, *, told: Callable[[str], object]) -> AsyncGenerator[list[Contender]]:
    """Open the peers a plan names."""
    if unknown := set(plan.peers) - set(PEERS):
        raise InvalidMeasurement(f"no peer {min(unknown)!r}; there are {', '.join(PEERS)}")
    drafter, expert = plan.settings.drafter, plan.settings.expert
    pair = transformers_baselines.load_pair(
        drafter=drafter.model_path,
        expert=expert.model_path,
        device=expert.engine.device,
        drafter_dtype=drafter.engine.dtype,
        expert_dtype=expert.engine.dtype,
        threads=expert.engine.threads,
    )
    limit = plan.arrivals.concurrency if isinstance(plan.arrivals, Closed) else len(plan.bodies)
    async with AsyncExitStack() as cleanup:
        found: list[Contender] = []
        if "assisted" in plan.peers:
            found.append(await best_assistance(pair, plan.bodies[:3], told=told))
        if "batched" in plan.peers:
            batched = transformers_baselines.Batched(pair, limit=limit)
            found.append(Contender(name=batched.name, answerer=batched))
        if "continuous" in plan.peers:
            tokens = limit * _CACHE_TOKENS_OF_A_SESSION
            opened = await cleanup.enter_async_context(
                transformers_baselines.continuous(pair, tokens=tokens)
            )
            found.append(Contender(name=opened.name, answerer=opened))
        yield found


async def best_assistance(
    pair: transformers_baselines.Pair, bodies: Sequence[Json], *, told: Callable[[str], object]
) -> Contender:
    """Return assisted generation with the best of `peers.ASSISTANCE` on a few requests."""
    tried = [
        transformers_baselines.Assisted(pair, assistance)
        for assistance in transformers_baselines.ASSISTANCE
    ]
    contenders = [Contender(name=one.name, answerer=one) for one in tried]
    contest = await compete(contenders, bodies, Closed(), rounds=1)
    for standing in contest.standings:
        told(f"{standing.name}: {standing.middle.tokens_per_s:.1f} tokens/s")
    best = max(contest.standings, key=lambda standing: standing.middle.tokens_per_s)
    return next(one for one in contenders if one.name == best.name)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cascade" / "padded"


def _digest(source: Path, shape: synthetic_model.Shape) -> str:
    """Return what changes with the source's weights or with the shape."""
    digest = hashlib.sha256(repr(shape).encode())
    for path in sorted(source.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
