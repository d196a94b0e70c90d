"""``KVCache``: how it grows, what it returns, trim, masks, quantization."""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrs_py.cache import KVCache, QuantizedKVCache
from tiny import advance, feed, held, leaves, noise, payload_nans, positions, raw


@pytest.mark.parametrize(
    ("updates", "lengths"),
    [
        ([1], [256]),
        ([255, 1, 1], [256, 256, 512]),
        ([257], [512]),
        ([513], [768]),
        ([300, 300], [512, 812]),
        ([100, 200, 700], [256, 356, 1068]),
        ([0], [0]),
    ],
)
def test_buffers_grow_by_whole_steps(updates, lengths):
    cache, seen = KVCache(), []
    for n_tokens in updates:
        feed(cache, n_tokens)
        assert cache.keys.shape == cache.values.shape
        seen.append(cache.keys.shape[2])
    assert seen == lengths


def test_an_aligned_offset_after_a_trim_keeps_the_whole_buffer():
    cache = feed(KVCache(), 300)
    cache.trim(44)
    assert feed(cache, 300).keys.shape[2] == 1024
    cache = feed(KVCache(), 300)
    cache.trim(300)
    assert feed(cache, 600).keys.shape[2] == 1280


def test_an_empty_cache_has_no_buffers():
    cache = KVCache()
    assert (cache.keys, cache.values, cache.offset, cache.size(), cache.nbytes) == (None, None, 0, 0, 0)
    assert cache.empty() is True
    assert cache.state == (None, None, 0)


def test_nbytes_counts_both_whole_buffers():
    cache = feed(KVCache(), 3, dim=8)
    assert cache.nbytes == 32_768
    cache.trim(3)
    assert (cache.size(), cache.empty(), cache.nbytes) == (0, False, 32_768)


def test_an_update_of_no_tokens_makes_buffers_of_no_rows():
    cache = feed(KVCache(), 0)
    assert (cache.empty(), cache.offset, cache.keys.shape) == (False, 0, (1, 2, 0, 32))
    assert advance_from_scratch(cache) == [0, 1]


def advance_from_scratch(cache):
    cache.state = (None, None, 0)
    return advance(cache, 2)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 300))
def test_an_update_returns_every_token_in_order(counts, step):
    cache = KVCache()
    cache.step = step
    assert advance(cache, *counts) == list(range(sum(counts)))
    assert held(cache.keys_and_values()[0]) == list(range(sum(counts)))


def test_an_update_returns_the_bits_that_went_in():
    cache = KVCache()
    keys, values = cache.update_and_fetch(payload_nans(), -payload_nans())
    assert raw(keys) == raw(payload_nans())
    assert raw(values) == raw(-payload_nans())
    assert raw(cache.update_and_fetch(noise(2, heads=1, dim=2), noise(2, heads=1, dim=2))[0][..., :1, :]) == raw(keys)


def test_a_full_buffer_is_returned_whole():
    keys, _ = feed(KVCache(), 200).update_and_fetch(noise(56), noise(56))
    assert keys.shape == (1, 2, 256, 32)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 8), (8, 32), (16, 0)])
def test_keys_and_values_may_have_other_head_sizes(key_dim, value_dim):
    cache = KVCache()
    keys, values = cache.update_and_fetch(noise(5, dim=key_dim), noise(5, dim=value_dim))
    assert (keys.shape, values.shape) == ((1, 2, 5, key_dim), (1, 2, 5, value_dim))
    assert cache.nbytes == 256 * 2 * 4 * (key_dim + value_dim)


def test_one_array_may_be_keys_and_values():
    cache, same = KVCache(), positions(0, 3)
    keys, values = cache.update_and_fetch(same, same)
    cache.values = cache.values + 1
    assert held(keys) == held(values) == [0, 1, 2]
    assert held(cache.keys_and_values()[1]) == [1, 2, 3]


def test_without_growth_the_buffers_keep_their_dtype_and_with_growth_they_promote():
    cache = KVCache()
    cache.update_and_fetch(noise(3).astype(mx.bfloat16), noise(3).astype(mx.float16))
    keys, values = cache.update_and_fetch(noise(3), noise(3))
    assert (keys.dtype, values.dtype) == (mx.bfloat16, mx.float16)
    keys, values = cache.update_and_fetch(noise(300), noise(300))
    assert (keys.dtype, values.dtype) == (mx.float32, mx.float32)


