"""What every cache is as a Python object: attributes, subclasses, copies, pickles, garbage."""

import copy
import gc
import inspect
import pickle
import subprocess
import sys
import weakref

import mlx.core as mx
import pytest

import mlxrs_py.cache
from mlxrs_py.cache import Cache, KVCache, QuantizedKVCache, RotatingKVCache
from tiny import COPIES, MAKERS, active_memory, every_class, feed, leaves, noise, raw


class Labelled(KVCache):
    """A subclass whose constructor takes other arguments than its base."""

    step = 32

    def __init__(self, label, *, width=1):
        super().__init__()
        self.label, self.width = label, width

    def update_and_fetch(self, keys, values):
        keys, values = super().update_and_fetch(keys, values)
        return keys, values + self.width


class Unprepared(RotatingKVCache):
    """A subclass that forgets its base's constructor."""

    def __init__(self):
        self.ready = True


@every_class
def test_no_class_of_mlx_lm_is_an_ancestor(make):
    *ancestors, base, root = type(make()).__mro__
    assert {c.__module__ for c in ancestors} == {"mlxrs_py.cache"}
    assert (base, root) == (Cache, object)


@every_class
def test_a_cache_is_always_true_and_has_no_length(make):
    cache = make()
    assert bool(cache) and not hasattr(cache, "__len__")


@every_class
def test_only_a_quantized_cache_has_bits(make):
    assert hasattr(make(), "bits") == hasattr(make(), "group_size") == ("Quantized" in type(make()).__name__)


@every_class
def test_every_array_that_comes_out_is_an_mlx_array(make):
    cache = make()
    seen = cache.update_and_fetch(noise(3), noise(3))
    state = [leaf for leaf in flat(cache.state) if not isinstance(leaf, int)]
    out = [*flat(seen), *flat(cache.keys), *flat(cache.values), *flat(cache.keys_and_values()), *state]
    assert {type(array) for array in out} == {mx.array}


def flat(tree):
    return [leaf for branch in tree for leaf in flat(branch)] if isinstance(tree, tuple) else [tree]


@every_class
def test_a_state_is_a_snapshot(make):
    cache = feed(make(), 3)
    state = cache.state
    before = leaves(state)
    feed(cache, 1, 2, 1, 1, 1, 1, 300)
    cache.trim(0)
    assert leaves(state) == before != leaves(cache.state)


@every_class
def test_what_an_update_returned_never_changes(make):
    cache = make()
    seen = [cache.update_and_fetch(noise(1, seed=i), noise(1, seed=i + 50)) for i in range(12)]
    before = [leaves(rows) for rows in seen]
    feed(cache, 1, 1, 1, 5, 1)
    assert [leaves(rows) for rows in seen] == before


@every_class
def test_a_state_that_is_put_back_undoes_updates(make):
    cache = feed(make(), 5, 1, 1, 1, 1)
    state = cache.state
    feed(cache, 4, 1, 1)
    cache.state = state
    assert leaves(cache.state) == leaves(state)
    assert leaves(feed(cache, 3, 1).state) == leaves(feed(feed(make(), 5, 1, 1, 1, 1), 3, 1).state)


@every_class
def test_a_cache_made_from_a_state_goes_on_bit_equal(make):
    cache = feed(make(), 5, 1, 1)
    twin = type(cache).from_state(cache.state)
    assert type(twin) is type(cache)
    assert leaves(twin.state) == leaves(cache.state)
    for counts in [(1,), (4,), (1, 1, 300)]:
        assert leaves(feed(twin, *counts).state) == leaves(feed(cache, *counts).state)


@every_class
def test_lists_are_as_good_as_tuples_in_a_state(make):
    cache = feed(make(), 5)
    state = [list(part) if isinstance(part, tuple) else part for part in cache.state]
    assert leaves(type(cache).from_state(state).state) == leaves(cache.state)


@every_class
def test_a_state_of_an_empty_cache_goes_round(make):
    cache = make()
    assert leaves(type(cache).from_state(cache.state).state) == leaves(cache.state)


