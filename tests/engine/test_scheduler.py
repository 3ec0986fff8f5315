from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.engine.kv_cache import CachedSequence
from cascade.engine.request import NOBODYS, ForwardRequest, Share
from cascade.engine.scheduler import ScheduledStep, Scheduler, StepChunk
from cascade.types import SessionId

BUDGET = 128


@dataclass(frozen=True)
class Shape:
    tokens: int
    num_logits: int


shapes = st.integers(1, 700).flatmap(
    lambda tokens: st.builds(Shape, tokens=st.just(tokens), num_logits=st.integers(0, tokens))
)


def add(scheduler: Scheduler, name: str, shape: Shape, *, share: Share = NOBODYS) -> ScheduledStep:
    session = SessionId(name)
    tokens = [1] * shape.tokens
    sequence = CachedSequence(session=session, tokens=tokens)
    step = ForwardRequest(
        session=session,
        base=0,
        tokens=tokens,
        num_logits=shape.num_logits,
        share=share,
    )
    return scheduler.add(step, sequence=sequence)


def grant(_: ScheduledStep) -> bool:
    return True


def add_block(scheduler: Scheduler, name: str, *, share: Share) -> None:
    session = SessionId(name)
    sequence = CachedSequence(session=session, tokens=[1] * 906, cached=900)
    request = ForwardRequest(session=session, base=900, tokens=[1] * 6, num_logits=6, share=share)
    scheduler.add(request, sequence=sequence)


def run(scheduler: Scheduler) -> list[StepChunk]:
    chunks = scheduler.plan(reserve=grant)
    for chunk in chunks:
        chunk.step.sequence.cached += chunk.count
        if not chunk.step.remaining:
            scheduler.remove(chunk.step.request.session)
    return chunks


@settings(max_examples=50, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=12))
def test_every_request_ends_and_no_pass_exceeds_the_budget(many: list[Shape]) -> None:
    scheduler = Scheduler(budget=BUDGET)
    for number, shape in enumerate(many):
        add(scheduler, str(number), shape)
    total, passes = sum(shape.tokens for shape in many), 0

    while len(scheduler):
        chunks = run(scheduler)
        passes += 1
        assert chunks
        assert sum(chunk.count for chunk in chunks) <= BUDGET
        assert all(chunk.count > 0 for chunk in chunks)
        assert len({chunk.step.number for chunk in chunks}) == len(chunks)
        total -= sum(chunk.count for chunk in chunks)

    assert total == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=12))
def test_logits_that_fit_one_pass_are_not_split(many: list[Shape]) -> None:
    scheduler = Scheduler(budget=BUDGET)
    for number, shape in enumerate(many):
        add(scheduler, str(number), shape)

    while len(scheduler):
        for chunk in run(scheduler):
            step = chunk.step
            first = step.end - step.request.num_logits
            if 0 < step.request.num_logits <= BUDGET and step.sequence.cached > first:
                assert not step.remaining


