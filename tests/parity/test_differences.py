"""Where we differ from mlx-lm on purpose: each test shows what mlx-lm does, and what we do. See docs/parity.md."""

import mlx.core as mx
import pytest

import mlxrs_py
import mlxrs_py.cache as ours

from .reference import cache as theirs
from .reference import generate_step, prefill, tiny_llama
from .twins import leaves

GROWING = ["KVCache", "QuantizedKVCache", "ConcatenateKVCache"]


def positions(start, stop, dim=2):
    """Rows ``(1, 1, stop - start, dim)`` that hold their own position."""
    return mx.broadcast_to(mx.arange(start, stop, dtype=mx.float32)[:, None], (1, 1, stop - start, dim)) + 0


def held(rows):
    return [int(x) for x in rows[0, 0, :, 0].tolist()]


def advance(cache, *counts, dim=2):
    """Update with tokens that hold their own position; give the positions that the last update returned."""
    for n_tokens in counts:
        rows = positions(cache.offset, cache.offset + n_tokens, dim)
        seen = cache.update_and_fetch(rows, rows + 0)[0]
    return seen if isinstance(seen, (tuple, list)) else held(seen)


def both(name, *arguments, **options):
    return getattr(ours, name)(*arguments, **options), getattr(theirs, name)(*arguments, **options)


@pytest.mark.parametrize("name", ["KVCache", "QuantizedKVCache", "RotatingKVCache", "ConcatenateKVCache"])
def test_a_negative_trim_is_refused(name):
    mine, other = both(name, *[8] * (name == "RotatingKVCache"))
    for cache in (mine, other):
        advance(cache, 5, dim=64)
    assert (other.trim(-3), other.offset) == (-3, 8)
    with pytest.raises(ValueError, match="at least 0, got -3"):
        mine.trim(-3)
    assert mine.offset == 5


def test_a_full_ring_cannot_be_trimmed_directly():
    mine, other = both("RotatingKVCache", 8)
    for cache in (mine, other):
        advance(cache, *[1] * 11)
    assert (other.trim(4), other.offset, other._idx) == (4, 7, -1)
    # The tokens that were taken back are still seen, and older ones are gone.
    assert advance(other, 1) == [8, 9, 10, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="fewer than max_size=8"):
        mine.trim(4)
    assert advance(mine, 1) == [8, 9, 10, 11, 4, 5, 6, 7]


@pytest.mark.parametrize(("max_size", "keep"), [(4, 4), (4, 6), (0, 0)])
def test_a_ring_must_have_room_beside_its_kept_tokens(max_size, keep):
    other = theirs.RotatingKVCache(max_size, keep=keep)
    if max_size:
        assert 6 not in advance(other, *[1] * 7)
    else:
        assert advance(other, 1) == []
    with pytest.raises(ValueError, match="0 <= keep < max_size"):
        ours.RotatingKVCache(max_size, keep=keep)


def test_a_ring_does_not_write_into_the_callers_arrays():
    for cache, expected in zip(both("RotatingKVCache", 4), ([0, 1, 2, 3], [50, 1, 2, 3]), strict=True):
        keys, values = positions(0, 4), positions(0, 4)
        cache.update_and_fetch(keys, values)
        cache.update_and_fetch(positions(50, 51), positions(50, 51))
        assert held(keys) == held(values) == expected


def test_one_array_given_as_keys_and_values_becomes_two_buffers():
    for cache, expected in zip(both("RotatingKVCache", 4), ([50, 1, 2, 3], [60, 1, 2, 3]), strict=True):
        same = positions(0, 4)
        cache.update_and_fetch(same, same)
        cache.update_and_fetch(positions(50, 51), positions(60, 61))
        assert (held(cache.keys), held(cache.values)) == (expected, [60, 1, 2, 3])


@pytest.mark.parametrize("name", ["KVCache", "QuantizedKVCache"])
def test_a_failed_update_changes_nothing(name):
    mine, other = both(name)
    wrong = mx.zeros((2, 1, 1, 64))
    for cache, offset in ((mine, 3), (other, 4)):
        advance(cache, 3, dim=64)
        with pytest.raises(ValueError):
            cache.update_and_fetch(wrong, wrong)
        assert cache.offset == offset