@every_class
def test_a_state_that_does_not_fit_changes_nothing(make):
    cache = feed(make(), 3)
    before, good = leaves(cache.state), cache.state
    bad_states = [
        (),
        good[:-1],
        (*good, 1),
        (None, *good[1:]),
        (good[0], "values", *good[2:]),
        (*good[:2], *(-1 for _ in good[2:]), 7),
    ]
    if len(good) > 2:
        bad_states += [(*good[:2], 10**6, *good[3:]), (*good[:2], 1.5, *good[3:]), (*good[:2], None, *good[3:])]
    for state in bad_states:
        with pytest.raises(ValueError, match="state: expected"):
            cache.state = state
        assert leaves(cache.state) == before
    for state in (3, object(), {1: 2}, noise(1)):
        with pytest.raises((ValueError, TypeError), match="state: expected"):
            cache.state = state
        assert leaves(cache.state) == before


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@every_class
def test_a_copy_is_equal_and_goes_its_own_way(make, duplicate):
    cache = feed(make(), 3, 1, 1, 1, 1, 1)
    cache.note = ["kept"]
    before = leaves(cache.state)
    twin = duplicate(cache)
    assert type(twin) is type(cache) and twin is not cache
    assert (leaves(twin.state), twin.note) == (before, ["kept"])
    feed(twin, 1, 2)
    assert leaves(cache.state) == before != leaves(twin.state)
    assert leaves(feed(cache, 1, 2).state) == leaves(twin.state)


@every_class
def test_a_copy_shares_attributes_and_a_deep_copy_does_not(make):
    cache = make()
    cache.notes, cache.itself = [1], cache
    assert copy.copy(cache).notes is cache.notes
    deep = copy.deepcopy([cache, cache])
    assert deep[0] is deep[1] is deep[0].itself and deep[0] is not cache
    assert deep[0].notes == [1] and deep[0].notes is not cache.notes


def test_a_deep_copy_shares_memory_until_one_of_the_two_writes():
    cache = feed(KVCache(), 4000, heads=4, dim=64)
    mx.eval(cache.state)
    before = active_memory()
    twin = copy.deepcopy(cache)
    mx.eval(twin.state)
    assert active_memory() - before < 4096
    mx.eval(feed(twin, 1, heads=4, dim=64).state)
    grown = active_memory() - before
    assert 0.9 * cache.nbytes < grown < 1.2 * cache.nbytes
    again = active_memory()
    for _ in range(5):
        mx.eval(feed(twin, 1, heads=4, dim=64).state)
    assert active_memory() - again < 4096


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@every_class
def test_a_pickle_holds_state_and_attributes(make, dtype):
    cache = make()
    for n_tokens in (3, 1, 1, 1, 1, 1, 1):
        cache.update_and_fetch(noise(n_tokens).astype(dtype), noise(n_tokens, seed=1).astype(dtype))
    cache.note = ("kept", 1)
    cache.step = 64
    twin = pickle.loads(pickle.dumps(cache))
    assert (type(twin), twin.note, twin.step) == (type(cache), ("kept", 1), 64)
    assert leaves(twin.state) == leaves(cache.state)
    assert leaves(feed(twin, 300).state) == leaves(feed(cache, 300).state)


def test_a_subclass_may_have_another_constructor():
    cache = Labelled("a", width=5)
    keys, values = cache.update_and_fetch(noise(2), noise(2))
    assert raw(values) == raw(noise(2) + 5) and keys.shape[2] == 2
    assert cache.keys.shape[2] == 32
    for twin in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (type(twin), twin.label, twin.width) == (Labelled, "a", 5)
        assert leaves(twin.state) == leaves(cache.state)
    assert not hasattr(Labelled.from_state(cache.state), "label")


def test_a_subclass_that_skips_its_bases_constructor_is_refused_at_the_first_update_or_works():
    cache = Unprepared()
    assert cache.ready and cache.max_size == 1
    assert feed(cache, 1, 1).offset == 2


def test_constructors_refuse_what_they_do_not_know():
    for make in (lambda: KVCache(1), RotatingKVCache, lambda: QuantizedKVCache(size=3), lambda: RotatingKVCache("8")):
        with pytest.raises(TypeError):
            make()
    with pytest.raises(TypeError, match="use KVCache or another subclass"):
        Cache()


@pytest.mark.parametrize("name", ["KVCache", "QuantizedKVCache"])
def test_step_counts_on_the_class_a_subclass_and_an_instance(name):
    make = MAKERS[name]
    assert make().step == type(make()).step == 256

    class Wide(type(make())):
        step = 48

    def length(cache):
        keys = feed(cache, 3).keys
        return (keys[0] if isinstance(keys, tuple) else keys).shape[2]

    arguments = {"group_size": 32} if name == "QuantizedKVCache" else {}
    assert length(Wide(**arguments)) == 48
    cache = make()
    cache.step = 10
    assert (cache.step, type(cache).step, length(cache)) == (10, 256, 10)
    del cache.step
    assert cache.step == 256


