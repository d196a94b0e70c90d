"""``ArraysCache``: recurrent states, one per slot."""

import copy
import gc
import pickle
import weakref

import mlx.core as mx
import pytest

from mlxrs_py.cache import ArraysCache, Cache, load_prompt_cache, save_prompt_cache
from tiny import COPIES, active_memory, leaves


def state(*shape, seed=0, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def filled(batch=1, seed=0):
    """Give a cache of three slots, of which the one in the middle is empty."""
    cache = ArraysCache(3)
    cache[0], cache[2] = state(batch, 3, 4, seed=seed), state(batch, 2, seed=seed + 50)
    return cache


def test_slots_are_read_and_written_like_a_list():
    cache, x = ArraysCache(3), state(1, 3, 4)
    cache[0], cache[-1] = x, x + 1
    assert leaves([cache[0], cache[1], cache[2]]) == leaves([x, None, x + 1])
    assert leaves(cache[::2]) == leaves([x, x + 1])
    first, second, third = cache
    assert leaves([first, second, third]) == leaves(cache.cache)
    cache[0:2] = None, x
    assert leaves(cache.cache) == leaves([None, x, x + 1])
    with pytest.raises(IndexError):
        cache[3]
    with pytest.raises(IndexError):
        cache[3] = x


@pytest.mark.parametrize("value", [3, "x", [1.0], object()])
def test_a_slot_takes_arrays_and_none(value):
    cache = filled()
    before = leaves(cache.state)
    with pytest.raises(TypeError, match=r"expected an mlx.core.array or None in a slot"):
        cache[1] = value
    with pytest.raises(TypeError):
        cache.cache = [value]
    assert leaves(cache.state) == before


def test_the_list_of_slots_is_a_copy_and_can_be_assigned():
    cache, x = ArraysCache(2), state(1, 3)
    cache.cache[0] = x
    assert cache.cache == [None, None]
    cache.cache = [x, None, x]
    assert leaves(cache.cache) == leaves([x, None, x])


@pytest.mark.parametrize("missing", ["keys", "values", "offset", "trim", "update_and_fetch", "step", "bits", "__len__"])
def test_it_is_no_attention_cache(missing):
    assert not hasattr(ArraysCache(1), missing)


def test_masks_take_the_number_of_tokens_alone():
    with pytest.raises(TypeError):
        ArraysCache(1).make_mask(3, return_array=True)
    with pytest.raises(TypeError):
        ArraysCache(1).make_mask(3, window_size=None)


def test_masks_show_what_is_neither_padding_nor_past_the_end():
    cache = ArraysCache(1, left_padding=[0, 2])
    assert cache.make_mask(3).tolist() == [[True, True, True], [False, False, True]]
    cache.prepare(lengths=[2, 3], right_padding=[1, 0])
    assert cache.make_mask(4).tolist() == [[True, True, False, False], [False, False, True, False]]
    cache.advance(1)
    assert (cache.left_padding.tolist(), cache.lengths.tolist()) == ([-1, 1], [1, 2])
    assert cache.make_mask(2).tolist() == [[True, False], [False, True]]
    cache.finalize()
    assert (cache.make_mask(2), cache.left_padding, cache.lengths) == (None, None, None)
    cache.advance(3)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        cache.make_mask(-1)


def test_the_callers_arrays_are_not_advanced():
    lengths = mx.array([5, 6])
    cache = ArraysCache(1, left_padding=[1, 2])
    padding = cache.left_padding
    cache.prepare(lengths=lengths)
    cache.advance(4)
    assert (lengths.tolist(), padding.tolist()) == ([5, 6], [1, 2])


def test_no_padding_is_none_and_a_padding_of_0_is_one():
    assert ArraysCache(1, []).left_padding is None
    assert ArraysCache(1, [0]).left_padding.tolist() == [0]
    assert ArraysCache(1, mx.array([0, 1])).left_padding.dtype == mx.int32
    with pytest.raises(TypeError, match="expected lengths, got none"):
        ArraysCache(1).prepare(right_padding=[1])


@pytest.mark.parametrize("bad", [[1.5], [[1]], mx.array(3)])
def test_padding_and_lengths_are_integers_one_per_sequence(bad):
    cache = filled()
    for assign in (
        lambda: ArraysCache(1, bad),
        lambda: cache.prepare(lengths=bad),
        lambda: setattr(cache, "lengths", bad),
        lambda: setattr(cache, "left_padding", bad),
    ):
        with pytest.raises(ValueError, match="integer"):
            assign()
    assert (cache.lengths, cache.left_padding) == (None, None)


def test_the_first_array_tells_the_size_of_the_batch():
    cache = ArraysCache(2)
    assert cache.batch_size == 1
    cache.lengths = [1, 2]
    assert cache.batch_size == 2
    cache.left_padding = [1, 2, 3]
    assert cache.batch_size == 3
    cache[1] = state(4, 2)
    assert cache.batch_size == 4


def test_filtered_sequences_come_in_the_order_asked_for():
    cache = filled(4)
    cache.lengths, cache.left_padding = [1, 2, 3, 4], [5, 6, 7, 8]
    rows = mx.array([3, 1, 1])
    expected = leaves([[slot if slot is None else slot[rows] for slot in cache.cache], [8, 6, 6], [4, 2, 2]])
    for places in ([3, 1, 1], (3, -3, 1), rows, mx.array([3, 1, 1], dtype=mx.uint32)):
        twin = cache.copy()
        twin.filter(places)
        assert leaves([twin.cache, twin.left_padding.tolist(), twin.lengths.tolist()]) == expected
    cache.filter([])
    assert (cache.batch_size, cache[0].shape, cache.lengths.shape) == (0, (0, 3, 4), (0,))


@pytest.mark.parametrize("places", [[4], [-5], [0, 99], mx.array([4])])
def test_places_that_are_no_sequences_are_refused(places):
    cache = filled(4)
    before = leaves(cache.state)
    with pytest.raises(ValueError, match="an index of one of 4 sequences"):
        cache.filter(places)
    assert leaves(cache.state) == before
    for place in (4, -5):
        with pytest.raises(ValueError, match="an index of one of 4 sequences"):
            cache.extract(place)


def test_a_batch_grows_by_the_sequences_of_another():
    cache, other = filled(2), filled(1, seed=7)
    other[1], other.lengths = state(1, 5), [3]
    pairs = [cache[0], other[0]], [mx.zeros((2, 5)), other[1]], [cache[2], other[2]]
    rows = leaves([*map(mx.concatenate, pairs), None, mx.array([0, 0, 3])])
    before = leaves(other.state)
    cache.extend(other)
    assert leaves(cache.state) == rows
    assert leaves(other.state) == before
    twice = filled(2)
    twice.extend(twice)
    assert twice.batch_size == 4


def test_what_does_not_fit_is_not_appended():
    cache = filled(2)
    before = leaves(cache.state)
    wrong = filled(1)
    wrong[2] = state(1, 3)
    for other in (ArraysCache(2), wrong):
        with pytest.raises(ValueError, match=r"ArraysCache.extend: expected"):
            cache.extend(other)
    with pytest.raises(TypeError):
        cache.extend(3)
    assert leaves(cache.state) == before


def test_what_is_merged_can_be_extracted_again():
    caches = [filled(seed=1), ArraysCache(3), filled(seed=2)]
    caches[2][1] = state(1, 5)
    merged = ArraysCache.merge(caches)
    assert [slot.shape for slot in merged.cache] == [(3, 3, 4), (3, 5), (3, 2)]
    for at in (0, 2):
        # What a cache had not set is zeros in the batch.
        one = merged.extract(at)
        assert leaves([one[0], one[2]]) == leaves([caches[at][0], caches[at][2]])
        assert leaves([one[1]]) == leaves([caches[at][1] if at else mx.zeros((1, 5))])
    assert leaves(merged.extract(-1).state) == leaves(caches[2].state)
    assert not mx.any(merged[0][1]).item()


def test_a_slot_that_nobody_has_set_stays_empty():
    merged = ArraysCache.merge([filled(seed=1), filled(seed=2)])
    assert merged[1] is None and merged.extract(1)[1] is None


def test_empty_caches_merge_into_a_batch_without_padding():
    merged = ArraysCache.merge([ArraysCache(2)] * 3)
    assert (merged.cache, merged.left_padding.tolist(), merged.batch_size) == ([None, None], [0, 0, 0], 3)


def test_caches_that_do_not_fit_are_not_merged():
    wrong = filled()
    wrong[0] = state(1, 3, 5)
    for caches in ([], [filled(), ArraysCache(2)], [filled(), filled(2)], [filled(), wrong]):
        with pytest.raises(ValueError, match=r"ArraysCache.merge: expected"):
            ArraysCache.merge(caches)


def test_a_cache_is_empty_until_a_slot_is_set():
    cache = ArraysCache(2, [1])
    assert (cache.empty(), cache.nbytes, cache.size(), cache.is_trimmable()) == (True, 0, 0, False)
    cache[1] = state(1, 5)
    assert (cache.empty(), cache.nbytes, cache.size()) == (False, 20, 0)
    assert (ArraysCache(0).empty(), ArraysCache(0).cache) == (True, [])
    with pytest.raises(ValueError, match="size of at least 0"):
        ArraysCache(-1)


def test_a_state_goes_round_and_a_wrong_one_changes_nothing():
    cache = filled(2)
    cache.left_padding = [0, 1]
    twin = ArraysCache.from_state(cache.state)
    assert leaves(twin.state) == leaves(cache.state)
    before = leaves(cache.state)
    for bad in [(), ([], None), ([3], None, None), ([None], 3, None), ([None], None, mx.zeros((2,))), 3, None]:
        with pytest.raises((ValueError, TypeError), match="state: expected"):
            cache.state = bad
        assert leaves(cache.state) == before


@pytest.mark.parametrize("duplicate", [*COPIES.values(), lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_is_equal_and_goes_its_own_way(duplicate):
    cache = filled(2)
    cache.prepare(lengths=[3, 4])
    cache.note = ["kept"]
    twin = duplicate(cache)
    assert (type(twin), twin.note, leaves(twin.state)) == (ArraysCache, ["kept"], leaves(cache.state))
    before = leaves(cache.state)
    twin[0] = state(2, 3, 4, seed=9)
    twin.advance(1)
    assert leaves(cache.state) == before != leaves(twin.state)


def test_a_deep_copy_shares_memory():
    cache = ArraysCache(1)
    cache[0] = state(1, 1000, 1000)
    mx.eval(cache.state)
    before = active_memory()
    twin = copy.deepcopy(cache)
    mx.eval(twin.state)
    assert active_memory() == before


def test_it_is_a_cache_as_a_python_object():
    class Labelled(ArraysCache):
        def __init__(self, label):
            super().__init__(2)
            self.label = label

    cache = Labelled("a")
    cache.itself = [cache]
    assert isinstance(cache, Cache) and bool(cache) and len(cache.cache) == 2
    assert (type(copy.copy(cache)), copy.copy(cache).label) == (Labelled, "a")
    assert repr(filled()) == "ArraysCache([Array[1, 3, 4] F32, Array[1, 2] F32])"
    reference = weakref.ref(cache)
    del cache
    gc.collect()
    assert reference() is None


def test_states_come_back_from_a_file(tmp_path):
    cache = filled(2)
    cache.left_padding = [1, 0]
    save_prompt_cache(tmp_path / "p", [cache, ArraysCache(2), ArraysCache(0)])
    loaded = load_prompt_cache(tmp_path / "p")
    assert [type(c) for c in loaded] == [ArraysCache] * 3
    assert [leaves(c.state) for c in loaded] == [leaves(c.state) for c in (cache, ArraysCache(2), ArraysCache(0))]
