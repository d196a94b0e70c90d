"""``QuantizedKVCache``: rows quantized once, as they come."""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrs_py.cache import QuantizedKVCache
from tiny import feed, leaves, noise, raw

BITS = (1, 2, 3, 4, 5, 6, 8)


def test_the_defaults_are_those_of_mlx_lm():
    cache = QuantizedKVCache()
    assert (cache.group_size, cache.bits) == (64, 8)
    assert (cache.keys, cache.values, cache.offset, cache.nbytes, cache.empty()) == (None, None, 0, 0, True)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=5),
    st.sampled_from(BITS),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
)
def test_an_update_returns_each_token_as_mlx_quantizes_it(counts, bits, dtype):
    cache = QuantizedKVCache(group_size=32, bits=bits)
    new = [(noise(n, dim=96, seed=n).astype(dtype), noise(n, dim=32, seed=n + 1000).astype(dtype)) for n in counts]
    for keys, values in new:
        seen = cache.update_and_fetch(keys, values)
    for rows, fed in zip(seen, zip(*new, strict=True), strict=True):
        assert leaves(rows) == leaves(mx.quantize(mx.concatenate(fed, axis=2), group_size=32, bits=bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "dim"), [(32, 32), (32, 96), (64, 128), (128, 256)])
def test_every_size_that_mlx_quantizes_works(bits, group_size, dim):
    cache = QuantizedKVCache(group_size=group_size, bits=bits)
    packed, scales, biases = cache.update_and_fetch(noise(3, dim=dim), noise(3, dim=dim))[0]
    assert packed.shape == (1, 2, 3, dim * bits // 32) and packed.dtype == mx.uint32
    assert scales.shape == biases.shape == (1, 2, 3, dim // group_size)


@pytest.mark.parametrize(("updates", "lengths"), [([300, 300], [512, 812]), ([100, 200, 700], [256, 356, 1068])])
def test_buffers_grow_as_those_of_the_plain_cache(updates, lengths):
    cache, seen = QuantizedKVCache(32), []
    for n_tokens in updates:
        feed(cache, n_tokens)
        assert {array.shape[2] for array in (*cache.keys, *cache.values)} == {cache.keys[0].shape[2]}
        seen.append(cache.keys[0].shape[2])
    assert seen == lengths


def test_returned_rows_are_tuples_of_three_mlx_arrays():
    keys, values = QuantizedKVCache(32).update_and_fetch(noise(3), noise(3))
    assert type(keys) is tuple and type(values) is tuple
    assert [type(array) for array in (*keys, *values)] == [mx.array] * 6


def test_size_is_the_number_of_tokens():
    cache = feed(QuantizedKVCache(32), 7)
    assert cache.size() == cache.offset == 7


def test_nbytes_counts_all_six_buffers():
    cache = feed(QuantizedKVCache(32, bits=8), 3)
    assert cache.nbytes == 2 * 2 * 256 * (32 + 4 + 4)


def test_scales_keep_their_dtype_as_long_as_the_buffers_stand():
    cache = QuantizedKVCache(32)
    cache.update_and_fetch(noise(3).astype(mx.bfloat16), noise(3).astype(mx.bfloat16))
    for n_tokens in (3, 300):
        keys, values = cache.update_and_fetch(noise(n_tokens), noise(n_tokens))
        assert {array.dtype for array in (*keys[1:], *values[1:])} == {mx.bfloat16}


def test_a_trim_takes_back_the_newest():
    cache = feed(QuantizedKVCache(32), 10)
    before = [raw(array[..., :6, :]) for array in cache.keys]
    assert (cache.is_trimmable(), cache.trim(4), cache.offset) == (True, 4, 6)
    assert [raw(array) for array in cache.keys_and_values()[0]] == before
    assert (cache.trim(99), cache.trim(1), cache.empty()) == (6, 0, False)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        cache.trim(-1)


@pytest.mark.parametrize("container", [tuple, list])
def test_assigned_buffers_may_be_tuples_or_lists(container):
    cache, other = feed(QuantizedKVCache(32), 5), QuantizedKVCache(32)
    other.keys, other.values, other.offset = container(cache.keys), container(cache.values), 5
    assert leaves(other.state) == leaves(cache.state)
    assert leaves(feed(other, 2).state) == leaves(feed(cache, 2).state)


def test_one_array_is_no_quantized_buffer():
    with pytest.raises(ValueError, match="keys: expected packed words, scales and biases"):
        QuantizedKVCache(32).keys = noise(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 7}, r"bits among \[1, 2, 3, 4, 5, 6, 8\], got 7"),
        ({"bits": 0}, r"bits among"),
        ({"group_size": 16}, r"group_size among \[32, 64, 128\], got 16"),
        ({"group_size": -64}, r"group_size of at least 0, got -64"),
    ],
)
def test_what_mlx_cannot_quantize_is_refused_when_the_cache_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizedKVCache(**arguments)


def test_group_size_and_bits_can_be_assigned_and_are_checked():
    cache = QuantizedKVCache()
    cache.bits, cache.group_size = 4, 32
    assert (cache.bits, cache.group_size) == (4, 32)
    with pytest.raises(ValueError, match="bits among"):
        cache.bits = 9
    assert cache.bits == 4


@pytest.mark.parametrize(
    ("keys", "values"), [((1, 2, 3, 80), (1, 2, 3, 64)), ((1, 2, 3, 64), (1, 2, 3, 80)), ((2, 2, 3, 64), (2, 2, 3, 64))]
)
def test_an_update_that_does_not_fit_changes_nothing(keys, values):
    cache = feed(QuantizedKVCache(), 3, dim=64)
    before = leaves(cache.state)
    with pytest.raises(ValueError, match=r"QuantizedKVCache.update_and_fetch: expected"):
        cache.update_and_fetch(mx.zeros(keys), mx.zeros(values))
    assert leaves(cache.state) == before


def test_buffers_of_another_bit_width_are_noticed_at_the_next_update():
    cache = feed(QuantizedKVCache(32, bits=4), 3)
    before = leaves(cache.state)
    cache.bits = 8
    with pytest.raises(ValueError, match="expected a head size that fits the cache's"):
        feed(cache, 1)
    cache.bits = 4
    assert leaves(cache.state) == before


def test_integers_cannot_be_quantized():
    with pytest.raises(ValueError, match="keys of a float type, got I32"):
        QuantizedKVCache().update_and_fetch(mx.zeros((1, 1, 2, 64), mx.int32), mx.zeros((1, 1, 2, 64), mx.int32))


def test_masks_are_those_of_the_plain_cache():
    cache = feed(QuantizedKVCache(32), 2)
    assert (cache.make_mask(1), cache.make_mask(3)) == (None, "causal")
    assert cache.make_mask(1, window_size=2).tolist() == [[False, True, True]]
