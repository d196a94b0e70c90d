"""``adopt`` and ``make_prompt_cache`` on mlx-lm's caches and models."""

import copy

import mlx.core as mx
import pytest

import mlxrs_py.cache as ours

from .reference import cache as theirs
from .reference import tiny_llama
from .twins import leaves

MAKERS = {
    "KVCache": theirs.KVCache,
    "RotatingKVCache": lambda: theirs.RotatingKVCache(8, keep=2),
    "QuantizedKVCache": lambda: theirs.QuantizedKVCache(32, bits=4),
    "ConcatenateKVCache": theirs.ConcatenateKVCache,
    "ChunkedKVCache": lambda: theirs.ChunkedKVCache(8),
}
every_class = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def feed(cache, *counts, dim=32):
    for n_tokens in counts:
        rows = mx.random.normal((1, 2, n_tokens, dim), key=mx.random.key(n_tokens))
        cache.update_and_fetch(rows, rows + 1)
    return cache


@every_class
def test_a_fresh_cache_is_replaced_by_ours_with_the_same_parameters(make):
    cache = make()
    (adopted,) = ours.adopt([cache])
    assert type(adopted) is getattr(ours, type(cache).__name__)
    assert leaves(adopted.state) == leaves(cache.state)
    assert adopted.empty()


@pytest.mark.parametrize("counts", [[3], [12], [12, 1], [1] * 11, [5, 4, 6, 1, 1, 3], [300, 1, 300]])
@every_class
def test_a_filled_cache_goes_on_bit_equal(make, counts):
    cache = feed(make(), *counts)
    (adopted,) = ours.adopt([cache])
    assert leaves(adopted.state) == leaves(cache.state)
    twin = copy.deepcopy(cache)
    for more in (1, 4, 1, 300, 1):
        assert leaves(feed(adopted, more).state) == leaves(feed(twin, more).state)


@every_class
def test_what_is_adopted_and_the_original_do_not_disturb_each_other(make):
    cache = feed(make(), 3, 1, 1, 1, 1, 1, 1)
    before = leaves(cache.state)
    (adopted,) = ours.adopt([cache])
    feed(adopted, 1, 1)
    assert leaves(cache.state) == before
    state = leaves(adopted.state)
    feed(cache, 1, 5)
    assert leaves(adopted.state) == state


def test_adopting_copies_no_buffer():
    cache = feed(theirs.KVCache(), 5000, dim=64)
    mx.eval(cache.state)
    before = mx.get_active_memory()
    (adopted,) = ours.adopt([cache])
    mx.eval(adopted.state)
    assert mx.get_active_memory() == before
    del cache
    mx.eval(feed(adopted, 1, dim=64).state)
    assert mx.get_active_memory() <= before + 4096


def test_lists_are_adopted_with_their_children():
    inner = theirs.CacheList(feed(theirs.KVCache(), 3), theirs.ArraysCache(2))
    outer = theirs.CacheList(inner, theirs.RotatingKVCache(8), theirs.ChunkedKVCache(8))
    (adopted,) = ours.adopt([outer])
    assert (type(adopted), type(adopted[0])) == (ours.CacheList, ours.CacheList)
    assert [type(c) for c in adopted[0].caches] == [ours.KVCache, ours.ArraysCache]
    assert [type(c) for c in adopted.caches[1:]] == [ours.RotatingKVCache, ours.ChunkedKVCache]
    assert (adopted[0][0].offset, adopted[1].max_size) == (3, 8)
    assert (adopted.size(), adopted.empty(), adopted.is_trimmable()) == (3, False, False)
    assert (adopted.nbytes, leaves(adopted.state)) == (inner[0].nbytes, leaves(outer.state))
    assert outer.caches[0] is inner and type(inner[0]) is theirs.KVCache


def test_subclasses_stay():
    class Own(theirs.KVCache):
        pass

    cache = Own()
    assert ours.adopt([cache])[0] is cache


def test_recurrent_states_are_adopted_with_their_padding():
    cache = theirs.ArraysCache(3, left_padding=[1, 0])
    cache[0], cache[2] = mx.ones((2, 3, 4)), mx.zeros((2, 5), dtype=mx.bfloat16)
    cache.prepare(lengths=[3, 4])
    (adopted,) = ours.adopt([cache])
    assert type(adopted) is ours.ArraysCache
    before = leaves(adopted.state)
    assert before == leaves(cache.state)
    # mlx-lm counts in the very arrays that it was given.
    cache.advance(1)
    assert leaves(adopted.state) == before


def test_a_step_of_an_instance_is_adopted():
    cache = theirs.KVCache()
    cache.step = 16
    (adopted,) = ours.adopt([cache])
    assert (adopted.step, feed(adopted, 3).keys.shape[2]) == (16, 16)


def test_a_cache_that_mlx_lm_has_corrupted_is_refused():
    cache = feed(theirs.RotatingKVCache(8), *[1] * 11)
    cache.trim(4)
    assert cache._idx == -1
    with pytest.raises(ValueError, match="_idx"):
        ours.adopt([cache])


def test_a_model_with_a_hook_gets_its_caches_adopted():
    model = tiny_llama(4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=12)
    assert [type(c) for c in model.make_cache()] == [theirs.RotatingKVCache, theirs.KVCache] * 2
    caches = ours.make_prompt_cache(model)
    assert [type(c) for c in caches] == [ours.RotatingKVCache, ours.KVCache] * 2
    assert [(c.max_size, c.keep) for c in caches[::2]] == [(12, 0)] * 2
    with pytest.warns(UserWarning, match="max_kv_size=7 is ignored: mlx_lm.models.llama makes its own caches"):
        assert [c.max_size for c in ours.make_prompt_cache(model, 7)[::2]] == [12, 12]


@pytest.mark.parametrize("max_kv_size", [None, 16])
def test_a_model_without_a_hook_gets_what_mlx_lm_gives_it(max_kv_size):
    class Plain:
        layers = (1, 2, 3)

    mine, other = (module.make_prompt_cache(Plain(), max_kv_size) for module in (ours, theirs))
    assert [type(c).__name__ for c in mine] == [type(c).__name__ for c in other]
    assert [leaves(c.state) for c in mine] == [leaves(c.state) for c in other]
