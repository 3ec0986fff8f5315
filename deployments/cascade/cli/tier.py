"""`cascade tier` and `cascade router`: the parts as plain processes, without Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cascade.engine import threads

if TYPE_CHECKING:
    from cascade.replica.replica import Replica
    from cascade.settings import Application

TOKEN_VARIABLE = "CASCADE_LEASE_TOKEN"  # noqa: S105 - the variable's name
Token = Annotated[str, typer.Option(envvar=TOKEN_VARIABLE, help="What callers of a tier must know")]
Config = Annotated[
    Path | None, typer.Option(help="A cluster/*.yaml whose args to take; defaults if absent")
]


class TierName(StrEnum):
    """Which tier."""

    DRAFTER = "drafter"
    EXPERT = "expert"


def tier(  # noqa: PLR0913 - one parameter an option
    name: Annotated[TierName, typer.Argument(help="Which tier")],
    *,
    address: Annotated[str, typer.Option(help="host:port to bind; port 0 picks a free one")],
    token: Token,
    model: Annotated[str | None, typer.Option(help="Hub id, folder or demo")] = None,
    config: Config = None,
    metrics_port: Annotated[int, typer.Option(help="Where Prometheus may ask; 0: nowhere")] = 0,
) -> None:
    """Serve one replica of a tier on its gRPC address until interrupted."""
    # The settings bring torch along, which reads these as it is imported.
    os.environ.update(threads.environment())
    settings = getattr(application(config), name.value)
    if model is not None:
        settings = settings.model_copy(update={"model": model})
    work = _serve(name, settings.options(), address=address, token=token, metrics_port=metrics_port)
    asyncio.run(work)


def application(config: Path | None) -> Application:
    """Return the settings of the first application of a Serve YAML, or the defaults."""
    from cascade.settings import Application  # noqa: PLC0415 - brings torch along

    if config is None:
        return Application()
    document: Any = yaml.safe_load(config.read_text())
    return Application.model_validate(document["applications"][0].get("args", {}))


async def _serve(
    name: TierName, options: Any, *, address: str, token: str, metrics_port: int
) -> None:
    replica: Replica[Any] = await _part(name).start(options, address=address, token=token)
    typer.echo(f"{name.value} serves {options.model} on {replica.address}")
    reports = asyncio.create_task(_report(replica, metrics_port)) if metrics_port else None
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    if reports is not None:
        reports.cancel()
    await replica.stop()


async def _report(replica: Replica[Any], port: int) -> None:
    from prometheus_client import start_http_server  # noqa: PLC0415 - few want it

    from cascade.observability.metric_specs import ENGINE  # noqa: PLC0415 - as above
    from cascade.observability.metrics import PrometheusMetrics  # noqa: PLC0415 - as above
    from cascade.replica.metrics import keep_reporting  # noqa: PLC0415 - as above

    sink = PrometheusMetrics(ENGINE)
    start_http_server(port, registry=sink.registry)
    await keep_reporting(replica, sink)


def _part(name: TierName) -> type[Replica[Any]]:
    # Imported late: torch reads the environment when it is imported.
    if name is TierName.DRAFTER:
        from cascade.drafter.drafter import Drafter  # noqa: PLC0415 - as above

        return Drafter
    from cascade.expert.expert import Expert  # noqa: PLC0415 - as above

    return Expert
