from __future__ import annotations

import pytest

from cascade.errors import InvalidRequest, Overloaded
from cascade.protocol import write_buffer
from cascade.protocol.write_buffer import WriteBuffer


async def test_what_is_put_in_one_tick_is_taken_as_one() -> None:
    box = WriteBuffer()
    box.put(b"a")
    box.put(b"b")
    assert await box.take() == b"ab"


async def test_a_frame_holds_no_more_items_than_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_buffer, "FRAME_LIMIT_MESSAGES", 2)
    box = WriteBuffer()
    for item in (b"a", b"b", b"c"):
        box.put(item)
    assert [await box.take(), await box.take()] == [b"ab", b"c"]


async def test_a_frame_is_no_larger_than_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_buffer, "FRAME_LIMIT_BYTES", 5)
    box = WriteBuffer()
    for item in (b"aaa", b"bb", b"c", b"ddddd"):
        box.put(item)
    assert [await box.take() for _ in range(3)] == [b"aaabb", b"c", b"ddddd"]


async def test_an_item_larger_than_a_frame_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_buffer, "FRAME_LIMIT_BYTES", 5)
    with pytest.raises(InvalidRequest, match="6 bytes is too large"):
        WriteBuffer().put(b"aaaaaa")


async def test_a_peer_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_buffer, "BACKLOG_LIMIT_BYTES", 10)
    box = WriteBuffer()
    box.put(b"aaaaaaaaaa")
    with pytest.raises(Overloaded, match="10 bytes wait"):
        box.put(b"b")
    assert await box.take() == b"aaaaaaaaaa"
    box.put(b"b")
    assert await box.take() == b"b"


async def test_a_closed_outbox_is_emptied_and_then_ends() -> None:
    box = WriteBuffer()
    box.put(b"a")
    box.close()
    assert [await box.take(), await box.take()] == [b"a", None]


async def test_what_is_discarded_is_not_taken() -> None:
    box = WriteBuffer()
    box.put(b"a")
    box.discard()
    box.put(b"b")
    assert await box.take() == b"b"
