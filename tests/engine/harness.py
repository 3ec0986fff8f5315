"""An engine turned by hand, beside the same model's plain forward pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt
from cascade.engine.request import ForwardRequest, LogitsOutput
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.settings import EngineSettings


@dataclass(kw_only=True)
class Received:
    """What became of a step: the whole sequence then, and its rows as they came."""

    context: list[int]
    rows: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    ended: bool = False
    error: Exception | None = None


class RecordingHandler:
    """A head that keeps what it hears."""

    def __init__(self) -> None:
        self.answers: dict[int, Received] = {}
        self.passes: list[list[str]] = []

    def expect(self, step: ForwardRequest, *, context: list[int]) -> Received:
        answer = Received(context=context)
        self.answers[id(step)] = answer
        return answer

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        assert logits_NV.shape[0] == sum(one.count for one in outputs)
        self.passes.append([one.request.session for one in outputs])
        for one, rows in zip(outputs, logits_NV.split([one.count for one in outputs]), strict=True):
            answer = self.answers[id(one.request)]
            assert not answer.ended
            assert one.first == len(answer.places)
            answer.rows.extend(rows.clone())
            answer.places.extend(range(one.position, one.position + one.count))
            answer.ended = one.last
        return []

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        answer = self.answers[id(request)]
        assert not answer.ended
        answer.error, answer.ended = error, True


class EngineHarness:
    """Runs steps of named sessions and compares every row with the plain forward pass."""

    def __init__(self, model: PreTrainedModel, settings: EngineSettings | None = None) -> None:
        self._plain = copy.deepcopy(model)
        self.head = RecordingHandler()
        self.engine = Engine(adopt(model), handler=self.head, settings=settings)
        self.tokens: dict[str, list[int]] = {}
        self._steps: list[ForwardRequest] = []  # alive, so that no two share an id
        self.worst = 0.0
        self.largest = 0.0

    def submit(self, session: str, tokens: Sequence[int], *, drop: int = 0, rows: int) -> Received:
        """Queue a step that rolls back `drop` tokens and appends `tokens`."""
        known = self.tokens.get(session, [])
        base = len(known) - drop
        self.tokens[session] = [*known[:base], *tokens]
        step = ForwardRequest(
            session=SessionId(session), base=base, tokens=list(tokens), num_logits=rows
        )
        self._steps.append(step)
        answer = self.head.expect(step, context=self.tokens[session])
        self.engine.submit(step)
        return answer

    def branch(self, session: str, tokens: Sequence[int], *, trunk: str, base: int) -> Received:
        """Queue the first step of a branch that has the first `base` tokens of its trunk."""
        self.tokens[session] = [*self.tokens[trunk][:base], *tokens]
        step = ForwardRequest(
            session=SessionId(session),
            base=base,
            tokens=list(tokens),
            num_logits=1,
            parent=SessionId(trunk),
        )
        self._steps.append(step)
        answer = self.head.expect(step, context=self.tokens[session])
        self.engine.submit(step)
        return answer

    def adopt(self, session: str, *, branch: str) -> None:
        self.tokens[session] = self.tokens.pop(branch)
        self.engine.adopt(SessionId(session), branch=SessionId(branch))

    def release(self, session: str) -> None:
        self.tokens.pop(session)
        self.engine.release(SessionId(session))

    def run_until_done(self, *answers: Received) -> None:
        """Turn the engine until the answers are there, and check them."""
        for _ in range(1000):
            if all(answer.ended for answer in answers):
                break
            self.engine.step()
        for answer in answers:
            self.check(answer)

    def check(self, answer: Received) -> None:
        assert answer.ended
        assert answer.error is None, answer.error
        if not answer.rows:
            return
        length, count = len(answer.context), len(answer.rows)
        assert answer.places == list(range(length - count, length))
        expected = self.plain(answer.context)[-count:]
        error = (torch.stack(answer.rows) - expected).abs().max()
        assert not error.isnan()
        self.worst = max(self.worst, float(error))
        self.largest = max(self.largest, float(expected.abs().max()))

    def plain(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits of a forward pass without a cache, of a model that saw no other."""
        with torch.inference_mode():
            fresh = copy.deepcopy(self._plain)
            return fresh(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]

    def forget(self) -> None:
        """Release every session and forget every answer."""
        self._steps.clear()
        self.head.answers.clear()
        for session in list(self.tokens):
            self.release(session)
            self.engine.step()
