from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.architectures import VOCABULARY, build
from tests.engine.harness import EngineHarness, GreedyHandler, Received

from cascade.engine import threads
from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt
from cascade.engine.request import NOBODYS, ForwardRequest, LogitsHandler, LogitsOutput
from cascade.engine.settings import EngineSettings
from cascade.errors import ContextTooLong, Internal, InvalidRequest, Overloaded, Unavailable
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

SMALL = EngineSettings(cache_tokens=1024, max_step_tokens=64, max_sessions=4)


@pytest.fixture
def harness() -> EngineHarness:
    return EngineHarness(build("llama"), SMALL)


def numbers(count: int, *, start: int = 3) -> list[int]:
    return [3 + (start * 7 + 11 * index) % (VOCABULARY - 3) for index in range(count)]


def test_blocks_run_while_a_long_prefill_is_in_progress(harness: EngineHarness) -> None:
    harness.run("short", numbers(5), num_logits=1)
    prefill = harness.submit("long", numbers(300), num_logits=1)
    for _ in range(3):
        harness.run("short", numbers(2), num_logits=2)

    assert not prefill.ended
    harness.run_until_done(prefill)
    assert harness.worst < 1e-4


def test_more_logits_than_a_pass_holds_come_in_chunks(harness: EngineHarness) -> None:
    received = harness.submit("scored", numbers(200), num_logits=200)

    harness.run_until_done(received)

    assert len(harness.handler.passes) > 1
    assert harness.worst < 1e-4


def test_requested_logits_run_again_if_all_tokens_are_cached(harness: EngineHarness) -> None:
    harness.run("a", numbers(20), num_logits=0)

    harness.run("a", [], num_logits=4)

    assert harness.worst < 1e-4
    assert harness.engine.stats().tokens == 24


def test_a_repeated_request_recomputes_only_its_logits(harness: EngineHarness) -> None:
    harness.run("a", numbers(20), num_logits=1)

    harness.run("a", numbers(20), drop=20, num_logits=1)

    assert harness.engine.stats().tokens == 21


def test_a_request_without_logits_is_reported_when_it_is_done(harness: EngineHarness) -> None:
    first = harness.submit("a", numbers(20), num_logits=0)
    harness.run_until_done(first)
    again = harness.submit("a", numbers(20), drop=20, num_logits=0)
    harness.run_until_done(again)

    assert harness.handler.passes == [["a"], ["a"]]
    assert harness.engine.stats().tokens == 20


def test_the_current_pass_has_its_size_and_start(harness: EngineHarness) -> None:
    harness.run_until_done(
        harness.submit("a", (1, 2, 3), num_logits=1), harness.submit("b", (4, 5), num_logits=1)
    )
    first = harness.engine.current_pass
    harness.run("a", (6,), num_logits=1)
    second = harness.engine.current_pass
    assert [(one.tokens, one.sessions) for one in (first, second)] == [(5, 2), (1, 1)]
    assert second.began_s >= first.began_s


def test_the_cache_of_a_released_session_is_reused_by_prefix(harness: EngineHarness) -> None:
    harness.run("a", numbers(50), num_logits=1)
    harness.release("a")

    harness.run("b", [*numbers(40), 5, 5], num_logits=1)

    assert harness.engine.cached_tokens(SessionId("b")) == 40
    assert harness.engine.cached_tokens(SessionId("nobody")) == 0
    stats = harness.engine.stats()
    assert (stats.prefix_hits, stats.prefix_tokens, stats.sessions) == (1, 40, 1)
    assert 42 <= stats.cache_tokens_live <= stats.cache_tokens_used
    harness.release("b")
    harness.engine.step()
    stats = harness.engine.stats()
    assert stats.cache_tokens_live == 0 < stats.cache_tokens_used
    assert harness.worst < 1e-4


