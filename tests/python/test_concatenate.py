"""``ConcatenateKVCache``: exactly the rows, no padding."""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrs_py.cache import ConcatenateKVCache
from tiny import advance, feed, held, leaves, noise, positions


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_the_buffers_are_the_tokens(counts):
    cache = ConcatenateKVCache()
    assert advance(cache, *counts) == list(range(sum(counts)))
    assert cache.offset == cache.size() == cache.keys.shape[2] == sum(counts)
    assert cache.nbytes == 2 * cache.offset * 2 * 4


def test_an_empty_cache_has_no_buffers():
    cache = ConcatenateKVCache()
    assert (cache.state, cache.offset, cache.nbytes, cache.empty()) == ((None, None), 0, 0, True)


def test_a_trim_takes_back_the_newest_rows_for_good():
    cache = ConcatenateKVCache()
    advance(cache, 6)
    assert (cache.is_trimmable(), cache.trim(2), cache.offset) == (True, 2, 4)
    assert held(cache.keys_and_values()[0]) == [0, 1, 2, 3]
    assert advance(cache, 1) == [0, 1, 2, 3, 4]
    assert (cache.trim(99), cache.offset, cache.empty()) == (5, 0, False)
    assert ConcatenateKVCache().trim(3) == 0


def test_a_negative_trim_raises_and_changes_nothing():
    cache = feed(ConcatenateKVCache(), 5)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        cache.trim(-1)
    assert cache.offset == 5


def test_the_offset_follows_the_buffers_and_cannot_be_assigned():
    cache = feed(ConcatenateKVCache(), 5)
    with pytest.raises(ValueError, match="offset: expected an offset that is the number of rows"):
        cache.offset = 3
    cache.keys, cache.values = noise(4), noise(4)
    assert cache.offset == 4


def test_the_callers_arrays_stay_as_they_are():
    cache, same = ConcatenateKVCache(), positions(0, 3)
    cache.update_and_fetch(same, same)
    cache.values = cache.values + 5
    cache.update_and_fetch(positions(3, 4), positions(9, 10))
    assert (held(same), held(cache.keys), held(cache.values)) == ([0, 1, 2], [0, 1, 2, 3], [5, 6, 7, 9])


def test_dtypes_promote():
    cache = ConcatenateKVCache()
    cache.update_and_fetch(noise(3).astype(mx.bfloat16), noise(3).astype(mx.float16))
    keys, values = cache.update_and_fetch(noise(1), noise(1).astype(mx.float16))
    assert (keys.dtype, values.dtype) == (mx.float32, mx.float16)


def test_an_update_that_does_not_fit_changes_nothing():
    cache = feed(ConcatenateKVCache(), 3)
    before = leaves(cache.state)
    for shape in [(2, 2, 1, 32), (1, 1, 1, 32), (1, 2, 1, 8)]:
        with pytest.raises(ValueError, match=r"ConcatenateKVCache.update_and_fetch: expected keys that fit"):
            cache.update_and_fetch(mx.zeros(shape), mx.zeros(shape))
    assert leaves(cache.state) == before


def test_there_is_nothing_to_quantize():
    assert not hasattr(ConcatenateKVCache(), "to_quantized")


def test_masks_are_those_of_the_plain_cache():
    cache = feed(ConcatenateKVCache(), 2)
    assert (cache.make_mask(1), cache.make_mask(3)) == (None, "causal")
    assert cache.make_mask(2, return_array=True).tolist() == [[True, True, True, False], [True] * 4]
