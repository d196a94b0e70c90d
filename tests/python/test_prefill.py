"""``prefill``: windows, progress, quantization on the way, embeddings, errors."""

from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlxrs_py
from mlxrs_py.cache import ConcatenateKVCache, KVCache, QuantizedKVCache, QuantizedRotatingKVCache, RotatingKVCache
from test_threads import elsewhere
from tiny import TinyModel, active_memory, every_class, leaves, raw

TOKENS = list(range(1, 11))


def plain(n_layers=2):
    return [KVCache() for _ in range(n_layers)]


@pytest.mark.parametrize(
    ("total", "windows", "calls"),
    [
        (1, [1], [0, 1]),
        (2, [1, 1], [0, 1, 2]),
        (5, [4, 1], [0, 4, 5]),
        (6, [4, 1, 1], [0, 4, 5, 6]),
        (9, [4, 4, 1], [0, 4, 8, 9]),
        (10, [4, 4, 1, 1], [0, 4, 8, 9, 10]),
    ],
)
def test_the_last_token_goes_alone_and_progress_follows_every_window(total, windows, calls):
    model, caches, seen = TinyModel(), plain(), []
    mlxrs_py.prefill(model, TOKENS[:total], caches, step_size=4, progress=lambda *call: seen.append(call))
    assert model.windows == windows
    assert list(chain.from_iterable(model.tokens)) == TOKENS[:total]
    assert seen == [(done, total) for done in calls]
    assert [c.offset for c in caches] == [total, total]


def test_a_window_is_told_of_once_the_next_is_under_way():
    model, trace = TinyModel(1), []
    model.on_layer = lambda layer: trace.append("forward")
    mlxrs_py.prefill(model, TOKENS[:7], plain(1), step_size=3, progress=lambda done, total: trace.append(done))
    forward = ["forward", "forward"]
    assert trace == [0, *forward, *forward, 3, *forward, 6, 7]


@given(st.integers(1, 40), st.integers(1, 50))
def test_the_windows_do_not_change_the_logits_beyond_rounding(total, step):
    tokens = [1 + i % 60 for i in range(total)]
    model, caches = TinyModel(), plain()
    logits = mlxrs_py.prefill(model, tokens, caches, step_size=step)
    whole = model(mx.array([tokens]), cache=plain())[:, -1, :]
    assert logits.shape == (1, 61) and type(logits) is mx.array
    assert mx.allclose(logits, whole, rtol=1e-4, atol=1e-4)
    assert [c.offset for c in caches] == [total, total]


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        mx.array,
        lambda t: mx.array(t, mx.uint32),
        np.array,
        lambda t: np.array(t, np.uint16),
        lambda t: np.array(t, np.int32),
    ],
)
def test_tokens_may_be_a_list_a_numpy_or_an_mlx_array(convert):
    model = TinyModel()
    expected = mlxrs_py.prefill(model, mx.array(TOKENS), plain(), step_size=4)
    assert raw(mlxrs_py.prefill(model, convert(TOKENS), plain(), step_size=4)) == raw(expected)


class Collector(TinyModel):
    """Hands out what the caches hold when a window has been recorded."""

    def __init__(self):
        super().__init__()
        self.states = []

    def __call__(self, tokens, cache, *rest):
        logits = super().__call__(tokens, cache, *rest)
        self.states.append([c.state for c in cache])
        return logits


@every_class
def test_a_window_is_computed_when_it_is_told_of_and_that_is_before_the_next_but_one_begins(make):
    model, begun = Collector(), []

    def progress(done, total):
        begun.append(len(model.states))
        if 0 < done < total:
            # Another thread cannot compute what was recorded on this one; it can only find it done.
            elsewhere(lambda: mx.eval(model.states[len(begun) - 2]))

    logits = mlxrs_py.prefill(model, TOKENS + TOKENS, [make(), make()], step_size=4, progress=progress)
    assert begun == [0, 2, 3, 4, 5, 6, 6]
    elsewhere(lambda: mx.eval(logits, model.states))


def test_a_leading_window_is_under_way_when_the_next_begins():
    model, calls = Collector(), []

    def find_done(layer):
        # What was handed to the device is computed without this thread, sooner or later.
        calls.append(layer)
        elsewhere(lambda: mx.eval(model.states))

    model.on_layer = find_done
    mlxrs_py.prefill(model, TOKENS, plain(), step_size=4)
    assert len(calls) == 2 * 2 * 4


@pytest.mark.parametrize(("room", "stays"), [(10_000_000_000, True), (40_000_000, False)])
def test_unused_memory_goes_back_when_it_takes_too_much(room, stays):
    before = mx.set_memory_limit(active_memory() + room)
    try:
        mx.clear_cache()
        unused = mx.arange(5_000_000)
        mx.eval(unused)
        del unused
        mlxrs_py.prefill(TinyModel(), TOKENS, plain(), step_size=4)
        assert (mx.get_cache_memory() >= 20_000_000) == stays
    finally:
        mx.set_memory_limit(before)


