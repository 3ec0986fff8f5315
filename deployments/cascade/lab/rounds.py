"""How many rounds a router runs a second if tiers answer at once: transport and loop alone."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.decoding.draft_length import Experience
from cascade.decoding.generation import Request
from cascade.decoding.session import Bonus, Mode, Policy, Sampling
from cascade.lab.direct import DirectPeers
from cascade.operations.leases import FixedLeases
from cascade.operations.places import Tier
from cascade.router import Router, RouterOptions
from cascade.wire.channel import Peers
from cascade.wire.echo import DESCRIPTION, echo
from cascade.wire.server import TierServer
from cascade.wire.tiers import DRAFTER, EXPERT

if TYPE_CHECKING:
    from cascade.wire.codec import Question
    from cascade.wire.server import Connection
    from cascade.wire.tiers import Description, Kind

BLOCK, BLOCKS = 4, 64  # tokens of a block, blocks of an answer
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """What was measured, in one process with both tiers."""

    rounds: int
    seconds: float
    cpu_s: float  # of the process, tiers too
    grown_bytes: int  # of resident memory, since the first tenth of the rounds

    @property
    def per_second(self) -> float:
        """Return rounds a second."""
        return self.rounds / self.seconds


class InstantTier:
    """Drafts and accepts at once, and keeps nothing."""

    def receive(self, connection: Connection, item: Question) -> None:
        """Answer the item."""
        answer = echo(item)
        if answer is not None:
            connection.send(answer)

    def disconnected(self, connection: Connection) -> None:
        """Do nothing: nothing was kept."""

    def describe(self) -> Description:
        """Return what any request fits."""
        return DESCRIPTION

    @property
    def alive(self) -> bool:
        """Always."""
        return True


async def measure(*, streams: int, rounds: int, direct: bool = False) -> Rounds:
    """Return what `rounds` rounds or a few more take, `streams` answers at a time.

    Args:
        streams: Answers generated at once.
        rounds: Blocks drafted and judged, at least.
        direct: Call the tiers instead of going over gRPC: the loop alone.
    """
    async with AsyncExitStack() as cleanup:
        router = Router(
            drafters=await _tier(DRAFTER, cleanup, direct=direct),
            experts=await _tier(EXPERT, cleanup, direct=direct),
            automatic=Experience().session,
            options=RouterOptions(),
        )
        done = await _run(router, streams=streams, rounds=rounds // 10)
        gc.collect()
        held_bytes, began_s, cpu_s = _resident_bytes(), time.perf_counter(), time.process_time()
        done = await _run(router, streams=streams, rounds=rounds)
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        gc.collect()
        grown_bytes = _resident_bytes() - held_bytes
    return Rounds(rounds=done, seconds=seconds, cpu_s=cpu_s, grown_bytes=grown_bytes)


async def _tier(kind: Kind, cleanup: AsyncExitStack, *, direct: bool) -> Tier:
    tier = InstantTier()
    if direct:
        return Tier(leases=FixedLeases(["here"], token=""), peers=DirectPeers(tier, kind))
    server = TierServer(tier, kind)
    address = await server.start("127.0.0.1:0")
    cleanup.push_async_callback(server.stop)
    peers = Peers(kind)
    cleanup.push_async_callback(peers.close)
    return Tier(leases=FixedLeases([address], token=""), peers=peers)


async def _run(router: Router, *, streams: int, rounds: int) -> int:
    answers = -(-rounds // (streams * BLOCKS))
    counts = await asyncio.gather(*(_stream(router, answers=answers) for _ in range(streams)))
    return sum(counts)


async def _stream(router: Router, *, answers: int) -> int:
    policy = Policy(sampling=Sampling(temperature=0.0), bonus=Bonus.NONE)
    request = Request(
        prompt=(1,) * 32,
        policy=policy,
        mode=Mode.SPECULATIVE,
        max_tokens=BLOCK * BLOCKS,
        draft_tokens=BLOCK,
    )
    done = 0
    for _ in range(answers):
        async for _ in router.generate(request):
            done += 1
    return done


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
