"""An engine without a model, and replicas on it: a test decides when forward passes run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable  # noqa: TC003 - a field of a dataclass
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from cascade.drafter.drafter import Drafter
from cascade.engine.request import LogitsOutput
from cascade.engine.stats import ForwardPass
from cascade.expert.expert import Expert
from cascade.protocol.messages import Open, extend_digest
from cascade.protocol.server import Connection
from cascade.replica.options import ReplicaOptions
from cascade.types import DecodingParams, SamplingParams, Session, SessionId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.engine.request import ForwardRequest, LogitsHandler
    from cascade.protocol.codec import ServerMessage

    Model: TypeAlias = Callable[[Sequence[int]], int]

VOCABULARY = 16
TOKEN = "shared"  # noqa: S105 - no secret: every fake replica accepts it as a lease
GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))


def successor(tokens: Sequence[int]) -> int:
    """Return the last token plus one: the next token of the default model."""
    return (tokens[-1] + 1) % VOCABULARY


@dataclass(eq=False, kw_only=True)
class FakeEngine:
    """Holds the tokens of each session; `run` serves all waiting requests in one pass."""

    handler: LogitsHandler
    model: Model = successor
    limit_tokens: int = 64
    limit_source: int = 0
    spare: float = 1.0
    decodes_ahead: bool = False
    reads_each: bool = False
    alive: bool = True
    working_s: float = 0.0
    current_pass: ForwardPass = field(default_factory=ForwardPass)
    cache: dict[str, list[int]] = field(default_factory=dict[str, "list[int]"])
    waiting: list[ForwardRequest] = field(default_factory=list["ForwardRequest"])
    adopted: list[str] = field(default_factory=list[str])
    released: list[str] = field(default_factory=list[str])
    _inbox: list[Callable[[], None]] | None = None  # calls made while the handler has logits

    def submit(self, request: ForwardRequest) -> None:
        self._call(lambda: self._submit(request))

    def _submit(self, request: ForwardRequest) -> None:
        if request.parent is not None:
            self.cache[request.session] = self.cache[request.parent][: request.base]
        self.waiting.append(request)

    def adopt(self, session: SessionId, *, branch: SessionId) -> None:
        self._call(lambda: self._adopt(session, branch))

    def _adopt(self, session: SessionId, branch: SessionId) -> None:
        self.adopted.append(branch)
        self.cache[session] = self.cache.pop(branch)
        self._forget(session)
        for request in self.waiting:
            if request.session == branch:
                request.session = session

    def release(self, session: SessionId) -> None:
        self._call(lambda: self._release(session))

    def _release(self, session: SessionId) -> None:
        self.released.append(session)
        self.cache.pop(session, None)
        self._forget(session)

    def cached_tokens(self, session: SessionId) -> int:
        del session
        return 0

    def taken_s(self, session: SessionId) -> float:
        del session
        return 0.25

    def run(self) -> None:
        """Serve all waiting requests in one forward pass; those that follow wait."""
        requests, self.waiting = self.waiting, []
        outputs: list[LogitsOutput] = []
        rows: list[int] = []
        for request in requests:
            text = self.cache.setdefault(request.session, [])
            assert 0 <= request.base <= len(text), "only cached tokens can be kept"
            text[request.base :] = request.tokens
            first = len(text) - request.num_logits
            rows += [self.model(text[: end + 1]) for end in range(first, len(text))]
            outputs.append(
                LogitsOutput(request=request, first=0, count=request.num_logits, position=first)
            )
        num_tokens = sum(len(request.tokens) for request in requests)
        self.current_pass = ForwardPass(
            began_s=time.monotonic(), tokens=num_tokens, sessions=len(requests)
        )
        self._inbox = []
        for request in self.handler.finish(outputs, _logits(rows)):
            self._submit(request)  # before anything that waits in the inbox, as in an engine
        inbox, self._inbox = self._inbox, None
        for call in inbox:
            call()

    def fail(self, session: SessionId, error: Exception) -> None:
        """Let the waiting request of a session fail."""
        (request,) = (one for one in self.waiting if one.session == session)
        self.waiting.remove(request)
        self.handler.fail(request, error)

    def _call(self, call: Callable[[], None]) -> None:
        if self._inbox is None:
            call()
        else:
            self._inbox.append(call)

    def _forget(self, session: SessionId) -> None:
        self.waiting = [request for request in self.waiting if request.session != session]


def _logits(tokens: Sequence[int]) -> Tensor:
    """Return logits [N, V] whose largest is each token's, and whose second its successor's."""
    first_N = torch.tensor(tokens, dtype=torch.int64)
    one_hot = torch.nn.functional.one_hot
    return 2.0 * one_hot(first_N, VOCABULARY) + one_hot((first_N + 1) % VOCABULARY, VOCABULARY)


class _OnFakeEngine:
    """A replica without a model; `token` is accepted as a lease."""

    engine: Any

    def __init__(self, *, model: Model = successor, limit_tokens: int = 64) -> None:
        self._model = model
        self._limit_tokens = limit_tokens
        weights: Any = SimpleNamespace(vocabulary=VOCABULARY)
        tokenizer: Any = SimpleNamespace(size=VOCABULARY, tokens={})
        options = ReplicaOptions(model="fake")
        super().__init__(weights, tokenizer, options, token=TOKEN)  # pyright: ignore[reportCallIssue] - that of a replica

    def make_engine(self, model: Any, settings: Any) -> Any:
        del model, settings
        handler: Any = self
        return FakeEngine(handler=handler, model=self._model, limit_tokens=self._limit_tokens)


class FakeDrafter(_OnFakeEngine, Drafter):
    """A drafter on a fake engine."""


class FakeExpert(_OnFakeEngine, Expert):
    """An expert on a fake engine."""


class Client:
    """The router's end of one session on a replica of this process."""

    def __init__(
        self,
        replica: FakeDrafter | FakeExpert,
        *tokens: int,
        name: str = "s",
        prompt: tuple[int, ...] = (1, 2),
        policy: DecodingParams = GREEDY,
        **opening: Any,
    ) -> None:
        self.replica = replica
        self.received: list[ServerMessage] = []
        self.connection = Connection(replica.kind)
        self.connection.on_send = self.received.append
        self.session = Session(id=SessionId(name), prompt=prompt, policy=policy, tokens=tokens)
        opening = {"lease": TOKEN, **opening}
        replica.receive(self.connection, Open(session=self.session, epoch=1, **opening))

    def digest(self, *tokens: int) -> int:
        """Return the digest of the prompt and tokens after it."""
        return extend_digest(extend_digest(0, self.session.prompt), tokens)

    def after(self, *tokens: int) -> dict[str, Any]:
        """Return the fields of a message that follows these tokens."""
        return {
            "session_id": self.session.id,
            "epoch": 1,
            "position": len(tokens),
            "digest": self.digest(*tokens),
        }

    def send(self, message: Any) -> None:
        """Send a message to the replica."""
        self.replica.receive(self.connection, message)

    async def run(self, passes: int = 1) -> list[ServerMessage]:
        """Run forward passes; return the messages received since the last call."""
        for _ in range(passes):
            self.replica.engine.run()
            await asyncio.sleep(0)  # the event loop delivers results
        return await self.take()

    async def take(self) -> list[ServerMessage]:
        """Return the messages received since the last call."""
        await asyncio.sleep(0)
        taken = self.received.copy()
        self.received.clear()
        return taken
