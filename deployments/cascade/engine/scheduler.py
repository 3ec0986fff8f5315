"""Which waiting requests the next forward pass runs, and how many tokens of each.

Blocks to decode or verify go first; long prefills share the rest of the token budget, so neither
stalls the other: callers by their weights, and the sessions of a caller its part. While there is
more than one caller, the prompts of each take a part of a pass at most, since another's next
request waits for the pass that runs; and a pass that ends one's prompt takes no piece of another's
longer ones. A prefill that got nothing for several passes goes before the blocks, one per pass.
`Preemptor` decides which sequences lose their KV slots to the steps of a plan.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from cascade.engine.kv_cache import CachedSequence, KVCacheManager
    from cascade.engine.request import ForwardRequest
    from cascade.types import SessionId

_MAX_BLOCK = 64  # tokens up to which a request is a block rather than a prefill
_MAX_SKIPPED = 4  # passes without a token after which a step goes first
_MIN_SHARE = 64  # tokens of a prefill below which a pass is not worth its overhead
_CROWDED = 8  # a caller's prompts take one in so many tokens of a pass while there are others
_REMEMBERED = 64  # passes for which a caller counts as there


@dataclass(slots=True, kw_only=True, eq=False)
class ScheduledStep:
    """A request in progress; its sequence already has the request's tokens."""

    request: ForwardRequest
    sequence: CachedSequence
    number: int  # order of arrival
    run_end: int  # where the RoPE length of the next logits ends, `end` for most models
    is_first: bool  # of its session
    began_long: bool = False  # arrived with more tokens than a block
    computed: int = 0  # logits that have been computed
    held: list[Tensor] = field(default_factory=list["Tensor"])  # until the block's others follow
    delivered: int = 0  # logits that the handler has had
    alone: bool = False  # in its passes, because its logits were invalid beside others
    skipped_passes: int = 0

    @property
    def caller(self) -> str:
        """Return whose it is."""
        return self.request.share.caller

    @property
    def end(self) -> int:
        """Return the length of the sequence when the step is done."""
        return len(self.sequence.tokens)

    @property
    def first_logit(self) -> int:
        """Return the position of the first token whose logits are requested."""
        return self.end - self.request.num_logits

    @property
    def next_logit(self) -> int:
        """Return the position of the first token whose logits are still to be computed."""
        return self.first_logit + self.computed

    @property
    def remaining(self) -> int:
        """Return the tokens that are still to run up to `run_end`."""
        return self.run_end - self.sequence.cached

    @property
    def finished(self) -> bool:
        """Whether all tokens have run."""
        return self.sequence.cached == self.end == self.run_end

    @property
    def is_prefill(self) -> bool:
        """Whether this is a prefill, or the rest of one, rather than a block."""
        return self.began_long or self.remaining > _MAX_BLOCK

    @property
    def is_prompt(self) -> bool:
        """Whether it begins a session, or is a prefill of one."""
        return self.is_prefill or self.is_first

    @property
    def starved(self) -> bool:
        """Whether it was skipped for too many passes."""
        return self.skipped_passes >= _MAX_SKIPPED


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChunk:
    """The next `count` tokens of a step."""

    step: ScheduledStep
    count: int