def test_with_kept_tokens_a_single_token_sees_itself_and_its_window():
    mine, other = both("RotatingKVCache", 6, keep=2)
    for cache in (mine, other):
        advance(cache, *[1] * 6)
    masks = [cache.make_mask(1, window_size=3).tolist() for cache in (mine, other)]
    rows = advance(mine, 1)
    assert rows == advance(other, 1) == [0, 1, 6, 3, 4, 5]
    visible = [[p for p, seen in zip(rows, mask, strict=True) if seen] for mask in masks]
    assert visible == [[6, 4, 5], [0, 4, 5]]


def test_with_kept_tokens_every_token_of_a_chunk_sees_them():
    mine, other = both("RotatingKVCache", 8, keep=2)
    for cache in (mine, other):
        advance(cache, *[1] * 9)
    last = [cache.make_mask(6).tolist()[-1] for cache in (mine, other)]
    rows = advance(mine, 6)
    assert rows == advance(other, 6) == [0, 1, *range(4, 15)]
    visible = [[p for p, seen in zip(rows, mask, strict=True) if seen] for mask in last]
    assert visible == [[0, 1, 9, 10, 11, 12, 13, 14], [7, 8, 9, 10, 11, 12, 13, 14]]


def test_a_window_of_nothing_is_no_window_for_a_ring():
    mine, other = both("RotatingKVCache", 6)
    for cache in (mine, other):
        advance(cache, *[1] * 3)
    # mlx-lm itself takes 0 as no window when there are several tokens.
    assert mine.make_mask(3, window_size=0) == other.make_mask(3, window_size=0) == "causal"
    assert mine.make_mask(1, window_size=0) is None
    assert other.make_mask(1, window_size=0).tolist() == [False] * 4


def test_a_huge_window_hides_nothing():
    mine, other = both("KVCache")
    for cache in (mine, other):
        advance(cache, 3)
    everything = mine.make_mask(2, return_array=True).tolist()
    # Positions are 32-bit integers, and the sum of position and window wraps around.
    wrapped = other.make_mask(2, window_size=2**31 - 1, return_array=True).tolist()
    assert wrapped == [[True, False, False, False, False]] * 2
    with pytest.raises(ValueError, match="Converting 2147483648 to int32"):
        other.make_mask(2, window_size=2**31, return_array=True)
    for window in (2**31 - 1, 2**31, 2**40):
        assert mine.make_mask(2, window_size=window).tolist() == everything


@pytest.mark.parametrize("name", ["KVCache", "QuantizedKVCache", "RotatingKVCache"])
def test_a_state_is_a_snapshot(name):
    mine, other = both(name, *[8] * (name == "RotatingKVCache"))
    for cache, changes in ((mine, False), (other, True)):
        advance(cache, 1, dim=64)
        state = cache.state
        before = leaves(state)
        advance(cache, 1, dim=64)
        assert (leaves(state) != before) == changes


def test_writing_into_the_keys_that_were_read_does_not_write_into_the_cache():
    for cache, expected in zip(both("KVCache"), (1, 9), strict=True):
        advance(cache, 3)
        cache.keys[..., 1:2, :] = 9
        assert held(cache.keys_and_values()[0])[1] == expected


@pytest.mark.parametrize("name", ["QuantizedKVCache", "ConcatenateKVCache"])
def test_size_is_the_number_of_tokens(name):
    mine, other = both(name)
    for cache in (mine, other):
        advance(cache, 5, dim=64)
    assert (mine.size(), other.size()) == (5, 0)


def test_a_trim_of_concatenated_rows_takes_them_away():
    mine, other = both("ConcatenateKVCache")
    for cache, after, later in ((mine, 4, 5), (other, 6, 7)):
        advance(cache, 6)
        assert (cache.trim(2), cache.offset) == (2, 4)
        assert len(held(cache.keys_and_values()[0])) == after
        advance(cache, 1)
        assert cache.offset == later


def test_the_offset_of_concatenated_rows_is_their_number():
    mine, other = both("ConcatenateKVCache")
    for cache in (mine, other):
        advance(cache, 6)
    other.offset = 2
    assert len(held(other.keys)) == 6
    with pytest.raises(ValueError, match="the number of rows"):
        mine.offset = 2


