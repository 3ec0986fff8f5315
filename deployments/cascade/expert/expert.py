"""The expert: judges blocks, all that wait in one forward pass, and can write on alone.

The replica commits what its verdicts say, so a round ships only the draft and the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from cascade.engine.request import ForwardRequest
from cascade.errors import CascadeError, Internal
from cascade.protocol.grpc_status import refusal
from cascade.protocol.messages import Judge, Judgement, Score, Scores, extend_digest
from cascade.protocol.services import EXPERT
from cascade.replica.replica import Replica, Result
from cascade.replica.session import ReplicaSession
from cascade.sampling.probs import unscaled_probs
from cascade.sampling.sampler import logprobs
from cascade.speculation.cost_model import Timing
from cascade.speculation.verify import VerifyTask, rows_needed, verify
from cascade.types import Block, SessionId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.engine.request import LogitsOutput
    from cascade.protocol.server import Connection
    from cascade.types import TokenLogprob, Verdict


@dataclass(slots=True, eq=False, kw_only=True)
class _Verification:
    """A block under judgement, and then the tokens written alone."""

    seat: ReplicaSession
    item: Judge
    block: Block
    answer: list[int]  # committed
    digest: int  # of prompt and answer
    ahead: int
    since_s: float  # when the item came, or the verdict before

    @property
    def task(self) -> VerifyTask:
        session = self.seat.opened
        return VerifyTask(
            policy=session.policy,
            position=len(self.answer),
            block=self.block,
            prompt=session.prompt,
            answer=self.answer,
        )

    def take(self, verdict: Verdict) -> ForwardRequest | None:
        """Commit a verdict; return the step that leads to the next token, if one is wanted."""
        kept = len(self.answer) + verdict.accepted
        self.answer.extend(verdict.tokens)
        self.digest = extend_digest(self.digest, verdict.tokens)
        done = not verdict.tokens or verdict.tokens[-1] in self.seat.opened.policy.stop_ids
        if done or self.ahead == 0 or self.seat.closed or self.seat.queued:
            return None
        self.ahead -= 1
        self.block = Block()
        self.seat.fed[kept:] = self.answer[kept:]
        return ForwardRequest(
            session=self.seat.key,
            base=len(self.seat.opened.prompt) + kept,
            tokens=tuple(self.answer[kept:]),
            num_logits=1,
            task=self,
        )


@dataclass(slots=True, eq=False, kw_only=True)
class _Scoring:
    """A text being scored, chunk by chunk."""

    connection: Connection
    item: Score
    key: SessionId
    found: list[TokenLogprob] = field(default_factory=list)

    def take(self, logits_NV: Tensor, *, index: int) -> None:
        """Add the log-probabilities of the tokens after those at `index`, `index` + 1, ..."""
        tokens = self.item.tokens[index + 1 : index + 1 + logits_NV.shape[0]]
        self.found.extend(
            logprobs(unscaled_probs(logits_NV), tokens, [self.item.top] * len(tokens))
        )


class Expert(Replica[Judge]):
    """A replica of the expert tier; its engine's head."""

    kind = EXPERT

    def begin(self, seat: ReplicaSession, item: Judge) -> Sequence[ForwardRequest]:
        """Return the step whose rows judge the block."""
        self.check_context(seat.length, item.block.length)
        room = self.describe().context_length - seat.length - item.block.length
        task = _Verification(
            seat=seat,
            item=item,
            block=item.block,
            answer=list(seat.answer),
            digest=seat.digest,
            ahead=max(0, min(item.ahead, room)),
            since_s=seat.asked_s,
        )
        rows = rows_needed(seat.opened.policy, item.block.tokens)
        return [seat.step(item.block.tokens[: rows - 1], rows=rows, task=task)]

    def verdicts(self, rows: Sequence[Tensor], tasks: Sequence[VerifyTask]) -> Sequence[Verdict]:
        """Return what the rows, [N, V] of each task, say of the tasks' blocks."""
        return verify(torch.cat(list(rows)), tasks)

    def score(self, connection: Connection, item: Score) -> None:
        """Begin to score a text."""
        self.check_context(len(item.tokens), 0)
        key = SessionId(f"score/{next(self._keys)}")
        task = _Scoring(connection=connection, item=item, key=key)
        fed = item.tokens[:-1]
        if fed:
            self.engine.submit(
                ForwardRequest(session=key, base=0, tokens=fed, num_logits=len(fed), task=task)
            )
        else:
            self._scored(task)

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        """Judge every block and score every text whose rows are there."""
        ends = list(accumulate(one.count for one in outputs))
        blocks: list[tuple[_Verification, Tensor]] = []
        results: list[Result] = []
        for one, end in zip(outputs, ends, strict=True):
            rows_NV = logits_NV[end - one.count : end]
            match one.request.task:
                case _Verification() as block:
                    blocks.append((block, rows_NV))
                case _Scoring() as scoring:
                    self._score(scoring, rows_NV, one)
                case seat:
                    results.append(Result(session=seat))
        follow = self._verify(blocks, results)
        self.publish(results)
        return follow

    def session_of(self, step: ForwardRequest) -> ReplicaSession | None:
        """Return the seat that a step belongs to; a score has none."""
        match step.task:
            case _Verification() as block:
                return block.seat
            case ReplicaSession() as seat:
                return seat
            case _:
                return None

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Refuse the session or the score whose step cannot run."""
        if isinstance(request.task, _Scoring):
            self._loop.call_soon_threadsafe(self._unscored, request.task, error)
        else:
            super().fail(request, error)

    def _verify(
        self, blocks: list[tuple[_Verification, Tensor]], results: list[Result]
    ) -> list[ForwardRequest]:
        if not blocks:
            return []
        follow: list[ForwardRequest] = []
        verdicts = self.verdicts([rows for _, rows in blocks], [block.task for block, _ in blocks])
        now_s = self.clock()
        for (block, _), verdict in zip(blocks, verdicts, strict=True):
            item = self._judgement(block, verdict, now_s=now_s)
            step = block.take(verdict)
            if step is not None:
                follow.append(step)
            results.append(
                Result(session=block.seat, item=item, committed=verdict.tokens, done=step is None)
            )
        return follow

    def _judgement(self, block: _Verification, verdict: Verdict, *, now_s: float) -> Judgement:
        current = self.engine.current_pass
        service_s, block.since_s = now_s - block.since_s, now_s
        return Judgement(
            session_id=block.item.session_id,
            epoch=block.item.epoch,
            position=len(block.answer),
            digest=block.digest,
            verdict=verdict,
            cached_prompt_tokens=self.engine.cached_tokens(block.seat.key),
            timing=Timing(
                service_s=service_s,
                step_s=now_s - current.began_s,
                tokens=current.tokens,
                sessions=current.sessions,
                open=self.num_sessions,
            ),
        )

    def _score(self, scoring: _Scoring, rows_NV: Tensor, one: LogitsOutput) -> None:
        scoring.take(rows_NV, index=one.position)
        if one.last:
            self._loop.call_soon_threadsafe(self._scored, scoring)

    def _scored(self, scoring: _Scoring) -> None:
        item = scoring.item
        self._end_score(scoring)
        scoring.connection.send(
            Scores(session_id=item.session_id, epoch=item.epoch, logprobs=tuple(scoring.found))
        )

    def _unscored(self, scoring: _Scoring, error: Exception) -> None:
        item = scoring.item
        self._end_score(scoring)
        known = error if isinstance(error, CascadeError) else Internal(f"a pass failed: {error}")
        scoring.connection.send(refusal(item.session_id, item.epoch, known))

    def _end_score(self, scoring: _Scoring) -> None:
        self.engine.release(scoring.key)
        self.leases.end(scoring.item.lease)
