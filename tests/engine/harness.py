"""An engine that a test steps itself, beside the same model's plain forward pass."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from numpy.random import Generator, default_rng
from tests.engine.architectures import VOCABULARY

from cascade.engine.backends.base import RopeLengths, find_rope_lengths
from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt
from cascade.engine.request import NOBODYS, ForwardRequest, LogitsOutput
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.model_loader import LoadedModel
    from cascade.engine.settings import EngineSettings


@dataclass(kw_only=True)
class Received:
    """What the handler received for a request; `context` is the whole sequence."""

    context: list[int]
    source: list[int] = field(default_factory=list[int])
    logits: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ended: bool = False
    error: Exception | None = None


class RecordingHandler:
    """Records all logits and failures."""

    def __init__(self) -> None:
        self.received: dict[int, Received] = {}
        self.passes: list[list[str]] = []
        self._requests: list[ForwardRequest] = []  # kept alive, so that no two share an id

    def expect(self, request: ForwardRequest, *, context: list[int]) -> Received:
        self._requests.append(request)
        return self.received.setdefault(id(request), Received(context=context))

    def forget(self) -> None:
        self._requests.clear()
        self.received.clear()

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        counts = [output.count for output in outputs]
        assert logits_NV.shape[0] == sum(counts)
        self.passes.append([output.request.session for output in outputs])
        for output, logits in zip(outputs, logits_NV.split(counts), strict=True):
            received = self.received[id(output.request)]
            assert not received.ended
            assert output.first == len(received.positions)
            received.logits.extend(logits.to("cpu", copy=True))
            received.positions.extend(range(output.position, output.position + output.count))
            received.ended = output.last
        return []

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        received = self.received[id(request)]
        assert not received.ended
        received.error, received.ended = error, True


@dataclass
class GreedyHandler:
    """Generates `length` tokens greedily in each session."""

    length: int
    generated: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    begun: threading.Event = field(default_factory=threading.Event)  # a token was generated

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        following: list[ForwardRequest] = []
        logits = logits_NV.split([output.count for output in outputs])
        for request, rows in zip([o.request for o in outputs], logits, strict=True):
            tokens = self.generated.setdefault(request.session, [])
            tokens.append(int(rows[-1].argmax()))
            self.begun.set()
            if len(tokens) == self.length:
                self.ended.release()
                continue
            base = request.base + len(request.tokens)
            following.append(
                ForwardRequest(
                    share=NOBODYS,
                    session=request.session,
                    base=base,
                    tokens=tokens[-1:],
                    num_logits=1,
                )
            )
        return following

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        self.errors[request.session] = error
        self.ended.release()


class EngineHarness:
    """Runs requests of named sessions and compares all logits with the plain forward pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: EngineSettings | None = None,
        *,
        loaded: LoadedModel | None = None,
        sources: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Make an engine of a model.

        Args:
            model: The model.
            settings: Of the engine.
            loaded: The model as the engine gets it.
            sources: Of an encoder-decoder, by the first letter of a session's name.
        """
        self._plain = copy.deepcopy(model)
        self.handler = RecordingHandler()
        self.engine = Engine(loaded or adopt(model), handler=self.handler, settings=settings)
        self.tokens: dict[str, list[int]] = {}
        self._sources = sources or {}
        self.worst = 0.0
        self.largest = 0.0

    def submit(
        self, session: str, tokens: Sequence[int], *, drop: int = 0, num_logits: int
    ) -> Received:
        """Queue a request that rolls back `drop` tokens and appends `tokens`."""
        known = self.tokens.get(session, [])
        return self._submit(session, known[: len(known) - drop], tokens, num_logits=num_logits)

    def branch(self, session: str, tokens: Sequence[int], *, parent: str, base: int) -> Received:
        """Queue the first request of a branch with the first `base` tokens of its parent."""
        return self._submit(session, self.tokens[parent][:base], tokens, parent=SessionId(parent))

    def _submit(
        self,
        session: str,
        kept: list[int],
        tokens: Sequence[int],
        *,
        num_logits: int = 1,
        parent: SessionId | None = None,
    ) -> Received:
        self.tokens[session] = [*kept, *tokens]
        request = ForwardRequest(
            share=NOBODYS,
            session=SessionId(session),
            base=len(kept),
            tokens=list(tokens),
            num_logits=num_logits,
            parent=parent,
            source=self._sources.get(session[0], ()),
        )
        received = self.handler.expect(request, context=self.tokens[session])
        received.source = list(request.source)
        self.engine.submit(request)
        return received

    def adopt(self, session: str, *, branch: str) -> None:
        self.tokens[session] = self.tokens.pop(branch)
        self.engine.adopt(SessionId(session), branch=SessionId(branch))

    def release(self, session: str) -> None:
        self.tokens.pop(session)
        self.engine.release(SessionId(session))

    def run(
        self, session: str, tokens: Sequence[int], *, drop: int = 0, num_logits: int = 1
    ) -> None:
        """Submit a request, run it and check its logits."""
        self.run_until_done(self.submit(session, tokens, drop=drop, num_logits=num_logits))

    def run_until_done(self, *expected: Received) -> None:
        """Step the engine until all logits are there, and check them."""
        for _ in range(1000):
            if all(received.ended for received in expected):
                break
            self.engine.step()
        for received in expected:
            self.check(received)

    def check(self, received: Received) -> None:
        assert received.ended
        assert received.error is None, received.error
        if not received.logits:
            return
        length, count = len(received.context), len(received.logits)
        assert received.positions == list(range(length - count, length))
        expected = self.plain_logits(received.context, count=count, source=received.source)
        error = (torch.stack(received.logits) - expected).abs().max()
        assert not error.isnan()
        self.worst = max(self.worst, float(error))
        self.largest = max(self.largest, float(expected.abs().max()))

    def plain_logits(
        self, tokens: Sequence[int], *, count: int, source: Sequence[int] = ()
    ) -> Tensor:
        """Return the logits of the last `count` tokens, by passes of the model without a cache.

        If its RoPE depends on the length of a pass, each has its own pass over the tokens up to it.
        """
        ids = torch.tensor([list(tokens)])
        ends = range(len(tokens) - count + 1, len(tokens) + 1)
        # Frequencies that grow with the length are right in a fresh copy only, shortest pass first.
        fresh = copy.deepcopy(self._plain)
        with torch.inference_mode():
            if source:
                read = {"input_ids": torch.tensor([list(source)]), "decoder_input_ids": ids}
                return fresh(**read, use_cache=False).logits[0, -count:]
            if find_rope_lengths(fresh) == RopeLengths():
                return fresh(input_ids=ids, use_cache=False).logits[0, -count:]
            passes = [fresh(input_ids=ids[:, :end], use_cache=False) for end in ends]
            return torch.cat([one.logits[0, -1:] for one in passes])

    def reset(self) -> None:
        """Release every session and forget what was received."""
        self.handler.forget()
        for session in list(self.tokens):
            self.release(session)
            self.engine.step()


def draw(chance: Generator, count: int) -> list[int]:
    return chance.integers(3, VOCABULARY, size=count).tolist()


def ragged_scenario(harness: EngineHarness) -> None:
    """Run prefills, blocks and rollbacks of several sessions, with growth, eviction and reuse."""
    chance = default_rng(7)

    def run(*requests: tuple[str, int, int]) -> None:
        received = [
            harness.submit(session, draw(chance, count), drop=drop, num_logits=count)
            for session, drop, count in requests
        ]
        harness.run_until_done(*received)

    run(("a", 0, 37), ("b", 0, 5))
    run(("a", 0, 4), ("b", 0, 1), ("c", 0, 23))
    run(("a", 3, 6), ("c", 0, 16), ("b", 0, 2), ("d", 0, 70))
    run(("c", 9, 1), ("d", 30, 1), ("a", 0, 1), ("b", 0, 1))
    run(("a", 0, 3), ("b", 1, 8), ("c", 2, 1), ("d", 0, 30))
    prefix = harness.tokens["a"][:30]
    reused = harness.submit("e", [*prefix, *draw(chance, 9)], num_logits=9)
    harness.run_until_done(reused, harness.submit("d", draw(chance, 60), num_logits=5))
    run(("d", 1, 2), ("a", 0, 5), ("e", 0, 5))
    harness.release("a")
    again = harness.submit("f", [*prefix, *draw(chance, 3)], num_logits=33)
    harness.run_until_done(again)
    run(("f", 0, 5), ("e", 4, 5), ("b", 0, 40))
