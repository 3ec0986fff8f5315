from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from hypothesis import given
from hypothesis import strategies as st

from cascade.protocol.messages import extend_digest
from cascade.replica.session import ReplicaSession
from cascade.types import DecodingParams, Session, SessionId

if TYPE_CHECKING:
    from cascade.engine.request import ForwardRequest

PROMPT = (7, 8, 9)

TOKENS = st.lists(st.integers(0, 3), max_size=4)


def seat(answer: list[int] | None = None) -> ReplicaSession:
    return ReplicaSession(
        connection=cast("Any", None),
        opened=Session(id=SessionId("s"), prompt=PROMPT, policy=DecodingParams()),
        epoch=1,
        token="t",  # noqa: S106 - not a password
        key=SessionId("s/0"),
        answer=answer or [],
    )


def digest(answer: list[int]) -> int:
    return extend_digest(extend_digest(0, PROMPT), answer)


class Fed:
    """What an engine that obeys steps holds."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def run(self, step: ForwardRequest) -> None:
        assert 0 <= step.base <= len(self.tokens)
        assert step.num_logits <= len(step.tokens)
        self.tokens[step.base :] = step.tokens


def test_tokens_that_connect_are_committed() -> None:
    here = seat([1, 2])
    assert here.sync_tokens(position=3, tokens=(3,), digest=digest([1, 2, 3])) is None
    assert here.answer == [1, 2, 3]


def test_a_gap_is_asked_for() -> None:
    here = seat([1, 2])
    assert here.sync_tokens(position=5, tokens=(5,), digest=0) == 2
    assert here.answer == [1, 2]


def test_an_earlier_position_takes_the_session_back() -> None:
    here = seat([1, 2, 3])
    assert here.sync_tokens(position=2, tokens=(), digest=digest([1, 2])) is None
    assert here.answer == [1, 2]


def test_another_history_is_asked_for_from_the_start() -> None:
    here = seat([1, 2])
    assert here.sync_tokens(position=2, tokens=(), digest=digest([1, 3])) == 0
    assert here.sync_tokens(position=2, tokens=(1, 3), digest=digest([1, 3])) is None


@given(st.lists(st.tuples(TOKENS, st.integers(0, 4), TOKENS), max_size=8))
def test_the_engine_always_ends_with_answer_and_draft(
    rounds: list[tuple[list[int], int, list[int]]],
) -> None:
    """Whatever is drafted, accepted, corrected or taken back, each step feeds the truth."""
    here, fed = seat(), Fed()
    fed.run(here.prefill(None))
    for draft, accepted, correction in rounds:
        step = here.step(draft, rows=len(draft) + 1, task=None)
        fed.run(step)
        assert fed.tokens == [*PROMPT, *here.answer, *draft]
        here.commit([*draft[:accepted], *correction])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.data())
def test_a_session_taken_back_feeds_the_truth(answer: list[int], data: st.DataObject) -> None:
    here, fed = seat(), Fed()
    fed.run(here.prefill(None))
    fed.run(here.step(answer, rows=1, task=None))
    here.commit(answer)
    position = data.draw(st.integers(0, len(answer)))
    other = data.draw(TOKENS)
    told = [*answer[:position], *other]
    assert here.sync_tokens(position=len(told), tokens=tuple(other), digest=digest(told)) is None
    fed.run(here.step([], rows=1, task=None))
    assert fed.tokens == [*PROMPT, *told]


def test_a_session_that_went_on_before_its_first_item_is_fed_the_whole_prompt() -> None:
    """The prefill leaves the prompt's last token to the first item, which may come late."""
    here, fed = seat(), Fed()
    fed.run(here.prefill(None))
    assert here.sync_tokens(position=2, tokens=(1, 2), digest=digest([1, 2])) is None
    fed.run(here.step([], rows=1, task=None))
    assert fed.tokens == [*PROMPT, 1, 2]
