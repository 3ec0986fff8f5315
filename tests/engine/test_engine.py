from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.architectures import VOCABULARY, build
from tests.engine.harness import EngineHarness, Received

from cascade.engine import threads
from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt
from cascade.engine.request import ForwardRequest, LogitsOutput
from cascade.engine.settings import EngineSettings
from cascade.errors import ContextTooLong, Internal, InvalidRequest, Overloaded, Unavailable
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SMALL = EngineSettings(cache_tokens=1024, max_step_tokens=64, max_sessions=4)


@pytest.fixture
def bench() -> EngineHarness:
    return EngineHarness(build("llama"), SMALL)


def numbers(count: int, *, start: int = 3) -> list[int]:
    return [3 + (start * 7 + 11 * place) % (VOCABULARY - 3) for place in range(count)]


def test_a_long_prefill_lets_blocks_pass(bench: EngineHarness) -> None:
    bench.run_until_done(bench.submit("short", numbers(5), rows=1))
    prefill = bench.submit("long", numbers(300), rows=1)
    for _ in range(3):
        bench.run_until_done(bench.submit("short", numbers(2), rows=2))

    assert not prefill.ended
    bench.run_until_done(prefill)
    assert bench.worst < 1e-4


def test_more_rows_than_a_pass_holds_come_in_chunks(bench: EngineHarness) -> None:
    answer = bench.submit("scored", numbers(200), rows=200)

    bench.run_until_done(answer)

    assert len(bench.head.passes) > 1
    assert bench.worst < 1e-4


def test_wanted_rows_run_again_where_all_is_cached(bench: EngineHarness) -> None:
    bench.run_until_done(bench.submit("a", numbers(20), rows=0))

    bench.run_until_done(bench.submit("a", [], rows=4))

    assert bench.worst < 1e-4
    assert bench.engine.stats().tokens == 24


def test_a_step_that_repeats_itself_costs_its_rows_alone(bench: EngineHarness) -> None:
    bench.run_until_done(bench.submit("a", numbers(20), rows=1))

    bench.run_until_done(bench.submit("a", numbers(20), drop=20, rows=1))

    assert bench.engine.stats().tokens == 21


def test_a_step_without_rows_is_heard_when_it_is_done(bench: EngineHarness) -> None:
    first = bench.submit("a", numbers(20), rows=0)
    bench.run_until_done(first)
    again = bench.submit("a", numbers(20), drop=20, rows=0)
    bench.run_until_done(again)

    assert bench.head.passes == [["a"], ["a"]]
    assert bench.engine.stats().tokens == 20


def test_the_pass_in_hand_says_what_it_runs(bench: EngineHarness) -> None:
    bench.run_until_done(bench.submit("a", (1, 2, 3), rows=1), bench.submit("b", (4, 5), rows=1))
    first = bench.engine.current_pass
    bench.run_until_done(bench.submit("a", (6,), rows=1))
    second = bench.engine.current_pass
    assert [(one.tokens, one.sessions) for one in (first, second)] == [(5, 2), (1, 1)]
    assert second.began_s >= first.began_s


def test_a_released_session_is_found_again_by_its_prefix(bench: EngineHarness) -> None:
    bench.run_until_done(bench.submit("a", numbers(50), rows=1))
    bench.release("a")

    bench.run_until_done(bench.submit("b", [*numbers(40), 5, 5], rows=1))

    assert bench.engine.cached_tokens(SessionId("b")) == 40
    assert bench.engine.cached_tokens(SessionId("nobody")) == 0
    stats = bench.engine.stats()
    assert (stats.prefix_hits, stats.prefix_tokens, stats.sessions) == (1, 40, 1)
    assert 42 <= stats.cache_tokens_live <= stats.cache_tokens_used
    bench.release("b")
    bench.engine.step()
    stats = bench.engine.stats()
    assert stats.cache_tokens_live == 0 < stats.cache_tokens_used
    assert bench.worst < 1e-4


def test_release_drops_the_waiting_step_unheard(bench: EngineHarness) -> None:
    answer = bench.submit("a", numbers(200), rows=1)
    bench.engine.step()

    bench.release("a")
    bench.run_until_done(bench.submit("b", numbers(5), rows=1))

    assert not answer.ended
    assert bench.engine.stats().waiting == 0


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
def test_a_step_that_cannot_run_fails_alone(
    bench: EngineHarness, fields: dict[str, object], error: type[Exception], message: str
) -> None:
    wrong = ForwardRequest(session=SessionId("wrong"), **fields)  # pyright: ignore[reportArgumentType] - fields of the table
    answer = bench.head.expect(wrong, context=[])
    bench.engine.submit(wrong)

    bench.run_until_done(bench.submit("right", numbers(5), rows=1))

    assert answer.ended
    assert isinstance(answer.error, error)
    assert message in str(answer.error)


