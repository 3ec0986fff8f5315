from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.engine.kv_cache import CachedSequence
from cascade.engine.request import ForwardRequest
from cascade.engine.scheduler import ScheduledStep, Scheduler, StepChunk
from cascade.types import SessionId

BUDGET = 128


@dataclass(frozen=True)
class Wish:
    tokens: int
    rows: int


wishes = st.integers(1, 700).flatmap(
    lambda tokens: st.builds(Wish, tokens=st.just(tokens), rows=st.integers(0, tokens))
)


def add(scheduler: Scheduler, name: str, wish: Wish, *, whole: bool = False) -> ScheduledStep:
    session = SessionId(name)
    tokens = [1] * wish.tokens
    sequence = CachedSequence(session=session, tokens=tokens)
    step = ForwardRequest(session=session, base=0, tokens=tokens, num_logits=wish.rows)
    return scheduler.add(step, sequence=sequence, single_pass=whole)


def granted(_: ScheduledStep) -> bool:
    return True


def run(scheduler: Scheduler) -> list[StepChunk]:
    slices = scheduler.plan(reserve=granted)
    for piece in slices:
        piece.step.sequence.cached += piece.count
        if not piece.step.remaining:
            scheduler.remove(piece.step.request.session)
    return slices


@settings(max_examples=50, deadline=None)
@given(st.lists(wishes, min_size=1, max_size=12))
def test_every_step_ends_and_no_pass_exceeds_the_budget(many: list[Wish]) -> None:
    scheduler = Scheduler(budget=BUDGET)
    for number, wish in enumerate(many):
        add(scheduler, str(number), wish)
    total, passes = sum(wish.tokens for wish in many), 0

    while len(scheduler):
        slices = run(scheduler)
        passes += 1
        assert slices
        assert sum(piece.count for piece in slices) <= BUDGET
        assert all(piece.count > 0 for piece in slices)
        assert len({piece.step.number for piece in slices}) == len(slices)
        total -= sum(piece.count for piece in slices)

    assert total == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(wishes, min_size=1, max_size=12))
def test_rows_that_fit_a_pass_come_in_one(many: list[Wish]) -> None:
    scheduler = Scheduler(budget=BUDGET)
    for number, wish in enumerate(many):
        add(scheduler, str(number), wish)

    while len(scheduler):
        for piece in run(scheduler):
            job = piece.step
            first = job.end - job.request.num_logits
            if 0 < job.request.num_logits <= BUDGET and job.sequence.cached > first:
                assert not job.remaining


@settings(max_examples=30, deadline=None)
@given(st.lists(wishes, min_size=1, max_size=4), st.sampled_from([1, 30, 50]))
def test_a_stream_of_blocks_starves_no_prefill(many: list[Wish], blocks: int) -> None:
    scheduler = Scheduler(budget=BUDGET)
    prefills = [add(scheduler, str(number), wish) for number, wish in enumerate(many)]

    for _ in range(6 * len(many) * (1 + 700 // 16)):
        for number in range(blocks):
            if scheduler.find(SessionId(f"block {number}")) is None:
                add(scheduler, f"block {number}", Wish(tokens=3, rows=3))
        run(scheduler)
        if not any(job.remaining for job in prefills):
            break

    assert not any(job.remaining for job in prefills)


@settings(max_examples=30, deadline=None)
@given(prefills=st.integers(1, 40), tokens=st.integers(65, 700), blocks=st.integers(1, 10))
def test_a_burst_of_prompts_holds_up_no_verdict(prefills: int, tokens: int, blocks: int) -> None:
    """Blocks that leave room for one prefill run in every pass, however many prompts wait."""
    scheduler = Scheduler(budget=BUDGET)
    waiting = [
        add(scheduler, str(number), Wish(tokens=tokens, rows=1)) for number in range(prefills)
    ]

    for _ in range(10 * prefills * (1 + tokens // 64)):
        jobs = [
            add(scheduler, f"block {number}", Wish(tokens=6, rows=6)) for number in range(blocks)
        ]
        run(scheduler)
        assert not any(job.remaining for job in jobs)
        if not any(job.remaining for job in waiting):
            break

    assert not any(job.remaining for job in waiting)


def test_crumbs_do_not_count_as_a_turn() -> None:
    """Blocks that leave two tokens of each pass do not keep a prefill at two tokens a pass."""
    scheduler = Scheduler(budget=BUDGET)
    prefill = add(scheduler, "prefill", Wish(tokens=591, rows=0))
    passes = 0
    while prefill.remaining:
        passes += 1
        for number in range(50):
            if scheduler.find(SessionId(f"block {number}")) is None:
                add(scheduler, f"block {number}", Wish(tokens=3, rows=3))
        run(scheduler)
    assert passes < 30


def test_blocks_go_before_prefills_and_share_their_pass() -> None:
    scheduler = Scheduler(budget=BUDGET)
    prefill = add(scheduler, "prefill", Wish(tokens=600, rows=1))
    block = add(scheduler, "block", Wish(tokens=5, rows=5))

    slices = run(scheduler)

    assert [(piece.step, piece.count) for piece in slices] == [(block, 5), (prefill, BUDGET - 5)]


def test_long_prefills_share_a_pass() -> None:
    scheduler = Scheduler(budget=BUDGET)
    add(scheduler, "first", Wish(tokens=600, rows=1))
    add(scheduler, "second", Wish(tokens=600, rows=1))

    assert [piece.count for piece in run(scheduler)] == [64, 64]


def test_rows_beyond_the_budget_come_in_chunks() -> None:
    scheduler = Scheduler(budget=BUDGET)
    add(scheduler, "score", Wish(tokens=300, rows=299))

    counts: list[int] = []
    while len(scheduler):
        counts += [piece.count for piece in run(scheduler)]

    assert counts == [1, 128, 128, 43]


def test_a_whole_step_runs_in_one_pass_whatever_the_budget() -> None:
    scheduler = Scheduler(budget=BUDGET)
    add(scheduler, "block", Wish(tokens=3, rows=3))
    add(scheduler, "whole", Wish(tokens=600, rows=3), whole=True)

    assert [piece.count for piece in run(scheduler)] == [3]
    assert [piece.count for piece in run(scheduler)] == [600]


def test_a_step_without_room_in_the_cache_waits() -> None:
    scheduler = Scheduler(budget=BUDGET)
    first = add(scheduler, "first", Wish(tokens=5, rows=1))
    second = add(scheduler, "second", Wish(tokens=5, rows=1))

    slices = scheduler.plan(reserve=lambda job: job is second)

    assert [piece.step for piece in slices] == [second]
    assert first.skipped_passes == 1
