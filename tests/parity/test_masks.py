"""Masks of every class at every state are mlx-lm's, but for rings with kept tokens (test_differences)."""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlxrs_py.cache as ours

from .reference import cache as theirs
from .reference import create_attention_mask, create_causal_mask
from .twins import leaves

PAIRS = {
    "KVCache": (ours.KVCache, theirs.KVCache),
    "QuantizedKVCache": (ours.QuantizedKVCache, theirs.QuantizedKVCache),
    "ConcatenateKVCache": (ours.ConcatenateKVCache, theirs.ConcatenateKVCache),
    "a short ring": (lambda: ours.RotatingKVCache(6), lambda: theirs.RotatingKVCache(6)),
    "a long ring": (lambda: ours.RotatingKVCache(40), lambda: theirs.RotatingKVCache(40)),
}
counts = st.lists(st.one_of(st.just(1), st.integers(1, 15)), max_size=10)
windows = st.none() | st.integers(1, 20)
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def fed(pair, updates):
    caches = [make() for make in pair]
    for cache in caches:
        for n_tokens in updates:
            rows = mx.zeros((1, 1, n_tokens, 64))
            cache.update_and_fetch(rows, rows)
    return caches


@pairs
@given(counts, st.integers(1, 12), windows, st.booleans())
def test_the_masks_of_a_cache(pair, updates, n_tokens, window, return_array):
    mine, other = (c.make_mask(n_tokens, window_size=window, return_array=return_array) for c in fed(pair, updates))
    assert leaves([mine]) == leaves([other])


@pairs
@given(counts, st.integers(1, 12), windows, st.booleans())
def test_the_masks_that_a_model_makes_from_a_cache(pair, updates, n_tokens, window, return_array):
    h = mx.zeros((1, n_tokens, 8))
    mine, other = (create_attention_mask(h, c, window, return_array) for c in fed(pair, updates))
    assert leaves([mine]) == leaves([other])


@given(st.integers(0, 12), st.integers(0, 30), st.booleans(), st.none() | st.integers(0, 40))
def test_the_function(n_tokens, offset, return_array, window):
    arguments = n_tokens, offset, return_array, window
    assert leaves([ours.create_attention_mask(*arguments)]) == leaves([theirs.create_attention_mask(*arguments)])


@given(counts, st.integers(1, 4), windows)
def test_rings_with_kept_tokens_agree_until_they_are_full(updates, keep, window):
    pair = lambda: ours.RotatingKVCache(200, keep), lambda: theirs.RotatingKVCache(200, keep)
    mine, other = fed(pair, updates)
    for n_tokens in (1, 5):
        masks = [c.make_mask(n_tokens, window_size=window) for c in (mine, other)]
        assert leaves(masks[:1]) == leaves(masks[1:])


@given(
    st.integers(0, 9),
    st.integers(0, 40),
    st.none() | st.integers(0, 50),
    st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.none() | st.integers(0, 9),
)
def test_the_causal_mask_of_a_batch(n_tokens, offset, window, left, right):
    right = None if right is None else mx.array([right] * len(left or [1, 2]))
    left = None if left is None else mx.array(left)
    arguments = {"window_size": window, "right_padding": right, "left_padding": left}
    assert leaves([ours.create_causal_mask(n_tokens, offset, **arguments)]) == leaves(
        [create_causal_mask(n_tokens, offset, **arguments)]
    )
