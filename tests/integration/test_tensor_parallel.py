"""An expert over two processes: its text is that of `transformers`, also when one of them dies."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest
import torch
from numpy.random import default_rng
from tests.conftest import Folder, random_model, words
from tests.support.generation import greedy_answer
from transformers import LlamaForCausalLM

from cascade.drafter.drafter import Drafter
from cascade.engine.backends.sharded import ShardedRunner
from cascade.engine.tensor_parallel import Child
from cascade.errors import Unavailable
from cascade.expert.expert import Expert
from cascade.local import ANY_PORT
from cascade.protocol import services
from cascade.protocol.client import ReplicaClients
from cascade.router.leases import FixedLeases
from cascade.router.tier_session import TierClient
from cascade.settings import Application
from cascade.types import DecodingParams, Mode, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from cascade.engine.tensor_parallel import RankTask
    from cascade.router.router import Router

TOKEN = "between us"  # noqa: S105 - of tests
VOCABULARY = 40
GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))
LENGTHS = range(1, 9)  # of drafts


@dataclass(frozen=True)
class Case:
    """A pair whose drafter is often right, and prompts."""

    drafter: Folder
    expert: Folder

    @cached_property
    def prompts(self) -> list[tuple[int, ...]]:
        chance = default_rng(3)
        sizes = chance.integers(2, 30, size=50)
        return [tuple(chance.integers(0, VOCABULARY, size=size).tolist()) for size in sizes]

    def settings(self) -> Application:
        engine = {"threads": 1}
        return Application.model_validate(
            {
                "drafter": {"model": str(self.drafter.path), "engine": engine},
                "expert": {"model": str(self.expert.path), "engine": engine},
                "router": {"draft_deadline_s": 60, "loss_deadline_s": 5, "entry_deadline_s": 5},
            }
        )

    def expected(self, prompt: tuple[int, ...], *, max_tokens: int) -> tuple[int, ...]:
        """Return the answer of `transformers`."""
        return greedy_answer(self.expert.model, prompt, max_tokens=max_tokens)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("sharded"), key_heads=2)


def make_case(root: Path, *, key_heads: int) -> Case:
    shape: dict[str, int] = {
        "vocabulary": VOCABULARY,
        "width": 64,
        "layers": 3,
        "key_heads": key_heads,
    }
    expert = random_model(root / "expert", **shape, seed=3)
    drafter = LlamaForCausalLM.from_pretrained(expert.path)
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(torch.randn_like(weight) * 0.03 * weight.std())
    drafter.save_pretrained(root / "drafter")
    words(VOCABULARY).save_pretrained(root / "drafter")
    return Case(Folder(path=root / "drafter", model=drafter.eval()), expert)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A router over a sharded expert, and plain ones beside it."""

    router: Router
    sharded: Expert
    ranks: list[Child]  # but the first, which is this process


@asynccontextmanager
async def serving(case: Case, *, others: int = 0) -> AsyncGenerator[Running]:
    settings, ranks = case.settings(), list[Child]()
    options: dict[str, Any] = {"expert": {"engine": {"threads": 1, "tensor_parallel": 2}}}
    options["expert"]["model"] = str(case.expert.path)
    sharded_options = Application.model_validate(options).expert.options()

    def launch(task: RankTask) -> Child:
        ranks.append(Child(task))
        return ranks[-1]

    drafter = await Drafter.start(settings.drafter.options(), address=ANY_PORT, token=TOKEN)
    experts = [await Expert.start(sharded_options, address=ANY_PORT, token=TOKEN, launch=launch)]
    for _ in range(others):
        plain = await Expert.start(settings.expert.options(), address=ANY_PORT, token=TOKEN)
        experts.append(plain)
    tiers = [
        TierClient(
            leases=FixedLeases([one.address for one in replicas], token=TOKEN),
            clients=ReplicaClients(kind),
        )
        for kind, replicas in ((services.DRAFTER, [drafter]), (services.EXPERT, experts))
    ]
    for tier in tiers:
        await tier.connect()
    try:
        router = settings.router.loop(drafters=tiers[0], experts=tiers[1])
        yield Running(router=router, sharded=experts[0], ranks=ranks)
    finally:
        for tier in tiers:
            await tier.clients.close()
        for replica in (drafter, *experts):
            await replica.stop()


async def generate(
    running: Running, prompt: tuple[int, ...], *, length: int, max_tokens: int, kill_at: int = -1
) -> tuple[int, ...]:
    """Return an answer; after so many tokens of it, a process of the expert is killed."""
    request = Request(
        prompt=prompt,
        policy=GREEDY,
        mode=Mode.SPECULATIVE,
        max_tokens=max_tokens,
        draft_tokens=length,
    )
    tokens: list[int] = []
    async for chunk in running.router.generate(request):
        tokens += chunk.tokens
        if 0 <= kill_at <= len(tokens):
            await asyncio.to_thread(running.ranks[0].kill)
            kill_at = -1
    return tuple(tokens)


async def generate_all(
    running: Running, prompts: Sequence[tuple[int, ...]], *, shift: int, max_tokens: int
) -> list[tuple[int, ...]]:
    """Return answers that are generated at once, with draft lengths that differ."""
    return await asyncio.gather(
        *(
            generate(
                running, prompt, length=LENGTHS[(i + shift) % len(LENGTHS)], max_tokens=max_tokens
            )
            for i, prompt in enumerate(prompts)
        )
    )


async def test_streams_go_on_at_another_replica_when_a_process_of_the_expert_dies(
    case: Case,
) -> None:
    prompts, max_tokens = case.prompts[:8], 100
    async with serving(case, others=1) as running:
        assert isinstance(running.sharded.engine.runner, ShardedRunner)
        first = generate(running, prompts[0], length=3, max_tokens=max_tokens, kill_at=20)
        rest = generate_all(running, prompts[1:], shift=0, max_tokens=max_tokens)

        found, others = await asyncio.gather(first, rest)

        assert not running.sharded.alive
    expected = [case.expected(prompt, max_tokens=max_tokens) for prompt in prompts]
    assert [found, *others] == expected


@pytest.mark.slow
async def test_without_another_replica_a_stream_ends_with_an_error(case: Case) -> None:
    async with serving(case) as running:
        with pytest.raises(Unavailable):
            await generate(running, case.prompts[0], length=3, max_tokens=200, kill_at=10)
        assert not running.sharded.alive


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
async def test_greedy_text_is_the_experts_own_at_every_draft_length(
    key_heads: int, tmp_path: Path
) -> None:
    case = make_case(tmp_path, key_heads=key_heads)
    expected = [case.expected(prompt, max_tokens=40) for prompt in case.prompts]
    async with serving(case) as running:
        for shift in range(len(LENGTHS)):
            found = await generate_all(running, case.prompts, shift=shift, max_tokens=40)
            assert found == expected
