"""LRUPromptCache: what is found for a prompt, what stays under the limits, and what goes."""

import copy
import gc
import pickle
import threading
import weakref

import mlx.core as mx
import numpy as np
import pytest

from mlxrs_py.cache import KVCache, LRUPromptCache, RotatingKVCache
from tiny import active_memory, feed, leaves


class Stub:
    """A cache of some bytes and tokens that does nothing."""

    def __init__(self, n_bytes=1, *, trimmable=True, n_tokens=10**9):
        self.n_bytes, self.trimmable, self.n_tokens = n_bytes, trimmable, n_tokens

    @property
    def nbytes(self):
        return self.n_bytes

    def is_trimmable(self):
        return self.trimmable

    def trim(self, n):
        n = min(n, self.n_tokens)
        self.n_tokens -= n
        return n


class Model:
    pass


def kv(n_tokens, **shape):
    return [feed(KVCache(), n_tokens, **shape)]


def filled(*sequences, n_bytes=1, cache_type="assistant", **limits):
    cache = LRUPromptCache(**limits)
    for tokens in sequences:
        cache.insert_cache("m", tokens, [Stub(n_bytes)], cache_type=cache_type)
    return cache


def held(cache, *sequences, model="m"):
    """Give those that are stored, without using them."""
    twin = copy.copy(cache)
    return [tokens for tokens in sequences if twin.fetch_nearest_cache(model, tokens)[1] == []]


@pytest.mark.parametrize(
    ("query", "offset", "rest"),
    [
        ([1, 2, 3, 4, 5], 5, []),
        ([1, 2, 3, 4, 5, 6], 5, [6]),
        ([1, 2, 3], 2, [3]),
        ([1, 2, 9, 9], 2, [9, 9]),
        ([1], 0, [1]),
    ],
)
def test_a_stored_prompt_serves_what_it_has_in_common(query, offset, rest):
    cache = LRUPromptCache()
    cache.insert_cache("m", [1, 2, 3, 4, 5], kv(5))
    caches, left = cache.fetch_nearest_cache("m", query)
    assert (caches[0].offset, left) == (offset, rest)


@pytest.mark.parametrize(("model", "query"), [("m", [7]), ("m", []), ("other", [1, 2])])
def test_what_is_not_there_is_none_and_the_tokens_themselves(model, query):
    cache = filled([1, 2])
    caches, left = cache.fetch_nearest_cache(model, query)
    assert caches is None and left is query


def test_a_prefix_of_one_token_is_found():
    for trimmable in (True, False):
        cache = LRUPromptCache()
        cache.insert_cache("m", [1], [Stub(trimmable=trimmable)])
        assert cache.fetch_nearest_cache("m", [1, 2])[1] == [2]


def test_a_cache_of_no_tokens_serves_every_prompt_that_nothing_else_does():
    cache = filled([])
    assert cache.fetch_nearest_cache("m", [])[0] is not None
    caches, left = cache.fetch_nearest_cache("m", [1, 2])
    assert (type(caches[0]), left) == (Stub, [1, 2])


@pytest.mark.parametrize("form", [list, tuple, np.array, lambda t: mx.array(t, mx.int32)])
def test_the_tokens_left_have_the_form_of_those_that_were_given(form):
    cache = filled([1, 2, 3])
    for query, expected in (([1, 2, 3], []), ([1, 2, 3, 4, 5], [4, 5]), ([1, 9], [9]), ([7], [7])):
        left = cache.fetch_nearest_cache("m", form(query))[1]
        assert type(left) is type(form(query)) and list(np.array(left)) == expected
    cache.insert_cache("m", form([1, 2, 3]), [Stub()])
    assert len(cache) == 1


def test_what_cannot_be_trimmed_serves_only_as_a_prefix():
    cache = LRUPromptCache()
    cache.insert_cache("m", [1, 2], [Stub(trimmable=False)])
    assert cache.fetch_nearest_cache("m", [1, 9]) == (None, [1, 9])
    assert cache.fetch_nearest_cache("m", [1, 2, 3])[1] == [3]
    cache.insert_cache("m", [1, 2, 3, 4], [Stub(trimmable=False)])
    assert (len(cache), cache.fetch_nearest_cache("m", [1, 2, 3])[1]) == (2, [3])


def test_a_full_ring_is_not_trimmed():
    cache = LRUPromptCache()
    cache.insert_cache("m", range(9), [feed(RotatingKVCache(8), 9)])
    assert cache.fetch_nearest_cache("m", [0, 1, 2])[0] is None


