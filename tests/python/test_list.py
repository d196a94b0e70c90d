"""``CacheList``: several caches of one layer, ours or any other."""

import copy
import gc
import pickle
import weakref

import mlx.core as mx
import pytest

import mlxrs_py
from mlxrs_py.cache import (
    ArraysCache,
    Cache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    register,
    save_prompt_cache,
    trim_prompt_cache,
)
from tiny import COPIES, TinyModel, active_memory, feed, leaves

DUPLICATES = {**COPIES, "pickle": lambda cache: pickle.loads(pickle.dumps(cache))}


class Foreign:
    """A cache that only looks like one."""

    def __init__(self, offset=0):
        self.offset, self.calls = offset, []
        self.nbytes, self.state = 10, [mx.array(offset)]

    def __getattr__(self, name):
        if name in ("filter", "extend", "prepare", "finalize"):
            return lambda *arguments, **named: self.calls.append((name, arguments, named))
        raise AttributeError(name)

    def size(self):
        return self.offset

    def empty(self):
        return self.offset == 0

    def is_trimmable(self):
        return True

    def trim(self, n):
        self.offset -= n
        return n


def states(*arrays):
    cache = ArraysCache(len(arrays))
    cache.cache = arrays
    return cache


def filled():
    return CacheList(feed(KVCache(), 5), CacheList(feed(RotatingKVCache(8), 3), states(mx.ones((1, 3)))))


def test_children_are_the_objects_that_were_put_in():
    first, second = KVCache(), Foreign()
    cache = CacheList(first, second)
    assert cache[0] is first and cache[-1] is second and cache.caches == (first, second)
    assert [*cache] == [first, second] and cache[:1] == (first,)
    with pytest.raises(IndexError):
        cache[2]
    feed(cache[0], 3)
    assert (first.offset, cache.size()) == (3, 3)
    cache.caches = [second]
    assert cache.caches == (second,)


@pytest.mark.parametrize("missing", ["offset", "make_mask", "to_quantized", "keys", "__len__", "update_and_fetch"])
def test_a_list_is_no_attention_cache(missing):
    assert not hasattr(CacheList(KVCache()), missing)
    assert isinstance(CacheList(), Cache) and bool(CacheList())


def test_sizes_are_told_by_the_children():
    cache = CacheList(feed(KVCache(), 5), feed(RotatingKVCache(8), 3), Foreign(4))
    assert (cache.size(), cache.empty(), cache.is_trimmable()) == (5, False, True)
    assert cache.nbytes == cache[0].nbytes + cache[1].nbytes + 10
    assert not CacheList(KVCache(), states(None)).is_trimmable()
    assert (CacheList(KVCache(), Foreign(4)).empty(), CacheList(Foreign(4), KVCache()).empty()) == (True, False)


def test_a_list_without_children_behaves():
    cache = CacheList()
    assert (cache.size(), cache.empty(), cache.nbytes, cache.is_trimmable(), cache.trim(3)) == (0, True, 0, True, 0)
    assert (cache.state, cache.caches, repr(cache)) == ([], (), "CacheList()")
    cache.filter([0])
    cache.finalize()
    assert trim_prompt_cache([cache, feed(KVCache(), 5)], 3) == 3


def test_all_children_are_trimmed_by_the_same_number():
    chunk = feed(ChunkedKVCache(4), 9)
    chunk.maybe_trim_front()
    cache = CacheList(feed(KVCache(), 9), Foreign(9), CacheList(chunk))
    plain = feed(KVCache(), 9)
    assert trim_prompt_cache([cache, plain], 7) == 4
    assert [cache[0].offset, cache[1].offset, chunk.offset, plain.offset] == [5, 5, 5, 5]
    assert (cache.trim(9), cache[0].offset) == (0, 5)


def test_what_cannot_be_trimmed_leaves_all_children_alone():
    cache = CacheList(feed(KVCache(), 9), feed(RotatingKVCache(8), 9))
    with pytest.raises(ValueError, match="caches that can all be trimmed"):
        cache.trim(2)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        cache.trim(-1)
    assert (cache.trim(0), cache[0].offset) == (0, 9)
    assert (trim_prompt_cache([cache], 2), can_trim_prompt_cache([cache]), trim_prompt_cache([], 2)) == (0, False, 0)


