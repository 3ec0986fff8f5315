"""A deterministic engine gives the same tokens and logits to the bit, alone and beside others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.engine.architectures import build
from tests.engine.harness import RecordingHandler
from torch import nn

from cascade import demo
from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt, load
from cascade.engine.request import NOBODYS, ForwardRequest
from cascade.engine.settings import EngineSettings
from cascade.speculation.verify import VerifyTask, verify
from cascade.types import Block, DecodingParams, SamplingParams, SessionId

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from cascade.engine.model_loader import LoadedModel

SETTINGS = EngineSettings(cache_tokens=4096, deterministic=True, prefix_reuse=False)
GREEDY = DecodingParams(sampling=SamplingParams(temperature=0))
PROMPT = [(5 * index + 3) % 50 for index in range(33)]
LENGTH = 24


def tiny(name: str) -> LoadedModel:
    model = build(name)
    nn.Module.to(model, torch.bfloat16)
    return adopt(model)


def shipped() -> LoadedModel:
    return load(str(demo.EXPERT), dtype="bfloat16")


class Harness:
    """An engine that the test steps itself."""

    def __init__(self, model: LoadedModel) -> None:
        self.handler = RecordingHandler()
        self._engine = Engine(model, handler=self.handler, settings=SETTINGS)

    def submit(
        self, session: str, tokens: Sequence[int], *, base: int, num_logits: int
    ) -> Callable[[], Tensor]:
        """Queue a request; return what runs it and returns its logits `[N, V]`."""
        request = ForwardRequest(
            share=NOBODYS,
            session=SessionId(session),
            base=base,
            tokens=list(tokens),
            num_logits=num_logits,
        )
        received = self.handler.expect(request, context=[])
        self._engine.submit(request)

        def wait() -> Tensor:
            while not received.ended:
                self._engine.step()
            assert received.error is None
            return torch.stack(received.logits)

        return wait


def generate_alone(harness: Harness) -> tuple[list[int], list[Tensor]]:
    """Generate greedily, token by token, without other sessions."""
    tokens: list[int] = []
    logits: list[Tensor] = []
    fed, base = PROMPT, 0
    for _ in range(LENGTH):
        logits_V = harness.submit("alone", fed, base=base, num_logits=1)()[-1]
        base += len(fed)
        logits.append(logits_V)
        tokens.append(int(logits_V.argmax()))
        fed = tokens[-1:]
    return tokens, logits


def verify_beside_others(harness: Harness, drafts: list[int]) -> tuple[list[int], list[Tensor]]:
    """Verify blocks of three, every second one wrong in its middle, beside nine other sessions."""
    tokens: list[int] = []
    logits: list[Tensor] = []
    harness.submit("prefill", PROMPT[:7], base=0, num_logits=1)
    while len(tokens) < LENGTH:
        block = drafts[len(tokens) : len(tokens) + 3]
        if len(tokens) % 2:
            block[1:2] = [(block[0] + 1) % 50]
        held = [*PROMPT, *tokens]
        for other in range(9):
            prompt = PROMPT[: 11 + other + len(tokens) % 5]
            harness.submit(f"other {other}", prompt, base=0, num_logits=2)
        base = len(held) - 1 if tokens else 0
        fed = [*held[base:], *block]
        block_NV = harness.submit("block", fed, base=base, num_logits=len(block) + 1)()
        task = VerifyTask(policy=GREEDY, position=len(tokens), block=Block(tokens=tuple(block)))
        (verdict,) = verify(block_NV, [task])
        logits += block_NV[: len(verdict.tokens)]
        tokens += verdict.tokens
    return tokens[:LENGTH], logits[:LENGTH]


@pytest.mark.parametrize(
    "model",
    [lambda: tiny("llama"), lambda: tiny("qwen3"), lambda: tiny("gpt2"), shipped],
    ids=["llama", "qwen3", "gpt2", "shipped expert"],
)
def test_speculation_beside_others_changes_no_bit(model: Callable[[], LoadedModel]) -> None:
    harness = Harness(model())
    tokens, logits = generate_alone(harness)

    verified, found = verify_beside_others(harness, [*tokens, 1, 2, 3])

    assert verified == tokens
    assert torch.equal(torch.stack(found), torch.stack(logits))
    assert max(map(len, harness.handler.passes)) == 11
