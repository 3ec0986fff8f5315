"""`cascade tier` and `cascade router`: the parts of a server as plain processes, without Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console

from cascade.engine import threads
from cascade.errors import CascadeError, StartupError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from fastapi import FastAPI

    from cascade.protocol.tls import TlsFiles
    from cascade.replica.options import ReplicaOptions
    from cascade.replica.replica import Replica
    from cascade.settings import Application

TOKEN_VARIABLE = "CASCADE_LEASE_TOKEN"  # noqa: S105 - the variable's name
TokenFile = Annotated[
    Path | None,
    typer.Option(
        help=f"File with the secret that callers of a tier send; or in {TOKEN_VARIABLE}. Not an"
        " option itself, since all users of the machine see those"
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="A cluster/*.yaml whose args to use; defaults if absent")
]


class TierName(StrEnum):
    """A tier."""

    DRAFTER = "drafter"
    EXPERT = "expert"


def read_settings(config: Path | None) -> Application:
    """Return the settings of the first application of a Serve YAML, or the defaults.

    Raises:
        StartupError: The file cannot be read, or its settings are invalid.
    """
    from cascade.settings import Application  # noqa: PLC0415 - imports torch

    if config is None:
        return Application()
    try:
        document: Any = yaml.safe_load(config.read_text())
        return Application.model_validate(document["applications"][0].get("args") or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StartupError(f"{config} cannot be used: {error}") from error
    except ValidationError as error:
        raise StartupError("\n".join(settings_errors(config, error))) from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise StartupError(
            f"{config} has no `applications`; wanted a file like cluster/local.yaml"
        ) from error


def _lease_token(path: Path | None) -> str:
    """Return the secret of router and tiers, from a file or the environment.

    Raises:
        StartupError: There is none.
    """
    try:
        token = path.read_text().strip() if path else os.environ.get(TOKEN_VARIABLE, "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"`--token-file` cannot be read: {error}") from error
    if not token:
        raise StartupError(
            f"there is no token; put a secret, the same for router and tiers, into {TOKEN_VARIABLE}"
            " or into a file for `--token-file`"
        )
    return token


def settings_errors(config: Path, error: ValidationError) -> list[str]:
    """Return what is wrong with the settings of a YAML, a line for each."""
    return [
        f"{config}: {'.'.join(('args', *map(str, one['loc'])))} {one['msg']}"
        for one in error.errors(include_url=False)
    ]


def failed(error: CascadeError) -> typer.Exit:
    """Print an error and return the exit: status 2 if the user can fix it, otherwise 1."""
    console = Console(stderr=True, soft_wrap=True)
    console.print("error", style="bold red", end=" ")
    console.print(error.message, markup=False, highlight=False)
    return typer.Exit(2 if isinstance(error, StartupError) else 1)


def tier(  # noqa: PLR0913 - one parameter an option
    name: Annotated[TierName, typer.Argument(help="Which tier")],
    *,
    address: Annotated[str, typer.Option(help="host:port to bind; port 0 picks a free one")],
    token_file: TokenFile = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, demo or demo-t5")] = None,
    expert: Annotated[
        str | None, typer.Option(help="The expert of a drafter whose vocabulary differs")
    ] = None,
    config: Config = None,
    metrics_port: Annotated[int, typer.Option(help="Port for Prometheus; 0: none")] = 0,
) -> None:
    """Serve one replica of a tier on its gRPC address until interrupted.

    SIGTERM lets open sessions end first, for `deployment.graceful_shutdown_timeout_s` at most. A
    second signal, or Ctrl-C, ends it at once; sessions then go on at another replica.
    """
    # Importing the settings imports torch, which reads these variables.
    os.environ.update(threads.environment())
    try:
        application = read_settings(config)
        serving = _serve(
            name,
            _tier_options(application, name, model=model, expert=expert, known=config is not None),
            tls=application.tls_files,
            address=address,
            token=_lease_token(token_file),
            metrics_port=metrics_port,
            drain_s=getattr(application, name.value).deployment.graceful_shutdown_timeout_s,
        )
        asyncio.run(serving)
    except StartupError as error:
        raise failed(error) from error


def _tier_options(
    settings: Application, name: TierName, *, model: str | None, expert: str | None, known: bool
) -> ReplicaOptions:
    """Return what a replica takes.

    Args:
        settings: Of the whole application.
        name: Its tier.
        model: Its model; None: as the settings say.
        expert: The expert of a drafter; None: as the settings say.
        known: Whether the settings name the models of both tiers.
    """
    tier = getattr(settings, name.value)
    if model is not None:
        tier = tier.model_copy(update={"model": model})
    if name is TierName.EXPERT or not (known or expert):
        return tier.options()
    other = (
        settings.expert if expert is None else settings.expert.model_copy(update={"model": expert})
    )
    return settings.model_copy(update={"drafter": tier, "expert": other}).drafter_options()


async def _serve(  # noqa: PLR0913 - the command's options
    name: TierName,
    options: Any,
    *,
    tls: TlsFiles | None,
    address: str,
    token: str,
    metrics_port: int,
    drain_s: float,
) -> None:
    # Imported late: torch reads the environment when it is imported.
    from cascade.drafter.drafter import Drafter  # noqa: PLC0415 - as above
    from cascade.expert.expert import Expert  # noqa: PLC0415 - as above
    from cascade.observability.request_log import to_stderr  # noqa: PLC0415 - as above
    from cascade.protocol.tls import credentials_of  # noqa: PLC0415 - as above

    to_stderr()
    kind = Drafter if name is TierName.DRAFTER else Expert
    replica: Replica[Any] = await kind.start(
        options, address=address, token=token, credentials=credentials_of(tls)
    )
    typer.echo(f"{name.value} serves {options.model} on {replica.address}")
    reports = asyncio.create_task(_report(replica, metrics_port)) if metrics_port else None
    await _interrupted(replica, drain_s=drain_s)
    if reports is not None:
        reports.cancel()
    await replica.stop()


async def _interrupted(replica: Replica[Any], *, drain_s: float) -> None:
    """Return when the process is to end: after SIGTERM, when no session is open any more."""
    loop, at_once, draining = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def terminate() -> None:
        (at_once if draining.is_set() else draining).set()

    loop.add_signal_handler(signal.SIGINT, at_once.set)
    loop.add_signal_handler(signal.SIGTERM, terminate)

    async def drained() -> None:
        await draining.wait()
        await asyncio.wait([asyncio.ensure_future(replica.drain())], timeout=drain_s)

    ends = [asyncio.ensure_future(drained()), asyncio.ensure_future(at_once.wait())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for one in ends:
        one.cancel()


async def _report(replica: Replica[Any], port: int) -> None:
    from prometheus_client import start_http_server  # noqa: PLC0415 - rarely needed

    from cascade.observability.metric_specs import ENGINE  # noqa: PLC0415 - as above
    from cascade.observability.metrics import PrometheusMetrics  # noqa: PLC0415 - as above
    from cascade.replica.metrics import keep_reporting  # noqa: PLC0415 - as above

    metrics = PrometheusMetrics(ENGINE)
    start_http_server(port, registry=metrics.registry)
    await keep_reporting(replica, metrics)


def router(  # noqa: PLR0913 - one parameter an option
    *,
    drafter: Annotated[list[str], typer.Option(help="Address of a drafter; repeat for more")],
    expert: Annotated[list[str], typer.Option(help="Address of an expert; repeat for more")],
    token_file: TokenFile = None,
    host: Annotated[str, typer.Option(help="HTTP address to bind")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port to bind")] = 8000,
    config: Config = None,
) -> None:
    """Serve HTTP over tiers that were started with `cascade tier`."""
    import uvicorn  # noqa: PLC0415 - `cascade ask` does not need a server's libraries

    try:
        token = _lease_token(token_file)
        app = _http_app(read_settings(config), drafters=drafter, experts=expert, token=token)
    except StartupError as error:
        raise failed(error) from error
    uvicorn.run(app, host=host, port=port, log_level="warning")


def _http_app(
    settings: Application, *, drafters: list[str], experts: list[str], token: str
) -> FastAPI:
    from cascade.api.http import create_app  # noqa: PLC0415 - as above
    from cascade.observability.metric_specs import ROUTER  # noqa: PLC0415 - as above
    from cascade.observability.metrics import PrometheusMetrics  # noqa: PLC0415 - as above
    from cascade.observability.request_log import to_stderr  # noqa: PLC0415 - as above
    from cascade.protocol import services  # noqa: PLC0415 - as above
    from cascade.protocol.client import ReplicaClients  # noqa: PLC0415 - as above
    from cascade.protocol.tls import credentials_of  # noqa: PLC0415 - as above
    from cascade.router.leases import FixedLeases  # noqa: PLC0415 - as above
    from cascade.router.tier_session import TierClient  # noqa: PLC0415 - as above

    pair, metrics = settings.pair(), PrometheusMetrics(ROUTER)
    credentials = credentials_of(settings.tls_files)
    to_stderr()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        drafter, expert = (
            TierClient(
                leases=FixedLeases(addresses, token=token),
                clients=ReplicaClients(kind, credentials=credentials),
            )
            for addresses, kind in ((drafters, services.DRAFTER), (experts, services.EXPERT))
        )
        loop = settings.router.loop(drafters=drafter, experts=expert)
        watch = asyncio.create_task(loop.watch())
        app.state.service = service = settings.serving_context(
            settings.observe(loop, metrics, suspects=loop.suspects),
            pair,
            ready=loop.ready,
            warnings=loop.warnings,
            tier_context=loop.context_tokens,
            metrics=metrics.text,
        )
        assert service.grammars is not None, "settings make one"
        await service.grammars.start()  # before the first request that needs it
        yield
        await service.grammars.close()
        watch.cancel()
        await drafter.clients.close()
        await expert.clients.close()

    app = create_app(cors=settings.cors, has_playground=settings.playground)
    app.router.lifespan_context = lifespan
    return app