@settings(max_examples=30, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=4), st.sampled_from([1, 30, 50]))
def test_a_stream_of_blocks_starves_no_prefill(many: list[Shape], blocks: int) -> None:
    scheduler = Scheduler(budget=BUDGET)
    prefills = [add(scheduler, str(number), shape) for number, shape in enumerate(many)]

    for _ in range(6 * len(many) * (1 + 700 // 16)):
        for number in range(blocks):
            if scheduler.find(SessionId(f"block {number}")) is None:
                add(scheduler, f"block {number}", Shape(tokens=3, num_logits=3))
        run(scheduler)
        if not any(step.remaining for step in prefills):
            break

    assert not any(step.remaining for step in prefills)


@settings(max_examples=30, deadline=None)
@given(prefills=st.integers(1, 40), tokens=st.integers(65, 700), blocks=st.integers(1, 10))
def test_many_prompts_do_not_delay_verification(prefills: int, tokens: int, blocks: int) -> None:
    """Blocks that leave budget for one prefill run in every pass, however many prompts wait."""
    scheduler = Scheduler(budget=BUDGET)
    waiting = [
        add(scheduler, str(number), Shape(tokens=tokens, num_logits=1))
        for number in range(prefills)
    ]

    for _ in range(10 * prefills * (1 + tokens // 64)):
        steps = [
            add(scheduler, f"block {number}", Shape(tokens=6, num_logits=6))
            for number in range(blocks)
        ]
        run(scheduler)
        assert not any(step.remaining for step in steps)
        if not any(step.remaining for step in waiting):
            break

    assert not any(step.remaining for step in waiting)


def test_a_few_leftover_tokens_count_as_a_skipped_pass() -> None:
    """Blocks that leave two tokens of each pass do not keep a prefill at two tokens a pass."""
    scheduler = Scheduler(budget=BUDGET)
    prefill = add(scheduler, "prefill", Shape(tokens=591, num_logits=0))
    passes = 0
    while prefill.remaining:
        passes += 1
        for number in range(50):
            if scheduler.find(SessionId(f"block {number}")) is None:
                add(scheduler, f"block {number}", Shape(tokens=3, num_logits=3))
        run(scheduler)
    assert passes < 30


def test_blocks_go_before_prefills_and_share_their_pass() -> None:
    scheduler = Scheduler(budget=BUDGET)
    prefill = add(scheduler, "prefill", Shape(tokens=600, num_logits=1))
    block = add(scheduler, "block", Shape(tokens=5, num_logits=5))

    chunks = run(scheduler)

    assert [(chunk.step, chunk.count) for chunk in chunks] == [(block, 5), (prefill, BUDGET - 5)]


def test_long_prefills_share_a_pass() -> None:
    scheduler = Scheduler(budget=BUDGET)
    add(scheduler, "first", Shape(tokens=600, num_logits=1))
    add(scheduler, "second", Shape(tokens=600, num_logits=1))

    assert [chunk.count for chunk in run(scheduler)] == [64, 64]


def test_logits_beyond_the_budget_come_in_chunks() -> None:
    scheduler = Scheduler(budget=BUDGET)
    add(scheduler, "score", Shape(tokens=300, num_logits=299))

    counts: list[int] = []
    while len(scheduler):
        counts += [chunk.count for chunk in run(scheduler)]

    assert counts == [1, 128, 128, 43]


def test_a_step_without_cache_space_waits() -> None:
    scheduler = Scheduler(budget=BUDGET)
    first = add(scheduler, "first", Shape(tokens=5, num_logits=1))
    second = add(scheduler, "second", Shape(tokens=5, num_logits=1))

    chunks = scheduler.plan(reserve=lambda step: step is second)

    assert [chunk.step for chunk in chunks] == [second]
    assert first.skipped_passes == 1


def test_a_block_that_loses_its_cache_to_an_earlier_step_of_the_pass_is_prefilled() -> None:
    scheduler = Scheduler(budget=512)
    first = add(scheduler, "first", Shape(5, 5))
    evicted = add(scheduler, "evicted", Shape(300, 3))
    evicted.sequence.cached, evicted.began_long = 297, False

    def reserve(step: ScheduledStep) -> bool:
        if step is first:
            evicted.sequence.cached = 0
        return True

    chunks = scheduler.plan(reserve=reserve)

    assert [(chunk.step, chunk.count) for chunk in chunks] == [(first, 5), (evicted, 300)]


LARGE, SMALL = Share("large"), Share("small")


def tokens_of(chunks: list[StepChunk], share: Share) -> int:
    return sum(chunk.count for chunk in chunks if chunk.step.caller == share.caller)


def test_a_short_prompt_runs_at_once_beside_many_long_ones_of_another() -> None:
    scheduler = Scheduler(budget=512)
    for number in range(8):
        add(scheduler, f"long {number}", Shape(1000, 0), share=LARGE)
    run(scheduler)
    add(scheduler, "short", Shape(50, 0), share=SMALL)
    chunks = run(scheduler)
    assert tokens_of(chunks, SMALL) == 50
    assert tokens_of(chunks, LARGE) == 0
    chunks = run(scheduler)
    assert tokens_of(chunks, LARGE) == 512 // 8, "the next request of the other waits for this pass"


def test_long_prompts_go_on_beside_short_ones_that_never_cease() -> None:
    scheduler = Scheduler(budget=512)
    add(scheduler, "long", Shape(1000, 0), share=LARGE)
    run(scheduler)
    passes = 0
    while scheduler.find(SessionId("long")):
        add(scheduler, f"short {passes}", Shape(50, 0), share=SMALL)
        assert tokens_of(run(scheduler), SMALL) == 50
        passes += 1
        assert passes < 64


def test_blocks_yield_to_short_prompts_of_others_but_not_twice_in_a_row() -> None:
    scheduler = Scheduler(budget=512, linear=True)
    ran = list[int]()
    for number in range(6):
        if not scheduler.find(SessionId("block")):
            add_block(scheduler, "block", share=LARGE)
        if number:
            add(scheduler, f"short {number}", Shape(50, 0), share=SMALL)
        chunks = run(scheduler)
        assert tokens_of(chunks, SMALL) == (50 if number else 0)
        ran.append(tokens_of(chunks, LARGE))
    assert ran == [6, 0, 6, 0, 6, 0]


def test_where_passes_are_linear_a_caller_beside_others_runs_a_smaller_piece() -> None:
    scheduler = Scheduler(budget=512, linear=True)
    add(scheduler, "short", Shape(200, 0), share=SMALL)
    assert tokens_of(run(scheduler), SMALL) == 200, "all of a prompt that leaves room"
    add(scheduler, "long", Shape(1000, 0), share=LARGE)
    assert [tokens_of(run(scheduler), LARGE) for _ in range(5)] == [32] * 5
    for _ in range(80):
        run(scheduler)
    add(scheduler, "longer", Shape(2000, 0), share=LARGE)
    assert tokens_of(run(scheduler), LARGE) == 512, "the other has gone"


def test_short_prompts_of_many_callers_share_a_pass() -> None:
    scheduler = Scheduler(budget=512)
    for number in range(4):
        add(scheduler, f"{number}", Shape(100, 0), share=Share(f"{number}"))
    assert len(run(scheduler)) == 4


def test_a_caller_alone_has_whole_passes() -> None:
    scheduler = Scheduler(budget=512)
    for number in range(8):
        add(scheduler, f"long {number}", Shape(1000, 0), share=LARGE)
    assert tokens_of(run(scheduler), LARGE) == 512


def test_callers_share_passes_by_their_weights() -> None:
    """However many prompts each of them has."""
    scheduler = Scheduler(budget=256)
    heavy, light = Share("heavy", 3), Share("light")
    for number in range(8):
        add(scheduler, f"heavy {number}", Shape(2000, 0), share=heavy)
    add(scheduler, "light", Shape(2000, 0), share=light)
    totals = {heavy: 0, light: 0}
    for _ in range(20):
        chunks = run(scheduler)
        for share in totals:
            totals[share] += tokens_of(chunks, share)
    assert totals[light] > 0
    assert totals[heavy] >= totals[light]
