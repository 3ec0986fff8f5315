"""What must hold after every scenario."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.chaos.cluster import wait_until
from tests.chaos.load import key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tests.chaos.cluster import ChaosCluster
    from tests.chaos.load import Answer

SPARE = 24  # more tasks and files than before: the first connection to a replica costs five


def assert_exact(answers: Iterable[Answer], texts: Mapping[str, str]) -> None:
    """Check that each answer ended with the text that it has without faults."""
    for answer in answers:
        details = (answer.status, answer.error, answer.broken, answer.causes)
        assert answer.done, details
        assert answer.text == texts[key(answer.body)], details


async def wait_until_free(cluster: ChaosCluster, *, timeout_s: float = 60.0) -> float:
    """Wait until no tier holds anything for a session; return how long it took, in seconds."""

    async def free() -> bool:
        return not any((await cluster.held()).values())

    return await wait_until(free, "leases and caches to be free", timeout_s=timeout_s)


async def process_resources(cluster: ChaosCluster) -> dict[int, dict[str, int]]:
    """Return the tasks and open files of each replica's process."""
    found = [
        one for tier in ("Drafter", "Expert", "Router") for one in await cluster.debug_state(tier)
    ]
    return {one["pid"]: {name: one[name] for name in ("tasks", "files")} for one in found}


async def assert_no_leaks(cluster: ChaosCluster, before: Mapping[int, Mapping[str, int]]) -> None:
    """Check that nothing is held, and that no process has more tasks or files than before."""
    await wait_until_free(cluster)

    async def back() -> bool:
        now = await process_resources(cluster)
        most = {name: max(one[name] for one in before.values()) for name in ("tasks", "files")}
        return all(
            count <= before.get(pid, most)[name] + SPARE
            for pid, one in now.items()
            for name, count in one.items()
        )

    try:
        await wait_until(back, "tasks and files to go")
    except TimeoutError as error:
        raise AssertionError(
            f"before: {before}, now: {await process_resources(cluster)}"
        ) from error
