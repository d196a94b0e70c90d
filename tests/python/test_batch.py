"""``BatchKVCache``, ``BatchRotatingKVCache``, ``BatchQuantizedKVCache``: sequences, each with its own tokens."""

import copy
import pickle

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrs_py.cache import (
    BatchKVCache,
    BatchQuantizedKVCache,
    BatchRotatingKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from tiny import TinyModel, held, leaves, noise

BATCHES = {
    "BatchKVCache": lambda padding: BatchKVCache(padding),
    "BatchRotatingKVCache": lambda padding: BatchRotatingKVCache(6, padding),
    "BatchQuantizedKVCache": lambda padding: BatchQuantizedKVCache(padding, group_size=32, bits=8),
}
every_batch = pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
SINGLES = {
    "KVCache": KVCache,
    "RotatingKVCache": lambda: RotatingKVCache(6),
    "QuantizedKVCache": lambda: QuantizedKVCache(group_size=32, bits=8),
}
every_single = pytest.mark.parametrize("make", SINGLES.values(), ids=SINGLES)


def columns(sequences):
    """Rows ``(B, 1, n, 2)`` that hold the given numbers, one list per sequence."""
    array = mx.array(sequences, dtype=mx.float32)[:, None, :, None]
    return mx.concatenate([array, array], axis=3)


def feed(cache, sequences):
    cache.update_and_fetch(columns(sequences), columns(sequences) + 1000)


def single(tokens, make=KVCache):
    cache = make()
    if tokens:
        feed(cache, [tokens])
    return cache


@given(st.data(), st.sampled_from(["grow", "ring"]))
def test_every_sequence_keeps_its_own_tokens(data, kind):
    """Sequences are filtered, joined, extracted and go on in batches; a list of numbers stands for each."""
    make = KVCache if kind == "grow" else lambda: RotatingKVCache(6)
    numbers = iter(range(10**6))
    take = lambda n: [next(numbers) for _ in range(n)]  # noqa: E731

    def merged():
        known = [take(n) for n in data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))]
        return known, type(make()).merge([single(tokens, make) for tokens in known])

    known, batch = merged()
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["step", "prompt", "filter", "extend", "rebuild"]))
        if action == "step":
            new = [take(1) for _ in known]
            feed(batch, new)
            known = [old + more for old, more in zip(known, new, strict=True)]
        elif action == "prompt":
            new = [take(data.draw(st.integers(0, 5))) for _ in known]
            longest = max(2, *map(len, new))
            padding = [longest - len(tokens) for tokens in new]
            batch.prepare(lengths=[len(tokens) for tokens in new], right_padding=padding)
            feed(batch, [tokens + [-1] * n for tokens, n in zip(new, padding, strict=True)])
            batch.finalize()
            known = [old + more for old, more in zip(known, new, strict=True)]
        elif action == "filter":
            places = data.draw(st.lists(st.integers(0, len(known) - 1), min_size=1, max_size=4))
            batch.filter(places)
            known = [known[place] for place in places]
        elif action == "extend":
            more, other = merged()
            batch.extend(other)
            known += more
        elif not batch.empty():
            batch = type(make()).merge([batch.extract(place) for place in range(len(known))])
        assert batch.offset.tolist() == [len(tokens) for tokens in known]
        for place, tokens in enumerate(known if not batch.empty() else []):
            one = batch.extract(place)
            assert one.offset == len(tokens)
            # A ring shows at least what the next token may see.
            newest = tokens if kind == "grow" else tokens[-5:]
            keys, values = one.keys_and_values()
            assert held(keys)[len(held(keys)) - len(newest) :] == newest
            assert held(values)[len(held(values)) - len(newest) :] == [number + 1000 for number in newest]


@every_batch
def test_a_mask_hides_padding_and_what_comes_later(make):
    cache = make([2, 0])
    assert cache.make_mask(3).tolist() == [
        [[[False] * 3, [False] * 3, [False, False, True]]],
        [[[True, False, False], [True, True, False], [True] * 3]],
    ]
    cache.update_and_fetch(noise(3, batch=2), noise(3, batch=2))
    assert cache.make_mask(1, window_size=2).tolist() == [[[[False, False, True, True]]]] * 2
    assert cache.make_mask(1, return_array=False).shape == (2, 1, 1, 4)


