"""PromptTrie and LRUPromptCache beside mlx-lm's, and where they differ on purpose (docs/parity.md)."""

import copy
import gc
import weakref
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxrs_py.cache import LRUPromptCache, PromptTrie

from . import reference, twins

BOTH = pytest.mark.parametrize("ours", [True, False], ids=["ours", "mlx-lm"])
TYPES = ["assistant", "user", "system"]

#: Few different prompts, which share prefixes, so that much is found.
tokens = st.lists(st.integers(0, 1), max_size=5)
models = st.sampled_from("aaab")


class Stub:
    """A cache of a name and some bytes; equal if both are."""

    def __init__(self, name, n_bytes=1, trimmable=True, n_tokens=10**9):
        self.name, self.nbytes, self.trimmable, self.n_tokens = name, n_bytes, trimmable, n_tokens

    def __eq__(self, other):
        return vars(self) == vars(other)

    __hash__ = None

    def is_trimmable(self):
        return self.trimmable

    def trim(self, n):
        n = min(n, self.n_tokens)
        self.n_tokens -= n
        return n


def count(name, n_operations, **happened):
    counts = twins.COUNTS.setdefault(name, Counter(operations=0, sequences=0))
    counts.update(operations=n_operations, sequences=1, **happened)


many = settings(max_examples=4 * settings.default.max_examples)


class Refreshing(reference.cache.LRUPromptCache):
    """mlx-lm's, but for one thing: what is found counts as used last."""

    def fetch_nearest_cache(self, model, tokens):
        get, asked = self._trie.get, []
        self._trie.get = lambda model, tokens: asked.append(tokens) or get(model, tokens)
        found = super().fetch_nearest_cache(model, tokens)
        del self._trie.get
        if found[0] is not None:
            self._lru.remove(model, asked[-1])
            self._lru.push(model, asked[-1], get(model, asked[-1]).cache_type)
        return found


def outcome(call, *arguments, **keywords):
    try:
        return call(*arguments, **keywords)
    except KeyError:
        return KeyError


def lru(ours, **limits):
    return (LRUPromptCache if ours else reference.cache.LRUPromptCache)(**limits)


def trie(ours):
    return (PromptTrie if ours else reference.cache.PromptTrie)()


trie_steps = st.tuples(
    st.sampled_from(["add"] * 4 + ["get", "get", "pop", "pop", "pop_prefixes"] + ["search"] * 4), models, tokens
)


@many
@given(st.lists(trie_steps, min_size=25, max_size=60))
def test_a_trie_and_its_twin_agree(sequence):
    mine, theirs, stored, happened = trie(True), trie(False), set(), Counter()
    for turn, (name, model, query) in enumerate(sequence):
        arguments = (model, query, turn) if name == "add" else (model, query)
        if name == "pop_prefixes":
            if not any(m == model and list(s[: len(query)]) == query for m, s in stored):
                # Off the path mlx-lm raises too, but has taken some out.
                assert outcome(mine.pop_prefixes, model, query) is KeyError
                continue
            stored -= {(model, tuple(query[:n])) for n in range(len(query))}
        a, b = (outcome(getattr(one, name), *arguments) for one in (mine, theirs))
        happened[name if a is not KeyError else "KeyError"] += 1
        if name == "search":
            shorter = a.shorter if a.shorter and len(a.shorter) > 1 else None
            a, b = (
                (a.model, a.exact, shorter, a.longer, a.common_prefix),
                (b.model, b.exact, b.shorter, b.longer, b.common_prefix),
            )
        assert a == b
        if name == "add":
            stored.add((model, tuple(query)))
        elif name == "pop":
            stored.discard((model, tuple(query)))
    count("PromptTrie", len(sequence), **happened)


lru_steps = st.tuples(
    st.sampled_from(["insert"] * 4 + ["fetch"] * 5 + ["trim"]),
    models,
    tokens,
    st.tuples(st.integers(1, 4), st.booleans(), st.sampled_from(TYPES)),
    st.tuples(st.none() | st.integers(-1, 9), st.none() | st.integers(-1, 30)),
)


@many
@given(st.lists(lru_steps, min_size=25, max_size=60), st.integers(0, 9), st.integers(4, 30))
def test_an_lru_cache_and_its_twin_agree(sequence, max_size, max_bytes):
    mine, theirs, happened = LRUPromptCache(max_size, max_bytes), Refreshing(max_size, max_bytes), Counter()
    for turn, (name, model, query, (size, trimmable, cache_type), (n_sequences, n_bytes)) in enumerate(sequence):
        if name == "insert":
            # Two tokens at least: mlx-lm does not find a prefix of fewer.
            prompt = [0, *query] if query else [0, 0]
            for one in (mine, theirs):
                one.insert_cache(model, prompt[:], [Stub(turn, size, trimmable)], cache_type=cache_type)
        elif name == "fetch":
            prompt = [0, *query] if size > 1 else query
            hit = mine.fetch_nearest_cache(model, prompt)
            assert hit == theirs.fetch_nearest_cache(model, prompt)
            happened["miss" if hit[0] is None else "part" if hit[1] else "whole"] += 1
        else:
            for one in (mine, theirs):
                one.trim_to(n_sequences=n_sequences, n_bytes=n_bytes)
        assert (len(mine), mine.nbytes, mine.stats_by_type()) == (len(theirs), theirs.nbytes, theirs.stats_by_type())
    count("LRUPromptCache", len(sequence), **happened)


