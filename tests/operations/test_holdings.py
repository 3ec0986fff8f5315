from __future__ import annotations

import asyncio
import os

from cascade.operations.holdings import holdings


async def test_a_task_is_held_until_it_ends() -> None:
    before = holdings(leases=2)
    assert before["pid"] == os.getpid()
    assert before["leases"] == 2
    task = asyncio.create_task(asyncio.Event().wait())
    assert holdings()["tasks"] == before["tasks"] + 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert holdings()["tasks"] == before["tasks"]
