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


def make_cache(
    *, capacity: int = 1024, prefix_reuse: bool = True, pool: LayeredKVPool | None = None
) -> KVCacheManager:
    pool = pool or LayeredKVPool(num_slots=capacity)
    return KVCacheManager(pool=pool, capacity=capacity, prefix_reuse=prefix_reuse, max_idle=4)


def filled(cache: KVCacheManager, session: SessionId, tokens: list[int]) -> CachedSequence:
    sequence = cache.open(session, tokens=tokens)
    assert cache.reserve(sequence, tokens=len(tokens), victims=())
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
def test_rewriting_keeps_the_states_of_unchanged_tokens(
    old: list[int], base: int, new: list[int]
) -> None:
    base = min(base, len(old))
    sequence = CachedSequence(session=A, tokens=list(old), cached=len(old))

    sequence.rewrite(base=base, tokens=new, rope_length=0)

    assert sequence.tokens == old[:base] + new
    assert sequence.cached == common_prefix(old, sequence.tokens)


def test_states_of_another_rope_length_are_not_kept() -> None:
    sequence = CachedSequence(session=A, tokens=[1, 2], cached=2)

    sequence.rewrite(base=2, tokens=[3], rope_length=65)

    assert sequence.cached == 0


def test_a_prompt_takes_over_the_states_of_a_released_session() -> None:
    cache = make_cache()
    kv_range = filled(cache, A, list(range(100))).kv_range
    cache.release(A)

    second = cache.open(B, tokens=[*range(80), 7, 7])

    assert (second.cached, second.reused, second.kv_range) == (80, 80, kv_range)
    assert cache.used_tokens == 128
    assert (cache.prefix_hits, cache.prefix_tokens) == (1, 80)


def test_a_prompt_copies_the_states_of_a_live_session() -> None:
    pool = LayeredKVPool(num_slots=1024)
    cache = make_cache(pool=pool)
    first = filled(cache, A, list(range(100)))
    slots = torch.arange(100)
    states = torch.rand(2, 100, 4)
    pool.write(0, key_HTD=states, value_HTD=states, slots_T=slots)

    second = cache.open(B, tokens=[*range(60), 7, 7])

    assert second.cached == 60
    assert first.kv_range
    assert second.kv_range
    assert first.kv_range != second.kv_range
    key, _ = pool.write(0, key_HTD=states[:, :0], value_HTD=states[:, :0], slots_T=slots[:0])
    start = second.kv_range.start
    assert torch.equal(key[:, start : start + 60], states[:, :60])


def test_a_long_idle_prefix_is_copied_for_a_short_match() -> None:
    cache = make_cache(capacity=2048)
    filled(cache, A, list(range(1000)))
    cache.release(A)

    cache.open(B, tokens=[*range(100), 7, 7])
    again = cache.open(C, tokens=list(range(1000)))

    assert again.reused == 1000


def test_prefixes_of_another_rope_length_are_not_reused() -> None:
    cache = make_cache()
    filled(cache, A, list(range(100)))

    assert cache.open(B, tokens=list(range(100)), rope_length=65).reused == 0


def test_reuse_can_be_switched_off() -> None:
    cache = make_cache(prefix_reuse=False)
    filled(cache, A, list(range(100)))
    cache.release(A)

    assert cache.used_tokens == 0
    assert cache.open(B, tokens=list(range(100))).reused == 0


def test_idle_sequences_are_evicted_oldest_first() -> None:
    cache = make_cache(capacity=384)
    filled(cache, B, [2] * 100)
    filled(cache, A, [1] * 100)
    cache.release(A)
    cache.release(B)

    filled(cache, C, [3] * 200)

    assert cache.open(A, tokens=[1] * 100).reused == 0
    assert cache.open(SessionId("d"), tokens=[2] * 100).reused == 100
    assert cache.preemptions == 0


def test_idle_sequences_are_limited_in_number() -> None:
    cache = make_cache(capacity=8192)
    for number in range(9):
        session = SessionId(str(number))
        filled(cache, session, [number] * 100)
        cache.release(session)

    assert cache.used_tokens == 4 * 128


