"""`cascade tier` and `cascade router`: a server of plain processes, without Ray."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from cascade.cli import app
from cascade.cli.serve import TOKEN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.conftest import Pair

COMMAND = str(Path(sys.executable).with_name("cascade"))
ROUTER = ["router", "--drafter", "a:1", "--expert", "b:2"]
LONG: dict[str, Any] = {
    "prompt": "The capital",
    "max_tokens": 256,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}
ENVIRONMENT = {TOKEN_VARIABLE: "between us", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


@asynccontextmanager
async def running(*arguments: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run a `cascade` command until the block ends."""
    process = await asyncio.create_subprocess_exec(
        COMMAND, *arguments, stdout=asyncio.subprocess.PIPE, env=ENVIRONMENT
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.communicate()


async def address(process: asyncio.subprocess.Process) -> str:
    """Return the address that a tier prints."""
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert " serves " in line, line
    return line.split()[-1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


async def wait_ready(url: str, process: asyncio.subprocess.Process) -> None:
    """Return once the server is healthy."""
    async with httpx.AsyncClient(base_url=url) as client:
        while process.returncode is None:
            try:
                if (await client.get("/health")).is_success:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.2)
    raise AssertionError(f"the router ended with {process.returncode}")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """A server of four processes."""

    url: str
    metrics: str  # of the second expert
    first_expert: asyncio.subprocess.Process


@pytest.fixture(scope="module")
async def processes() -> AsyncGenerator[Processes]:
    """A router over a drafter and two experts; all load at once."""
    port, metrics, bind = free_port(), free_port(), ("--address", "127.0.0.1:0")
    async with (
        running("tier", "drafter", *bind) as left,
        running("tier", "expert", *bind) as first,
        running("tier", "expert", *bind, "--metrics-port", str(metrics)) as second,
    ):
        drafter, *experts = await asyncio.gather(*map(address, (left, first, second)))
        tiers = ("--drafter", drafter, *(word for one in experts for word in ("--expert", one)))
        async with running("router", *tiers, "--port", str(port)) as router:
            url = f"http://127.0.0.1:{port}"
            await wait_ready(url, router)
            yield Processes(
                url=url, metrics=f"http://127.0.0.1:{metrics}/metrics", first_expert=first
            )


async def test_processes_without_ray_answer(processes: Processes) -> None:
    body = {"prompt": "The capital", "max_tokens": 12, "temperature": 0}
    async with httpx.AsyncClient(base_url=processes.url, timeout=60) as client:
        answer = (await client.post("/v1/completions", json=body)).json()
        loop = (await client.get("/metrics")).text
        engine = (await client.get(processes.metrics)).text
    assert answer["usage"]["completion_tokens"] == 12
    drafted = answer["usage"]["cascade"]["drafted"]
    assert drafted > 0
    assert f'vllm:spec_decode_num_draft_tokens_total{{model_name="cascade"}} {drafted}.0' in loop
    assert 'cascade_engine_busy_ratio{tier="expert"}' in engine


async def test_a_tier_that_is_told_to_stop_lets_its_sessions_end_first(
    processes: Processes,
) -> None:
    """Of two experts one ends after the stream; further answers come from the other."""
    stopped = processes.first_expert
    async with httpx.AsyncClient(base_url=processes.url, timeout=60) as client:
        streams = [client.stream("POST", "/v1/completions", json=LONG) for _ in range(2)]
        async with streams[0] as first, streams[1] as second:  # one at each expert
            lines = [first.aiter_lines(), second.aiter_lines()]
            begun = [await anext(one) for one in lines]
            stopped.terminate()
            short = {"prompt": "The capital", "max_tokens": 4}
            for _ in range(2):  # the router goes on to the next expert for each
                answer = (await client.post("/v1/completions", json=short)).json()
                assert answer["usage"]["completion_tokens"] == 4
            ends = [[line async for line in one if line][-2:] for one in lines]
        await stopped.wait()
    assert all(line.startswith("data: ") for line in begun)
    assert stopped.returncode == 0
    for usage, done in ends:
        assert done == "data: [DONE]"
        cost = json.loads(usage.removeprefix("data: "))["usage"]
        assert cost["completion_tokens"] == LONG["max_tokens"]
        assert not cost["cascade"]["failovers"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_all_processes_of_a_sharded_tier_end_with_it(
    number: signal.Signals, toy: Pair, tmp_path: Path
) -> None:
    config = tmp_path / "serve.yaml"
    tier = {"model": str(toy.expert.path), "engine": {"tensor_parallel": 2, "threads": 1}}
    config.write_text(json.dumps({"applications": [{"args": {"expert": tier}}]}))
    arguments = ("tier", "expert", "--address", "127.0.0.1:0", "--config", str(config))
    process = await asyncio.create_subprocess_exec(
        COMMAND, *arguments, stdout=asyncio.subprocess.PIPE, env=ENVIRONMENT
    )
    await address(process)
    others = psutil.Process(process.pid).children()

    process.send_signal(number)
    ended = await process.wait()

    _, alive = await asyncio.to_thread(psutil.wait_procs, others, timeout=60)
    assert others
    assert not alive
    assert ended == (-number if number is signal.SIGKILL else 0)


def test_a_tier_prints_why_it_refuses_its_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    arguments = ["tier", "expert", "--address", "127.0.0.1:0", "--model", str(tmp_path)]

    ended = CliRunner().invoke(app, arguments, env={TOKEN_VARIABLE: "between us"})

    assert ended.exit_code == 2
    assert ended.stderr.startswith("error ")
    assert "holds an adapter" in ended.stderr


def test_a_router_prints_why_it_refuses_a_model(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("applications: [{args: {expert: {model: /no/such/folder}}}]")
    token = tmp_path / "token"
    token.write_text("between us\n")
    arguments = [*ROUTER, "--token-file", str(token), "--config", str(config)]

    ended = CliRunner().invoke(app, arguments)

    assert ended.exit_code == 2
    assert ended.stderr.startswith("error No model at '/no/such/folder'")


def test_without_a_token_both_commands_say_where_to_put_one(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for command in (ROUTER, ["tier", "expert", "--address", "127.0.0.1:0"]):
        for more, message in (
            ([], f"put a secret, the same for router and tiers, into {TOKEN_VARIABLE}"),
            (["--token-file", str(empty)], "there is no token"),
            (["--token-file", str(tmp_path / "none")], "`--token-file` cannot be read"),
        ):
            ended = CliRunner().invoke(app, [*command, *more], env={TOKEN_VARIABLE: None})
            assert ended.exit_code == 2
            assert message in ended.stderr


def test_a_token_is_no_option_since_all_users_of_a_machine_see_those() -> None:
    ended = CliRunner().invoke(app, [*ROUTER, "--token", "between us"])
    assert ended.exit_code == 2
    assert "No such option" in ended.stderr
