"""``TokenBuffer``: tokens appended, given whole."""

import copy
import pickle

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrs_py.cache import TokenBuffer
from tiny import leaves

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=300)


@given(tokens, st.lists(tokens, max_size=4), st.sampled_from([list, np.array, mx.array]))
def test_all_tokens_come_back(first, more, form):
    buffer = TokenBuffer(first)
    for new in more:
        seen = buffer.update_and_fetch(form(new) if new else [])
        first = first + new
        assert (seen.dtype, seen.tolist()) == (mx.int32, first)
    assert (buffer.tokens.tolist(), buffer._size) == (first, len(first))


def test_a_buffer_grows_by_whole_steps():
    buffer = TokenBuffer([1, 2, 3])
    assert (buffer.step, buffer.state.tolist(), TokenBuffer().tokens.tolist()) == (256, [1, 2, 3], [])
    sizes = []
    for n_tokens in (1, 252, 1, 300):
        buffer.update_and_fetch([7] * n_tokens)
        sizes.append(buffer.state.size)
    assert sizes == [256, 256, 512, 768]


def test_what_a_buffer_gave_does_not_change():
    buffer = TokenBuffer([1])
    seen = [buffer.update_and_fetch(mx.array([n], mx.uint32)) for n in range(5)]
    assert [array.tolist() for array in seen] == [[1, *range(n + 1)] for n in range(5)]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (3, TypeError),
        ([0.5], TypeError),
        (["a"], TypeError),
        ([2**40], OverflowError),
        (mx.array([0.5]), ValueError),
        (mx.zeros((1, 2), mx.int32), ValueError),
    ],
)
def test_what_is_no_token_changes_nothing(wrong, error):
    buffer = TokenBuffer([1, 2])
    with pytest.raises(error):
        buffer.update_and_fetch(wrong)
    assert buffer.state.tolist() == [1, 2]
    with pytest.raises(error):
        TokenBuffer(wrong)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_a_copy_goes_its_own_way(way):
    buffer = TokenBuffer([1, 2])
    buffer.update_and_fetch([3])
    buffer.note = "kept"
    twin = way(buffer)
    twin.update_and_fetch([4])
    assert (twin.tokens.tolist(), buffer.tokens.tolist(), twin.note) == ([1, 2, 3, 4], [1, 2, 3], "kept")
    assert leaves([buffer.update_and_fetch([4])]) == leaves([twin.tokens])