def test_layers_that_cannot_be_trimmed_alike_are_no_hit():
    cache = LRUPromptCache()
    cache.insert_cache("m", [1, 2, 3, 4], [Stub(), Stub(n_tokens=1)])
    assert cache.fetch_nearest_cache("m", [1, 2]) == (None, [1, 2])
    cache.insert_cache("m", [1], [Stub()])
    assert cache.fetch_nearest_cache("m", [1, 2, 9])[1] == [2, 9]


def test_a_hit_shares_memory_until_it_is_written_and_then_only_what_is_written_is_new():
    caches = [*kv(200, dim=64), *kv(200, dim=64)]
    mx.eval([c.state for c in caches])
    n_bytes = caches[0].nbytes
    cache = LRUPromptCache()
    cache.insert_cache("m", range(200), caches)
    before = active_memory()
    hit, left = cache.fetch_nearest_cache("m", range(200))
    mx.eval([c.state for c in hit])
    assert (len(left), active_memory()) == (0, before)
    row = mx.ones((1, 2, 1, 64))
    mx.eval(row)
    written = active_memory()
    hit[0].update_and_fetch(row, row)
    mx.eval(hit[0].keys, hit[0].values)
    assert active_memory() - written == n_bytes
    assert (caches[0].offset, hit[0].offset) == (200, 201)


def test_a_hit_may_be_used_without_harm_to_what_is_stored():
    stored = kv(5)
    before = leaves(stored[0].state)
    cache = LRUPromptCache()
    cache.insert_cache("m", [1, 2, 3, 4, 5], stored)
    for query in ([1, 2, 3, 4, 5], [1, 2], [1, 2, 3, 4, 5, 6]):
        hit, left = cache.fetch_nearest_cache("m", query)
        feed(hit[0], len(left) + 300)
        assert leaves(stored[0].state) == before


def test_a_longer_prompt_replaces_its_prefixes_unless_it_cannot_be_trimmed():
    cache = filled([], [1], [1, 2], [1, 2, 3])
    assert (len(cache), cache.nbytes) == (1, 1)
    cache.insert_cache("m", [1, 2, 3, 4], [Stub(trimmable=False)])
    cache.insert_cache("m", [1, 2], [Stub()])
    assert held(cache, [1, 2], [1, 2, 3], [1, 2, 3, 4]) == [[1, 2], [1, 2, 3], [1, 2, 3, 4]]


def test_equal_tokens_replace_the_entry_and_its_type():
    cache = filled([1, 2], n_bytes=5)
    cache.insert_cache("m", [1, 2], [Stub(3)], cache_type="system")
    assert (len(cache), cache.nbytes) == (1, 3)
    assert cache.stats_by_type() == {
        "assistant": {"n_sequences": 0, "n_bytes": 0},
        "user": {"n_sequences": 0, "n_bytes": 0},
        "system": {"n_sequences": 1, "n_bytes": 3},
    }


def test_what_was_used_last_stays():
    for query in ([1, 1], [1, 1, 5], [1], [1, 7]):
        cache = filled([1, 1], [2, 2], [3, 3], max_size=3)
        assert cache.fetch_nearest_cache("m", query)[0] is not None
        cache.insert_cache("m", [4, 4], [Stub()])
        assert held(cache, [1, 1], [2, 2], [3, 3]) == [[1, 1], [3, 3]], query


@pytest.mark.parametrize(("types", "order"), [("aauus", "auaus"), ("auuuss", "uuasus")])
def test_types_go_in_their_order(types, order):
    names = {"a": "assistant", "u": "user", "s": "system"}
    cache, gone = LRUPromptCache(), ""
    for number, kind in enumerate(types):
        cache.insert_cache("m", [number, number], [Stub()], cache_type=names[kind])
    while len(cache):
        before = cache.stats_by_type()
        cache.trim_to(n_sequences=len(cache) - 1)
        after = cache.stats_by_type()
        gone += next(k for k, name in names.items() if before[name] != after[name])
    assert gone == order


def test_limits_hold_after_an_insertion():
    cache = filled([1, 1], [2, 2], [3, 3], [4, 4], n_bytes=3, max_bytes=10)
    assert (len(cache), cache.nbytes) == (3, 9)
    cache = filled([1, 1], [2, 2], [3, 3], max_size=2)
    assert held(cache, [1, 1], [2, 2], [3, 3]) == [[2, 2], [3, 3]]


@pytest.mark.parametrize("limits", [{"max_size": 0}, {"max_size": -3}, {"max_bytes": 0}, {"max_bytes": -1}])
def test_where_there_is_no_room_nothing_is_stored(limits):
    cache = filled([1, 1], **limits)
    assert (len(cache), cache.nbytes) == (0, 0)


