"""The expert: verifies all waiting blocks in one forward pass, and can decode on alone.

The replica commits what its verdicts say, so a round ships only the draft and the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from cascade.engine.request import ForwardRequest, Share
from cascade.protocol.grpc_status import refusal
from cascade.protocol.messages import Judge, Judgement, Score, Scores, extend_digest
from cascade.protocol.services import EXPERT
from cascade.replica.replica import Replica, Result, as_cascade_error
from cascade.sampling.probs import unscaled_probs
from cascade.sampling.sampler import logprobs
from cascade.speculation.verify import VerifyTask, rows_needed, verify
from cascade.types import Block, SessionId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.engine.request import LogitsOutput
    from cascade.protocol.messages import Refusal, ToDrafter, ToExpert
    from cascade.protocol.server import Connection
    from cascade.replica.session import ReplicaSession
    from cascade.types import TokenLogprob, Verdict


@dataclass(slots=True, eq=False, kw_only=True)
class _Verification:
    """A block to verify, and then the tokens that the expert decodes alone."""

    session: ReplicaSession
    message: Judge
    block: Block
    tokens: list[int]  # committed
    digest: int  # of prompt and committed tokens
    ahead: int  # tokens left to decode alone
    since_s: float  # when the message or the last verdict came
    divergence_left: float | None  # of the policy's budget, if it has one

    @property
    def task(self) -> VerifyTask:
        opened = self.session.opened
        return VerifyTask(
            policy=self.session.rules.at(self.tokens),
            position=len(self.tokens),
            block=self.block,
            prompt=opened.prompt,
            answer=self.tokens,
            masks=self.session.masks,
            divergence_left=self.divergence_left,
        )

    def commit(self, verdict: Verdict) -> ForwardRequest | None:
        """Commit a verdict; return the request that leads to the next token, if one is wanted."""
        session = self.session
        kept = len(self.tokens) + verdict.accepted
        self.tokens.extend(verdict.tokens)
        self.divergence_left = verdict.divergence_left
        self.digest = extend_digest(self.digest, verdict.tokens)
        ended = not verdict.tokens or verdict.tokens[-1] in session.opened.policy.stop_ids
        if ended or self.ahead == 0 or session.closed or session.queued:
            return None
        self.ahead -= 1
        self.block = Block()
        session.engine_tokens[kept:] = self.tokens[kept:]
        return ForwardRequest(
            session=session.engine_id,
            base=len(session.opened.prompt) + kept,
            tokens=tuple(self.tokens[kept:]),
            num_logits=1,
            task=self,
            share=session.share,
        )


@dataclass(slots=True, eq=False, kw_only=True)
class _Scoring:
    """A text being scored, chunk by chunk."""

    connection: Connection
    message: Score
    engine_id: SessionId
    found: list[TokenLogprob] = field(default_factory=list["TokenLogprob"])

    def add(self, logits_NV: Tensor, *, index: int) -> None:
        """Add the log-probabilities of the tokens after those at `index`, `index` + 1, ..."""
        tokens = self.message.tokens[index + 1 : index + 1 + logits_NV.shape[0]]
        top = [self.message.top] * len(tokens)
        self.found.extend(logprobs(unscaled_probs(logits_NV), tokens, top))

    @property
    def scores(self) -> Scores:
        message = self.message
        return Scores(
            session_id=message.session_id, epoch=message.epoch, logprobs=tuple(self.found)
        )


class Expert(Replica[Judge]):
    """A replica of the expert tier; its engine's logits handler."""

    kind = EXPERT

    def receive(self, connection: Connection, message: ToDrafter | ToExpert) -> None:
        """Serve one message of a stream.

        Raises:
            CascadeError: The message cannot be served; the server then refuses its session.
        """
        if isinstance(message, Score):
            self._begin_scoring(connection, message)
        else:
            super().receive(connection, message)

    def begin(self, session: ReplicaSession, message: Judge) -> Sequence[ForwardRequest]:
        """Return the forward request whose logits verify the block.

        Raises:
            ContextTooLong: The block does not fit.
        """
        self.check_context(session.num_tokens, message.block.length)
        room = self.describe().context_length - session.num_tokens - message.block.length
        policy, tokens = session.rules.at(session.tokens), message.block.tokens
        block = message.block.prefix(session.rules.length(session.tokens, tokens))
        task = _Verification(
            session=session,
            message=message,
            block=block,
            tokens=list(session.tokens),
            digest=session.digest,
            ahead=max(0, min(message.ahead, room)),
            since_s=session.received_s,
            divergence_left=message.divergence_left,
        )
        num_logits = rows_needed(policy, block.tokens)
        draft = block.tokens[: num_logits - 1]
        return [session.forward_request(draft, num_logits=num_logits, task=task)]

    def verify_blocks(
        self, logits: Sequence[Tensor], tasks: Sequence[VerifyTask]
    ) -> Sequence[Verdict]:
        """Return the verdict on the block of each task; all their logits, in order, are [N, V]."""
        # The logits of a large vocabulary are not copied without need.
        return verify(logits[0] if len(logits) == 1 else torch.cat(list(logits)), tasks)

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        """Verify every block and score every text whose logits are there."""
        ends = accumulate(output.count for output in outputs)
        blocks: list[tuple[_Verification, Tensor]] = []
        results: list[Result] = []
        for output, end in zip(outputs, ends, strict=True):
            own_NV = logits_NV[end - output.count : end]
            match output.request.task:
                case _Verification() as block:
                    blocks.append((block, own_NV))
                case _Scoring() as scoring:
                    scoring.add(own_NV, index=output.position)
                    if output.last:
                        self._loop.call_soon_threadsafe(self._end_scoring, scoring, scoring.scores)
                case session:
                    results.append(Result(session=session, done=False))
        parts = [own_NV for _, own_NV in blocks]
        if sum(map(len, parts)) == len(logits_NV):
            parts = [logits_NV]
        requests = self._verify([block for block, _ in blocks], parts, results) if blocks else []
        self.publish(results)
        return requests

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Refuse the session or the score whose request failed."""
        scoring = request.task
        if isinstance(scoring, _Scoring):
            message = scoring.message
            reply = refusal(message.session_id, message.epoch, as_cascade_error(error))
            self._loop.call_soon_threadsafe(self._end_scoring, scoring, reply)
        else:
            super().fail(request, error)

    def _verify(
        self, blocks: list[_Verification], logits: Sequence[Tensor], results: list[Result]
    ) -> list[ForwardRequest]:
        requests: list[ForwardRequest] = []
        verdicts = self.verify_blocks(logits, [block.task for block in blocks])
        now_s = self.clock()
        for block, verdict in zip(blocks, verdicts, strict=True):
            judgement = self._judgement(block, verdict, now_s=now_s)
            request = block.commit(verdict)
            if request is not None:
                requests.append(request)
            results.append(
                Result(
                    session=block.session,
                    message=judgement,
                    committed=verdict.tokens,
                    done=request is None,
                )
            )
        return requests

    def _judgement(self, block: _Verification, verdict: Verdict, *, now_s: float) -> Judgement:
        service_s, block.since_s = now_s - block.since_s, now_s
        return Judgement(
            session_id=block.message.session_id,
            epoch=block.message.epoch,
            position=len(block.tokens),
            digest=block.digest,
            verdict=verdict,
            cached_prompt_tokens=self.engine.cached_tokens(block.session.engine_id),
            timing=self.timing(block.session, service_s, now_s=now_s),
        )

    def _begin_scoring(self, connection: Connection, message: Score) -> None:
        self.leases.claim(message.lease)
        self.check_context(len(message.tokens), 0)
        engine_id = SessionId(f"score/{next(self._engine_ids)}")
        scoring = _Scoring(connection=connection, message=message, engine_id=engine_id)
        tokens = message.tokens[:-1]
        if not tokens:
            self._end_scoring(scoring, scoring.scores)
            return
        self.engine.submit(
            ForwardRequest(
                session=engine_id,
                base=0,
                tokens=tokens,
                num_logits=len(tokens),
                task=scoring,
                share=Share(message.caller, message.weight),
            )
        )

    def _end_scoring(self, scoring: _Scoring, reply: Scores | Refusal) -> None:
        self.engine.release(scoring.engine_id)
        self.leases.end(scoring.message.lease)
        scoring.connection.send(reply)