def test_a_second_step_of_a_session_must_wait_for_the_first(bench: EngineHarness) -> None:
    first = bench.submit("a", numbers(200), rows=1)
    second = ForwardRequest(session=SessionId("a"), base=0, tokens=[5], num_logits=1)
    answer = bench.head.expect(second, context=[])
    bench.engine.submit(second)

    bench.run_until_done(first)

    assert isinstance(answer.error, Internal)


def test_one_session_too_many_is_told_to_come_again(bench: EngineHarness) -> None:
    bench.run_until_done(*(bench.submit(str(number), numbers(5), rows=1) for number in range(4)))

    refused = bench.submit("fifth", numbers(5), rows=1)
    bench.engine.step()
    assert isinstance(refused.error, Overloaded)

    bench.release("0")
    bench.tokens.pop("fifth")
    bench.run_until_done(bench.submit("fifth", numbers(5), rows=1))


def test_a_branch_runs_its_own_tokens_alone(bench: EngineHarness) -> None:
    bench.run_until_done(bench.submit("a", numbers(50), rows=1))
    before = bench.engine.stats().tokens

    branch = bench.branch("a~", [5], trunk="a", base=40)
    bench.run_until_done(branch, bench.submit("a", [7], rows=1))
    bench.run_until_done(bench.submit("a~", [6, 9], rows=2))

    stats = bench.engine.stats()
    assert stats.tokens - before == 4
    assert (stats.sessions, stats.branches) == (1, 1)
    bench.engine.release(SessionId("a"))
    bench.engine.step()
    stats = bench.engine.stats()
    assert (stats.sessions, stats.branches) == (0, 0)
    assert bench.worst < 1e-4


def test_a_session_goes_on_as_its_branch(bench: EngineHarness) -> None:
    bench.run_until_done(bench.submit("a", numbers(50), rows=1))
    dropped = bench.submit("a", numbers(9), rows=1)
    branch = bench.branch("a~", [5], trunk="a", base=40)
    bench.adopt("a", branch="a~")
    bench.run_until_done(branch)

    bench.run_until_done(bench.submit("a", [6], rows=1))

    assert not dropped.ended
    assert bench.engine.stats().tokens == 52
    assert (bench.engine.stats().sessions, bench.engine.stats().branches) == (1, 0)
    assert bench.worst < 1e-4


def test_a_session_that_ended_is_not_brought_back_by_its_branch(bench: EngineHarness) -> None:
    bench.run_until_done(bench.submit("a", numbers(50), rows=1))
    bench.run_until_done(bench.branch("a~", [5], trunk="a", base=40))
    bench.release("a")
    bench.engine.adopt(SessionId("a"), branch=SessionId("a~"))

    bench.run_until_done(bench.submit("b", numbers(5), rows=1))

    assert (bench.engine.stats().sessions, bench.engine.stats().branches) == (1, 0)


def test_branches_keep_no_session_out() -> None:
    """Neither by their number, nor by their room: one that is in the way fails."""
    bench = EngineHarness(build("llama"), replace(SMALL, cache_tokens=512))
    for name in "ab":
        bench.run_until_done(bench.submit(name, numbers(50, start=ord(name)), rows=1))
    bench.run_until_done(*(bench.branch(f"{name}~", [5], trunk=name, base=40) for name in "ab"))
    refused = bench.branch("a~~", [6], trunk="a", base=40)
    bench.engine.step()
    assert isinstance(refused.error, Overloaded)

    for name in "cd":
        bench.run_until_done(bench.submit(name, numbers(50, start=ord(name)), rows=1))
    for name in "abcd":
        bench.run_until_done(bench.submit(name, [8], rows=1))
    late = bench.submit("a~", [6], rows=1)
    bench.engine.step()

    assert isinstance(late.error, Overloaded)
    assert (bench.engine.stats().sessions, bench.engine.stats().preemptions) == (4, 0)
    assert bench.worst < 1e-4


