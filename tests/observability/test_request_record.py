"""What is recorded of one answer while it grows, and how its end is named."""

from __future__ import annotations

import asyncio

import pytest

from cascade.errors import ExpertUnavailable
from cascade.observability.request_record import CLOSED, RequestRecord
from cascade.rules import Chow
from cascade.types import (
    DecodingParams,
    FinishReason,
    Origin,
    OutputChunk,
    Request,
    Statistics,
)


def record() -> RequestRecord:
    request = Request(prompt=(1,), policy=DecodingParams(rule=Chow(alpha=0.5)))
    return RequestRecord(request=request, began_s=10.0)


def chunk(*tokens: int, finish: FinishReason | None = None) -> OutputChunk:
    return OutputChunk(
        tokens=tokens,
        origins=(Origin.EXPERT,) * len(tokens),
        finish=finish,
        statistics=Statistics(),
    )


def test_the_first_token_is_timed_not_the_first_chunk() -> None:
    one = record()
    one.add(chunk(), now_s=11.0)
    one.add(chunk(4, 5), now_s=12.0)
    one.add(chunk(6), now_s=14.0)
    assert (one.first_s, one.last_s, one.tokens) == (12.0, 14.0, 3)


def test_a_finished_answer_has_its_reason_and_an_unfinished_one_was_closed() -> None:
    one = record()
    assert one.finish == CLOSED
    one.add(chunk(1, finish=FinishReason.STOP), now_s=11.0)
    assert one.finish == "stop"
    assert one.rule == "chow"


@pytest.mark.parametrize(
    ("error", "finish"), [(ExpertUnavailable("gone"), "unavailable"), (ValueError(), "internal")]
)
def test_an_error_names_the_end(error: Exception, finish: str) -> None:
    one = record()
    one.fail(error)
    assert (one.finish, one.error) == (finish, error)


@pytest.mark.parametrize("error", [GeneratorExit(), asyncio.CancelledError()])
def test_a_client_that_disconnects_is_no_error(error: BaseException) -> None:
    one = record()
    one.fail(error)
    assert (one.finish, one.error) == (CLOSED, None)


def test_acceptance_is_counted_by_position() -> None:
    """Two blocks: one of three tokens with two accepted, one with none."""
    one = record()
    one.statistics.accepted_lengths = [1, 0, 1, 0]
    assert one.drafts == 2
    assert one.accepted_at() == [1, 1, 0]
