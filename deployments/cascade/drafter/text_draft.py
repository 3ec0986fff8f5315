"""A block that is drafted as text and said in the expert's tokens.

For pairs with little vocabulary in common (`engine.vocabulary`, way `slem`). The drafter writes in
its own tokens, from its own distribution over all of them; what it has written is read by the
expert's tokenizer. A token of the expert has no probability then: whatever the drafter's random
numbers are, it is drafted for certain, so q is a one-hot. That is exact for the lossless rule, and
token_v3 keeps a draft where the expert finds it likely enough, whatever q is.

A draft is made on request only, never ahead.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cascade.engine.request import ForwardRequest
from cascade.errors import InvalidRequest
from cascade.protocol.messages import Proposal
from cascade.rules import Lossless, TokenV3
from cascade.speculation.draft import DraftTask, DraftToken, block_of, forced_draft
from cascade.types import DecodingParams, SamplingParams

if TYPE_CHECKING:
    from cascade.drafter.draft_tree import DraftSession
    from cascade.engine.vocabulary import VocabularyMap
    from cascade.protocol.messages import Propose

_MAX_PASSES = 256  # of a block
_SPARE_PASSES = 8  # beyond one for each of the expert's tokens, which may have fewer bytes


def text_draft_of(policy: DecodingParams, token: int) -> DraftToken:
    """Return the draft of one of the expert's tokens that is drafted for certain."""
    return replace(forced_draft(policy, token), forced=False)


@dataclass(slots=True, eq=False, kw_only=True)
class TextDraft:
    """What is drafted for one message. The engine's thread owns it."""

    session: DraftSession
    message: Propose
    vocabulary: VocabularyMap
    limit: int  # of the context, in the drafter's tokens
    policy: DecodingParams = field(init=False)
    _own: list[int] = field(init=False, default_factory=list[int])  # the drafter's tokens
    _found: list[int] = field(init=False, default_factory=list[int])  # the same in the expert's
    _base: int = field(init=False)  # the drafter's tokens of prompt and answer

    def __post_init__(self) -> None:
        self.policy = self.session.rules.at(self.session.tokens)
        if self.message.until_deferral or not isinstance(self.policy.rule, Lossless | TokenV3):
            raise InvalidRequest(
                f"rule `{self.policy.rule.kind}` reads the drafter's probabilities, which its text "
                "has not in the expert's tokens (`drafter.vocabulary` is slem); use lossless or "
                "token_v3"
            )
        self._base = self.session.engine_length(self.session.tokens)

    def begin(self) -> ForwardRequest:
        """Return the request that leads to the first token."""
        return self.session.forward_request((), num_logits=1, task=self)

    def task(self) -> DraftTask:
        """Return the task of drafting the next of the drafter's tokens.

        Under the lossless rule its likeliest, which is the likeliest to be accepted. Random numbers
        are numbered apart for each position of the answer, so that none is used twice.
        """
        sampling = SamplingParams(temperature=0.0)
        if not isinstance(self.policy.rule, Lossless):
            asked = self.policy.sampling
            sampling = SamplingParams(
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                min_p=asked.min_p,
            )
        number = self.message.position * _MAX_PASSES + len(self._own)
        policy = DecodingParams(sampling=sampling, seed=self.policy.seed)
        return DraftTask(policy=policy, position=number, block_start=number)

    def add(self, token: int) -> ForwardRequest | None:
        """Add the drafter's next token; return the request that leads to one more, if needed."""
        self._own.append(token)
        if self._read(token) or self._base + len(self._own) >= self.limit:
            return None
        passes = min(_MAX_PASSES, 2 * self.message.count + _SPARE_PASSES)
        # A token more is drafted than is wanted: the last one may go on.
        if len(self._found) > self.message.count or len(self._own) >= passes:
            return None
        return ForwardRequest(
            session=self.session.engine_id,
            base=self._base + len(self._own) - 1,
            tokens=(token,),
            num_logits=1,
            task=self,
            share=self.session.share,
        )

    def proposal(self) -> Proposal:
        """Return the block."""
        message, drafts = self.message, self._found[: self.message.count]
        return Proposal(
            session_id=message.session_id,
            epoch=message.epoch,
            position=message.position,
            digest=message.digest,
            block=block_of([text_draft_of(self.policy, one) for one in drafts]),
            passes=len(self._own),
        )

    def _read(self, token: int) -> bool:
        """Read the drafter's text as the expert's tokens; return whether it has ended."""
        tokenizer = self.vocabulary.drafter.tokenizer
        special = token in tokenizer.special_ids
        own = self._own[:-1] if special else self._own
        decoder = getincrementaldecoder("utf-8")("surrogateescape")
        text = decoder.decode(self.vocabulary.drafter.bytes_of(own))  # an incomplete end waits
        self._found = self.vocabulary.expert.encode(text.encode("utf-8", "surrogateescape"))
        if special:
            same = next((e for e, d in self.vocabulary.pairs.items() if d == token), None)
            self._found += [] if same is None else [same]
        return special
