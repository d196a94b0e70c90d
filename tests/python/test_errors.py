"""What goes wrong, how it is said, and that nothing has changed afterwards."""

import mlx.core as mx
import numpy as np
import pytest

import mlxrs_py
from mlxrs_py.cache import BatchCache, ConcatenateKVCache, KVCache, create_attention_mask
from tiny import every_class, feed, leaves, noise


def test_exceptions_are_also_the_builtin_ones():
    assert mlxrs_py.MlxError.__mro__[1:3] == (mlxrs_py.MlxrsError, RuntimeError)
    assert mlxrs_py.CacheFormatError.__mro__[1:3] == (mlxrs_py.MlxrsError, ValueError)
    assert mlxrs_py.MlxrsError.__mro__[1] is Exception
    for name in ("MlxrsError", "MlxError", "CacheFormatError"):
        assert getattr(mlxrs_py, name).__module__ == "mlxrs_py"
        assert getattr(mlxrs_py, name).__doc__


WRONG_SHAPES = {
    "batch": ((2, 2, 1, 32), (2, 2, 1, 32)),
    "heads": ((1, 4, 1, 32), (1, 4, 1, 32)),
    "key size": ((1, 2, 1, 64), (1, 2, 1, 32)),
    "value size": ((1, 2, 1, 32), (1, 2, 1, 64)),
    "tokens of keys and values": ((1, 2, 2, 32), (1, 2, 1, 32)),
    "heads of keys and values": ((1, 2, 1, 32), (1, 1, 1, 32)),
    "rank": ((2, 1, 32), (2, 1, 32)),
    "rank of the values": ((1, 2, 1, 32), (2, 1, 32)),
    "no axes": ((), ()),
}


@pytest.mark.parametrize(("keys", "values"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
@every_class
def test_an_update_of_the_wrong_shape_changes_nothing(make, keys, values):
    cache = feed(make(), 5, 1)
    before = leaves(cache.state)
    with pytest.raises(ValueError, match=rf"^{type(cache).__name__}.update_and_fetch: expected .*, got ") as error:
        cache.update_and_fetch(mx.zeros(keys), mx.zeros(values))
    # A packed buffer shows the shapes that quantization gave.
    assert hasattr(cache, "bits") or str(list(keys)) in str(error.value) or str(list(values)) in str(error.value)
    assert leaves(cache.state) == before
    assert feed(cache, 1).offset == 7


@pytest.mark.parametrize("wrong", [None, 3, "rows", np.zeros((1, 2, 1, 32), np.float32), [[1.0]]])
@every_class
def test_an_update_of_no_array_changes_nothing(make, wrong):
    cache = feed(make(), 5)
    before = leaves(cache.state)
    for arguments in [(wrong, noise(1)), (noise(1), wrong)]:
        with pytest.raises(TypeError, match=r"expected an mlx.core.array, got "):
            cache.update_and_fetch(*arguments)
    with pytest.raises(TypeError):
        cache.update_and_fetch(noise(1))
    assert leaves(cache.state) == before


@every_class
def test_the_first_update_may_fail_too(make):
    cache = make()
    with pytest.raises(ValueError, match=r"keys \(B, H, S, D\) and values \(B, H, S, Dv\)"):
        cache.update_and_fetch(noise(2), noise(3))
    assert (cache.empty(), cache.offset, cache.nbytes) == (True, 0, 0)
    assert feed(cache, 2).offset == 2


@every_class
def test_the_rows_of_an_empty_cache_are_refused(make):
    with pytest.raises(ValueError, match="keys_and_values: expected a cache with tokens, got an empty one"):
        make().keys_and_values()


@every_class
def test_an_offset_beyond_the_buffer_is_noticed_at_the_next_update(make):
    cache = feed(make(), 3)
    if isinstance(cache, BatchCache):
        with pytest.raises(TypeError, match="an array or a list of integers"):
            cache.offset = 999
        return
    if type(cache) is ConcatenateKVCache:
        with pytest.raises(ValueError, match="the number of rows"):
            cache.offset = 999
        return
    cache.offset = 999
    with pytest.raises(ValueError, match="update_and_fetch: expected"):
        feed(cache, 1)
    cache.offset = 3
    assert feed(cache, 1).offset == 4


def test_an_offset_without_a_buffer_is_noticed_at_the_next_update():
    cache = KVCache()
    cache.offset = 3
    with pytest.raises(ValueError, match="expected a buffer, since the offset is not 0, got none"):
        feed(cache, 1)
    with pytest.raises(ValueError, match="offset of at least 0, got -1"):
        cache.offset = -1
    with pytest.raises(TypeError):
        cache.offset = 1.5
    assert cache.offset == 3


@every_class
def test_keys_without_values_are_noticed_at_the_next_update(make):
    cache = feed(make(), 3)
    keys = cache.keys
    cache.keys = None
    with pytest.raises(ValueError, match=r"both set, or neither|_idx = offset <= rows"):
        feed(cache, 1)
    cache.keys = keys
    assert feed(cache, 1).offset == 4


@every_class
def test_buffers_of_two_lengths_are_noticed_at_the_next_update(make):
    cache = feed(make(), 3)
    values = cache.values
    cache.values = tuple(v[..., :2, :] for v in values) if isinstance(values, tuple) else values[..., :2, :]
    with pytest.raises(ValueError, match="expected buffers of one length"):
        feed(cache, 1)
    cache.values = values
    assert feed(cache, 1).offset == 4


@every_class
def test_masks_and_trims_refuse_what_is_not_a_count(make):
    cache = feed(make(), 3)
    negative, wrong = [lambda: cache.trim(-1)], [lambda: cache.trim("1"), lambda: cache.trim(None)]
    if hasattr(cache, "make_mask"):
        negative += [lambda: cache.make_mask(-1), lambda: cache.make_mask(2, window_size=-1)]
        wrong += [lambda: cache.make_mask(1.5), cache.make_mask]
    for call in negative:
        with pytest.raises(ValueError, match="of at least 0, got -1"):
            call()
    for call in wrong:
        with pytest.raises(TypeError):
            call()
    assert cache.offset == 3


def test_the_mask_function_refuses_what_is_not_a_count():
    with pytest.raises(ValueError, match="create_attention_mask: expected offset of at least 0, got -1"):
        create_attention_mask(2, -1, False, None)
    with pytest.raises(TypeError, match="window_size"):
        create_attention_mask(2, 0, False)


@every_class
def test_unknown_attributes_are_told(make):
    cache = make()
    with pytest.raises(AttributeError, match="has no attribute 'size_of_chunk'"):
        _ = cache.size_of_chunk
    with pytest.raises(AttributeError):
        del cache.offset
    with pytest.raises(AttributeError):
        cache.nbytes = 3


@every_class
def test_a_cache_in_use_cannot_be_broken_by_what_python_runs_meanwhile(make):
    """A destructor that runs in the middle of an update reaches the same cache."""
    cache = make()

    class Meddler:
        def __del__(self):
            cache.trim(0)
            seen.append(cache.offset)

    seen = []
    cache.meddler = Meddler()
    feed(cache, 2)
    cache.meddler = None
    assert (seen, feed(cache, 1).offset) == ([2], 3)