def test_all_caches_are_trimmed_by_the_same_number():
    for module, n_taken, left in ((ours, 3, [2, 0]), (theirs, 4, [1, 0])):
        caches = [module.KVCache(), module.KVCache()]
        advance(caches[0], 5)
        advance(caches[1], 3)
        assert module.trim_prompt_cache(caches, 4) == n_taken
        assert [c.offset for c in caches] == left


def test_all_caches_are_trimmed_by_the_same_number_chunked_ones_too():
    def filled(module):
        chunked, plain = theirs.ChunkedKVCache(8), module.KVCache()
        for cache in (chunked, plain):
            advance(cache, 12)
        chunked.maybe_trim_front()
        return [chunked, plain]

    for module, offsets in ((ours, [4, 4]), (theirs, [4, 2])):
        caches = filled(module)
        assert module.trim_prompt_cache(caches, 10) == 8
        assert [c.offset for c in caches] == offsets


def test_a_negative_trim_of_all_caches_is_refused():
    caches = [theirs.KVCache()]
    advance(caches[0], 3)
    assert (theirs.trim_prompt_cache(caches, -2), caches[0].offset) == (-2, 5)
    caches = [ours.KVCache()]
    advance(caches[0], 3)
    with pytest.raises(ValueError, match="at least 0, got -2"):
        ours.trim_prompt_cache(caches, -2)
    assert caches[0].offset == 3


def test_an_empty_quantized_cache_has_no_bytes():
    mine, other = both("QuantizedKVCache")
    with pytest.raises(AttributeError):
        _ = other.nbytes
    assert mine.nbytes == 0


def test_the_rows_of_an_empty_cache_are_refused_in_one_way():
    for name, error in [("KVCache", AttributeError), ("QuantizedKVCache", TypeError)]:
        mine, other = both(name)
        with pytest.raises(error):
            other.keys_and_values()
        with pytest.raises(ValueError, match="a cache with tokens"):
            mine.keys_and_values()
    mine, other = both("ConcatenateKVCache")
    assert other.keys_and_values() == (None, None)
    with pytest.raises(ValueError, match="a cache with tokens"):
        mine.keys_and_values()


@pytest.mark.parametrize(("bits", "dim"), [(5, 96), (6, 128), (3, 256), (5, 256)])
def test_every_number_of_bits_works_from_the_first_token(bits, dim):
    mine, other = both("QuantizedKVCache", group_size=32, bits=bits)
    with pytest.raises(ValueError, match="cannot be broadcast"):
        advance(other, 3, dim=dim)
    seen = advance(mine, 3, dim=dim)
    assert leaves(seen) == leaves(mx.quantize(positions(0, 3, dim), group_size=32, bits=bits))


def test_what_mlx_cannot_quantize_is_refused_when_the_cache_is_made():
    other = theirs.QuantizedKVCache(bits=7)
    with pytest.raises(ValueError, match="bits 7 is not supported"):
        advance(other, 1, dim=64)
    assert other.offset == 1
    with pytest.raises(ValueError, match="bits among"):
        ours.QuantizedKVCache(bits=7)


def test_an_update_of_no_tokens_loses_none():
    mine, other = both("RotatingKVCache", 4)
    for cache, seen in ((mine, [2, 3, 4, 5]), (other, [3, 4, 5])):
        advance(cache, *[1] * 6)
        assert advance(cache, 0) == seen
    with pytest.raises(ValueError, match="Negative dimensions"):
        advance(other, 1)
    assert advance(mine, 1) == [6, 3, 4, 5]


def test_a_bound_that_a_model_ignores_is_told():
    class Model:
        def make_cache(self):
            return [theirs.KVCache()]

    assert type(theirs.make_prompt_cache(Model(), 16)[0]) is theirs.KVCache
    with pytest.warns(UserWarning, match="max_kv_size=16 is ignored"):
        ours.make_prompt_cache(Model(), 16)


def test_a_mask_needs_only_the_number_of_tokens():
    mine, other = both("KVCache")
    with pytest.raises(TypeError):
        other.make_mask(2)
    assert mine.make_mask(2) == "causal"


