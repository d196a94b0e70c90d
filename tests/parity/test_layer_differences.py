"""Where the caches of other layers differ from mlx-lm's on purpose; see docs/parity.md."""

import copy

import mlx.core as mx
import pytest

import mlxrs_py.cache as ours

from .reference import cache as theirs
from .twins import leaves


def chunk(module, chunk_size=8, n_tokens=0):
    cache = module.ChunkedKVCache(chunk_size)
    if n_tokens:
        rows = mx.ones((1, 1, n_tokens, 4))
        cache.update_and_fetch(rows, rows)
    return cache


def slots(module, *arrays):
    cache = module.ArraysCache(len(arrays))
    for at, array in enumerate(arrays):
        cache[at] = array
    return cache


def test_a_chunk_of_no_rows_is_refused():
    other = chunk(theirs, 0, 3)
    other.maybe_trim_front()
    assert (other.keys.shape[2], other.offset) == (0, 3)
    with pytest.raises(ValueError, match="a chunk_size of at least 1"):
        ours.ChunkedKVCache(0)


def test_the_size_of_a_chunk_is_the_number_of_tokens_held():
    for module, size in ((theirs, 0), (ours, 8)):
        cache = chunk(module, 8, 9)
        cache.maybe_trim_front()
        assert cache.size() == size


def test_advancing_leaves_the_callers_arrays_alone():
    for module, left in ((theirs, [3]), (ours, [5])):
        cache = module.ArraysCache(1)
        cache.lengths = lengths = mx.array([5])
        cache.advance(2)
        assert (cache.lengths.tolist(), lengths.tolist()) == ([3], left)


def test_advancing_by_less_than_nothing_is_refused():
    mine, other = (module.ArraysCache(1, [1]) for module in (ours, theirs))
    other.advance(-2)
    assert other.left_padding.tolist() == [3]
    with pytest.raises(ValueError, match="at least 0, got -2"):
        mine.advance(-2)
    assert (theirs.ArraysCache(1, [1]).make_mask(-1).shape, mine.left_padding.tolist()) == ((1, 0), [1])
    with pytest.raises(ValueError, match="at least 0, got -1"):
        mine.make_mask(-1)


def test_a_slot_that_is_empty_everywhere_stays_empty_in_a_merge():
    x = mx.ones((1, 3))
    with pytest.raises(StopIteration):
        theirs.ArraysCache.merge([slots(theirs, x, None)])
    assert leaves(ours.ArraysCache.merge([slots(ours, x, None)]).cache) == leaves([x, None])


def test_merging_keeps_a_state_behind_an_empty_first_slot():
    x = mx.ones((1, 3))
    assert theirs.ArraysCache.merge([slots(theirs, None, x)]).cache == [None, None]
    assert leaves(ours.ArraysCache.merge([slots(ours, None, x)]).cache) == leaves([None, x])


def test_an_empty_slot_is_extracted_as_an_empty_slot():
    x = mx.ones((2, 3))
    with pytest.raises(TypeError, match="not subscriptable"):
        slots(theirs, x, None).extract(0)
    assert leaves(slots(ours, x, None).extract(0).cache) == leaves([x[:1], None])


def test_any_state_makes_a_cache_of_states_not_empty():
    x = mx.ones((1, 3))
    assert slots(theirs, None, x).empty()
    assert not slots(ours, None, x).empty()
    with pytest.raises(IndexError):
        theirs.ArraysCache(0).empty()
    assert ours.ArraysCache(0).empty()


def test_filtering_to_nobody_leaves_an_empty_batch():
    x = mx.ones((2, 3))
    with pytest.raises(ValueError, match="gather"):
        slots(theirs, x).filter([])
    cache = slots(ours, x)
    cache.filter([])
    assert cache[0].shape == (0, 3)


def test_places_of_no_sequence_are_refused():
    x = mx.arange(6).reshape(2, 3)
    assert [slots(theirs, x).extract(place)[0].shape[0] for place in (7, -1)] == [0, 0]
    with pytest.raises(ValueError, match="an index of one of 2 sequences, got 7"):
        slots(ours, x).extract(7)
    assert leaves(slots(ours, x).extract(-1)[0]) == leaves(x[1:])
    with pytest.raises(ValueError, match="an index of one of 2 sequences, got 7"):
        slots(ours, x).filter([0, 7])


