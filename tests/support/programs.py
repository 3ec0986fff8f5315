"""Other programs that tests run, and the packages they need."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parents[1] / "clients"  # what to install for each client
INSTALL_S = 400


async def execute(*command: str, cwd: Path, timeout_s: float) -> tuple[int, str, str]:
    """Return how a command ended, and what it printed; it is killed if it takes too long."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, error = await asyncio.wait_for(process.communicate(), timeout_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out.decode(), error.decode()


async def install(*command: str, cwd: Path) -> None:
    """Run an installation; skip the test where it is not possible."""
    try:
        code, _, error = await execute(*command, cwd=cwd, timeout_s=INSTALL_S)
    except TimeoutError:
        pytest.skip(f"{command[0]} did not install the clients within {INSTALL_S} s")
    if code:
        pytest.skip(f"{' '.join(command)} failed: {error.strip()[-300:]}")


async def install_node_clients(folder: Path) -> Path:
    """Return the folder, with the clients for Node in it."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(CLIENTS / name, folder)
    await install("npm", "ci", "--omit=optional", "--no-audit", "--no-fund", cwd=folder)
    return folder
