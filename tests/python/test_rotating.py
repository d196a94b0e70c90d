"""``RotatingKVCache``: where rows lie, what attention sees, masks, trim."""

import copy

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrs_py.cache import RotatingKVCache
from tiny import advance, feed, held, leaves, noise, positions


@st.composite
def rings(draw):
    """A ring, and the counts of tokens that are to be fed."""
    max_size = draw(st.integers(1, 12))
    keep = draw(st.integers(0, max_size - 1))
    counts = draw(st.lists(st.one_of(st.just(1), st.integers(1, 20)), min_size=1, max_size=20))
    return RotatingKVCache(max_size, keep), counts


@pytest.mark.parametrize(
    ("keep", "counts", "offset", "index", "rows"),
    [
        (0, [1] * 8, 8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0, [1] * 9, 9, 1, [8, 1, 2, 3, 4, 5, 6, 7]),
        (2, [1] * 9, 9, 3, [0, 1, 8, 3, 4, 5, 6, 7]),
        (2, [1] * 14, 14, 8, [0, 1, 8, 9, 10, 11, 12, 13]),
        (0, [12], 12, 12, list(range(12))),
        (0, [12, 1], 13, 1, [12, 5, 6, 7, 8, 9, 10, 11]),
        (2, [12, 1], 13, 3, [0, 1, 12, 7, 8, 9, 10, 11]),
        (0, [5, 4, 6], 15, 13, list(range(2, 15))),
        (0, [5, 4, 6, 1, 1, 3], 20, 10, list(range(10, 20))),
        (2, [5, 4, 6], 15, 13, [0, 1, *range(4, 15)]),
    ],
)
def test_rows_lie_where_mlx_lm_puts_them(keep, counts, offset, index, rows):
    cache = RotatingKVCache(8, keep=keep)
    advance(cache, *counts)
    assert (cache.offset, cache._idx, held(cache.keys)) == (offset, index, rows)


@pytest.mark.parametrize(("n_steps", "length"), [(1, 256), (257, 512), (513, 600), (601, 600)])
def test_a_ring_grows_by_steps_up_to_its_size(n_steps, length):
    cache = RotatingKVCache(max_size=600)
    for _ in range(n_steps):
        new = positions(0, 1)
        cache.update_and_fetch(new, new)
    assert cache.keys.shape[2] == length
    assert (cache._idx, cache.size()) == ((1, 600) if n_steps == 601 else (n_steps, n_steps))


@given(rings())
def test_a_single_token_sees_the_kept_ones_and_the_newest(ring):
    cache, counts = ring
    for n_tokens in counts:
        before = cache.offset
        seen = advance(cache, n_tokens)
        newest = range(before, cache.offset)
        assert [p for p in seen if p in newest] == list(newest)
        if n_tokens == 1:
            kept = range(min(cache.keep, cache.offset))
            recent = range(max(len(kept), cache.offset - (cache.max_size - cache.keep)), cache.offset)
            assert sorted(seen) == [*kept, *recent]
    assert cache.size() == min(cache.offset, cache.max_size)


@given(rings())
def test_every_token_of_a_chunk_finds_all_that_it_would_see_alone(ring):
    cache, counts = ring
    advance(cache, *counts)
    n_tokens, first = 7, cache.offset
    seen = advance(cache, n_tokens)
    for position in range(first, first + n_tokens):
        kept = range(min(cache.keep, position + 1))
        recent = range(max(0, position + 1 - (cache.max_size - cache.keep)), position + 1)
        assert {*kept, *recent} <= set(seen)


def expected_mask(seen, keep, max_size, first, n_tokens, window):
    """Spell out which of the positions `seen` each new token may look at."""

    def visible(query, position):
        distance = query - position
        if window is not None:
            return 0 <= distance < window
        return distance >= 0 and (position < keep or distance < max_size - keep)

    return [[visible(query, position) for position in seen] for query in range(first, first + n_tokens)]


@given(rings(), st.integers(1, 9), st.none() | st.integers(1, 15), st.booleans())
def test_masks_show_the_right_positions(ring, n_tokens, window, return_array):
    cache, counts = ring
    advance(cache, *counts)
    mask = cache.make_mask(n_tokens, window_size=window, return_array=return_array)
    twin = copy.copy(cache)
    seen = advance(twin, n_tokens)
    expected = expected_mask(seen, cache.keep, cache.max_size, cache.offset, n_tokens, window)
    if mask is None:
        assert n_tokens == 1
        found = [[True] * len(seen)]
    elif isinstance(mask, str):
        assert (mask, return_array) == ("causal", False)
        shift = len(seen) - n_tokens
        found = [[column <= row + shift for column in range(len(seen))] for row in range(n_tokens)]
    else:
        assert type(mask) is mx.array and mask.dtype == mx.bool_
        found = [mask.tolist()] if mask.ndim == 1 else mask.tolist()
    assert found == expected


@pytest.mark.parametrize(
    ("token", "row"),
    [
        (2, [0, 1, 1]),
        (3, [0, 0, 1, 1]),
        (4, [1, 0, 0, 1]),
        (5, [1, 1, 0, 0]),
        (6, [0, 1, 1, 0]),
        (7, [0, 0, 1, 1]),
    ],
)
def test_the_mask_of_one_token_turns_with_the_ring(token, row):
    cache = RotatingKVCache(4)
    advance(cache, *[1] * token)
    mask = cache.make_mask(1, window_size=2)
    assert mask.tolist() == [bool(x) for x in row]


