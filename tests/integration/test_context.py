"""The context that a tier holds: learned from it, enforced at the door, never in mid-answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from cascade.api import build_request
from cascade.api.body import parse
from cascade.api.schema import CompletionBody
from cascade.errors import ContextTooLong
from cascade.expert.expert import Expert
from cascade.local import LocalServer, local_server
from cascade.types import FinishReason, Mode, OutputChunk, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import Pair

EXPERT_HOLDS, DRAFTER_HOLDS = 256, 128  # of 512 that the configurations name
PROMPT = [1, 2, 3, 4]


def settings(pair: Pair, *, expert: int = 0, drafter: int = 0, **more: Any) -> Any:
    """Return settings whose replicas hold so many tokens."""
    engines = {"expert": expert, "drafter": drafter}
    tiers = {
        name: {
            "model": str(getattr(pair, name).path),
            "engine": {"threads": 1, "cache_tokens": tokens},
        }
        for name, tokens in engines.items()
    }
    return pair.settings(**tiers, router={"draft_deadline_s": 60}, **more)


def requests(server: LocalServer, **fields: Any) -> tuple[Request, ...]:
    body = {"prompt": PROMPT, "temperature": 0} | fields
    parsed = parse(json.dumps(body).encode(), CompletionBody)
    return build_request.completion(parsed, server.service).requests


async def answer(server: LocalServer, request: Request) -> list[OutputChunk]:
    return [chunk async for chunk in server.router.generate(request)]


def length(chunks: Sequence[OutputChunk]) -> int:
    return sum(len(chunk.tokens) for chunk in chunks)


async def test_a_door_knows_what_the_tiers_hold(toy: Pair) -> None:
    """The smallest of configuration, cache and settings, of the tiers that the mode needs."""
    async with local_server(settings(toy, expert=EXPERT_HOLDS, drafter=DRAFTER_HOLDS)) as server:
        assert server.service.context_tokens == EXPERT_HOLDS
        for mode in Mode:
            alone = mode in {Mode.EXPERT_ONLY, Mode.CASCADE, Mode.SPECULATIVE}
            holds = EXPERT_HOLDS if alone else DRAFTER_HOLDS
            left, cascade = holds - len(PROMPT), {"mode": mode}
            (request,) = requests(server, max_tokens=left, cascade=cascade)
            chunks = await answer(server, request)
            assert (length(chunks), chunks[-1].finish) == (left, FinishReason.LENGTH), mode
            with pytest.raises(ContextTooLong, match=f"maximum context length is {holds} tokens"):
                requests(server, max_tokens=left + 1, cascade=cascade)
        waits = {"on_drafter_loss": "wait"}
        with pytest.raises(ContextTooLong, match=f"maximum context length is {DRAFTER_HOLDS}"):
            requests(server, max_tokens=DRAFTER_HOLDS, cascade=waits)


async def test_a_length_that_nobody_asked_for_is_clamped(toy: Pair) -> None:
    async with local_server(settings(toy, expert=EXPERT_HOLDS)) as server:
        (request,) = requests(server, prompt=[1] * (EXPERT_HOLDS - 3))
        assert request.max_tokens == 3
        assert length(await answer(server, request)) == 3
        with pytest.raises(ContextTooLong) as refused:
            requests(server, prompt=[1] * EXPERT_HOLDS)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
        with pytest.raises(ContextTooLong, match=r"maximum context length is 256 tokens\. However"):
            requests(server, prompt="A" * (EXPERT_HOLDS + 1))


@pytest.mark.parametrize(
    ("mode", "rule", "draft_tokens"),
    [
        (Mode.SPECULATIVE, None, 7),
        (Mode.CASCADE, None, 1),
        (Mode.CASCADE, {"kind": "chow", "alpha": 0.5}, 7),
        pytest.param(Mode.SPECULATIVE, None, 1, marks=pytest.mark.slow),
        pytest.param(Mode.CASCADE, None, 7, marks=pytest.mark.slow),
        pytest.param(Mode.CASCADE, {"kind": "chow", "alpha": 0.5}, 1, marks=pytest.mark.slow),
    ],
)
async def test_beyond_the_drafters_context_the_expert_goes_on_alone(
    toy: Pair, mode: Mode, rule: dict[str, Any] | None, draft_tokens: int
) -> None:
    """From a long prompt on, or from the middle of an answer; greedy text is the expert's own."""
    cascade = {"mode": mode, "draft_tokens": draft_tokens, "trace": True}
    cascade |= {} if rule is None else {"rule": rule}
    async with local_server(settings(toy, drafter=DRAFTER_HOLDS)) as server:
        for prompt in (PROMPT, [1, 2] * 70):
            (request,) = requests(server, prompt=prompt, max_tokens=150, cascade=cascade)
            (alone,) = requests(
                server, prompt=prompt, max_tokens=150, cascade={"mode": "expert_only"}
            )
            chunks, own = await answer(server, request), await answer(server, alone)
            assert length(chunks) == 150
            if rule is None:
                text = [token for chunk in chunks for token in chunk.tokens]
                assert text == [token for chunk in own for token in chunk.tokens]
            statistics = chunks[-1].statistics
            assert statistics is not None
            rounds = statistics.trace
            beyond = [one for one in rounds if len(prompt) + one.position >= DRAFTER_HOLDS]
            assert beyond
            assert not any(one.drafted for one in beyond)
            assert statistics.failover_causes == {"drafter context": 1}
            assert server.drafter.num_sessions == 0


async def test_an_expert_that_holds_less_than_the_last_ends_the_answer_as_full(toy: Pair) -> None:
    """The answer cannot go on there, and what it has is no error."""
    async with local_server(settings(toy, expert=EXPERT_HOLDS)) as server:
        (request,) = requests(server, max_tokens=EXPERT_HOLDS - len(PROMPT))
        chunks: list[OutputChunk] = []
        smaller: Expert | None = None
        async for chunk in server.router.generate(request):
            chunks.append(chunk)
            if smaller is None and length(chunks) >= 4:
                await server.expert.stop()
                options = settings(toy, expert=DRAFTER_HOLDS).expert.options()
                address, token = server.expert.address, server.token
                smaller = await Expert.start(options, address=address, token=token)
        assert smaller is not None
        await smaller.stop()
        assert chunks[-1].finish is FinishReason.LENGTH
        assert 4 <= length(chunks) <= DRAFTER_HOLDS - len(PROMPT) + 1  # the last needs no room