def test_a_leading_window_computes_no_logits():
    logits = []

    class Keeping(TinyModel):
        def __call__(self, tokens, cache):
            logits.append(super().__call__(tokens, cache))
            return logits[-1]

    mlxrs_py.prefill(Keeping(), TOKENS, plain(), step_size=4)
    for unused in logits[:-1]:
        with pytest.raises(RuntimeError, match="no Stream"):
            elsewhere(lambda unused=unused: mx.eval(unused))


@pytest.mark.parametrize("tokens", [600, 3000, 9000])
def test_the_step_may_follow_the_memory(tokens):
    calls = []

    def model(tokens, cache):
        calls.append(tokens.shape[1])
        rows = mx.zeros((1, 1, tokens.shape[1], 8))
        cache[0].update_and_fetch(rows, rows)
        return mx.zeros((1, 1, 5))

    mlxrs_py.prefill(model, np.arange(tokens), plain(1), step_size="auto")
    # So little memory fits anywhere.
    rest = tokens - 1 - 1024
    leading = [512, 512, *[4096] * (rest // 4096), rest % 4096] if rest > 0 else [512, tokens - 1 - 512]
    assert calls == [*leading, 1]


def test_the_step_stays_short_where_memory_is_short():
    calls = []

    def model(tokens, cache):
        calls.append(tokens.shape[1])
        rows = mx.zeros((1, 1, tokens.shape[1], 512))
        cache[0].update_and_fetch(rows, rows)
        return mx.zeros((1, 1, 5))

    before = mx.set_memory_limit(active_memory() + 12_000_000)
    try:
        mlxrs_py.prefill(model, np.arange(4000), plain(1), step_size="auto")
    finally:
        mx.set_memory_limit(before)
    assert set(calls[:-2]) == {512}


def test_any_callable_is_a_model():
    logits = mlxrs_py.prefill(lambda tokens, cache: mx.ones((1, tokens.shape[1], 3)), TOKENS, [])
    assert logits.tolist() == [[1, 1, 1]]


def test_filled_caches_go_on():
    model, caches = TinyModel(), plain()
    mlxrs_py.prefill(model, TOKENS[:5], caches, step_size=4)
    logits = mlxrs_py.prefill(model, TOKENS[5:], caches, step_size=4)
    whole = model(mx.array([TOKENS]), cache=plain())[:, -1, :]
    assert mx.allclose(logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [TOKENS, [], mx.array([], mx.int32), np.array([], np.int64)])
def test_embeddings_stand_in_for_tokens(tokens):
    model = TinyModel()
    embeddings = model.embed(mx.array(TOKENS))
    expected = mlxrs_py.prefill(model, TOKENS, plain(), step_size=4)
    model.windows, model.tokens, caches = [], [], plain()
    logits = mlxrs_py.prefill(model, tokens, caches, step_size=4, input_embeddings=embeddings)
    assert raw(logits) == raw(expected)
    assert model.windows == [4, 4, 1, 1]
    assert list(chain.from_iterable(model.tokens)) == list(tokens)
    assert [c.offset for c in caches] == [10, 10]


def test_embeddings_that_do_not_fit_are_refused_before_any_work():
    model = TinyModel()
    embeddings = model.embed(mx.array(TOKENS))
    with pytest.raises(ValueError, match="tokens and embeddings of one length, got 3 tokens"):
        mlxrs_py.prefill(model, TOKENS[:3], plain(), input_embeddings=embeddings)
    with pytest.raises(ValueError, match="expected a model that takes input_embeddings"):
        mlxrs_py.prefill(lambda tokens, cache: None, TOKENS, plain(), input_embeddings=embeddings)
    with pytest.raises(ValueError, match="empty prompt"):
        mlxrs_py.prefill(model, [], plain(), input_embeddings=embeddings[:0])
    with pytest.raises(TypeError, match=r"mlx.core.array"):
        mlxrs_py.prefill(model, TOKENS, plain(), input_embeddings=np.zeros((10, 64)))
    assert model.windows == []


@pytest.mark.parametrize("start", range(13))
def test_caches_are_quantized_at_the_end_of_the_window_that_reaches_the_start(start):
    classes = []

    class Watched(TinyModel):
        def __call__(self, tokens, cache):
            classes.append({type(c) for c in cache})
            return super().__call__(tokens, cache)

    caches = plain()
    mlxrs_py.prefill(Watched(), TOKENS, caches, step_size=4, kv_bits=4, kv_group_size=32, quantized_kv_start=start)
    reached = next(i for i, offset in enumerate([4, 8, 9, 10, 99]) if start <= offset)
    expected = [{KVCache}] * (reached + 1) + [{QuantizedKVCache}] * 4
    assert [*classes, {type(c) for c in caches}] == expected[:5]
    if reached < 4:
        assert [(c.bits, c.group_size, c.offset) for c in caches] == [(4, 32, 10)] * 2


def test_caches_without_a_quantized_form_stay():
    caches = [KVCache(), ConcatenateKVCache(), QuantizedKVCache(32, bits=4)]
    options = {"step_size": 4, "kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    mlxrs_py.prefill(TinyModel(3), TOKENS, caches, **options)
    assert [type(c) for c in caches] == [QuantizedKVCache, ConcatenateKVCache, QuantizedKVCache]
    assert [c.bits for c in caches[::2]] == [8, 4]


def test_rings_are_quantized_once_they_are_long_enough():
    caches = [KVCache(), RotatingKVCache(64)]
    mlxrs_py.prefill(TinyModel(), TOKENS, caches, kv_bits=4, kv_group_size=32, quantized_kv_start=11)
    assert [(type(c), c.offset) for c in caches] == [(KVCache, 10), (RotatingKVCache, 10)]
    mlxrs_py.prefill(TinyModel(), TOKENS, caches, kv_bits=4, kv_group_size=32, quantized_kv_start=11)
    assert [(type(c), c.offset) for c in caches] == [(QuantizedKVCache, 20), (QuantizedRotatingKVCache, 20)]


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one token, got an empty prompt"),
        ([[1, 2]], {}, ValueError, r"token ids \(P,\) of an integer type"),
        ([1.5, 2.0], {}, ValueError, "integer type"),
        (3, {}, (ValueError, TypeError), "3|Int32|array|shape"),
        ("text", {}, (ValueError, TypeError), "str|text"),
        (None, {}, (ValueError, TypeError), "None"),
        (TOKENS, {"step_size": 0}, ValueError, "step_size of at least 1, got 0"),
        (TOKENS, {"step_size": -4}, ValueError, "step_size of at least 1, got -4"),
        (TOKENS, {"step_size": 2.5}, TypeError, "integer"),
        (TOKENS, {"step_size": "some"}, ValueError, 'step_size "auto" or tokens, got "some"'),
        (TOKENS, {"kv_bits": 7}, ValueError, "bits among"),
        (TOKENS, {"kv_bits": 4, "kv_group_size": 5}, ValueError, "group_size among"),
        (TOKENS, {"progress": 3}, TypeError, "callable"),
        (TOKENS, {"unknown": 3}, TypeError, "unknown"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tokens, options, error, message):
    model, caches = TinyModel(), plain()
    with pytest.raises(error, match=message):
        mlxrs_py.prefill(model, tokens, caches, **options)
    assert (model.windows, [c.offset for c in caches]) == ([], [0, 0])


def test_caches_that_cannot_be_replaced_are_refused_with_kv_bits():
    model, caches = TinyModel(), tuple(plain())
    with pytest.raises(TypeError, match="with kv_bits, expected a list of caches, got tuple"):
        mlxrs_py.prefill(model, TOKENS, caches, kv_bits=4)
    mlxrs_py.prefill(model, TOKENS, caches)
    assert [c.offset for c in caches] == [10, 10]


@pytest.mark.parametrize("result", [None, 3, "logits", mx.zeros((1, 61)), mx.zeros((61,)), mx.zeros((2, 1, 61))])
def test_a_model_that_gives_no_logits_is_told_and_the_caches_are_put_back(result):
    model, caches = TinyModel(), plain()
    mlxrs_py.prefill(model, TOKENS, caches, step_size=4)

    def broken(tokens, cache):
        model(tokens, cache)
        return result

    before = leaves([c.keys_and_values() for c in caches])
    with pytest.raises((TypeError, ValueError, mlxrs_py.MlxError)):
        mlxrs_py.prefill(broken, [1], caches)
    assert leaves([c.keys_and_values() for c in caches]) == before


@pytest.mark.parametrize("progress", [None, False, True])
def test_progress_may_be_a_bar_or_nothing(progress, capfd):
    mlxrs_py.prefill(TinyModel(), TOKENS, plain(), step_size=4, progress=progress)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("stop_at", [0, 4, 8, 9, 10])
def test_an_exception_in_progress_leaves_the_tokens_that_it_was_told_of(stop_at):
    model, caches = TinyModel(), plain()

    def progress(done, total):
        if done == stop_at:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        mlxrs_py.prefill(model, TOKENS, caches, step_size=4, progress=progress)
    assert [c.offset for c in caches] == [stop_at, stop_at]


def test_a_prefill_does_not_keep_caches_or_model_alive():
    import gc
    import weakref

    model, caches = TinyModel(), plain()
    references = [weakref.ref(model), *map(weakref.ref, caches)]
    mlxrs_py.prefill(model, TOKENS, caches, step_size=4)
    del model, caches
    gc.collect()
    assert [r() for r in references] == [None] * 3