def test_a_state_that_no_cache_can_reach_is_refused():
    keys = mx.zeros((1, 1, 8, 2))
    for state in [(keys, keys, 99), (keys, keys, -3), (keys, keys[..., :4, :], 2), (keys, None, 2), (keys, keys, 2.5)]:
        assert theirs.KVCache.from_state(state).offset == state[2]
        with pytest.raises(ValueError, match="state: expected"):
            ours.KVCache.from_state(state)
    for numbers in [(3, 0, 8, -1), (3, 9, 8, 3), (20, 0, 16, 4), (3, 0, 8, 5)]:
        assert theirs.RotatingKVCache.from_state((keys, keys, *numbers)).offset == numbers[0]
        with pytest.raises(ValueError, match="state: expected"):
            ours.RotatingKVCache.from_state((keys, keys, *numbers))


def test_step_is_read_when_the_cache_is_made():
    for module, length in ((ours, 256), (theirs, 16)):

        class Narrow(module.KVCache):
            pass

        cache = Narrow()
        Narrow.step = 16
        advance(cache, 3)
        assert cache.keys.shape[2] == length
        advance(later := Narrow(), 3)
        assert later.keys.shape[2] == 16


def test_our_classes_are_not_mlx_lms():
    for mine, other in [both("KVCache"), both("RotatingKVCache", 8), both("QuantizedKVCache")]:
        assert not isinstance(mine, type(other))
        assert type(mine).__name__ == type(other).__name__


def test_a_stopped_prefill_leaves_all_layers_at_one_offset():
    class Stop(Exception):
        pass

    def stopped(run, caches):
        model = tiny_llama(4)
        third = model.model.layers[2]

        def spy(*arguments, **options):
            if caches[0].offset == 8:
                raise Stop
            return inner(*arguments, **options)

        inner = third.self_attn
        third["self_attn"] = spy
        with pytest.raises(Stop):
            run(model, list(range(1, 11)), caches)
        return [c.offset for c in caches]

    own = stopped(lambda *arguments: prefill(*arguments, prefill_step_size=4), [theirs.KVCache() for _ in range(4)])
    assert own == [8, 8, 4, 4]
    for module in (ours, theirs):
        caches = [module.KVCache() for _ in range(4)]
        assert stopped(lambda *arguments: mlxrs_py.prefill(*arguments, step_size=4), caches) == [4, 4, 4, 4]


def test_buffers_of_a_prompt_grow_by_longer_steps():
    model, tokens = tiny_llama(2), [token % 61 for token in range(700)]
    caches, twins = [ours.KVCache() for _ in range(2)], [theirs.KVCache() for _ in range(2)]
    mlxrs_py.prefill(model, tokens, caches, step_size=100)
    prefill(model, tokens, twins, prefill_step_size=100)
    assert [c.keys.shape[2] for c in caches] == [768, 768]
    # Cut to what is used and grown by 256 at each second window.
    assert [c.keys.shape[2] for c in twins] == [856, 856]
    for cache, twin in zip(caches, twins, strict=True):
        assert mx.array_equal(cache.keys[..., :700, :], twin.keys[..., :700, :])


def test_a_window_of_no_tokens_is_refused_in_plain_words():
    with pytest.raises(ValueError, match="Cannot infer the shape"):
        prefill(tiny_llama(1), [1, 2, 3], [theirs.KVCache()], prefill_step_size=0)
    with pytest.raises(ValueError, match="step_size of at least 1, got 0"):
        mlxrs_py.prefill(tiny_llama(1), [1, 2, 3], [ours.KVCache()], step_size=0)


def test_a_quantization_that_cannot_work_is_refused_before_any_token():
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 5}
    rings = [theirs.RotatingKVCache(64)]
    with pytest.raises(NotImplementedError):
        prefill(tiny_llama(1), list(range(10)), rings, prefill_step_size=4, **options)
    assert rings[0].offset == 8
    rings = [theirs.RotatingKVCache(64)]
    with pytest.raises(NotImplementedError, match="kv_bits is not supported"):
        mlxrs_py.prefill(tiny_llama(1), list(range(10)), rings, step_size=4, **options)
    assert rings[0].offset == 0


def test_a_prompt_may_be_a_list():
    with pytest.raises((TypeError, AttributeError)):
        list(generate_step([1, 2, 3], tiny_llama(1), max_tokens=0, prompt_cache=[theirs.KVCache()]))
    assert mlxrs_py.prefill(tiny_llama(1), [1, 2, 3], [ours.KVCache()]).shape == (1, 61)
