"""``ChunkedKVCache``: the newest chunk of the tokens."""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlxrs_py
from mlxrs_py.cache import ChunkedKVCache, load_prompt_cache, save_prompt_cache
from tiny import TinyModel, advance, feed, held, leaves, noise, positions


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 30))
def test_what_is_left_are_the_newest_tokens(counts, chunk_size):
    cache, first = ChunkedKVCache(chunk_size), 0
    for n_tokens in counts:
        cache.maybe_trim_front()
        first = max(first, cache.offset - chunk_size)
        assert advance(cache, n_tokens) == list(range(first, cache.offset))
        assert (cache.start_position, cache.size()) == (first, cache.offset - first)
    assert cache.offset == sum(counts)


def test_the_front_is_cut_to_the_last_rows_of_a_chunk():
    cache = ChunkedKVCache(8)
    advance(cache, 9)
    cache.maybe_trim_front()
    assert (cache.offset, cache.start_position, cache.keys.shape[2]) == (9, 1, 8)
    assert advance(cache, 5) == list(range(1, 14))
    assert (cache.offset, cache.keys.shape[2]) == (14, 264)
    cache.maybe_trim_front()
    assert (cache.start_position, held(cache.keys)) == (6, list(range(6, 14)))


def test_nothing_is_trimmed_off_the_front_of_an_empty_or_short_cache():
    cache = ChunkedKVCache(8)
    cache.maybe_trim_front()
    advance(cache, 8)
    before = leaves(cache.state)
    cache.maybe_trim_front()
    assert leaves(cache.state) == before


def test_a_trim_stops_at_the_first_row_that_is_left():
    cache = ChunkedKVCache(8)
    advance(cache, 12)
    cache.maybe_trim_front()
    assert (cache.trim(3), cache.offset, cache.trim(99), cache.offset, cache.start_position) == (3, 9, 5, 4, 4)
    assert advance(cache, 2) == [4, 5]


def test_a_negative_trim_raises_and_changes_nothing():
    cache = feed(ChunkedKVCache(8), 5)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        cache.trim(-1)
    assert cache.offset == 5


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_has_at_least_one_row(chunk_size):
    with pytest.raises(ValueError, match="chunk_size"):
        ChunkedKVCache(chunk_size)
    cache = ChunkedKVCache(chunk_size=3)
    with pytest.raises(ValueError, match="chunk_size"):
        cache.chunk_size = chunk_size
    assert cache.chunk_size == 3
    with pytest.raises(TypeError):
        ChunkedKVCache()


def test_chunk_size_start_position_and_offset_can_be_assigned():
    cache = feed(ChunkedKVCache(8), 9)
    cache.chunk_size = 4
    cache.maybe_trim_front()
    assert cache.start_position == 5
    cache.offset, cache.start_position = 3, 0
    assert (cache.offset, cache.size(), feed(cache, 1).offset) == (3, 3, 4)


def test_positions_that_the_buffers_do_not_hold_are_refused_where_they_are_used():
    cache = feed(ChunkedKVCache(8), 9)
    before = leaves([cache.keys, cache.values])
    cache.offset = 900
    with pytest.raises(ValueError, match="at most 256 tokens after start_position, got 900"):
        cache.maybe_trim_front()
    with pytest.raises(ValueError, match="buffers of one length, at least 900 rows"):
        feed(cache, 1)
    cache.offset, cache.start_position = 3, 5
    with pytest.raises(ValueError, match="start_position <= offset 3, got 5"):
        feed(cache, 1)
    assert leaves([cache.keys, cache.values]) == before


def test_an_update_that_does_not_fit_changes_nothing():
    cache = feed(ChunkedKVCache(8), 3)
    before = leaves(cache.state)
    for shape in [(2, 2, 1, 32), (1, 1, 1, 32), (1, 2, 1, 8)]:
        with pytest.raises(ValueError, match=r"ChunkedKVCache.update_and_fetch: expected keys that fit"):
            cache.update_and_fetch(mx.zeros(shape), mx.zeros(shape))
    assert leaves(cache.state) == before


def test_the_callers_arrays_stay_as_they_are():
    cache, same = ChunkedKVCache(2), positions(0, 3)
    cache.update_and_fetch(same, same)
    cache.maybe_trim_front()
    cache.update_and_fetch(positions(3, 4), positions(9, 10))
    rows = cache.keys_and_values()
    assert (held(same), held(rows[0]), held(rows[1])) == ([0, 1, 2], [1, 2, 3], [1, 2, 9])


def test_a_chunk_comes_back_from_a_file(tmp_path):
    cache = feed(ChunkedKVCache(8), 300)
    cache.maybe_trim_front()
    feed(cache, 1)
    save_prompt_cache(tmp_path / "p", [cache, ChunkedKVCache(5)])
    loaded, empty = load_prompt_cache(tmp_path / "p")
    assert (loaded.offset, loaded.start_position, loaded.chunk_size) == (301, 292, 8)
    assert leaves(loaded.keys_and_values()) == leaves(cache.keys_and_values())
    assert leaves(feed(loaded, 3).keys_and_values()) == leaves(feed(cache, 3).keys_and_values())
    assert (type(empty), empty.chunk_size, empty.empty()) == (ChunkedKVCache, 5, True)


def test_it_makes_no_masks_and_cannot_be_quantized():
    assert not [name for name in ("make_mask", "to_quantized", "bits") if hasattr(ChunkedKVCache(8), name)]


@pytest.mark.parametrize("chunk_size", [3, 6, 64])
def test_a_stopped_prefill_puts_the_front_back_too(chunk_size):
    model, tokens = TinyModel(), list(range(1, 20))

    def run(caches, done):
        return leaves([mlxrs_py.prefill(model, tokens[done:], caches, step_size=4)])

    undisturbed = [ChunkedKVCache(chunk_size), ChunkedKVCache(chunk_size)]
    expected = run(undisturbed, 0)
    for fatal in range(1, 24):
        caches, countdown = [ChunkedKVCache(chunk_size), ChunkedKVCache(chunk_size)], iter(range(fatal))

        def stop(_layer, countdown=countdown):
            if next(countdown, None) is None:
                raise KeyboardInterrupt

        model.on_layer = stop
        with pytest.raises(KeyboardInterrupt):
            run(caches, 0)
        model.on_layer = lambda layer: None
        done = caches[0].offset
        assert [c.offset for c in caches] == [done] * 2 and done in (0, 4, 8, 12, 16, 18)
        assert run(caches, done) == expected
        assert [leaves(c.keys_and_values()) for c in caches] == [leaves(c.keys_and_values()) for c in undisturbed]


def test_the_state_holds_numbers_behind_the_buffers():
    cache = feed(ChunkedKVCache(8), 9)
    assert cache.state[2:] == (9, 8, 0)
    for state in [(*cache.state[:2], 9, 0, 0), (*cache.state[:2], 9, 8, 10), (*cache.state[:2], 257, 8, 0)]:
        with pytest.raises(ValueError, match="state: expected"):
            cache.state = state
    twin = ChunkedKVCache.from_state((noise(4), noise(4), 12, 8, 8))
    assert (twin.offset, twin.size(), feed(twin, 1).offset) == (12, 4, 13)
