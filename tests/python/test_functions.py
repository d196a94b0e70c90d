"""The functions beside the classes: making, adopting, trimming, masks."""

import warnings

import pytest

from mlxrs_py.cache import (
    CacheConfig,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    adopt,
    can_trim_prompt_cache,
    create_attention_mask,
    make_prompt_cache,
    trim_prompt_cache,
)
from tiny import TinyModel, every_class, feed


class Hooked:
    """A model that makes its own caches."""

    layers = (1, 2, 3)

    def make_cache(self):
        return (KVCache(), RotatingKVCache(16))


class Foreign:
    """A cache of somebody else's."""

    offset = 7

    def __init__(self, trimmable=True):
        self.trimmable = trimmable

    def is_trimmable(self):
        return self.trimmable

    def trim(self, n):
        self.offset -= n
        return n


def test_a_model_without_a_hook_gets_one_cache_per_layer():
    assert [type(c) for c in make_prompt_cache(TinyModel(3))] == [KVCache] * 3


def test_a_bounded_cache_keeps_the_first_four_tokens():
    caches = make_prompt_cache(TinyModel(3), max_kv_size=16)
    assert [(type(c), c.max_size, c.keep) for c in caches] == [(RotatingKVCache, 16, 4)] * 3
    assert len({id(c) for c in caches}) == 3


@pytest.mark.parametrize("size", [0, 4])
def test_a_bound_that_leaves_no_room_is_refused(size):
    with pytest.raises(ValueError, match=rf"expected 0 <= keep < max_size, got max_size={size}, keep=4"):
        make_prompt_cache(TinyModel(), max_kv_size=size)


def test_a_model_with_a_hook_makes_its_own_caches():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caches = make_prompt_cache(Hooked())
    assert [type(c) for c in caches] == [KVCache, RotatingKVCache]


@pytest.mark.parametrize("size", [0, 16])
def test_one_warning_says_that_the_bound_is_ignored(size):
    with pytest.warns(UserWarning, match=f"max_kv_size={size} is ignored: .* makes its own caches") as caught:
        caches = make_prompt_cache(Hooked(), size)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert [c.max_size for c in caches[1:]] == [16]


def test_a_config_makes_caches_without_a_model():
    assert [type(c) for c in CacheConfig(2).make()] == [KVCache, KVCache]
    rings = CacheConfig(num_hidden_layers=3, sliding_window=32).make()
    assert [(type(c), c.max_size, c.keep) for c in rings] == [(RotatingKVCache, 32, 0)] * 3
    for config in (CacheConfig(2, 0), CacheConfig(-1), CacheConfig(1, -4)):
        with pytest.raises(ValueError, match="expected"):
            config.make()


@every_class
def test_our_caches_and_foreign_ones_stay_when_adopted(make):
    caches = (make(), Foreign(), feed(make(), 3))
    adopted = adopt(caches)
    assert type(adopted) is list
    assert all(a is b for a, b in zip(adopted, caches, strict=True))


def test_adopt_takes_any_iterable_and_nothing_else():
    assert adopt(iter([])) == []
    with pytest.raises(TypeError):
        adopt(3)


def test_a_namesake_of_another_module_is_not_adopted():
    namesake = type("KVCache", (Foreign,), {})()
    assert adopt([namesake]) == [namesake]


def test_all_caches_must_be_trimmable():
    full = feed(RotatingKVCache(2), 2)
    assert can_trim_prompt_cache([]) is True
    assert can_trim_prompt_cache([KVCache(), QuantizedKVCache(), ConcatenateKVCache(), RotatingKVCache(2)]) is True
    assert can_trim_prompt_cache([KVCache(), full]) is False
    assert can_trim_prompt_cache([Foreign(), Foreign(False)]) is False


def test_a_trim_takes_the_same_number_from_every_cache():
    caches = [feed(KVCache(), 5), feed(RotatingKVCache(8), 3), feed(QuantizedKVCache(32), 6), Foreign()]
    assert trim_prompt_cache(caches, 2) == 2
    assert [c.offset for c in caches] == [3, 1, 4, 5]
    assert trim_prompt_cache(caches, 4) == 1
    assert [c.offset for c in caches] == [2, 0, 3, 4]


def test_nothing_is_trimmed_if_one_cache_cannot_be():
    caches = [feed(KVCache(), 5), feed(RotatingKVCache(3), 5)]
    assert trim_prompt_cache(caches, 2) == 0
    assert [c.offset for c in caches] == [5, 5]
    assert trim_prompt_cache([], 2) == 0


def test_a_negative_trim_is_refused():
    caches = [feed(KVCache(), 5)]
    with pytest.raises(ValueError, match="expected num_tokens of at least 0, got -1"):
        trim_prompt_cache(caches, -1)
    assert caches[0].offset == 5


def test_the_mask_function_needs_all_four_arguments():
    assert create_attention_mask(1, 4, False, None) is None
    assert create_attention_mask(1, 4, True, None) is None
    assert create_attention_mask(3, 4, False, None) == "causal"
    assert create_attention_mask(N=2, offset=1, return_array=True, window_size=None).tolist() == [
        [True, True, False],
        [True, True, True],
    ]
    assert create_attention_mask(2, 1, False, 1).tolist() == [[False, True, False], [False, False, True]]
    assert create_attention_mask(1, 2, False, 0).tolist() == [[False, False, False]]
    with pytest.raises(TypeError):
        create_attention_mask(2, 0)
