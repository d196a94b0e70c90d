"""Prefill as mlx-lm's ``generate_step(max_tokens=0)`` runs it, on caches of ours, of mlx-lm's, and both."""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlxrs_py
import mlxrs_py.cache as ours

from .reference import cache as theirs
from .reference import generate_step, prefill, tiny_llama
from .twins import leaves

N_LAYERS = 4
TOKENS = list(range(1, 15))

MAKERS = {
    "ours": lambda: [ours.KVCache() for _ in range(N_LAYERS)],
    "mlx-lm's": lambda: [theirs.KVCache() for _ in range(N_LAYERS)],
    "both": lambda: [ours.KVCache(), theirs.KVCache(), theirs.KVCache(), ours.KVCache()],
    "our rings": lambda: [ours.RotatingKVCache(6) for _ in range(N_LAYERS)],
    "mlx-lm's rings": lambda: [theirs.RotatingKVCache(6) for _ in range(N_LAYERS)],
    "ours quantized": lambda: [ours.QuantizedKVCache(32) for _ in range(N_LAYERS)],
    "both concatenated": lambda: [make() for make in (ours.ConcatenateKVCache, theirs.ConcatenateKVCache) * 2],
}
every_mixture = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Traced:
    """A model that notes what it is called with."""

    def __init__(self, model=None):
        self.model = model or tiny_llama(N_LAYERS)
        self.calls = []

    @property
    def layers(self):
        return self.model.layers

    def __call__(self, tokens, cache, input_embeddings=None):
        self.calls.append((tokens.tolist(), sorted({type(c).__name__ for c in cache})))
        return self.model(tokens, cache=cache, input_embeddings=input_embeddings)


def twin_of(caches):
    """mlx-lm's caches of the same classes, empty."""
    makers = {
        "KVCache": theirs.KVCache,
        "RotatingKVCache": lambda: theirs.RotatingKVCache(6),
        "QuantizedKVCache": lambda: theirs.QuantizedKVCache(32),
        "ConcatenateKVCache": theirs.ConcatenateKVCache,
    }
    return [makers[type(c).__name__]() for c in caches]


@every_mixture
@given(st.integers(1, 14), st.integers(1, 9))
def test_model_calls_progress_and_caches_are_those_of_mlx_lm(make, total, step):
    mine, other = Traced(), Traced()
    my_calls, their_calls, caches = [], [], make()
    twins = twin_of(caches)
    logits = mlxrs_py.prefill(
        mine, TOKENS[:total], caches, step_size=step, progress=lambda *call: my_calls.append(call)
    )
    progress = {"prompt_progress_callback": lambda *call: their_calls.append(call)}
    prefill(other, TOKENS[:total], twins, prefill_step_size=step, **progress)
    assert (mine.calls, my_calls) == (other.calls, their_calls)
    assert [leaves(c.state) for c in caches] == [leaves(c.state) for c in twins]
    assert (logits.shape, type(logits)) == ((1, 61), mx.array)


@every_mixture
def test_the_logits_are_those_that_mlx_lm_samples_from(make):
    model, caches = tiny_llama(N_LAYERS), make()
    logits = mlxrs_py.prefill(model, TOKENS, caches, step_size=4)
    step = generate_step(mx.array(TOKENS), model, max_tokens=1, prompt_cache=twin_of(caches), prefill_step_size=4)
    token, logprobs = next(step)
    assert leaves([(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]]) == leaves([logprobs])
    assert mx.argmax(logits).item() == token


@pytest.mark.parametrize("start", range(13))
@pytest.mark.parametrize("mixture", ["ours", "mlx-lm's", "both"])
def test_caches_are_quantized_after_the_same_calls(mixture, start):
    mine, other, caches = Traced(), Traced(), MAKERS[mixture]()
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}
    twins = twin_of(caches)
    mlxrs_py.prefill(mine, TOKENS[:10], caches, step_size=4, **options)
    prefill(other, TOKENS[:10], twins, prefill_step_size=4, **options)
    assert mine.calls == other.calls
    assert [type(c).__name__ for c in caches] == [type(c).__name__ for c in twins]
    assert [leaves(c.state) for c in caches] == [leaves(c.state) for c in twins]


def test_classes_that_cannot_be_quantized_stay_and_mlx_lms_rings_raise():
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    caches = [theirs.ConcatenateKVCache(), ours.ConcatenateKVCache(), theirs.ChunkedKVCache(64), theirs.KVCache()]
    mlxrs_py.prefill(tiny_llama(N_LAYERS), TOKENS, caches, **options)
    names = ["ConcatenateKVCache", "ConcatenateKVCache", "ChunkedKVCache", "QuantizedKVCache"]
    assert [type(c).__name__ for c in caches] == names
    with pytest.raises(NotImplementedError):
        mlxrs_py.prefill(tiny_llama(1), TOKENS, [theirs.RotatingKVCache(64)], **options)
    with pytest.raises(NotImplementedError):
        prefill(tiny_llama(1), TOKENS, [theirs.RotatingKVCache(64)], **options)


@pytest.mark.parametrize("tokens", [TOKENS, []])
def test_embeddings_go_in_as_in_mlx_lm(tokens):
    mine, other = Traced(), Traced()
    embeddings = mine.model.model.embed_tokens(mx.array(TOKENS))
    caches, twins = MAKERS["ours"](), MAKERS["mlx-lm's"]()
    mlxrs_py.prefill(mine, tokens, caches, step_size=4, input_embeddings=embeddings)
    prompt = mx.array(tokens, mx.int32)
    for _ in generate_step(
        prompt, other, max_tokens=0, prompt_cache=twins, prefill_step_size=4, input_embeddings=embeddings
    ):
        pass
    assert mine.calls == other.calls
    assert [leaves(c.state) for c in caches] == [leaves(c.state) for c in twins]


def test_both_refuse_empty_prompts_and_unequal_lengths():
    model = tiny_llama(1)
    embeddings = model.model.embed_tokens(mx.array(TOKENS))
    for arguments in ({}, {"input_embeddings": embeddings[:0]}):
        with pytest.raises(ValueError, match="empty prompt"):
            mlxrs_py.prefill(model, [], [ours.KVCache()], **arguments)
    with pytest.raises(ValueError, match="must be provided"):
        prefill(model, [], [theirs.KVCache()])
    with pytest.raises(ValueError, match="one length"):
        mlxrs_py.prefill(model, TOKENS[:3], [ours.KVCache()], input_embeddings=embeddings)
    with pytest.raises(ValueError, match="must match"):
        prefill(model, TOKENS[:3], [theirs.KVCache()], input_embeddings=embeddings)


MODELS = {
    "full attention": {},
    "sliding attention": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 12,
    },
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_unmodified_models_generate_the_same_on_our_caches(options, kv_bits):
    if options and kv_bits:
        kv_bits = None
    model, results = tiny_llama(N_LAYERS, **options), []
    for module in (ours, theirs):
        caches = module.make_prompt_cache(model)
        assert all(type(c).__module__ == module.__name__ for c in caches)
        steps = generate_step(
            mx.array(TOKENS),
            model,
            max_tokens=40,
            prompt_cache=caches,
            prefill_step_size=5,
            kv_bits=kv_bits,
            kv_group_size=32,
        )
        results.append([(token, leaves([logprobs])) for token, logprobs in steps])
        assert all(type(c).__module__ == module.__name__ for c in caches)
        results[-1].append([leaves(c.state) for c in caches])
    assert results[0] == results[1]
