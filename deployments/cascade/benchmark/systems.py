"""What a benchmark compares: servers, our own loop in several arrangements, and peers."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.benchmark.processes import routed, tier_processes
from cascade.evaluation.client import InProcess
from cascade.local import local_server
from cascade.protocol.client import ReplicaClients

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Mapping

    from cascade.evaluation.client import Answerer
    from cascade.local import LocalServer
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]

Busy: TypeAlias = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Someone who answers, and how it is asked."""

    name: str
    answerer: Answerer
    cascade: Json = field(default_factory=dict[str, Any])  # of each request
    busy_s: Callable[[], Busy] = dict  # seconds each tier has been busy so far

    def asked(self, name: str, **cascade: Any) -> Contender:
        """Return the same one under another name, asked in another way."""
        return replace(self, name=name, cascade=self.cascade | cascade)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Both tiers, running; any number of routers can stand before them."""

    settings: Application
    drafter: str  # addresses
    expert: str
    token: str  # of both tiers' leases
    busy_s: Callable[[], Busy]

    @asynccontextmanager
    async def contender(self, name: str, *, delay_s: float = 0.0) -> AsyncGenerator[Contender]:
        """Put a router before the tiers, which sends and hears everything `delay_s` late."""
        async with routed(
            self.settings,
            drafter=self.drafter,
            expert=self.expert,
            token=self.token,
            peers=partial(ReplicaClients, delay_s=delay_s),
        ) as service:
            answerer = InProcess(service, name=name)
            yield Contender(name=name, answerer=answerer, busy_s=self.busy_s)


@asynccontextmanager
async def together(settings: Application) -> AsyncGenerator[Running]:
    """Run both tiers in this process; a tier is busy while its engine runs a pass."""
    async with local_server(settings) as running:
        yield Running(
            settings=settings,
            drafter=running.drafter.address,
            expert=running.expert.address,
            token=running.token,
            busy_s=partial(_passes_s, running),
        )


@asynccontextmanager
async def direct(settings: Application) -> AsyncGenerator[Contender]:
    """Run the loop and both tiers in this process without gRPC: what a network is held against."""
    async with local_server(settings, direct=True) as running:
        name = "one process"
        answerer = InProcess(running.service, name=name)
        yield Contender(name=name, answerer=answerer, busy_s=partial(_passes_s, running))


def _passes_s(running: LocalServer) -> Busy:
    return {
        "drafter": running.drafter.engine.stats().busy_s,
        "expert": running.expert.engine.stats().busy_s,
    }


@asynccontextmanager
async def apart(
    settings: Application, *, cores: Mapping[str, Collection[int]] | None = None
) -> AsyncGenerator[Running]:
    """Run each tier in a process of its own.

    A tier is busy while it has a core, and twice as busy while it has two.
    """
    async with tier_processes(settings, cores=cores) as running:
        yield Running(
            settings=settings,
            drafter=running.drafter.address,
            expert=running.expert.address,
            token=running.token,
            busy_s=lambda: {"drafter": running.drafter.cpu_s, "expert": running.expert.cpu_s},
        )
