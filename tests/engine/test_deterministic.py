"""Deterministic engines: text and every bit of its rows, alone and speculating in a crowd."""

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
from cascade.engine.request import ForwardRequest
from cascade.engine.settings import EngineSettings
from cascade.speculation.verify import VerifyTask, verify
from cascade.types import Block, DecodingParams, SamplingParams, SessionId

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from cascade.engine.model_loader import LoadedModel

SETTINGS = EngineSettings(cache_tokens=4096, deterministic=True, prefix_reuse=False)
GREEDY = DecodingParams(sampling=SamplingParams(temperature=0))
PROMPT = [(5 * place + 3) % 50 for place in range(33)]
LENGTH = 24


def tiny(name: str) -> LoadedModel:
    model = build(name)
    nn.Module.to(model, torch.bfloat16)
    return adopt(model)


def shipped() -> LoadedModel:
    return load(str(demo.EXPERT), dtype="bfloat16")


class Desk:
    """An engine turned by hand."""

    def __init__(self, model: LoadedModel) -> None:
        self.head = RecordingHandler()
        self.engine = Engine(model, handler=self.head, settings=SETTINGS)
        self._steps: list[ForwardRequest] = []

    def submit(
        self, session: str, tokens: Sequence[int], *, base: int, rows: int
    ) -> Callable[[], Tensor]:
        step = ForwardRequest(
            session=SessionId(session), base=base, tokens=list(tokens), num_logits=rows
        )
        self._steps.append(step)
        answer = self.head.expect(step, context=[])
        self.engine.submit(step)

        def wait() -> Tensor:
            while not answer.ended:
                self.engine.step()
            assert answer.error is None
            return torch.stack(answer.rows)

        return wait


def alone(desk: Desk) -> tuple[list[int], list[Tensor]]:
    """Write greedily, token by token, without company."""
    text, rows = [], []
    fed, base = PROMPT, 0
    for _ in range(LENGTH):
        row_V = desk.submit("alone", fed, base=base, rows=1)()[-1]
        base += len(fed)
        rows.append(row_V)
        text.append(int(row_V.argmax()))
        fed = text[-1:]
    return text, rows


def in_company(desk: Desk, drafts: list[int]) -> tuple[list[int], list[Tensor]]:
    """Write by blocks of three, each second one wrong at its middle, beside nine other sessions."""
    text: list[int] = []
    rows: list[Tensor] = []
    desk.submit("prefill", PROMPT[:7], base=0, rows=1)
    while len(text) < LENGTH:
        block = drafts[len(text) : len(text) + 3]
        if len(text) % 2:
            block[1:2] = [(block[0] + 1) % 50]
        held = [*PROMPT, *text]
        for other in range(9):
            desk.submit(f"other {other}", PROMPT[: 11 + other + len(text) % 5], base=0, rows=2)
        base = len(held) - 1 if text else 0
        fed = [*held[base:], *block]
        found_NV = desk.submit("company", fed, base=base, rows=len(block) + 1)()
        task = VerifyTask(policy=GREEDY, position=len(text), block=Block(tokens=tuple(block)))
        (verdict,) = verify(found_NV, [task])
        rows += found_NV[: len(verdict.tokens)]
        text += verdict.tokens
    return text[:LENGTH], rows[:LENGTH]


@pytest.mark.parametrize(
    "model",
    [lambda: tiny("llama"), lambda: tiny("qwen3"), lambda: tiny("gpt2"), shipped],
    ids=["llama", "qwen3", "gpt2", "shipped expert"],
)
def test_speculation_in_a_crowd_changes_no_bit(model: Callable[[], LoadedModel]) -> None:
    desk = Desk(model())
    text, rows = alone(desk)

    written, found = in_company(desk, [*text, 1, 2, 3])

    assert written == text
    assert torch.equal(torch.stack(found), torch.stack(rows))
    assert max(map(len, desk.head.passes)) == 11