def test_release_drops_the_waiting_request_without_a_call(harness: EngineHarness) -> None:
    received = harness.submit("a", numbers(200), num_logits=1)
    harness.engine.step()

    harness.release("a")
    harness.run("b", numbers(5), num_logits=1)

    assert not received.ended
    assert harness.engine.stats().waiting == 0


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"base": 3, "tokens": [5], "num_logits": 1}, InvalidRequest, "0 tokens here, so 3"),
        ({"base": 0, "tokens": [5], "num_logits": 2}, InvalidRequest, "cannot give 2 logits"),
        ({"base": 0, "tokens": [5], "num_logits": -1}, InvalidRequest, "cannot give -1 logits"),
        ({"base": -1, "tokens": [5], "num_logits": 1}, InvalidRequest, "-1 cannot be kept"),
        ({"base": 0, "tokens": [], "num_logits": 0}, InvalidRequest, "of 0 tokens"),
        ({"base": 0, "tokens": [5] * 513, "num_logits": 1}, ContextTooLong, "513 tokens"),
    ],
)
def test_a_request_that_cannot_run_fails_alone(
    harness: EngineHarness, fields: dict[str, object], error: type[Exception], message: str
) -> None:
    wrong = ForwardRequest(share=NOBODYS, session=SessionId("wrong"), **fields)  # pyright: ignore[reportArgumentType] - fields of the table
    received = harness.handler.expect(wrong, context=[])
    harness.engine.submit(wrong)

    harness.run("right", numbers(5), num_logits=1)

    assert received.ended
    assert isinstance(received.error, error)
    assert message in str(received.error)


def test_a_second_request_of_a_session_fails_while_the_first_runs(harness: EngineHarness) -> None:
    first = harness.submit("a", numbers(200), num_logits=1)
    second = ForwardRequest(share=NOBODYS, session=SessionId("a"), base=0, tokens=[5], num_logits=1)
    received = harness.handler.expect(second, context=[])
    harness.engine.submit(second)

    harness.run_until_done(first)

    assert isinstance(received.error, Internal)


