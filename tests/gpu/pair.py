"""The pair end to end on one device: each tier in a process of its own, the router here.

The drafter is the shipped one and the expert the shipped one, cost-padded, so acceptance is real.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tests.gpu.sections import scale_of

from cascade import demo
from cascade.benchmark.synthetic_model import build
from cascade.drafter.drafter import Drafter
from cascade.engine.model_loader import adopt, load
from cascade.engine.tokenizer import load as load_tokenizer
from cascade.evaluation.tasks import TaskFamily, held_out
from cascade.expert.expert import Expert
from cascade.protocol.client import ReplicaClients
from cascade.protocol.services import DRAFTER, EXPERT
from cascade.replica.options import ReplicaOptions
from cascade.router.leases import FixedLeases
from cascade.router.router import Router, RouterOptions
from cascade.router.tier_session import TierClient
from cascade.rules import TokenV3
from cascade.speculation.draft_length import DraftLengthTuner
from cascade.types import DecodingParams, Mode, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.gpu.sections import Scale

    from cascade.types import Statistics

Finding: TypeAlias = dict[str, Any]

TIERS = {DRAFTER: (Drafter, demo.DRAFTER), EXPERT: (Expert, demo.EXPERT)}
GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))
MODES = {
    "expert_only": (Mode.EXPERT_ONLY, GREEDY),
    "lossless": (Mode.SPECULATIVE, GREEDY),
    "token_v3": (Mode.CASCADE, replace(GREEDY, rule=TokenV3(alpha=0.95))),
}


async def measure(scale: Scale, size: str) -> list[Finding]:
    """Return the speed of each mode at each number of streams.

    Args:
        scale: How large everything is.
        size: Of the expert.
    """
    findings: list[Finding] = []
    async with AsyncExitStack() as cleanup:
        token = secrets.token_urlsafe()
        starting = [_start(kind.name, scale, size, token, cleanup) for kind in TIERS]
        addresses = await asyncio.gather(*starting)
        tiers: list[TierClient] = []
        for kind, address in zip(TIERS, addresses, strict=True):
            clients = ReplicaClients(kind)
            cleanup.push_async_callback(clients.close)
            tiers.append(TierClient(leases=FixedLeases([address], token=token), clients=clients))
        options = RouterOptions(draft_deadline_s=30.0, answer_deadline_s=60.0)
        router = Router(
            drafters=tiers[0],
            experts=tiers[1],
            automatic=DraftLengthTuner().session,
            options=options,
        )
        tokenizer = load_tokenizer(str(demo.EXPERT))
        items = held_out(TaskFamily.REPORTS, count=max(scale.streams))
        prompts = [tokenizer.chat([{"role": "user", "content": one.prompt}]) for one in items]
        for streams in scale.streams:
            alone: list[tuple[int, ...]] = []
            speeds: dict[str, float] = {}
            for name, (mode, policy) in MODES.items():
                policy = replace(policy, stop_ids=tokenizer.stop_ids)  # noqa: PLW2901 - completed
                requests = [
                    Request(prompt=one, policy=policy, mode=mode, max_tokens=scale.answer_tokens)
                    for one in prompts[:streams]
                ]
                await _answers(router, requests)  # captures, and measures costs
                began_s = time.perf_counter()
                answers = await _answers(router, requests)
                seconds = time.perf_counter() - began_s
                texts = [tokens for tokens, _ in answers]
                alone = alone or texts
                speeds[name] = sum(map(len, texts)) / seconds
                same = sum(one == other for one, other in zip(texts, alone, strict=True))
                findings.append(
                    {
                        "mode": name,
                        "streams": streams,
                        "tokens_per_s": speeds[name],
                        "over_expert_only": speeds[name] / speeds["expert_only"],
                        "same_text": same / streams,
                        "drafted": sum(one.drafted for _, one in answers),
                        "accepted": sum(one.accepted for _, one in answers),
                        "rounds": sum(one.rounds for _, one in answers),
                        "undrafted_rounds": dict(answers[0][1].undrafted_rounds),
                    }
                )
    return findings


async def _answers(
    router: Router, requests: Sequence[Request]
) -> list[tuple[tuple[int, ...], Statistics]]:
    """Return the tokens of all answers, generated at once, and what was counted of each."""

    async def answer(request: Request) -> tuple[tuple[int, ...], Statistics]:
        chunks = [chunk async for chunk in router.generate(request)]
        assert chunks[-1].statistics is not None, "the last chunk has them"
        return tuple(token for one in chunks for token in one.tokens), chunks[-1].statistics

    return await asyncio.gather(*map(answer, requests))


async def _start(tier: str, scale: Scale, size: str, token: str, cleanup: AsyncExitStack) -> str:
    """Start the process of a tier and return its address."""
    command = [sys.executable, "-m", "tests.gpu.pair", tier, size, "--device", scale.device]
    process = await asyncio.create_subprocess_exec(
        *command, f"--token={token}", stdout=asyncio.subprocess.PIPE
    )
    cleanup.callback(process.kill)
    assert process.stdout is not None, "piped"
    async for line in process.stdout:
        if line.startswith(b"serves "):
            return line.decode().split()[1]
    raise RuntimeError(f"the {tier} ended before it served")


async def _serve(tier: str, size: str, *, device: str, token: str) -> None:
    """Serve a tier until the process is killed."""
    scale = scale_of(device)
    replica_class, folder = next(one for kind, one in TIERS.items() if kind.name == tier)
    if replica_class is Expert:
        shape = scale.shape(size)
        model = adopt(build(str(folder), shape=shape, device=device, dtype=scale.dtype))
    else:
        model = load(str(folder), device=device, dtype=scale.dtype_name)
    tokenizer = load_tokenizer(str(folder))
    replica = replica_class(
        replace(model, vocabulary=min(tokenizer.size, model.vocabulary)),
        tokenizer,
        ReplicaOptions(model=str(folder), engine=scale.engine(max_sessions=64)),
        token=token,
    )
    replica.engine.start()
    address = await replica.server.start("127.0.0.1:0")
    replica.address = address
    sys.stdout.write(f"serves {address}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def main() -> None:
    """Run the process of a tier."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tier", choices=[kind.name for kind in TIERS])
    parser.add_argument("size")
    parser.add_argument("--device", required=True)
    parser.add_argument("--token", required=True)
    options = parser.parse_args()
    asyncio.run(_serve(options.tier, options.size, device=options.device, token=options.token))


if __name__ == "__main__":
    main()