def test_a_trim_takes_back_the_newest_and_gives_how_many():
    cache = KVCache()
    advance(cache, 10)
    length = cache.keys.shape[2]
    assert (cache.is_trimmable(), cache.trim(3), cache.offset, cache.keys.shape[2]) == (True, 3, 7, length)
    assert held(cache.keys_and_values()[0]) == list(range(7))
    assert advance(cache, 2) == list(range(9))
    assert (cache.trim(100), cache.offset, cache.trim(0)) == (9, 0, 0)


def test_a_negative_trim_raises_and_changes_nothing():
    cache = feed(KVCache(), 5)
    with pytest.raises(ValueError, match=r"trim: expected n of at least 0, got -5"):
        cache.trim(-5)
    assert cache.offset == 5


def test_keys_values_and_offset_can_be_assigned():
    cache = KVCache()
    advance(cache, 3)
    cache.keys = mx.depends(cache.keys, noise(1))
    cache.values = mx.zeros_like(cache.keys)
    cache.offset = 2
    keys, values = cache.keys_and_values()
    assert (held(keys), held(values)) == ([0, 1], [0, 0])
    cache.keys = cache.values = None
    cache.offset = 0
    assert cache.empty() and advance(cache, 2) == [0, 1]


@pytest.mark.parametrize("bad", [3, "keys", (1, 2, 3), [noise(1), noise(1)]])
def test_only_an_array_or_none_can_be_assigned_to_keys(bad):
    cache = feed(KVCache(), 3)
    before = leaves(cache.state)
    with pytest.raises(TypeError, match=r"expected an mlx.core.array"):
        cache.keys = bad
    assert leaves(cache.state) == before


def test_keys_of_another_rank_cannot_be_assigned():
    with pytest.raises(ValueError, match=r"keys: expected an array \(B, H, L, D\), got \[3\]"):
        KVCache().keys = mx.zeros((3,))


def test_a_mask_is_as_mlx_attention_takes_it():
    cache = KVCache()
    assert cache.make_mask(1, return_array=False, window_size=None) is None
    assert cache.make_mask(1, return_array=True) is None
    assert cache.make_mask(4) == "causal"
    advance(cache, 2)
    T, F = True, False
    assert cache.make_mask(2, return_array=True).tolist() == [[T, T, T, F], [T, T, T, T]]
    assert cache.make_mask(2, window_size=2).tolist() == [[F, T, T, F], [F, F, T, T]]
    assert cache.make_mask(1, window_size=2).tolist() == [[F, T, T]]
    assert cache.make_mask(1, window_size=9).tolist() == [[T, T, T]]


@pytest.mark.parametrize("window", [6, 2**31 - 2, 2**31 - 1, 2**31, 2**32 + 2, 2**40])
def test_a_huge_window_hides_nothing(window):
    cache = feed(KVCache(), 3)
    assert raw(cache.make_mask(2, window_size=window)) == raw(cache.make_mask(2, return_array=True))


def test_a_quantized_copy_grows_by_its_own_step():
    cache = KVCache()
    cache.step = 16
    quantized = feed(cache, 3, dim=64).to_quantized()
    assert quantized.step == 256
    assert feed(quantized, 20, dim=64).keys[0].shape[2] == 3 + 256


def test_a_quantized_copy_holds_the_same_tokens_in_buffers_of_the_same_length():
    cache = feed(KVCache(), 300, dim=64)
    quantized = cache.to_quantized()
    assert type(quantized) is QuantizedKVCache
    assert (quantized.group_size, quantized.bits, quantized.offset) == (64, 4, 300)
    assert leaves(quantized.keys) == leaves(mx.quantize(cache.keys, group_size=64, bits=4))
    assert leaves(quantized.values) == leaves(mx.quantize(cache.values, group_size=64, bits=4))
    assert quantized.keys[0].shape[2] == cache.keys.shape[2] == 512


def test_an_empty_cache_becomes_an_empty_quantized_one():
    quantized = KVCache().to_quantized(group_size=32, bits=8)
    assert (quantized.empty(), quantized.group_size, quantized.bits) == (True, 32, 8)


def test_a_quantization_that_mlx_does_not_know_changes_nothing():
    cache = feed(KVCache(), 3, dim=8)
    for arguments in ({"bits": 7}, {"group_size": 16}, {}):
        with pytest.raises(ValueError, match="expected"):
            cache.to_quantized(**arguments)
    assert (cache.offset, cache.keys.shape) == (3, (1, 2, 256, 8))
