"""The systems that a benchmark compares: our router over tiers in one or in several processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import psutil

from cascade.engine import threads
from cascade.errors import StartupError
from cascade.evaluation.client import InProcessClient, connect_http
from cascade.local import local_server
from cascade.protocol.client import ReplicaClients
from cascade.protocol.services import DRAFTER, EXPERT
from cascade.router.leases import FixedLeases
from cascade.router.tier_session import TierClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from cascade.evaluation.client import Client
    from cascade.local import LocalServer
    from cascade.settings import Application

Json: TypeAlias = dict[str, Any]

BusySeconds: TypeAlias = "Callable[[], dict[str, float]]"

# Starts systems for the settings of a pair and the round trips to emulate.
Deployment: TypeAlias = (
    "Callable[[Application, Sequence[float]], AbstractAsyncContextManager[list[System]]]"
)

TOKEN_VARIABLE = "CASCADE_LEASE_TOKEN"  # noqa: S105 - the variable's name, as `cascade tier` reads it

_TIERS = ("drafter", "expert")
_STOP_TIMEOUT_S = 20.0


class Role(StrEnum):
    """What a system stands for; ratios are quoted against the fastest of some roles."""

    EXPERT_ALONE = "the expert alone"
    LLAMA_DRAFTED = "llama.cpp with the drafter"
    OTHER = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Something that answers requests, and the options it is asked with."""

    name: str
    client: Client
    options: Json = field(default_factory=dict[str, Any])  # the `cascade` object of each request
    fields: Json = field(default_factory=dict[str, Any])  # other fields of each request
    busy_s: BusySeconds = dict  # seconds for which each tier has been busy so far
    role: Role = Role.OTHER
    note: str = ""  # what a reader must know of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """A running drafter and expert. Any number of routers can use them."""

    settings: Application
    addresses: tuple[str, str]  # of drafter and expert
    token: str  # of both tiers' leases
    busy_s: BusySeconds

    @asynccontextmanager
    async def routed(self, name: str, rtts_ms: Sequence[float]) -> AsyncGenerator[list[System]]:
        """Start one router for each round trip, in this process.

        Args:
            name: Of the systems, before their round trip.
            rtts_ms: Round trips to emulate; half of each is added each way.
        """
        systems: list[System] = []
        async with AsyncExitStack() as cleanup:
            for rtt_ms in rtts_ms:
                tiers: list[TierClient] = []
                for kind, address in zip((DRAFTER, EXPERT), self.addresses, strict=True):
                    clients = ReplicaClients(kind, delay_s=rtt_ms / 2e3)
                    cleanup.push_async_callback(clients.close)
                    leases = FixedLeases([address], token=self.token)
                    tiers.append(TierClient(leases=leases, clients=clients))
                router = self.settings.router.loop(drafters=tiers[0], experts=tiers[1])
                context = self.settings.serving_context(router, self.settings.pair())
                if context.grammars is not None:
                    cleanup.push_async_callback(context.grammars.close)
                full_name = joined(name, f"{rtt_ms:g} ms" if rtt_ms else "")
                client = InProcessClient(context, name=full_name)
                systems.append(System(name=full_name, client=client, busy_s=self.busy_s))
            yield systems


def joined(*parts: str) -> str:
    """Return the name of a system from the parts that are not empty."""
    return ", ".join(filter(None, parts))


def tiers_of(settings: Application, server: LocalServer) -> Tiers:
    """Return the tiers of a server in this process; one is busy while its engine runs a step."""
    return Tiers(
        settings=settings,
        addresses=(server.drafter.address, server.expert.address),
        token=server.token,
        busy_s=lambda: {tier: getattr(server, tier).engine.stats().busy_s for tier in _TIERS},
    )


@asynccontextmanager
async def one_process(
    settings: Application, rtts_ms: Sequence[float]
) -> AsyncGenerator[list[System]]:
    """Run router and tiers in this process; raises StartupError."""
    async with (
        local_server(settings) as server,
        tiers_of(settings, server).routed("", rtts_ms) as systems,
    ):
        yield systems