@every_batch
def test_numbers_may_be_lists_numpy_or_mlx_arrays(make):
    states = []
    for form in (list, tuple, np.array, mx.array, iter):
        cache = make(form([0, 1, 2]))
        cache.prepare(left_padding=form([1, 1, 1]))
        cache.update_and_fetch(noise(5, batch=3), noise(5, batch=3))
        cache.filter(form([2, 0]))
        cache.prepare(lengths=form([2, 1]), right_padding=form([0, 1]))
        cache.update_and_fetch(noise(2, batch=2), noise(2, batch=2))
        cache.finalize()
        states.append(leaves(cache.state))
    assert all(state == states[0] for state in states)
    for wrong, error in ((3, TypeError), ([0.5], TypeError), (mx.array([0.5]), ValueError), ("ab", TypeError)):
        with pytest.raises(error):
            cache.filter(wrong)
    assert leaves(cache.state) == states[0]


@every_batch
def test_numbers_can_be_assigned(make):
    cache = make([1, 0])
    cache.update_and_fetch(noise(3, batch=2), noise(3, batch=2))
    cache.offset = cache.offset + 4
    cache.left_padding -= 1
    assert (cache.offset.tolist(), cache.left_padding.tolist()) == ([6, 7], [0, -1])
    assert (cache.offset.dtype, cache.left_padding.dtype) == (mx.int32, mx.int32)
    for wrong in ([1], mx.array([[1, 2]]), [2**40, 0], mx.array([2**40, 0])):
        with pytest.raises((ValueError, OverflowError)):
            cache.offset = wrong
    assert cache.offset.tolist() == [6, 7]


def test_the_position_of_a_ring_can_be_assigned_and_is_checked_at_the_next_update():
    cache = BatchRotatingKVCache(4, [0])
    cache.update_and_fetch(noise(3), noise(3))
    for name, value in [("max_size", 0), ("_idx", 2), ("_offset", 9), ("rotated", True)]:
        good = getattr(cache, name)
        setattr(cache, name, value)
        with pytest.raises(ValueError, match=r"BatchRotatingKVCache.update_and_fetch: expected"):
            cache.update_and_fetch(noise(1), noise(1))
        setattr(cache, name, good)
    cache.update_and_fetch(noise(1), noise(1))
    assert (cache._offset, cache._idx, cache.rotated) == (4, 4, False)
    plain = BatchKVCache([0])
    plain.update_and_fetch(noise(3), noise(3))
    plain._idx = 999
    with pytest.raises(ValueError, match="at least 999 rows"):
        plain.update_and_fetch(noise(1), noise(1))


