"""One session on one replica: its committed tokens, and what the engine holds of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cascade.engine.request import ForwardRequest
from cascade.protocol.messages import extend_digest
from cascade.sampling.phases import SessionRules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.engine.request import Share
    from cascade.protocol.messages import Judge, Propose
    from cascade.protocol.server import Connection
    from cascade.sampling.token_mask import TokenMask
    from cascade.types import Session, SessionId


@dataclass(slots=True, eq=False, kw_only=True)
class ReplicaSession:
    """The committed tokens of a session, and those that its KV cache in the engine covers.

    The event loop owns it; the engine's thread reads it only while it is `busy`.
    """

    connection: Connection
    opened: Session  # as the router opened it
    epoch: int
    lease: str  # its token
    share: Share  # of a pass
    message_follows: bool = False  # its first message comes right after it was opened
    engine_id: SessionId  # the session's name in the engine, never reused
    tokens: list[int]  # committed, after the prompt
    masks: Sequence[TokenMask] = ()
    vocabulary: int = 0  # logits of a row
    rules: SessionRules = field(init=False)
    digest: int = field(init=False)  # of prompt and committed tokens
    engine_tokens: list[int] = field(init=False, default_factory=list[int])  # drafts included
    num_synced: int = field(init=False, default=0)  # engine_tokens[:n] == tokens[:n]
    begun: bool = field(init=False, default=False)  # the engine has the prompt but its last token
    prefilled: bool = field(init=False, default=False)  # and that one too
    busy: bool = False
    closed: bool = False
    queued: deque[Propose | Judge] = field(init=False, default_factory=deque)  # while busy
    serving: Propose | Judge | None = None  # the message that the forward pass in flight is for
    received_s: float = 0.0  # when the last message came

    def __post_init__(self) -> None:
        self.rules = SessionRules(self.opened.policy)
        self.digest = self._digest()

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of prompt and committed output."""
        return len(self.opened.prompt) + len(self.tokens)

    @property
    def engine_prompt(self) -> Sequence[int]:
        """Return the prompt in the tokens of this replica's model."""
        return self.opened.prompt

    @property
    def engine_source(self) -> Sequence[int]:
        """Return what an encoder reads in the tokens of this replica's model."""
        return self.opened.source

    def to_engine(self, tokens: Sequence[int]) -> Sequence[int]:
        """Return tokens of the answer in those of this replica's model."""
        return tokens

    def engine_length(self, tokens: Sequence[int]) -> int:
        """Return how many tokens of the model the prompt and so much of the answer are."""
        return len(self.engine_prompt) + len(self.to_engine(tokens))

    def repeats(self, message: Propose | Judge) -> bool:
        """Return whether the message resends the last one, which will be answered anyway."""
        last = self.queued[-1] if self.queued else self.serving
        prefix = message.position, message.digest
        return last is not None and (last.position, last.digest) == prefix

    def commit(self, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        self.tokens.extend(tokens)
        self.digest = extend_digest(self.digest, tokens)

    def sync_tokens(self, message: Propose | Judge) -> int | None:
        """Make the message's tokens the last committed before its position.

        Returns:
            None, or the position from which the router must send tokens: there is a gap before
            these, or the digest shows that earlier ones differ.
        """
        start = message.position - len(message.tokens)
        if start > len(self.tokens):
            return len(self.tokens)
        if start < len(self.tokens):
            del self.tokens[start:]
            self.num_synced = min(self.num_synced, start)
            self.digest = self._digest()
        self.commit(message.tokens)
        return None if self.digest == message.digest else 0

    def forward_request(
        self, draft: Sequence[int], *, num_logits: int, task: object
    ) -> ForwardRequest:
        """Return the request that feeds the engine what it lacks of the tokens, and a draft.

        Args:
            draft: Tokens after the committed ones.
            num_logits: The last so many tokens need logits; at most `len(draft) + 1`.
            task: Passed back with the logits.
        """
        held, tokens = self.engine_tokens, self.tokens
        known = min(len(held), len(tokens))
        while self.num_synced < known and held[self.num_synced] == tokens[self.num_synced]:
            self.num_synced += 1
        # The last committed token may run again: its logits are the first that are needed.
        keep = min(self.num_synced, len(tokens) - 1) if self.prefilled else -1
        if keep >= 0:
            base = self.engine_length(tokens[:keep])
        else:
            base = len(self.engine_prompt) - 1 if self.begun else 0
        new = (*tokens[max(keep, 0) :], *draft)
        held[max(keep, 0) :] = new
        source = () if self.begun else self.engine_source
        self.begun = self.prefilled = True
        return ForwardRequest(
            session=self.engine_id,
            base=base,
            tokens=(*self.engine_prompt[base:], *self.to_engine(new)),
            num_logits=num_logits,
            task=task,
            share=self.share,
            source=source,
        )

    def prefill(self) -> ForwardRequest:
        """Return the request that feeds all but the last known token, without logits.

        The engine runs it with that of the first message, if that comes in time.
        Of an encoder-decoder it names the source, and feeds one token at least.
        """
        self.engine_tokens = list(self.tokens[:-1])
        self.begun, self.prefilled = True, bool(self.tokens)
        prompt = self.engine_prompt if self.tokens else self.engine_prompt[:-1]
        known = (*prompt, *self.to_engine(self.engine_tokens)) or self.engine_prompt
        return ForwardRequest(
            session=self.engine_id,
            base=0,
            tokens=known,
            num_logits=0,
            task=self,
            share=self.share,
            source=self.engine_source,
        )

    def _digest(self) -> int:
        return extend_digest(extend_digest(0, self.opened.prompt), self.tokens)
