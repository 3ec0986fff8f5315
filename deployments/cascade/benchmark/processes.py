"""Tiers as processes of this machine, and routers over tiers that run somewhere."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cascade.engine import threads
from cascade.errors import StartupError
from cascade.protocol import services
from cascade.protocol.client import ReplicaClients
from cascade.router.leases import FixedLeases
from cascade.router.tier_session import TierClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Mapping

    from cascade.api.context import ServingContext
    from cascade.protocol.services import TierKind
    from cascade.settings import Application

TOKEN_VARIABLE = "CASCADE_LEASE_TOKEN"  # noqa: S105 - the variable's name, as `cascade tier` reads it

_ANY_PORT = "127.0.0.1:0"

_START_TIMEOUT_S = 300.0

_STOP_TIMEOUT_S = 20.0

_TIERS = ("drafter", "expert")

_PROGRAM = "from cascade.cli import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierProcess:
    """A replica in a process of its own."""

    name: str
    address: str
    pid: int

    @property
    def cpu_s(self) -> float:
        """Return the seconds of processor time that it has used, of all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        user, system = int(fields[11]), int(fields[12])
        return (user + system) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class TierProcesses:
    """Both tiers, each in a process of its own; `token` opens sessions on both."""

    drafter: TierProcess
    expert: TierProcess
    token: str


@asynccontextmanager
async def tier_processes(
    settings: Application, *, cores: Mapping[str, Collection[int]] | None = None
) -> AsyncGenerator[TierProcesses]:
    """Start `cascade tier` twice, and end both at the end.

    Args:
        settings: What `cascade.app:build` takes.
        cores: Which cores each tier may use, by its name; all of this process's if absent.

    Raises:
        StartupError: A tier did not start.
    """
    token = secrets.token_urlsafe()
    async with AsyncExitStack() as cleanup:
        config = Path(cleanup.enter_context(TemporaryDirectory())) / "settings.yaml"
        told = {"applications": [{"args": settings.model_dump(mode="json", exclude={"api_keys"})}]}
        config.write_text(json.dumps(told))
        variables = {TOKEN_VARIABLE: token}
        processes = {
            name: await cleanup.enter_async_context(
                _process(name, settings, config=config, variables=variables, cores=cores or {})
            )
            for name in _TIERS
        }
        addresses = await asyncio.gather(*(_address(processes[name], name) for name in _TIERS))
        drafter, expert = (
            TierProcess(name=name, address=address, pid=processes[name].pid)
            for name, address in zip(_TIERS, addresses, strict=True)
        )
        yield TierProcesses(drafter=drafter, expert=expert, token=token)


@asynccontextmanager
async def routed(
    settings: Application,
    *,
    drafter: str,
    expert: str,
    token: str,
    peers: Callable[[TierKind], ReplicaClients] = ReplicaClients,
) -> AsyncGenerator[ServingContext]:
    """Route over tiers at two addresses, in this process.

    Args:
        settings: What `cascade.app:build` takes; the tiers' own part is not read.
        drafter: `host:port` of the drafter.
        expert: `host:port` of the expert.
        token: Of both tiers' leases.
        peers: Makes what reaches a tier, such as `partial(Peers, delay_s=0.005)`.
    """
    drafters, experts = (
        TierClient(leases=FixedLeases([address], token=token), clients=peers(kind))
        for kind, address in ((services.DRAFTER, drafter), (services.EXPERT, expert))
    )
    try:
        router = settings.router.loop(drafters=drafters, experts=experts)
        yield settings.serving_context(router, settings.pair())
    finally:
        await drafters.clients.close()
        await experts.clients.close()


@asynccontextmanager
async def _process(
    name: str,
    settings: Application,
    *,
    config: Path,
    variables: dict[str, str],
    cores: Mapping[str, Collection[int]],
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run `cascade tier` until the block ends."""
    words = ("tier", name, "--address", _ANY_PORT, "--config", str(config))
    own = threads.environment(threads=getattr(settings, name).engine.threads)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PROGRAM, *words,
        stdout=asyncio.subprocess.PIPE, env=os.environ | own | variables,
    )  # fmt: skip
    try:
        if name in cores:
            os.sched_setaffinity(process.pid, cores[name])
        yield process
    finally:
        await _end(process)


async def _address(process: asyncio.subprocess.Process, name: str) -> str:
    """Return the address that a tier says it serves on."""
    assert process.stdout is not None, "piped"
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while line := (await process.stdout.readline()).decode():
                if " serves " in line:
                    return line.split()[-1]
    except TimeoutError as error:
        raise StartupError(
            f"the {name} did not serve within {_START_TIMEOUT_S:g} s; start it alone with"
            f" `cascade tier {name}` to see why"
        ) from error
    raise StartupError(f"the {name} ended before it served; its own words are above")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