@BOTH
def test_a_hit_is_a_use(ours):
    cache = lru(ours, max_size=2)
    for query in ([1, 1], [2, 2]):
        cache.insert_cache("m", query, [Stub(0)])
    cache.fetch_nearest_cache("m", [1, 1])
    cache.insert_cache("m", [3, 3], [Stub(0)])
    assert (cache.fetch_nearest_cache("m", [1, 1])[0] is not None) == ours


@BOTH
def test_a_prefix_of_one_token_or_none_is_found(ours):
    for stored in ([], [1]):
        prefixes, cache = trie(ours), lru(ours)
        prefixes.add("m", stored, 0)
        assert prefixes.search("m", [1, 2]).shorter == (stored if ours else None)
        cache.insert_cache("m", stored, [Stub(0, trimmable=False)])
        assert (cache.fetch_nearest_cache("m", [1, 2])[0] is not None) == ours


@BOTH
def test_an_entry_larger_than_the_limit_is_refused_alone(ours):
    cache = lru(ours, max_bytes=10)
    cache.insert_cache("m", [1, 1], [Stub(0, 4)])
    cache.insert_cache("m", [2, 2], [Stub(0, 11)])
    assert (len(cache), cache.nbytes) == ((1, 4) if ours else (0, 0))


@BOTH
def test_bytes_are_counted_anew_when_a_cache_grew(ours):
    cache, stub = lru(ours, max_bytes=10), Stub(0, 4)
    cache.insert_cache("m", [1, 1], [stub])
    stub.nbytes = 7
    assert cache.nbytes == (7 if ours else 4)
    cache.insert_cache("m", [2, 2], [Stub(0, 4)])
    assert len(cache) == (1 if ours else 2)


@BOTH
def test_an_unknown_type_raises_before_anything_changes(ours):
    cache = lru(ours)
    with pytest.raises(KeyError):
        cache.insert_cache("m", [1, 1], [Stub(0, 4)], cache_type="tool")
    assert cache.nbytes == (0 if ours else 4)


@BOTH
def test_the_caller_may_change_its_tokens(ours):
    cache, mine = lru(ours, max_size=1), [1, 2]
    cache.insert_cache("m", mine, [Stub(0)])
    mine.append(3)
    if ours:
        cache.insert_cache("m", [5, 6], [Stub(0)])
        assert (len(cache), cache.nbytes) == (1, 1)
    else:
        with pytest.raises(KeyError):
            cache.insert_cache("m", [5, 6], [Stub(0)])


@BOTH
@pytest.mark.parametrize("form", [tuple, np.array, mx.array], ids=["tuple", "NumPy", "mlx"])
def test_tokens_may_be_tuples_and_arrays(ours, form):
    cache = lru(ours)
    cache.insert_cache("m", [1, 2, 3], [Stub(0)])
    if ours:
        assert list(np.array(cache.fetch_nearest_cache("m", form([1, 2, 9, 9]))[1])) == [9, 9]
    else:
        with pytest.raises((TypeError, ValueError)):
            cache.fetch_nearest_cache("m", form([1, 2, 9, 9]))


@BOTH
def test_layers_that_cannot_be_trimmed_alike_are_no_hit(ours):
    cache = lru(ours)
    cache.insert_cache("m", list(range(8)), [Stub(0), Stub(0, n_tokens=2)])
    caches, left = cache.fetch_nearest_cache("m", [0, 1, 9])
    if ours:
        assert (caches, left) == (None, [0, 1, 9])
    else:
        assert [c.n_tokens for c in caches] == [10**9 - 6, 0]


@BOTH
def test_prefixes_are_taken_out_all_or_none(ours):
    prefixes = trie(ours)
    for query in ([1], [1, 2, 3]):
        prefixes.add("m", query, 0)
    with pytest.raises(KeyError):
        prefixes.pop_prefixes("m", [1, 2, 9])
    assert outcome(prefixes.get, "m", [1]) == (0 if ours else KeyError)


@BOTH
def test_a_model_goes_with_its_last_value(ours):
    class Model:
        pass

    prefixes, model = trie(ours), Model()
    prefixes.add(model, [1], 0)
    prefixes.pop(model, [1])
    reference_to_it = weakref.ref(model)
    del model
    gc.collect()
    assert (reference_to_it() is None) == ours


@BOTH
def test_tokens_are_ints(ours):
    prefixes = trie(ours)
    if ours:
        with pytest.raises(TypeError):
            prefixes.add("m", ["a"], 0)
    else:
        assert prefixes.add("m", ["a"], 0) is None


@BOTH
def test_a_limit_that_is_set_holds_at_once(ours):
    cache = lru(ours)
    for query in ([1, 1], [2, 2], [3, 3]):
        cache.insert_cache("m", query, [Stub(0)])
    cache.max_size = 1
    assert len(cache) == (1 if ours else 3)


@BOTH
def test_a_copy_is_independent(ours):
    cache = lru(ours)
    cache.insert_cache("m", [1, 1], [Stub(0)])
    copy.copy(cache).trim_to(n_sequences=0)
    assert len(cache) == (1 if ours else 0)


@BOTH
def test_the_inner_parts_are_not_to_be_reached(ours):
    cache = lru(ours)
    assert [hasattr(cache, name) for name in ("CacheEntry", "CacheOrder", "_trie", "_lru")] == [not ours] * 4
