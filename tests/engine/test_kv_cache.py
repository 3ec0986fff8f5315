from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.engine.kv_cache import CachedSequence, KVCacheManager, common_prefix
from cascade.engine.kv_pool import LayeredKVPool
from cascade.types import SessionId

A, B, C = SessionId("a"), SessionId("b"), SessionId("c")

TOKENS = st.lists(st.integers(0, 2), max_size=40)


def store(
    *, capacity: int = 1024, prefix_reuse: bool = True, pool: LayeredKVPool | None = None
) -> KVCacheManager:
    pool = pool or LayeredKVPool(num_slots=capacity)
    return KVCacheManager(pool=pool, capacity=capacity, prefix_reuse=prefix_reuse, max_idle=4)


def filled(held: KVCacheManager, session: SessionId, tokens: list[int]) -> CachedSequence:
    sequence = held.open(session, tokens=tokens)
    assert held.reserve(sequence, tokens=len(tokens), victims=())
    sequence.cached = len(tokens)
    return sequence


@settings(deadline=None)
@given(TOKENS, TOKENS)
def test_the_common_prefix_is_the_longest(left: list[int], right: list[int]) -> None:
    length = common_prefix(left, right)

    assert left[:length] == right[:length]
    assert length == min(len(left), len(right)) or left[length] != right[length]


@settings(deadline=None)
@given(TOKENS, st.integers(0, 40), TOKENS)
def test_rewriting_keeps_the_rows_of_tokens_that_stay(
    old: list[int], base: int, new: list[int]
) -> None:
    base = min(base, len(old))
    sequence = CachedSequence(session=A, tokens=list(old), cached=len(old))

    sequence.rewrite(base=base, tokens=new, rope_length=0)

    assert sequence.tokens == old[:base] + new
    assert sequence.cached == common_prefix(old, sequence.tokens)


def test_rows_of_another_regime_are_not_kept() -> None:
    sequence = CachedSequence(session=A, tokens=[1, 2], cached=2)

    sequence.rewrite(base=2, tokens=[3], rope_length=65)

    assert sequence.cached == 0


def test_a_prompt_takes_over_the_rows_of_a_released_one() -> None:
    held = store()
    extent = filled(held, A, list(range(100))).kv_range
    held.release(A)

    second = held.open(B, tokens=[*range(80), 7, 7])

    assert (second.cached, second.reused, second.kv_range) == (80, 80, extent)
    assert held.used_tokens == 128
    assert (held.prefix_hits, held.prefix_tokens) == (1, 80)


def test_a_prompt_copies_the_rows_of_a_live_one() -> None:
    pool = LayeredKVPool(num_slots=1024)
    held = store(pool=pool)
    first = filled(held, A, list(range(100)))
    rows = torch.arange(100)
    states = torch.rand(2, 100, 4)
    pool.write(0, key_HTD=states, value_HTD=states, slots_T=rows)

    second = held.open(B, tokens=[*range(60), 7, 7])

    assert second.cached == 60
    assert first.kv_range
    assert second.kv_range
    assert first.kv_range != second.kv_range
    key, _ = pool.write(0, key_HTD=states[:, :0], value_HTD=states[:, :0], slots_T=rows[:0])
    start = second.kv_range.start
    assert torch.equal(key[:, start : start + 60], states[:, :60])


def test_a_long_idle_prefix_is_copied_for_a_short_match() -> None:
    held = store(capacity=2048)
    filled(held, A, list(range(1000)))
    held.release(A)

    held.open(B, tokens=[*range(100), 7, 7])
    again = held.open(C, tokens=list(range(1000)))

    assert again.reused == 1000


def test_prefixes_of_another_regime_are_not_reused() -> None:
    held = store()
    filled(held, A, list(range(100)))

    assert held.open(B, tokens=list(range(100)), rope_length=65).reused == 0


def test_reuse_can_be_switched_off() -> None:
    held = store(prefix_reuse=False)
    filled(held, A, list(range(100)))
    held.release(A)

    assert held.used_tokens == 0
    assert held.open(B, tokens=list(range(100))).reused == 0


def test_idle_sequences_give_way_oldest_first() -> None:
    held = store(capacity=384)
    filled(held, B, [2] * 100)
    filled(held, A, [1] * 100)
    held.release(A)
    held.release(B)

    filled(held, C, [3] * 200)

    assert held.open(A, tokens=[1] * 100).reused == 0
    assert held.open(SessionId("d"), tokens=[2] * 100).reused == 100
    assert held.preemptions == 0


