"""A replica's session keeps the engine's tokens equal to the committed ones plus the draft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from hypothesis import given
from hypothesis import strategies as st

from cascade.engine.request import NOBODYS
from cascade.protocol.messages import Judge, Propose, extend_digest
from cascade.replica.session import ReplicaSession
from cascade.types import DecodingParams, Session, SessionId

if TYPE_CHECKING:
    from cascade.engine.request import ForwardRequest

PROMPT = (7, 8, 9)

TOKENS = st.lists(st.integers(0, 3), max_size=4)


def new_session(tokens: list[int] | None = None) -> ReplicaSession:
    return ReplicaSession(
        connection=cast("Any", None),
        opened=Session(id=SessionId("s"), prompt=PROMPT, policy=DecodingParams()),
        epoch=1,
        lease="t",
        share=NOBODYS,
        engine_id=SessionId("s/0"),
        tokens=tokens or [],
    )


def digest(tokens: list[int]) -> int:
    return extend_digest(extend_digest(0, PROMPT), tokens)


def message(position: int, tokens: tuple[int, ...], digest: int) -> Judge:
    return Judge(
        session_id=SessionId("s"), epoch=1, position=position, digest=digest, tokens=tokens
    )


class Cache:
    """The tokens that an engine holds after the requests it was given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def run(self, request: ForwardRequest) -> None:
        assert 0 <= request.base <= len(self.tokens)
        assert request.num_logits <= len(request.tokens)
        self.tokens[request.base :] = request.tokens


def test_tokens_that_connect_are_committed() -> None:
    session = new_session([1, 2])
    assert session.sync_tokens(message(3, (3,), digest([1, 2, 3]))) is None
    assert session.tokens == [1, 2, 3]


def test_tokens_missing_before_those_sent_are_requested() -> None:
    session = new_session([1, 2])
    assert session.sync_tokens(message(5, (5,), 0)) == 2
    assert session.tokens == [1, 2]


def test_an_earlier_position_truncates_the_session() -> None:
    session = new_session([1, 2, 3])
    assert session.sync_tokens(message(2, (), digest([1, 2]))) is None
    assert session.tokens == [1, 2]


def test_a_wrong_digest_requests_all_tokens() -> None:
    session = new_session([1, 2])
    assert session.sync_tokens(message(2, (), digest([1, 3]))) == 0
    assert session.sync_tokens(message(2, (1, 3), digest([1, 3]))) is None


def test_a_message_sent_again_is_a_repeat_of_the_one_served_or_queued_last() -> None:
    session = new_session()
    first, second = message(0, (), 5), message(1, (), 6)
    assert not session.repeats(first)
    session.serving = first
    assert session.repeats(message(0, (), 5))
    session.queued.append(second)
    assert session.repeats(second)
    assert not session.repeats(first)
    assert not session.repeats(
        Propose(session_id=SessionId("s"), epoch=1, position=1, digest=7, count=1)
    )


@given(
    rounds=st.lists(st.tuples(TOKENS, st.integers(0, 4), TOKENS), max_size=8),
    begun_with=TOKENS,
    prefill=st.booleans(),
)
def test_the_engine_always_ends_with_committed_tokens_and_draft(
    rounds: list[tuple[list[int], int, list[int]]], begun_with: list[int], *, prefill: bool
) -> None:
    """Whatever is drafted, accepted or corrected, each forward request feeds the right tokens."""
    session, cache = new_session(begun_with), Cache()
    if prefill:
        cache.run(session.prefill())
    for draft, accepted, correction in rounds:
        request = session.forward_request(draft, num_logits=len(draft) + 1, task=None)
        cache.run(request)
        assert cache.tokens == [*PROMPT, *session.tokens, *draft]
        session.commit([*draft[:accepted], *correction])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.data())
def test_a_truncated_session_feeds_the_right_tokens(tokens: list[int], data: st.DataObject) -> None:
    session, cache = new_session(), Cache()
    cache.run(session.prefill())
    cache.run(session.forward_request(tokens, num_logits=1, task=None))
    session.commit(tokens)
    position = data.draw(st.integers(0, len(tokens)))
    other = data.draw(TOKENS)
    now = [*tokens[:position], *other]
    assert session.sync_tokens(message(len(now), tuple(other), digest(now))) is None
    cache.run(session.forward_request([], num_logits=1, task=None))
    assert cache.tokens == [*PROMPT, *now]


def test_tokens_committed_before_the_first_message_do_not_hide_the_prompts_last_token() -> None:
    """The prefill leaves that token to the first message, which may come late."""
    session, cache = new_session(), Cache()
    cache.run(session.prefill())
    assert session.sync_tokens(message(2, (1, 2), digest([1, 2]))) is None
    cache.run(session.forward_request([], num_logits=1, task=None))
    assert cache.tokens == [*PROMPT, 1, 2]