@pytest.mark.parametrize("length", [5, 64, 130, 200])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_a_request_takes_over_what_is_left_of_a_prefill(
    harness: EngineHarness, length: int, passes: int
) -> None:
    """The handler hears nothing of the prefill, unless that has ended before."""
    prefill = harness.submit("a", numbers(length), num_logits=0)
    for _ in range(passes):
        if not prefill.ended:
            harness.engine.step()
    ended = prefill.ended
    block = harness.submit("a", [5, 7], num_logits=2)
    before = harness.engine.stats()

    harness.run_until_done(block)

    after = harness.engine.stats()
    assert prefill.ended == ended == (passes * 64 >= length)
    left = max(0, length - 64 * passes)
    assert after.tokens - before.tokens == left + 2
    assert after.passes - before.passes == -(-(left + 2) // 64)
    assert harness.worst < 1e-4


def test_one_session_too_many_is_overloaded(harness: EngineHarness) -> None:
    harness.run_until_done(
        *(harness.submit(str(number), numbers(5), num_logits=1) for number in range(4))
    )

    refused = harness.submit("fifth", numbers(5), num_logits=1)
    harness.engine.step()
    assert isinstance(refused.error, Overloaded)

    harness.release("0")
    harness.tokens.pop("fifth")
    harness.run("fifth", numbers(5), num_logits=1)


def test_a_branch_runs_only_its_own_tokens(harness: EngineHarness) -> None:
    harness.run("a", numbers(50), num_logits=1)
    before = harness.engine.stats().tokens

    branch = harness.branch("a~", [5], parent="a", base=40)
    harness.run_until_done(branch, harness.submit("a", [7], num_logits=1))
    harness.run("a~", [6, 9], num_logits=2)

    stats = harness.engine.stats()
    assert stats.tokens - before == 4
    assert (stats.sessions, stats.branches) == (1, 1)
    harness.engine.release(SessionId("a"))
    harness.engine.step()
    stats = harness.engine.stats()
    assert (stats.sessions, stats.branches) == (0, 0)
    assert harness.worst < 1e-4


def test_a_session_continues_as_its_adopted_branch(harness: EngineHarness) -> None:
    harness.run("a", numbers(50), num_logits=1)
    dropped = harness.submit("a", numbers(9), num_logits=1)
    branch = harness.branch("a~", [5], parent="a", base=40)
    harness.adopt("a", branch="a~")
    harness.run_until_done(branch)

    harness.run("a", [6], num_logits=1)

    assert not dropped.ended
    assert harness.engine.stats().tokens == 52
    assert (harness.engine.stats().sessions, harness.engine.stats().branches) == (1, 0)
    assert harness.worst < 1e-4


def test_adopting_after_the_end_of_the_session_does_nothing(harness: EngineHarness) -> None:
    harness.run("a", numbers(50), num_logits=1)
    harness.run_until_done(harness.branch("a~", [5], parent="a", base=40))
    harness.release("a")
    harness.engine.adopt(SessionId("a"), branch=SessionId("a~"))

    harness.run("b", numbers(5), num_logits=1)

    assert (harness.engine.stats().sessions, harness.engine.stats().branches) == (1, 0)


def test_branches_take_no_space_from_sessions() -> None:
    """Neither session count nor cache space: a branch that is in the way fails."""
    harness = EngineHarness(build("llama"), replace(SMALL, cache_tokens=512))
    for name in "ab":
        harness.run(name, numbers(50, start=ord(name)), num_logits=1)
    harness.run_until_done(
        *(harness.branch(f"{name}~", [5], parent=name, base=40) for name in "ab")
    )
    refused = harness.branch("a~~", [6], parent="a", base=40)
    harness.engine.step()
    assert isinstance(refused.error, Overloaded)

    for name in "cd":
        harness.run(name, numbers(50, start=ord(name)), num_logits=1)
    for name in "abcd":
        harness.run(name, [8], num_logits=1)
    late = harness.submit("a~", [6], num_logits=1)
    harness.engine.step()

    assert isinstance(late.error, Overloaded)
    assert (harness.engine.stats().sessions, harness.engine.stats().preemptions) == (4, 0)
    assert harness.worst < 1e-4


def engine_of(
    handler: LogitsHandler,
    *,
    settings: EngineSettings = SMALL,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    return Engine(adopt(build("llama")), handler=handler, settings=settings, clock=clock)


def prompt_of(session: str, *, count: int = 1, num_logits: int = 1) -> ForwardRequest:
    return ForwardRequest(
        share=NOBODYS,
        session=SessionId(session),
        base=0,
        tokens=numbers(count),
        num_logits=num_logits,
    )


def generate(model: PreTrainedModel, prompt: list[int], *, count: int) -> list[int]:
    generated = model.generate(  # pyright: ignore[reportCallIssue] - mixed into the class at run time
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return generated[0, len(prompt) :].tolist()


def test_following_requests_run_in_the_next_passes() -> None:
    model = build("qwen3")
    expected = generate(model, numbers(7), count=12)
    handler = GreedyHandler(length=12)
    engine = Engine(adopt(model), handler=handler, settings=SMALL)
    engine.submit(prompt_of("a", count=7))

    for _ in range(12):
        engine.step()

    assert handler.generated["a"] == expected


def test_sessions_from_many_threads_share_passes_and_stay_apart() -> None:
    model = build("gemma3")
    prompts = [numbers(7, start=start) for start in range(6)]
    expected = [generate(model, prompt, count=20) for prompt in prompts]
    handler = GreedyHandler(length=20)
    engine = Engine(adopt(model), handler=handler, settings=EngineSettings(cache_tokens=1024))
    requests = [
        ForwardRequest(
            share=NOBODYS, session=SessionId(str(index)), base=0, tokens=prompt, num_logits=1
        )
        for index, prompt in enumerate(prompts)
    ]
    callers = [threading.Thread(target=engine.submit, args=(request,)) for request in requests]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    engine.start()
    assert all(handler.ended.acquire(timeout=60) for _ in prompts)
    engine.stop()

    assert [handler.generated[str(index)] for index in range(6)] == expected
    assert engine.stats().passes == 20


def test_the_thread_runs_what_is_submitted_and_ends_when_stopped() -> None:
    handler = GreedyHandler(length=5)
    engine = engine_of(handler)
    engine.start()
    engine.submit(prompt_of("a", count=7))
    assert handler.ended.acquire(timeout=60)
    assert engine.alive
    engine.stop()

    assert not engine.alive
    assert len(handler.generated["a"]) == 5
    assert engine.stats().passes == 5
    assert 0 < engine.stats().busy <= 1


def test_waiting_requests_fail_when_the_engine_stops() -> None:
    handler = GreedyHandler(length=5)
    engine = engine_of(handler)
    engine.stop()
    engine.submit(prompt_of("late"))
    engine.start()
    assert handler.ended.acquire(timeout=60)
    engine.stop()

    assert isinstance(handler.errors["late"], Unavailable)


def test_a_failed_pass_fails_only_its_own_requests(harness: EngineHarness) -> None:
    wrong = harness.submit("wrong", [VOCABULARY + 5], num_logits=1)
    harness.engine.step()
    assert isinstance(wrong.error, IndexError)

    harness.run("right", numbers(5), num_logits=1)


class FailingHandler(GreedyHandler):
    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        if outputs[0].request.session == "bad":
            raise ZeroDivisionError
        return super().finish(outputs, logits_NV)


def test_a_failing_handler_does_not_end_the_engine() -> None:
    handler = FailingHandler(length=2)
    engine = engine_of(handler)

    engine.submit(prompt_of("bad"))
    engine.step()
    engine.submit(prompt_of("good"))
    engine.step()
    engine.step()

    assert isinstance(handler.errors["bad"], ZeroDivisionError)
    assert len(handler.generated["good"]) == 2


@dataclass
class SamplingHandler(GreedyHandler):
    """Calls `sample` on the engine's thread in each pass."""

    sample: Callable[[], float] = torch.get_num_threads
    samples: list[float] = field(default_factory=list)

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        self.samples.append(self.sample())
        return super().finish(outputs, logits_NV)


def test_the_age_of_a_cycle_is_known_while_it_runs() -> None:
    handler, clock = SamplingHandler(length=2), itertools.count()
    engine = engine_of(handler, clock=clock.__next__)
    handler.sample = lambda: engine.working_s
    assert engine.working_s == 0
    engine.submit(prompt_of("a"))
    engine.step()
    engine.step()
    assert all(0 < seconds < 10 for seconds in handler.samples)
    assert engine.working_s == 0


def test_engines_of_one_process_have_their_own_numbers_of_threads() -> None:
    threads.apply()
    default = torch.get_num_threads()
    counts = (default + 2, default + 1, 0)
    handlers = [SamplingHandler(length=1) for _ in counts]
    engines = [
        engine_of(handler, settings=replace(SMALL, threads=count))
        for handler, count in zip(handlers, counts, strict=True)
    ]
    for engine, handler in zip(engines, handlers, strict=True):
        engine.start()
        engine.submit(prompt_of("a"))
        assert handler.ended.acquire(timeout=60)
    for engine in engines:
        engine.stop()

    assert [handler.samples for handler in handlers] == [[default + 2], [default + 1], [default]]


def test_only_the_shared_vocabulary_has_logits() -> None:
    handler = GreedyHandler(length=1)
    model = replace(adopt(build("llama")), vocabulary=100)
    engine = Engine(model, handler=handler, settings=EngineSettings(cache_tokens=1024))
    engine.submit(prompt_of("a", count=90, num_logits=90))
    engine.step()

    assert handler.generated["a"][0] < 100


@dataclass(frozen=True)
class Action:
    session: str
    drop: int
    tokens: int
    num_logits: int
    release: bool


actions = st.builds(
    Action,
    session=st.sampled_from("abcde"),
    drop=st.integers(0, 12),
    tokens=st.integers(1, 70),
    num_logits=st.integers(0, 9),
    release=st.integers(0, 7).map(lambda number: number == 0),
)


@settings(max_examples=40, deadline=None)
@given(rounds=st.lists(st.lists(actions, min_size=1, max_size=5), min_size=1, max_size=8))
def test_any_interleaving_gives_the_plain_logits(
    shared: EngineHarness, rounds: list[list[Action]]
) -> None:
    """The order of submits, rollbacks and releases does not change any logits.

    A request may follow one without logits before that has run.
    """
    waiting: dict[str, Received] = {}
    prefills = set[str]()
    for actions_of_round in rounds:
        for action in actions_of_round:
            if action.release and action.session in shared.tokens:
                shared.release(action.session)
                waiting.pop(action.session, None)
            elif action.session not in waiting or action.session in prefills:
                prefills.discard(action.session)
                if action.num_logits == 0:
                    prefills.add(action.session)
                known = len(shared.tokens.get(action.session, []))
                waiting[action.session] = shared.submit(
                    action.session,
                    numbers(action.tokens, start=action.drop % 3),
                    drop=min(action.drop, known),
                    num_logits=min(action.num_logits, action.tokens),
                )
        shared.engine.step()
        waiting = {name: one for name, one in waiting.items() if not one.ended}
    shared.run_until_done(*waiting.values())
    for received in shared.handler.received.values():
        if received.ended:
            shared.check(received)
    shared.reset()

    assert shared.worst < 1e-4
    assert shared.engine.stats().sessions == 0


@pytest.fixture(scope="module")
def shared() -> EngineHarness:
    return EngineHarness(build("llama"), EngineSettings(cache_tokens=512, max_step_tokens=48))