def test_with_kept_tokens_the_new_token_sees_itself_and_not_the_sinks_beyond_its_window():
    cache = RotatingKVCache(6, keep=2)
    advance(cache, *[1] * 6)
    assert cache.make_mask(1, window_size=3).tolist() == [False, False, True, False, True, True]


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("max_size", [2**31 - 1, 2**31, 2**40])
def test_a_huge_ring_hides_nothing(max_size, keep):
    huge, plain = RotatingKVCache(max_size, keep), RotatingKVCache(100)
    for cache in (huge, plain):
        advance(cache, 3)
    assert huge.make_mask(2, return_array=True).tolist() == plain.make_mask(2, return_array=True).tolist()
    assert (
        huge.make_mask(2, window_size=2**33, return_array=True).tolist()
        == plain.make_mask(2, return_array=True).tolist()
    )


def test_a_trim_before_the_ring_is_full_takes_tokens_back():
    cache = RotatingKVCache(8)
    advance(cache, 6)
    assert (cache.is_trimmable(), cache.trim(2)) == (True, 2)
    assert (cache.offset, cache._idx, cache.keys.shape[2]) == (4, 4, 6)
    assert advance(cache, 1) == [0, 1, 2, 3, 4]
    assert (cache.trim(100), cache.offset, cache._idx) == (5, 0, 0)


@pytest.mark.parametrize("counts", [[8], [12], [6, 1, 1], [1] * 11])
def test_a_ring_that_is_full_cannot_be_trimmed(counts):
    cache = RotatingKVCache(8)
    advance(cache, *counts)
    before = leaves(cache.state)
    assert cache.is_trimmable() is False
    with pytest.raises(ValueError, match=r"RotatingKVCache.trim: expected fewer than max_size=8 tokens.*got \d+"):
        cache.trim(4)
    assert cache.trim(0) == 0
    assert leaves(cache.state) == before


@pytest.mark.parametrize(("max_size", "keep"), [(8, 8), (4, 9), (0, 0)])
def test_a_ring_without_room_for_new_tokens_is_refused(max_size, keep):
    with pytest.raises(ValueError, match=rf"0 <= keep < max_size, got max_size={max_size}, keep={keep}"):
        RotatingKVCache(max_size, keep)


@pytest.mark.parametrize("arguments", [{"max_size": -1}, {"max_size": 4, "keep": -1}])
def test_negative_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match=r"RotatingKVCache: expected \w+ of at least 0, got -1"):
        RotatingKVCache(**arguments)


def test_a_ring_does_not_write_into_the_callers_arrays():
    cache, keys, values = RotatingKVCache(4), positions(0, 4), positions(10, 14)
    cache.update_and_fetch(keys, values)
    new = positions(50, 51)
    cache.update_and_fetch(new, new + 10)
    assert (held(keys), held(values)) == ([0, 1, 2, 3], [10, 11, 12, 13])
    assert (held(cache.keys), held(cache.values)) == ([50, 1, 2, 3], [60, 11, 12, 13])


def test_one_array_as_keys_and_values_becomes_two_buffers():
    cache, same = RotatingKVCache(4), positions(0, 4)
    cache.update_and_fetch(same, same)
    cache.update_and_fetch(positions(50, 51), positions(60, 61))
    assert (held(cache.keys), held(cache.values)) == ([50, 1, 2, 3], [60, 1, 2, 3])


def test_a_long_first_prompt_is_held_whole_until_the_next_update():
    cache = RotatingKVCache(4)
    assert advance(cache, 100) == list(range(100))
    assert (cache.size(), cache.nbytes) == (4, 100 * 2 * 2 * 4)
    advance(cache, 1)
    assert cache.nbytes == 4 * 2 * 2 * 4


def test_an_update_of_no_tokens_loses_none():
    cache = RotatingKVCache(4)
    advance(cache, *[1] * 6)
    assert advance(cache, 0) == [2, 3, 4, 5]
    assert advance(cache, 1) == [6, 3, 4, 5]


def test_the_numbers_of_a_ring_can_be_assigned_and_are_checked_at_the_next_update():
    cache = RotatingKVCache(8)
    advance(cache, 6)
    cache.offset, cache._idx = 4, 4
    assert advance(cache, 1) == [0, 1, 2, 3, 4]
    for name, value in [("keep", 8), ("max_size", 0), ("_idx", 3), ("offset", 99)]:
        good = getattr(cache, name)
        setattr(cache, name, value)
        with pytest.raises(ValueError, match=r"RotatingKVCache.update_and_fetch: expected"):
            feed(cache, 1, heads=1, dim=2)
        setattr(cache, name, good)
    assert advance(cache, 1) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["keep", "max_size", "_idx", "offset"])
def test_a_ring_has_no_negative_numbers(name):
    cache = RotatingKVCache(8)
    with pytest.raises(ValueError, match=rf"{name} of at least 0, got -1"):
        setattr(cache, name, -1)


def test_dtypes_promote_when_rows_are_joined():
    cache = RotatingKVCache(8)
    cache.update_and_fetch(noise(3).astype(mx.bfloat16), noise(3).astype(mx.float16))
    keys, values = cache.update_and_fetch(noise(3), noise(3))
    assert (keys.dtype, values.dtype) == (mx.float32, mx.float32)
    half = RotatingKVCache(4)
    half.update_and_fetch(noise(4).astype(mx.float16), noise(4).astype(mx.float16))
    assert half.update_and_fetch(noise(1), noise(1))[0].dtype == mx.float16


def test_step_bounds_how_a_ring_grows():
    cache = RotatingKVCache(10)
    cache.step = 4
    lengths = []
    for _ in range(10):
        advance(cache, 1)
        lengths.append(cache.keys.shape[2])
    assert lengths == [4] * 4 + [8] * 4 + [10] * 2
