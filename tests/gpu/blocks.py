"""What a drafter takes for a block, with a read after each pass and with one after the last."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from tests.support.fake_engine import TOKEN, Client

from cascade import demo
from cascade.drafter.drafter import Drafter
from cascade.engine.model_loader import load
from cascade.engine.tokenizer import load as load_tokenizer
from cascade.protocol.messages import Proposal, Propose
from cascade.replica.options import ReplicaOptions
from cascade.types import DecodingParams, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.gpu.sections import Scale

Finding: TypeAlias = dict[str, Any]

TOKENS = 5  # of a block
POLICIES = {
    "greedy": DecodingParams(sampling=SamplingParams(temperature=0.0)),
    "sampled": DecodingParams(seed=3),
}


def measure(scale: Scale) -> Iterator[Finding]:
    """Yield the times of blocks of the shipped drafter, and whether both ways draft the same."""
    yield from asyncio.run(_measure(scale))


async def _measure(scale: Scale) -> list[Finding]:
    model = load(str(demo.DRAFTER), device=scale.device, dtype=scale.dtype_name)
    tokenizer = load_tokenizer(str(demo.DRAFTER))
    options = ReplicaOptions(model="drafter", engine=scale.engine())
    shared = min(tokenizer.size, model.vocabulary)
    drafter = Drafter(replace(model, vocabulary=shared), tokenizer, options, token=TOKEN)
    findings: list[Finding] = []
    for name, policy in POLICIES.items():
        for sessions in scale.sessions:
            found = {
                ahead: await _blocks(drafter, policy, scale, sessions=sessions, ahead=ahead)
                for ahead in (False, True)
            }
            same = sum(
                one == other for one, other in zip(found[False][1], found[True][1], strict=True)
            )
            findings.append(
                {
                    "sampling": name,
                    "sessions": sessions,
                    "by_token_ms": found[False][0],
                    "ahead_ms": found[True][0],
                    "speedup": found[False][0] / found[True][0],
                    "same_blocks": same / len(found[False][1]),
                    "ok": drafter.engine.decodes_ahead,  # it has not failed
                }
            )
    return findings


async def _blocks(
    drafter: Drafter, policy: DecodingParams, scale: Scale, *, sessions: int, ahead: bool
) -> tuple[float, list[tuple[int, ...]]]:
    """Return the median time of a block of all sessions, and the last blocks."""
    drafter.engine.decodes_ahead, drafter.engine.reads_each = ahead, False
    clients = [
        Client(
            drafter,  # pyright: ignore[reportArgumentType] - it serves messages as a fake one does
            name=f"{policy.seed} {number} {ahead}",
            prompt=tuple((3 * i + number) % 1000 for i in range(scale.context_tokens)),
            policy=replace(policy, seed=number),
        )
        for number in range(sessions)
    ]
    await _finish(drafter)
    times_s: list[float] = []
    for _ in range(2 + scale.passes // 2):
        for client in clients:
            client.received.clear()
            client.send(Propose(**client.after(), count=TOKENS))
        began_s = time.perf_counter()
        await _finish(drafter)
        times_s.append(time.perf_counter() - began_s)
    blocks = [one.block.tokens for c in clients for one in c.received if isinstance(one, Proposal)]
    for client in clients:
        drafter.disconnected(client.connection)
    await _finish(drafter)
    return 1e3 * median(times_s[2:]), blocks


async def _finish(drafter: Drafter) -> None:
    """Run what waits."""
    await asyncio.sleep(0)  # results are delivered by the event loop
    while drafter.engine.stats().waiting:
        drafter.engine.step()
        await asyncio.sleep(0)