def test_caches_of_other_numbers_of_slots_do_not_join():
    x = mx.ones((1, 3))
    other = slots(theirs, x, x)
    other.extend(slots(theirs, x))
    assert len(other.cache) == 1
    with pytest.raises(ValueError, match="a cache of 2 slots, got 1"):
        slots(ours, x, x).extend(slots(ours, x))
    assert len(theirs.ArraysCache.merge([slots(theirs, x), slots(theirs, x, x)]).cache) == 1
    with pytest.raises(ValueError, match="caches of 1 slots, got 2"):
        ours.ArraysCache.merge([slots(ours, x), slots(ours, x, x)])
    with pytest.raises(IndexError):
        theirs.ArraysCache.merge([])
    with pytest.raises(ValueError, match="at least one cache"):
        ours.ArraysCache.merge([])


def test_the_list_of_slots_that_was_read_is_not_the_cache():
    x = mx.ones((1, 3))
    for module, written in ((theirs, True), (ours, False)):
        cache = module.ArraysCache(1)
        cache.cache[0] = x
        assert (cache[0] is not None) == written


def test_slots_and_padding_hold_arrays_that_can_be_saved():
    other = theirs.ArraysCache(1)
    other[0], other.lengths = "text", "text"
    mine = ours.ArraysCache(1)
    with pytest.raises(TypeError, match=r"an mlx.core.array or None in a slot"):
        mine[0] = "text"
    with pytest.raises(ValueError, match="of an integer type"):
        mine.lengths = [1.5]


def test_mlx_lms_models_take_our_recurrent_states_for_theirs():
    # mamba writes no state into what is no ArraysCache of mlx-lm's, without a word.
    assert isinstance(ours.ArraysCache(1), theirs.ArraysCache)
    assert type(ours.ArraysCache(1)) is ours.ArraysCache
    assert not issubclass(ours.ArraysCache, theirs.ArraysCache)


def pair(module, n_tokens=5, n_others=3):
    cache = module.CacheList(module.KVCache(), module.KVCache())
    for child, n in zip(cache.caches, (n_tokens, n_others), strict=True):
        child.update_and_fetch(mx.ones((1, 1, n, 4)), mx.ones((1, 1, n, 4)))
    return cache


def test_all_children_of_a_list_are_trimmed_by_the_same_number():
    for module, n_taken, left in ((theirs, 3, [1, 0]), (ours, 3, [2, 0])):
        cache = pair(module)
        assert (cache.trim(4), [child.offset for child in cache.caches]) == (n_taken, left)


def test_a_list_that_cannot_be_trimmed_is_not_trimmed_in_part():
    mine, other = (module.CacheList(*pair(module).caches, module.ArraysCache(1)) for module in (ours, theirs))
    with pytest.raises(AttributeError):
        other.trim(2)
    with pytest.raises(ValueError, match="caches that can all be trimmed"):
        mine.trim(2)
    assert ([c.offset for c in other.caches[:2]], [c.offset for c in mine.caches[:2]]) == ([3, 1], [5, 3])


def test_a_list_without_children_answers():
    mine, other = ours.CacheList(), theirs.CacheList()
    for call, error in (
        (lambda: other.trim(1), UnboundLocalError),
        (other.empty, IndexError),
        (other.size, ValueError),
    ):
        with pytest.raises(error):
            call()
    assert (mine.trim(1), mine.empty(), mine.size()) == (0, True, 0)
    with pytest.raises(IndexError):
        theirs.CacheList.merge([])
    with pytest.raises(ValueError, match="at least one list"):
        ours.CacheList.merge([])


def test_lists_of_other_numbers_of_children_do_not_join():
    def lists(module):
        return [module.CacheList(*(slots(module, mx.ones((1, 3))) for _ in range(n))) for n in (2, 1)]

    first, second = lists(theirs)
    first.extend(second)
    assert [child.batch_size for child in first.caches] == [2, 1]
    first, second = lists(ours)
    with pytest.raises(ValueError, match="a list of 2 caches, got 1"):
        first.extend(second)
    assert [child.batch_size for child in first.caches] == [1, 1]


def test_the_children_of_a_list_are_a_tuple():
    for module, kind in ((theirs, list), (ours, tuple)):
        assert type(module.CacheList.from_state(pair(module).state).caches) is kind


def test_a_plain_copy_of_a_list_is_independent():
    for module, offset in ((theirs, 6), (ours, 5)):
        cache = pair(module)
        copy.copy(cache)[0].update_and_fetch(mx.ones((1, 1, 1, 4)), mx.ones((1, 1, 1, 4)))
        assert cache[0].offset == offset