class Failing(Foreign):
    def trim(self, n):
        raise OSError("no")

    filter = extend = trim


def test_children_are_put_back_when_one_fails():
    rows, recurrent = feed(KVCache(), 9), states(mx.ones((2, 3)))
    before = leaves([rows.state, recurrent.state])
    for fails in (
        lambda: CacheList(rows, CacheList(rows, Failing(9))).trim(3),
        lambda: trim_prompt_cache([rows, Failing(9)], 3),
        lambda: CacheList(recurrent, Failing()).filter([1]),
        lambda: CacheList(recurrent, Failing()).extend(CacheList(states(mx.ones((1, 3))), Foreign())),
    ):
        with pytest.raises(OSError, match="no"):
            fails()
        assert leaves([rows.state, recurrent.state]) == before


def test_batches_are_handed_down():
    foreign = Foreign()
    cache = CacheList(states(mx.arange(3).reshape(3, 1)), foreign)
    cache.prepare(lengths=[1, 2, 3], right_padding=[2, 1, 0])
    assert cache[0].lengths.tolist() == [1, 2, 3]
    cache.filter([2, 0])
    cache.finalize()
    assert (cache[0][0].tolist(), cache[0].lengths) == ([[2], [0]], None)
    other = CacheList(states(mx.array([[7]])), Foreign())
    cache.extend(other)
    assert cache[0][0].tolist() == [[2], [0], [7]]
    assert [call[0] for call in foreign.calls] == ["prepare", "filter", "finalize", "extend"]
    assert foreign.calls[3][1] == (other[1],)
    nested = CacheList(CacheList(cache[0]), states(mx.zeros((3, 2))))
    assert nested.extract(1)[0][0][0].tolist() == [[0]]
    merged = CacheList.merge([nested.extract(place) for place in (2, 0)])
    assert (type(merged[0]), merged[0][0][0].tolist()) == (CacheList, [[7], [2]])


def test_lists_that_do_not_fit_are_refused():
    cache = CacheList(states(mx.ones((1, 3))))
    for other in (CacheList(), CacheList(ArraysCache(1), ArraysCache(1))):
        with pytest.raises(ValueError, match="a list of 1 caches"):
            cache.extend(other)
        with pytest.raises(ValueError, match="a list of 1 caches"):
            CacheList.merge([cache, other])
    with pytest.raises(ValueError, match="at least one list"):
        CacheList.merge([])
    for wrong in (KVCache(), 3):
        with pytest.raises(TypeError, match="expected a CacheList"):
            cache.extend(wrong)
    with pytest.raises(AttributeError):
        CacheList(ChunkedKVCache(8)).filter([0])


def test_a_list_cannot_be_inside_of_itself_or_too_deep():
    inner = CacheList()
    outer = CacheList(CacheList(inner))
    for children in ([inner], [outer]):
        with pytest.raises(ValueError, match="none in itself"):
            inner.caches = children
    deep = CacheList()
    for _ in range(7):
        deep = CacheList(deep)
    with pytest.raises(ValueError, match="at most 8 CacheLists"):
        CacheList(deep)


def test_a_state_goes_round_and_a_wrong_one_changes_nothing():
    cache = filled()
    assert [name for _, name in cache.state] == ["KVCache", "CacheList"]
    twin = CacheList.from_state(cache.state)
    assert [type(child) for child in twin] == [KVCache, CacheList] and type(twin[1][1]) is ArraysCache
    assert leaves(twin.state) == leaves(cache.state)
    before, children = leaves(cache.state), cache.caches
    for bad in [3, None, [3], [(cache[0].state, "Nope")], [(cache[0].state, "RotatingKVCache")], [(1, 2, 3)]]:
        with pytest.raises((ValueError, TypeError), match="state: expected"):
            cache.state = bad
    endless = []
    endless.append((endless, "CacheList"))
    with pytest.raises(ValueError, match="state: expected at most"):
        cache.state = endless
    assert leaves(cache.state) == before and cache.caches == children


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_a_copy_is_equal_and_goes_its_own_way(duplicate):
    class_, cache = type(filled()), filled()
    cache.note, cache[0].note = ["kept"], "child"
    twin = duplicate(cache)
    assert (type(twin), twin.note, twin[0].note) == (class_, ["kept"], "child")
    before = leaves(cache.state)
    assert leaves(twin.state) == before
    feed(twin[0], 2)
    feed(twin[1][0], 7)
    twin[1][1][0] = mx.zeros((1, 3))
    assert leaves(cache.state) == before != leaves(twin.state)


