"""Answers of a server in this process, as token ids."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.local import LocalServer
    from cascade.types import Request


async def generate(server: LocalServer, request: Request) -> tuple[int, ...]:
    """Return the tokens of one answer."""
    chunks = [chunk async for chunk in server.router.generate(request)]
    return tuple(token for chunk in chunks for token in chunk.tokens)


async def generate_all(
    server: LocalServer, requests: Sequence[Request], *, concurrency: int = 16
) -> list[tuple[int, ...]]:
    """Return answers that are generated concurrently."""
    semaphore = asyncio.Semaphore(concurrency)

    async def one(request: Request) -> tuple[int, ...]:
        async with semaphore:
            return await generate(server, request)

    return list(await asyncio.gather(*map(one, requests)))