class Scheduler:
    """The waiting steps, at most one per session; a pass has a `budget` of tokens.

    Args:
        budget: Tokens of a pass.
        linear: A pass takes as long as its tokens, so short ones cost little. While there are
            several callers, a pass then takes a smaller piece of the prompts of each, and blocks,
            too, wait for a pass that ends prompts of others, but not twice in a row.
    """

    def __init__(self, *, budget: int, linear: bool = False) -> None:
        self._budget = budget
        self._linear = linear
        self._steps: dict[SessionId, ScheduledStep] = {}
        self._number = 0
        self._plans = 0
        self._callers: dict[str, int] = {}  # with the number of the last plan that they were in
        # The last plan that ran any prefill of a caller (True), or any block (False).
        self._ran: dict[tuple[str, bool], int] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[ScheduledStep]:
        return iter(self._steps.values())

    @property
    def has_blocks(self) -> bool:
        """Whether a step waits that is no prefill."""
        return any(not step.is_prefill for step in self)

    def find(self, session: SessionId | None) -> ScheduledStep | None:
        """Return the waiting step of `session`."""
        return None if session is None else self._steps.get(session)

    def add(
        self,
        request: ForwardRequest,
        *,
        sequence: CachedSequence,
        prefill: ScheduledStep | None = None,
    ) -> ScheduledStep:
        """Queue a request and return its step.

        Args:
            request: The request.
            sequence: Already has the tokens of the request.
            prefill: A removed step of the sequence; what is left of it runs with this one.
        """
        assert request.session not in self._steps, "a session has one step at a time"
        self._number += prefill is None
        step = ScheduledStep(
            request=request,
            sequence=sequence,
            number=self._number if prefill is None else prefill.number,
            run_end=len(sequence.tokens),
            is_first=request.base == 0 or prefill is not None,
        )
        step.began_long = step.remaining > _MAX_BLOCK
        if prefill is not None:
            step.began_long |= prefill.began_long
            step.skipped_passes = prefill.skipped_passes
        self._steps[request.session] = step
        return step

    def remove(self, session: SessionId) -> ScheduledStep | None:
        """Remove the step of `session`, finished or not."""
        return self._steps.pop(session, None)

    def rename(self, session: SessionId, *, to: SessionId) -> None:
        """Move the step of `session`, if there is one, to another session."""
        step = self._steps.pop(session, None)
        if step is not None:
            step.request.session = to
            self._steps[to] = step

    def plan(self, *, reserve: Callable[[ScheduledStep], bool]) -> list[StepChunk]:
        """Return the chunks of the next pass, of at most the budget together.

        Args:
            reserve: Reserves KV slots for a step; a step for which it returns False waits.
        """
        chunks: list[StepChunk] = []
        budget = self._budget
        steps = self._order()
        most = self._most_of_callers(steps)
        shares = _Shares(steps, most=most)
        ending = {step.caller for step in steps if _ends_prompt(step, most=most)}
        block_tokens = sum(step.remaining for step in steps if not step.is_prefill)
        for step in steps:
            share = budget
            if step.is_prefill:
                share = shares.next(step, budget=budget)
                if budget - block_tokens >= _MIN_SHARE:
                    share = min(share, budget - block_tokens)
            else:
                block_tokens -= step.remaining
            ends = _ends_prompt(step, most=most)
            waits = not ends and self._yields(step, to=ending)
            if waits or not self._chunk_size(step, budget=budget, share=share) or not reserve(step):
                continue
            # Reserving may have dropped the step's own cached tokens.
            count = self._chunk_size(step, budget=budget, share=share)
            if count:
                self._ran[step.caller, step.is_prefill] = self._plans
                chunks.append(StepChunk(step=step, count=count))
                budget = max(0, budget - count)
                shares.take(step, count)
        self._count_skipped(chunks, least=min([_MIN_SHARE, *most.values()]))
        return chunks

    def _order(self) -> list[ScheduledStep]:
        """Return the steps by priority.

        Of the starved prefills only one goes before the blocks, so that many prompts at once do not
        delay every verification.
        """
        starved = [step for step in self._steps.values() if step.is_prefill and step.starved]
        first = max(starved, key=lambda step: (step.skipped_passes, -step.number), default=None)
        prompts = Counter[str]()  # what waits of the prefills of each caller
        for step in self._steps.values():
            if step.is_prefill:
                prompts[step.caller] += step.remaining

        def key(step: ScheduledStep) -> tuple[int, int, int]:
            # Who wants least leaves the others more than an equal share.
            wants = prompts[step.caller] if step.is_prefill else 0
            return _priority(step, first=first), wants, step.number

        return sorted(self._steps.values(), key=key)

    def _yields(self, step: ScheduledStep, *, to: set[str]) -> bool:
        """Whether a step leaves this pass to prompts of other callers.

        Args:
            step: Any but a prompt that ends in this pass.
            to: Callers with a prompt that ends in this pass.
        """
        if not to - {step.caller} or not (step.is_prefill or self._linear):
            return False
        # However many steps of the caller wait: few of them are in each pass.
        since = self._plans - self._ran.setdefault((step.caller, step.is_prefill), self._plans)
        return since <= (_MAX_SKIPPED if step.is_prefill else 1)

    def _most_of_callers(self, steps: list[ScheduledStep]) -> dict[str, int]:
        """Return the most tokens of a pass that the prompts of each caller take."""
        self._plans += 1
        waiting = Counter[str]()
        for step in steps:
            waiting[step.caller] += step.remaining if step.is_prompt else 0
        self._callers |= dict.fromkeys(waiting, self._plans)
        since = self._plans - _REMEMBERED
        self._callers = {name: last for name, last in self._callers.items() if last > since}
        self._ran = {which: last for which, last in self._ran.items() if last > since}
        piece = max(_MIN_SHARE, self._budget // _CROWDED) // (1 + self._linear)
        is_whole = len(self._callers) == 1
        return {
            name: self._budget if is_whole or wanted <= self._budget // 2 else piece
            for name, wanted in waiting.items()
        }

    def _chunk_size(self, step: ScheduledStep, *, budget: int, share: int) -> int:
        """Return how many tokens of `step` run; logits that fit one pass are not split."""
        most = min(budget, share)
        if step.remaining <= min(budget, max(share, _MAX_BLOCK)):
            return step.remaining
        if step.sequence.cached < step.next_logit:
            return min(step.next_logit - step.sequence.cached, most)
        if step.request.num_logits > self._budget:
            return min(step.remaining, most)
        return step.remaining if step.remaining <= budget else 0

    def _count_skipped(self, chunks: list[StepChunk], *, least: int) -> None:
        # A few leftover tokens count as nothing: under load a prefill would get no more than those.
        served = {
            chunk.step.number for chunk in chunks if chunk.count >= min(least, chunk.step.remaining)
        }
        for step in self._steps.values():
            step.skipped_passes = 0 if step.number in served else step.skipped_passes + 1


class _Shares:
    """The tokens of one pass that the prefills of each caller may take."""

    def __init__(self, steps: list[ScheduledStep], *, most: Mapping[str, int]) -> None:
        self._most = most
        self._waiting = Counter(step.caller for step in steps if step.is_prefill)
        self._weights = {step.caller: step.request.share.weight for step in steps}
        self._left: dict[str, int] = {}  # of the callers whose turn has begun

    def next(self, step: ScheduledStep, *, budget: int) -> int:
        """Return the share of the next prefill, in the order of the plan."""
        caller = step.caller
        # A block that lost its cache to a step before it in the plan has become a prefill.
        self._waiting[caller] = max(1, self._waiting[caller])
        if caller not in self._left:
            whole = sum(self._weights[one] for one in self._waiting if one not in self._left)
            part = budget * self._weights[caller] // whole
            self._left[caller] = min(self._most[caller], max(_MIN_SHARE, part))
        left, waiting = self._left[caller], self._waiting[caller]
        self._waiting[caller] -= 1
        return min(left, max(_MIN_SHARE, left // waiting))

    def take(self, step: ScheduledStep, count: int) -> None:
        """Count what a step runs; blocks count for nobody."""
        if step.caller in self._left and step.is_prefill:
            self._left[step.caller] = max(0, self._left[step.caller] - count)


def _ends_prompt(step: ScheduledStep, *, most: Mapping[str, int]) -> bool:
    """Whether a prompt ends in the next pass, if there is room."""
    return step.is_prompt and step.remaining <= max(most[step.caller], _MAX_BLOCK)


def _priority(step: ScheduledStep, *, first: ScheduledStep | None) -> int:
    if step is first:
        return 1
    if step.is_prefill:
        return 3
    return 0 if step.starved else 2


class Preemptor:
    """Reserves KV slots for the steps of one plan; what it has reserved is not evicted again."""

    def __init__(self, *, cache: KVCacheManager, scheduler: Scheduler) -> None:
        self.failed: list[ScheduledStep] = []  # steps of branches that found no slots
        self._cache = cache
        self._scheduler = scheduler
        self._reserved: set[CachedSequence] = set()

    def reserve(self, step: ScheduledStep) -> bool:
        """Reserve slots for a step; False if it has to wait or, as a branch, has failed."""
        sequence = step.sequence
        if sequence.parent is not None and (
            sequence.kv_range is None
            or not self._cache.reserve(sequence, tokens=step.end, victims=())
        ):
            self.failed.append(step)
            return False
        if not self._cache.reserve(sequence, tokens=step.end, victims=self._victims(step)):
            return False
        self._reserved.add(sequence)
        return True

    def _victims(self, step: ScheduledStep) -> Iterator[CachedSequence]:
        """Yield sequences that may lose their slots: those without a step, then younger steps'."""
        for sequence in self._cache.least_recent():
            waiting = self._scheduler.find(sequence.session)
            if waiting is None and sequence not in self._reserved:
                yield sequence
        for other in sorted(self._scheduler, key=lambda other: other.number, reverse=True):
            if other.number > step.number and other.sequence not in self._reserved:
                yield other.sequence