@dataclass
class Chain:
    """A head that asks for the next token at once, `length` times."""

    length: int
    written: list[int] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    errors: dict[str, Exception] = field(default_factory=dict)

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        (one,) = outputs
        self.written.append(int(logits_NV[-1].argmax()))
        if len(self.written) == self.length:
            self.done.set()
            return []
        base = one.request.base + len(one.request.tokens)
        return [
            ForwardRequest(
                session=one.request.session, base=base, tokens=self.written[-1:], num_logits=1
            )
        ]

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        self.errors[request.session] = error
        self.done.set()


def test_steps_that_follow_run_in_the_very_next_passes() -> None:
    model = build("qwen3")
    prompt = torch.tensor([numbers(7)])
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)  # pyright: ignore[reportCallIssue] - mixed into the class at run time
    head = Chain(length=12)
    engine = Engine(adopt(model), handler=head, settings=SMALL)
    engine.submit(ForwardRequest(session=SessionId("a"), base=0, tokens=numbers(7), num_logits=1))

    for _ in range(12):
        engine.step()

    assert head.written == expected[0, 7:].tolist()


@dataclass
class Chains:
    """A head that writes `length` tokens for each session."""

    length: int
    prompt: int
    written: dict[str, list[int]] = field(default_factory=dict)
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        steps = [
            self._next(one, int(row.argmax())) for one, row in zip(outputs, logits_NV, strict=True)
        ]
        return [step for step in steps if step]

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        raise AssertionError(request) from error

    def _next(self, one: LogitsOutput, token: int) -> ForwardRequest | None:
        written = self.written.setdefault(one.request.session, [])
        written.append(token)
        if len(written) == self.length:
            self.ended.release()
            return None
        base = self.prompt + len(written) - 1
        return ForwardRequest(session=one.request.session, base=base, tokens=[token], num_logits=1)


def test_sessions_from_many_threads_share_passes_and_stay_apart() -> None:
    model = build("gemma3")
    prompts = [numbers(7, start=place) for place in range(6)]
    expected = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )  # pyright: ignore[reportCallIssue] - mixed into the class at run time
        for prompt in prompts
    ]
    head = Chains(length=20, prompt=7)
    engine = Engine(adopt(model), handler=head, settings=EngineSettings(cache_tokens=1024))
    steps = [
        ForwardRequest(session=SessionId(str(place)), base=0, tokens=prompt, num_logits=1)
        for place, prompt in enumerate(prompts)
    ]
    callers = [threading.Thread(target=engine.submit, args=(step,)) for step in steps]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    engine.start()
    assert all(head.ended.acquire(timeout=60) for _ in prompts)
    engine.stop()

    for place, text in enumerate(expected):
        assert head.written[str(place)] == text[0, 7:].tolist()
    assert engine.stats().passes == 20


def test_the_thread_runs_what_is_submitted_and_ends_when_stopped() -> None:
    head = Chain(length=5)
    engine = Engine(adopt(build("llama")), handler=head, settings=SMALL)
    engine.start()
    engine.submit(ForwardRequest(session=SessionId("a"), base=0, tokens=numbers(7), num_logits=1))
    assert head.done.wait(60)
    assert engine.alive
    engine.stop()

    assert not engine.alive
    assert len(head.written) == 5
    assert engine.stats().passes == 5
    assert 0 < engine.stats().busy <= 1


def test_what_waits_when_the_engine_stops_is_told() -> None:
    head = Chain(length=5)
    engine = Engine(adopt(build("llama")), handler=head, settings=SMALL)
    engine.stop()
    engine.submit(ForwardRequest(session=SessionId("late"), base=0, tokens=[5], num_logits=1))
    engine.start()
    assert head.done.wait(60)
    engine.stop()

    assert isinstance(head.errors["late"], Unavailable)


def test_a_pass_that_fails_fails_its_own_steps_and_the_engine_lives(bench: EngineHarness) -> None:
    wrong = bench.submit("wrong", [VOCABULARY + 5], rows=1)
    bench.engine.step()
    assert isinstance(wrong.error, IndexError)

    bench.run_until_done(bench.submit("right", numbers(5), rows=1))


class Careless(Chain):
    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        if outputs[0].request.session == "bad":
            raise ZeroDivisionError
        return super().finish(outputs, logits_NV)