@asynccontextmanager
async def one_process_without_grpc(
    settings: Application, _: Sequence[float]
) -> AsyncGenerator[list[System]]:
    """Run router and tiers in this process, connected by calls; raises StartupError."""
    name = "one process"
    async with local_server(settings, direct=True) as server:
        client = InProcessClient(server.service, name=name)
        yield [System(name=name, client=client, busy_s=tiers_of(settings, server).busy_s)]


@asynccontextmanager
async def separate_processes(
    settings: Application, rtts_ms: Sequence[float]
) -> AsyncGenerator[list[System]]:
    """Run the router in this process and each tier in its own; raises StartupError."""
    async with tier_processes(settings) as tiers, tiers.routed("apart", rtts_ms) as systems:
        yield systems


@asynccontextmanager
async def running_server(
    _: Application, __: Sequence[float], *, url: str, api_key: str | None
) -> AsyncGenerator[list[System]]:
    """Connect to a server that is already running; raises InvalidMeasurement."""
    async with connect_http(url, api_key=api_key) as client:
        yield [System(name="", client=client)]


@asynccontextmanager
async def tier_processes(
    settings: Application, *, start_timeout_s: float = 300.0
) -> AsyncGenerator[Tiers]:
    """Run `cascade tier` twice, each tier in its own process.

    A tier is busy while it uses a core, and twice as busy while it uses two.

    Args:
        settings: What `cascade.app:build` takes.
        start_timeout_s: How long a tier may take to start.

    Raises:
        StartupError: A tier did not start.
    """
    token = secrets.token_urlsafe()
    async with AsyncExitStack() as cleanup:
        config = Path(cleanup.enter_context(TemporaryDirectory())) / "settings.yaml"
        arguments = settings.model_dump(mode="json")
        config.write_text(json.dumps({"applications": [{"args": arguments}]}))
        processes = {
            tier: await cleanup.enter_async_context(
                _tier_process(
                    tier,
                    config,
                    threads.environment(threads=getattr(settings, tier).engine.threads)
                    | {TOKEN_VARIABLE: token},
                )
            )
            for tier in _TIERS
        }
        drafter, expert = [
            await _address(*started, timeout_s=start_timeout_s) for started in processes.items()
        ]
        yield Tiers(
            settings=settings,
            addresses=(drafter, expert),
            token=token,
            busy_s=lambda: {
                tier: sum(psutil.Process(process.pid).cpu_times()[:2])
                for tier, process in processes.items()
            },
        )


@asynccontextmanager
async def _tier_process(
    tier: str, config: Path, variables: dict[str, str]
) -> AsyncGenerator[asyncio.subprocess.Process]:
    words = ("tier", tier, "--address", "127.0.0.1:0", "--config", str(config))
    async with child_process(
        sys.executable, "-c", "from cascade.cli import main; main()", *words,
        stdout=asyncio.subprocess.PIPE, env=os.environ | variables,
    ) as process:  # fmt: skip
        yield process


@asynccontextmanager
async def child_process(
    *command: str, **options: Any
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run a command, and end it at the end.

    Args:
        command: The program and its arguments.
        options: Of `asyncio.create_subprocess_exec`.
    """
    process = await asyncio.create_subprocess_exec(*command, **options)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.communicate(), _STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.communicate()


async def _address(tier: str, process: asyncio.subprocess.Process, *, timeout_s: float) -> str:
    """Return the address that a tier prints once it serves."""
    assert process.stdout is not None, "piped"
    try:
        async with asyncio.timeout(timeout_s):
            async for line in process.stdout:
                if found := re.search(r"\S+:\d+$", line.decode().rstrip()):
                    return found[0]
    except TimeoutError as error:
        raise StartupError(
            f"the {tier} did not start within {timeout_s:g} s; start it alone with"
            f" `cascade tier {tier}` to see why"
        ) from error
    raise StartupError(f"the {tier} ended before it served; its own output is above")