def test_copies_keep_what_is_shared_inside():
    child = feed(KVCache(), 2)
    cache = CacheList(child, child)
    cache.itself = cache
    for deep in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert deep[0] is deep[1] is not child and deep.itself is deep


def test_a_deep_copy_shares_memory():
    cache = CacheList(feed(KVCache(), 4000), states(mx.ones((1, 100_000))))
    mx.eval(cache.state)
    before = active_memory()
    twin = copy.deepcopy(cache)
    mx.eval(twin.state)
    assert active_memory() == before


class Own(CacheList):
    def __init__(self, label):
        super().__init__(KVCache())
        self.label = label


def test_a_subclass_may_have_another_constructor():
    cache = Own("a")
    for twin in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (type(twin), twin.label, type(twin[0])) == (Own, "a", KVCache)
    cache.trim = lambda n: "spy"
    assert cache.trim(3) == "spy"


@pytest.mark.parametrize("way", ["attribute of a child", "child that is not ours", "attribute"])
def test_a_cycle_through_a_list_is_collected(way):
    child = Foreign() if way == "child that is not ours" else KVCache()
    cache = CacheList(child)
    (cache if way == "attribute" else child).owner = [cache]
    reference = weakref.ref(cache)
    del cache, child
    gc.collect()
    assert reference() is None


def test_lists_come_back_from_a_file(tmp_path):
    cache = filled()
    save_prompt_cache(tmp_path / "p", [cache, CacheList(), CacheList(ArraysCache(0), KVCache())])
    loaded = load_prompt_cache(tmp_path / "p")
    assert [type(c) for c in loaded] == [CacheList] * 3
    assert leaves(loaded[0][0].keys_and_values()) == leaves(cache[0].keys_and_values())
    assert leaves(loaded[0][1].state) == leaves(cache[1].state)
    assert (loaded[1].caches, [type(c) for c in loaded[2]]) == ((), [ArraysCache, KVCache])


def test_a_representation_shows_the_children():
    assert repr(CacheList(KVCache(), CacheList())) == "CacheList(KVCache(offset=0), CacheList())"


class Paired(TinyModel):
    """Two caches per layer, of which the second holds twice the values."""

    def attend(self, qkv, cache):
        h = super().attend(qkv, cache[0])
        return h + super().attend(qkv, cache[1])


def test_a_stopped_prefill_puts_all_children_back():
    model, tokens = Paired(), list(range(1, 20))

    def make():
        return [CacheList(KVCache(), RotatingKVCache(6)) for _ in range(2)]

    def run(caches, done):
        return leaves([mlxrs_py.prefill(model, tokens[done:], caches, step_size=4)])

    expected = run(make(), 0)
    for fatal in range(1, 24):
        caches, countdown = make(), iter(range(fatal))

        def stop(_layer, countdown=countdown):
            if next(countdown, None) is None:
                raise KeyboardInterrupt

        model.on_layer = stop
        with pytest.raises(KeyboardInterrupt):
            run(caches, 0)
        model.on_layer = lambda layer: None
        (done,) = {child.offset for cache in caches for child in cache}
        assert done in (0, 4, 8, 12, 16, 18) and run(caches, done) == expected


def test_a_registered_class_is_a_child_of_states_and_files(tmp_path):
    @register
    class ChildOfAList:
        def __init__(self, array):
            self.state = [array]

        @classmethod
        def from_state(cls, state):
            return cls(state[0])

    cache = CacheList(ChildOfAList(mx.ones((2,))), feed(KVCache(), 3))
    save_prompt_cache(tmp_path / "p", [cache])
    for twin in (CacheList.from_state(cache.state), *load_prompt_cache(tmp_path / "p")):
        assert [type(child) for child in twin] == [ChildOfAList, KVCache]
        assert leaves(twin[0].state) == leaves(cache[0].state)
