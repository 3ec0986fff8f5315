"""What a process holds now, for whoever looks for leaks."""

from __future__ import annotations

import asyncio
import os


def holdings(**held: int) -> dict[str, int]:
    """Return the process id, the tasks of the running event loop, and what else is held."""
    return {"pid": os.getpid(), "tasks": len(asyncio.all_tasks()), **held}