@every_batch
def test_what_was_announced_goes_with_a_copy_and_a_pickle(make):
    cache = make([0, 0])
    cache.prepare(lengths=[3, 1], right_padding=[0, 2])
    cache.update_and_fetch(noise(2, batch=2), noise(2, batch=2))
    twins = [copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    for twin in (cache, *twins):
        twin.update_and_fetch(noise(1, batch=2), noise(1, batch=2))
        twin.finalize()
        assert (twin.offset.tolist(), twin.left_padding.tolist()) == ([3, 1], [0, 2])
        assert leaves(twin.state) == leaves(cache.state)
    assert vars(twins[2]) == {}


@every_batch
def test_a_batch_in_a_file_comes_back(make, tmp_path):
    cache = make([1, 0])
    for n_columns in (5, 1, 1, 1):
        cache.update_and_fetch(noise(n_columns, batch=2), noise(n_columns, batch=2))
    formats = ["0.32"] if "Quantized" in type(cache).__name__ else ["0.32", "0.31"]
    for layout in formats:
        save_prompt_cache(tmp_path / "p.safetensors", [cache, make([2])], format=layout)
        loaded, empty = load_prompt_cache(tmp_path / "p.safetensors")
        assert type(loaded) is type(empty) is type(cache)
        assert leaves(loaded.keys_and_values()) == leaves(cache.keys_and_values())
        assert (loaded.offset.tolist(), empty.offset.tolist(), empty.left_padding.tolist()) == ([7, 8], [-2], [2])
        assert leaves(loaded.make_mask(2)) == leaves(cache.make_mask(2))
    if "Quantized" in type(cache).__name__:
        with pytest.raises(ValueError, match=r"format 0\.31"):
            save_prompt_cache(tmp_path / "q.safetensors", [cache], format="0.31")


@every_single
def test_a_merge_of_subclasses_and_empty_caches(make):
    class Own(type(make())):
        pass

    full = make()
    full.update_and_fetch(noise(3), noise(3))
    own = Own.from_state(full.state)
    batch = own.merge([own, make(), full])
    assert type(batch).__name__ == f"Batch{type(full).__name__}"
    assert (batch.offset.tolist(), batch.left_padding.tolist(), batch.size()) == ([3, 0, 3], [0, 3, 0], 3)
    assert leaves(batch.extract(0).keys_and_values()) == leaves(full.keys_and_values())
    assert batch.extract(1).offset == 0
    empty = type(full).merge([make(), make()])
    assert (empty.empty(), empty.offset.tolist(), empty.left_padding.tolist()) == (True, [0, 0], [0, 0])
    subclass = type("Batch", (type(batch),), {"step": 32})
    grown = subclass.merge([make(), make()])
    assert (type(grown), grown.step) == (subclass, 32)
    assert grown.offset.tolist() == [0, 0]


def test_a_merge_takes_caches_of_one_sequence():
    two = KVCache()
    two.update_and_fetch(noise(3, batch=2), noise(3, batch=2))
    with pytest.raises(ValueError, match="caches of one sequence each"):
        KVCache.merge([two])
    for wrong in ([object()], [None], 3, [BatchKVCache([0])]):
        with pytest.raises(TypeError):
            KVCache.merge(wrong)
    with pytest.raises(TypeError, match="caches that form a BatchRotatingKVCache, got BatchKVCache"):
        BatchRotatingKVCache.merge([KVCache()])


def test_a_batch_joined_with_itself_is_there_twice():
    cache = single([1, 2]).merge([single([1, 2]), single([3])])
    cache.extend(cache)
    assert [held(cache.extract(place).keys) for place in range(4)] == [[1, 2], [3], [1, 2], [3]]


@pytest.mark.parametrize("arguments", [([-1],), ([0], 48, 8), ([0], 32, 7)])
def test_a_batch_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        BatchQuantizedKVCache(*arguments)
    for size in (0, -1):
        with pytest.raises(ValueError, match="max_size of at least"):
            BatchRotatingKVCache(size, [0])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rows_of_a_quantized_batch_are_moved_and_not_quantized_again(bits):
    singles = [QuantizedKVCache(group_size=32, bits=bits) for _ in range(3)]
    for n_tokens, cache in zip((4, 1, 3), singles, strict=True):
        cache.update_and_fetch(noise(n_tokens, dim=64, seed=n_tokens), noise(n_tokens, seed=n_tokens + 9))
    batch = QuantizedKVCache.merge(singles)
    batch.extend(QuantizedKVCache.merge(singles[:1]))
    batch.filter([2, 1, 3])
    for at, cache in enumerate((singles[2], singles[1], singles[0])):
        assert leaves(batch.extract(at).keys_and_values()) == leaves(cache.keys_and_values())


@every_single
def test_a_batch_of_a_model_says_what_each_sequence_says_alone(make):
    model, prompts = TinyModel(), [[5, 9, 1], [7], [3, 3, 8, 2]]
    alone, caches = [], []
    for prompt in prompts:
        own = [make(), make()]
        model(mx.array([prompt]), cache=own)
        caches.append(own)
        alone.append([copy.copy(cache) for cache in own])
    batch = [type(layer[0]).merge(list(layer)) for layer in zip(*caches, strict=True)]
    for _ in range(4):
        tokens = [11, 12, 13]
        together = model(mx.array(tokens)[:, None], cache=batch)
        for at, (token, own) in enumerate(zip(tokens, alone, strict=True)):
            one = model(mx.array([[token]]), cache=own)
            assert mx.allclose(one[0], together[at], atol=1e-4).item()