def test_only_so_many_idle_sequences_are_kept() -> None:
    held = store(capacity=8192)
    for number in range(9):
        session = SessionId(str(number))
        filled(held, session, [number] * 100)
        held.release(session)

    assert held.used_tokens == 4 * 128


def test_a_victim_loses_its_rows_and_keeps_its_tokens() -> None:
    held = store(capacity=256)
    first = filled(held, A, [1] * 200)
    second = held.open(B, tokens=[2] * 200)

    assert not held.reserve(second, tokens=200, victims=())
    assert held.reserve(second, tokens=200, victims=iter([first]))
    assert (first.cached, first.kv_range, first.tokens) == (0, None, [1] * 200)
    assert held.preemptions == 1


def test_a_sequence_that_fits_nowhere_else_is_computed_again() -> None:
    held = store(capacity=1024)
    first = filled(held, A, [1] * 100)
    second = filled(held, B, [2] * 200)
    held.release(A)
    second.tokens += [2] * 700

    assert held.reserve(second, tokens=900, victims=())

    assert second.cached == 0
    assert second.kv_range
    assert second.kv_range.size == 1024
    assert first.kv_range is None


def test_growing_moves_the_rows_along() -> None:
    pool = LayeredKVPool(num_slots=1024)
    held = store(pool=pool)
    first = filled(held, A, [1] * 100)
    filled(held, B, [2] * 100)
    states = torch.rand(1, 100, 4)
    pool.write(0, key_HTD=states, value_HTD=states, slots_T=torch.arange(100))

    assert held.reserve(first, tokens=200, victims=())

    assert first.kv_range
    assert first.kv_range.start == 256
    key, _ = pool.write(0, key_HTD=states[:, :0], value_HTD=states[:, :0], slots_T=torch.arange(0))
    assert torch.equal(key[:, 256:356], states)


@pytest.mark.parametrize("length", [0, 5])
def test_a_prefix_too_short_to_matter_is_let_go(length: int) -> None:
    held = store()
    filled(held, A, [1] * length or [2])
    held.release(A)

    assert held.used_tokens == 0


def test_a_branch_begins_with_its_trunks_rows_and_ends_without_a_trace() -> None:
    pool = LayeredKVPool(num_slots=1024)
    held = store(pool=pool)
    filled(held, A, list(range(100)))
    states = torch.rand(2, 100, 4)
    pool.write(0, key_HTD=states, value_HTD=states, slots_T=torch.arange(100))

    branch = held.branch(B, parent=A, base=60)

    assert branch is not None
    assert branch.kv_range is not None
    assert (branch.tokens, branch.cached) == (list(range(60)), 60)
    rows = torch.arange(branch.kv_range.start, branch.kv_range.start + 60)
    key, _ = pool.write(0, key_HTD=states[:, :0], value_HTD=states[:, :0], slots_T=torch.arange(0))
    assert torch.equal(key[:, rows], states[:, :60])
    assert (len(held), held.num_branches, held.live_tokens, held.branches(A)) == (1, 1, 128, [B])
    held.release(B)
    assert (len(held), held.num_branches, held.used_tokens) == (1, 0, 128)


def test_a_branch_becomes_its_session() -> None:
    held = store()
    filled(held, A, list(range(100)))
    branch = held.branch(B, parent=A, base=60)

    held.adopt(A, branch=B)

    assert held.find(A) is branch
    assert held.find(B) is None
    assert (len(held), held.num_branches, held.used_tokens) == (1, 0, 128)


def test_a_branch_takes_the_room_of_idle_sequences_alone() -> None:
    held = store(capacity=256)
    filled(held, A, list(range(100)))
    filled(held, C, list(range(200, 300)))
    assert held.branch(B, parent=A, base=60) is None

    held.release(C)

    assert held.branch(B, parent=A, base=60) is not None
    assert held.preemptions == 0


def test_no_branch_begins_where_the_trunk_has_lost_its_rows() -> None:
    held = store()
    held.drop(filled(held, A, list(range(100))))

    assert held.branch(B, parent=A, base=60) is None
    assert held.branch(B, parent=C, base=1) is None


def test_branches_are_the_first_to_lose_their_rows() -> None:
    held = store()
    first = filled(held, A, list(range(100)))
    branch = held.branch(B, parent=A, base=60)

    assert held.least_recent() == [branch, first]