@pytest.mark.parametrize(("step", "error"), [(0, ValueError), (-1, (ValueError, OverflowError)), ("8", TypeError)])
def test_a_step_that_is_none_is_refused(step, error):
    cache = KVCache()
    with pytest.raises(error):
        cache.step = step
    assert (cache.step, feed(cache, 1).keys.shape[2]) == (256, 256)


@every_class
def test_an_instance_attribute_stands_in_for_a_method(make):
    cache, calls = make(), []
    original = cache.update_and_fetch

    def spy(keys, values):
        calls.append(keys.shape[2])
        return original(keys, values)

    cache.update_and_fetch = spy
    feed(cache, 3, 1)
    assert (calls, cache.offset) == ([3, 1], 4)
    del cache.update_and_fetch
    assert (feed(cache, 1).offset, calls) == (5, [3, 1])


@every_class
def test_a_cache_can_be_referenced_weakly(make):
    cache = make()
    reference = weakref.ref(cache)
    assert reference() is cache
    del cache
    assert reference() is None


@every_class
def test_a_cycle_through_a_cache_is_collected(make):
    cache = feed(make(), 3)
    cache.itself = [cache]
    cache.update_and_fetch = lambda keys, values, owner=cache: owner
    reference = weakref.ref(cache)
    del cache
    gc.collect()
    assert reference() is None


@every_class
def test_memory_goes_when_the_cache_goes(make):
    gc.collect()
    before = active_memory()
    cache = feed(make(), 2000, 1, dim=64)
    mx.eval(cache.state)
    assert active_memory() > before
    del cache
    assert active_memory() == before


@every_class
def test_a_representation_names_class_offset_and_shape(make):
    cache = make()
    name = type(cache).__name__
    assert repr(cache) == f"{name}(offset=0)"
    assert repr(feed(cache, 3)).startswith(f"{name}(offset=3, keys=Array[1, 2, ")


def test_constructors_and_methods_take_the_arguments_of_mlx_lm():
    ring, quantized = RotatingKVCache(max_size=8, keep=2), QuantizedKVCache(group_size=32, bits=4)
    assert (ring.max_size, ring.keep) == (RotatingKVCache(8, 2).max_size, RotatingKVCache(8, 2).keep) == (8, 2)
    assert (quantized.group_size, quantized.bits) == (32, 4)
    assert RotatingKVCache(8).keep == 0
    assert str(inspect.signature(KVCache.to_quantized)) == "(self, /, group_size=64, bits=4)"
    assert str(inspect.signature(KVCache.update_and_fetch)) == "(self, /, keys, values)"
    assert str(inspect.signature(KVCache.trim)) == "(self, /, n)"
    assert str(inspect.signature(KVCache.make_mask)) == "(self, /, N, window_size=None, return_array=False)"


WITHOUT_MLX_LM = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mlx_lm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import mlxrs_py
import mlx.core as mx
from mlxrs_py.cache import *
rows = mx.ones((1, 1, 3, 32))
for cache in (KVCache(), RotatingKVCache(8), QuantizedKVCache(32), ConcatenateKVCache()):
    cache.update_and_fetch(rows, rows)
    assert cache.make_mask(2) == "causal"
save_prompt_cache(sys.argv[1], [cache])
assert load_prompt_cache(sys.argv[1])[0].offset == 3
assert adopt([cache])[0] is cache
print(mlxrs_py.prefill(lambda tokens, cache: mx.zeros((1, tokens.shape[1], 5)), [1, 2], [KVCache()]).shape)
assert not [name for name in sys.modules if name.startswith("mlx_lm")]
"""


def test_the_package_works_without_mlx_lm(tmp_path):
    command = [sys.executable, "-c", WITHOUT_MLX_LM, str(tmp_path / "cache.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "(1, 5)\n", "")


def test_names_are_those_of_mlx_lm():
    assert {
        "ArraysCache",
        "CacheList",
        "ChunkedKVCache",
        "ConcatenateKVCache",
        "KVCache",
        "QuantizedKVCache",
        "RotatingKVCache",
        "can_trim_prompt_cache",
        "create_attention_mask",
        "load_prompt_cache",
        "make_prompt_cache",
        "save_prompt_cache",
        "trim_prompt_cache",
    } <= set(mlxrs_py.cache.__all__)
    assert all(hasattr(mlxrs_py.cache, name) for name in mlxrs_py.cache.__all__)
