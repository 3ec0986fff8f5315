"""`cascade doctor`: what is wrong with this machine or cluster, and what to do about it."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cascade.cli.cluster import check_cluster, check_server
from cascade.cli.findings import Finding, Grade
from cascade.cli.machine import check_devices, check_memory, check_ports, check_threads
from cascade.cli.plan import DEFAULT_PLAN, check_plan
from cascade.cli.versions import check_versions

_STYLES = {Grade.OK: "green", Grade.WARN: "yellow", Grade.FAIL: "bold red"}


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A Serve YAML, such as cluster/local.yaml")
    ] = None,
    *,
    url: Annotated[
        str | None, typer.Option(envvar="CASCADE_URL", help="The server; else as the YAML says")
    ] = None,
    dashboard: Annotated[
        str, typer.Option(envvar="RAY_DASHBOARD_ADDRESS", help="The dashboard of the Ray cluster")
    ] = "http://127.0.0.1:8265",
) -> None:
    """Say what is wrong with this machine or cluster; exit 1 if the server cannot run on it."""
    findings, plan = check_plan(config) if config else ([], DEFAULT_PLAN)
    address = url or f"http://127.0.0.1:{plan.http_port}"
    server = check_server(address)
    serving = any(finding.grade is Grade.OK for finding in server)
    findings += [
        *check_versions(),
        *check_devices(),
        *check_memory(),
        *check_threads(),
        *check_cluster(dashboard, plan=plan),
        *check_ports(plan, serving=serving),
        *server,
    ]
    show(findings)
    if any(finding.grade is Grade.FAIL for finding in findings):
        raise typer.Exit(1)


def show(findings: list[Finding]) -> None:
    """Print one line a finding, and under it what to do."""
    console = Console(highlight=False)
    for finding in findings:
        line = Text.assemble((f"{finding.grade.value:4}  ", _STYLES[finding.grade]), finding.told)
        console.print(line, soft_wrap=True)
        if finding.advice:
            console.print(Text(f"      {finding.advice}", "dim"), soft_wrap=True)