def test_an_entry_larger_than_the_limit_is_refused_alone():
    cache = filled([1], [2, 2], n_bytes=4, max_bytes=10)
    big = [Stub(6), Stub(5)]
    reference = weakref.ref(big[0])
    cache.insert_cache("m", [1, 5], big)
    del big
    assert held(cache, [1], [2, 2], [1, 5]) == [[1], [2, 2]]
    assert (cache.nbytes, reference()) == (8, None)


def test_bytes_are_counted_anew_when_a_stored_cache_grew():
    caches = kv(10)
    cache = LRUPromptCache()
    cache.insert_cache("m", [1, 2], caches)
    assert cache.nbytes == caches[0].nbytes
    feed(caches[0], 1000)
    assert cache.nbytes == cache.stats_by_type()["assistant"]["n_bytes"] == caches[0].nbytes


@pytest.mark.parametrize(
    "look",
    [
        lambda cache: cache.nbytes,
        lambda cache: cache.stats_by_type(),
        lambda cache: cache.trim_to(),
        lambda cache: cache.insert_cache("m", [1, 1], [Stub(4)]),
        lambda cache: cache.fetch_nearest_cache("m", [3, 3]),
        lambda cache: setattr(cache, "max_bytes", 12),
    ],
)
def test_limits_hold_when_a_stored_cache_grew(look):
    cache, growing = LRUPromptCache(max_bytes=12), Stub(4)
    for tokens, stub in (([1, 1], Stub(4)), ([2, 2], Stub(4)), ([3, 3], growing)):
        cache.insert_cache("m", tokens, [stub])
    growing.n_bytes = 8
    look(cache)
    assert (len(cache), cache.nbytes) == (2, 12)
    growing.n_bytes = 13
    look(cache)
    assert held(cache, [3, 3]) == [] and len(cache) >= 1


def test_trim_to_takes_out_down_to_both_numbers():
    cache = filled([1, 1], [2, 2], [3, 3], [4, 4], n_bytes=3)
    cache.trim_to()
    assert len(cache) == 4
    cache.trim_to(n_bytes=7)
    assert (len(cache), cache.nbytes) == (2, 6)
    cache.trim_to(n_sequences=1, n_bytes=100)
    assert held(cache, [3, 3], [4, 4]) == [[4, 4]]
    cache.trim_to(n_sequences=-5)
    assert (len(cache), cache.nbytes) == (0, 0)


def test_limits_can_be_set_and_hold_at_once():
    cache = filled([1, 1], [2, 2], [3, 3], n_bytes=3)
    assert (cache.max_size, cache.max_bytes) == (10, 1 << 63)
    cache.max_size = 2
    assert (len(cache), cache.max_size) == (2, 2)
    cache.max_bytes = 5
    assert (len(cache), cache.max_bytes) == (1, 5)
    cache.max_bytes = 10**30
    assert cache.max_bytes == 2**64 - 1
    for wrong in ("3", None, 1.5):
        with pytest.raises(TypeError):
            cache.max_size = wrong


def test_the_callers_list_of_tokens_is_not_kept():
    cache, tokens = LRUPromptCache(max_size=1), [1, 2]
    cache.insert_cache("m", tokens, [Stub(3)])
    tokens.clear()
    cache.insert_cache("m", [5, 6], [Stub(4)])
    assert (cache.nbytes, held(cache, [5, 6])) == (4, [[5, 6]])


@pytest.mark.parametrize("cache_type", ["Assistant", "", None, 3, []])
def test_an_unknown_type_raises_before_anything_changes(cache_type):
    cache = filled([1], n_bytes=3)
    with pytest.raises(KeyError) as caught:
        cache.insert_cache("m", [1, 2], [Stub(5)], cache_type=cache_type)
    assert caught.value.args == (cache_type,)
    assert (len(cache), cache.nbytes, held(cache, [1])) == (1, 3, [[1]])


class Failing(Stub):
    """Fails where it is told to."""

    fails = ""

    def __deepcopy__(self, memo):
        if self.fails == "deepcopy":
            raise ZeroDivisionError
        return copy.copy(self)

    @property
    def nbytes(self):
        return 1 // 0 if self.fails == "nbytes" else self.n_bytes

    def is_trimmable(self):
        return 1 // 0 if self.fails == "is_trimmable" else True

    def trim(self, n):
        return 1 // 0 if self.fails == "trim" else n


