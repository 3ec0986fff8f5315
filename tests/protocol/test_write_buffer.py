from __future__ import annotations

import pytest

from cascade.errors import InvalidRequest, Overloaded
from cascade.protocol import write_buffer
from cascade.protocol.write_buffer import WriteBuffer


async def test_frames_put_before_a_take_are_joined() -> None:
    buffer = WriteBuffer()
    buffer.put(b"a")
    buffer.put(b"b")
    assert await buffer.take() == b"ab"


async def test_a_joined_frame_has_a_limit_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_buffer, "FRAME_LIMIT_MESSAGES", 2)
    buffer = WriteBuffer()
    for frame in (b"a", b"b", b"c"):
        buffer.put(frame)
    assert [await buffer.take(), await buffer.take()] == [b"ab", b"c"]


async def test_a_joined_frame_has_a_limit_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_buffer, "FRAME_LIMIT_BYTES", 5)
    buffer = WriteBuffer()
    for frame in (b"aaa", b"bb", b"c", b"ddddd"):
        buffer.put(frame)
    assert [await buffer.take() for _ in range(3)] == [b"aaabb", b"c", b"ddddd"]


async def test_a_message_larger_than_a_frame_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_buffer, "FRAME_LIMIT_BYTES", 5)
    with pytest.raises(InvalidRequest, match="6 bytes is too large"):
        WriteBuffer().put(b"aaaaaa")


async def test_a_backlog_over_the_limit_is_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_buffer, "BACKLOG_LIMIT_BYTES", 10)
    buffer = WriteBuffer()
    buffer.put(b"aaaaaaaaaa")
    with pytest.raises(Overloaded, match="10 bytes wait"):
        buffer.put(b"b")
    assert await buffer.take() == b"aaaaaaaaaa"
    buffer.put(b"b")
    assert await buffer.take() == b"b"


async def test_a_closed_buffer_is_emptied_and_then_ends() -> None:
    buffer = WriteBuffer()
    buffer.put(b"a")
    buffer.close()
    assert [await buffer.take(), await buffer.take()] == [b"a", None]


async def test_discarded_frames_are_not_taken() -> None:
    buffer = WriteBuffer()
    buffer.put(b"a")
    buffer.discard()
    buffer.put(b"b")
    assert await buffer.take() == b"b"
