from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.engine.extents import SMALLEST, Extent, ExtentAllocator, size_class

TOKENS = st.integers(1, 3000)


@settings(deadline=None)
@given(TOKENS)
def test_a_class_holds_its_tokens_and_wastes_little(tokens: int) -> None:
    size = size_class(tokens)

    assert size >= tokens
    assert size_class(size) == size
    assert size < max(2 * tokens, SMALLEST + 1) or size - tokens < 1024


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "give", "grow"]), TOKENS), max_size=60))
def test_extents_never_overlap_and_nothing_leaks(acts: list[tuple[str, int]]) -> None:
    allocator = ExtentAllocator(capacity=8192)
    held: list[Extent] = []
    for act, number in acts:
        if act == "take":
            got = allocator.allocate(number)
            held += [got] if got else []
        elif held and act == "give":
            allocator.release(held.pop(number % len(held)))
        elif held:
            place = number % len(held)
            grown = allocator.extend(held[place], held[place].size + number)
            held[place] = grown or held[place]

        rows = [row for extent in held for row in range(extent.start, extent.end)]
        assert len(rows) == len(set(rows)) == allocator.used
        assert all(0 <= row < 8192 for row in rows)

    for extent in held:
        allocator.release(extent)
    assert allocator.allocate(8192) == Extent(start=0, size=8192)


def test_an_extent_grows_into_free_rows_only() -> None:
    allocator = ExtentAllocator(capacity=1024)
    first, second = allocator.allocate(100), allocator.allocate(100)
    assert first
    assert second

    assert allocator.extend(first, 200) is None
    assert allocator.extend(second, 200) == Extent(start=128, size=256)


def test_no_extent_where_no_stretch_is_long_enough() -> None:
    allocator = ExtentAllocator(capacity=512)
    held = [allocator.allocate(128) for _ in range(4)]
    for extent in held[::2]:
        assert extent
        allocator.release(extent)

    assert allocator.allocate(200) is None
    assert allocator.used == 256