def test_a_head_that_fails_does_not_end_the_engine() -> None:
    head = Careless(length=2)
    engine = Engine(adopt(build("llama")), handler=head, settings=SMALL)

    engine.submit(ForwardRequest(session=SessionId("bad"), base=0, tokens=[5], num_logits=1))
    engine.step()
    engine.submit(ForwardRequest(session=SessionId("good"), base=0, tokens=[5], num_logits=1))
    engine.step()
    engine.step()

    assert isinstance(head.errors["bad"], ZeroDivisionError)
    assert len(head.written) == 2


@dataclass(kw_only=True)
class Watching(Chain):
    """Notes for how long the engine has worked whenever it is given rows."""

    engine: Engine | None = None
    working_s: list[float] = field(default_factory=list)

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        assert self.engine is not None
        self.working_s.append(self.engine.working_s)
        return super().finish(outputs, logits_NV)


def test_the_engine_says_for_how_long_it_has_been_at_it() -> None:
    head, clock = Watching(length=2), itertools.count()
    engine = Engine(adopt(build("llama")), handler=head, settings=SMALL, clock=clock.__next__)
    head.engine = engine
    assert engine.working_s == 0
    engine.submit(ForwardRequest(session=SessionId("a"), base=0, tokens=[5], num_logits=1))
    engine.step()
    engine.step()
    assert all(0 < seconds < 10 for seconds in head.working_s)
    assert engine.working_s == 0


class Counting(Chain):
    """Notes how many threads are behind the engine's."""

    threads: int = 0

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        self.threads = torch.get_num_threads()
        return super().finish(outputs, logits_NV)


def test_engines_of_one_process_have_their_own_numbers_of_threads() -> None:
    threads.apply()
    usual = torch.get_num_threads()
    settings_of = (usual + 2, usual + 1, 0)
    heads = [Counting(length=1) for _ in settings_of]
    engines = [
        Engine(adopt(build("llama")), handler=head, settings=replace(SMALL, threads=count))
        for head, count in zip(heads, settings_of, strict=True)
    ]
    for engine, head in zip(engines, heads, strict=True):
        engine.start()
        engine.submit(ForwardRequest(session=SessionId("a"), base=0, tokens=[5], num_logits=1))
        assert head.done.wait(60)
    for engine in engines:
        engine.stop()

    assert [head.threads for head in heads] == [usual + 2, usual + 1, usual]


def test_only_the_pairs_vocabulary_has_logits() -> None:
    head = Chain(length=1)
    cut = EngineSettings(cache_tokens=1024, vocabulary=100)
    engine = Engine(adopt(build("llama")), handler=head, settings=cut)
    engine.submit(ForwardRequest(session=SessionId("a"), base=0, tokens=numbers(90), num_logits=90))
    engine.step()

    assert head.written[0] < 100


@dataclass(frozen=True)
class Move:
    session: str
    drop: int
    tokens: int
    rows: int
    release: bool


moves = st.builds(
    Move,
    session=st.sampled_from("abcde"),
    drop=st.integers(0, 12),
    tokens=st.integers(1, 70),
    rows=st.integers(0, 9),
    release=st.integers(0, 7).map(lambda number: number == 0),
)


@settings(max_examples=15, deadline=None)
@given(story=st.lists(st.lists(moves, min_size=1, max_size=5), min_size=1, max_size=8))
def test_any_interleaving_gives_the_plain_rows(
    shared: EngineHarness, story: list[list[Move]]
) -> None:
    """Submitting, rolling back and releasing in any order never shows in a row."""
    waiting: dict[str, Received] = {}
    for act in story:
        for move in act:
            if move.release and move.session in shared.tokens:
                shared.release(move.session)
                waiting.pop(move.session, None)
            elif move.session not in waiting:
                known = len(shared.tokens.get(move.session, []))
                waiting[move.session] = shared.submit(
                    move.session,
                    numbers(move.tokens, start=move.drop % 3),
                    drop=min(move.drop, known),
                    rows=min(move.rows, move.tokens),
                )
        shared.engine.step()
        waiting = {name: answer for name, answer in waiting.items() if not answer.ended}
    shared.run_until_done(*waiting.values())
    for answer in shared.head.answers.values():
        if answer.ended:
            shared.check(answer)
    shared.forget()

    assert shared.worst < 1e-4
    assert shared.engine.stats().sessions == 0


@pytest.fixture(scope="module")
def shared() -> EngineHarness:
    return EngineHarness(build("llama"), EngineSettings(cache_tokens=512, max_step_tokens=48))