@pytest.mark.parametrize("fails", ["nbytes", "is_trimmable", "deepcopy", "trim"])
def test_a_cache_that_raises_leaves_all_as_it_was(fails):
    cache, stored, new = LRUPromptCache(max_size=2), Failing(3), Failing(3)
    cache.insert_cache("m", [1, 2], [stored])
    cache.insert_cache("m", [5, 5], [Stub(3)])
    stored.fails = new.fails = fails
    if fails in ("nbytes", "is_trimmable"):
        for tokens in ([1, 2], [1, 2, 3], [6]):
            with pytest.raises(ZeroDivisionError):
                cache.insert_cache("m", tokens, [new])
    with pytest.raises(ZeroDivisionError):
        cache.fetch_nearest_cache("m", [1, 9])
    if fails == "nbytes":
        for look in (cache.stats_by_type, cache.trim_to, lambda: cache.nbytes):
            with pytest.raises(ZeroDivisionError):
                look()
    stored.fails = ""
    assert (len(cache), cache.nbytes) == (2, 6)
    # The failed fetch was no use: the entry is still the next to go.
    cache.insert_cache("m", [6], [Stub()])
    assert held(cache, [1, 2], [5, 5], [6]) == [[5, 5], [6]]


def test_callbacks_and_destructors_may_use_the_cache():
    cache, seen = LRUPromptCache(max_size=1), []

    class Meddler(Stub):
        @property
        def nbytes(self):
            seen.append(len(cache))
            cache.fetch_nearest_cache("other", [1])
            return 1

        def __del__(self):
            seen.append(len(cache))

    cache.insert_cache("m", [1], [Meddler()])
    cache.insert_cache("m", [2], [Stub()])
    assert len(seen) >= 3 and held(cache, [2]) == [[2]]


def test_threads_may_share_a_cache():
    cache, errors = LRUPromptCache(max_size=5, max_bytes=12), []

    def work(seed):
        try:
            for turn in range(200):
                tokens = [turn % 3, seed % 2, turn % 7]
                cache.insert_cache(("m", turn % 2), tokens, [Stub(1 + turn % 4)])
                hit, left = cache.fetch_nearest_cache(("m", turn % 2), [*tokens, 9])
                assert hit is None or len(left) < 4
                assert cache.nbytes <= 12 and len(cache) <= 5
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    cache.trim_to(n_sequences=0)
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_model_goes_with_its_last_entry():
    cache, model = LRUPromptCache(max_size=1), Model()
    reference = weakref.ref(model)
    cache.insert_cache(model, [1], [Stub()])
    del model
    assert reference() is not None
    cache.insert_cache("m", [1], [Stub()])
    assert reference() is None


def test_a_refused_entry_leaves_no_model_behind():
    model = Model()
    reference = weakref.ref(model)
    cache = filled([1], max_bytes=3)
    cache.insert_cache(model, [1], [Stub(4)])
    del model
    assert (reference(), len(cache)) == (None, 1)


def test_a_cycle_through_stored_caches_is_collected():
    cache = LRUPromptCache()
    stub = Stub()
    stub.owner = cache
    cache.insert_cache("m", [1], [stub])
    cache.itself = cache
    reference = weakref.ref(cache)
    del cache, stub
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_the_same_entries_limits_and_order(duplicate):
    cache = filled([1, 1], [2, 2], [3, 3], n_bytes=2, max_size=3, max_bytes=50)
    cache.insert_cache("m", [4, 4], [Stub(7)], cache_type="system")
    cache.label = "mine"
    cache.fetch_nearest_cache("m", [2, 2])
    twin = duplicate(cache)
    assert (twin.max_size, twin.max_bytes, twin.label) == (3, 50, "mine")
    assert twin.stats_by_type() == cache.stats_by_type()
    for one in (cache, twin):
        one.trim_to(n_sequences=2)
        assert held(one, [1, 1], [2, 2], [3, 3], [4, 4]) == [[2, 2], [4, 4]]


def test_a_subclass_has_its_own_constructor():
    class Named(LRUPromptCache):
        def __init__(self, name):
            super().__init__(max_size=1)
            self.name = name

    cache = Named("mine")
    for tokens in ([1], [2]):
        cache.insert_cache("m", tokens, [Stub()])
    assert (cache.name, len(cache)) == ("mine", 1)


def test_arguments_are_those_of_mlx_lm():
    cache = LRUPromptCache(2, 30)
    assert (cache.max_size, cache.max_bytes) == (2, 30)
    with pytest.raises(TypeError):
        cache.insert_cache("m", [1], [Stub()], "user")
    with pytest.raises(TypeError):
        cache.trim_to(1)
    with pytest.raises(TypeError):
        LRUPromptCache(size=3)