def test_a_victim_loses_its_states_and_keeps_its_tokens() -> None:
    cache = make_cache(capacity=256)
    first = filled(cache, A, [1] * 200)
    second = cache.open(B, tokens=[2] * 200)

    assert not cache.reserve(second, tokens=200, victims=())
    assert cache.reserve(second, tokens=200, victims=iter([first]))
    assert (first.cached, first.kv_range, first.tokens) == (0, None, [1] * 200)
    assert cache.preemptions == 1


def test_a_sequence_that_fits_nowhere_else_is_recomputed() -> None:
    cache = make_cache(capacity=1024)
    first = filled(cache, A, [1] * 100)
    second = filled(cache, B, [2] * 200)
    cache.release(A)
    second.tokens += [2] * 700

    assert cache.reserve(second, tokens=900, victims=())

    assert second.cached == 0
    assert second.kv_range
    assert second.kv_range.size == 1024
    assert first.kv_range is None


def test_a_growing_sequence_moves_its_states() -> None:
    pool = LayeredKVPool(num_slots=1024)
    cache = make_cache(pool=pool)
    first = filled(cache, A, [1] * 100)
    filled(cache, B, [2] * 100)
    states = torch.rand(1, 100, 4)
    pool.write(0, key_HTD=states, value_HTD=states, slots_T=torch.arange(100))

    assert cache.reserve(first, tokens=200, victims=())

    assert first.kv_range
    assert first.kv_range.start == 256
    key, _ = pool.write(0, key_HTD=states[:, :0], value_HTD=states[:, :0], slots_T=torch.arange(0))
    assert torch.equal(key[:, 256:356], states)


@pytest.mark.parametrize("length", [0, 5])
def test_short_prefixes_are_not_kept(length: int) -> None:
    cache = make_cache()
    filled(cache, A, [1] * length or [2])
    cache.release(A)

    assert cache.used_tokens == 0


def test_a_branch_starts_with_its_parents_states_and_frees_its_slots() -> None:
    pool = LayeredKVPool(num_slots=1024)
    cache = make_cache(pool=pool)
    filled(cache, A, list(range(100)))
    states = torch.rand(2, 100, 4)
    pool.write(0, key_HTD=states, value_HTD=states, slots_T=torch.arange(100))

    branch = cache.branch(B, parent=A, base=60)

    assert branch is not None
    assert branch.kv_range is not None
    assert (branch.tokens, branch.cached) == (list(range(60)), 60)
    slots = torch.arange(branch.kv_range.start, branch.kv_range.start + 60)
    key, _ = pool.write(0, key_HTD=states[:, :0], value_HTD=states[:, :0], slots_T=torch.arange(0))
    assert torch.equal(key[:, slots], states[:, :60])
    assert (len(cache), cache.num_branches, cache.live_tokens, cache.branches(A)) == (
        1,
        1,
        128,
        [B],
    )
    cache.release(B)
    assert (len(cache), cache.num_branches, cache.used_tokens) == (1, 0, 128)


def test_an_adopted_branch_becomes_its_session() -> None:
    cache = make_cache()
    filled(cache, A, list(range(100)))
    branch = cache.branch(B, parent=A, base=60)

    cache.adopt(A, branch=B)

    assert cache.find(A) is branch
    assert cache.find(B) is None
    assert (len(cache), cache.num_branches, cache.used_tokens) == (1, 0, 128)


def test_a_branch_evicts_only_idle_sequences() -> None:
    cache = make_cache(capacity=256)
    filled(cache, A, list(range(100)))
    filled(cache, C, list(range(200, 300)))
    assert cache.branch(B, parent=A, base=60) is None

    cache.release(C)

    assert cache.branch(B, parent=A, base=60) is not None
    assert cache.preemptions == 0


def test_no_branch_starts_from_a_parent_without_states() -> None:
    cache = make_cache()
    cache.drop(filled(cache, A, list(range(100))))

    assert cache.branch(B, parent=A, base=60) is None
    assert cache.branch(B, parent=C, base=1) is None


def test_branches_are_evicted_first() -> None:
    cache = make_cache()
    first = filled(cache, A, list(range(100)))
    branch = cache.branch(B, parent=A, base=60)

    assert cache.least_recent() == [branch, first]
