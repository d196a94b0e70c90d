"""Rings that are quantized, which mlx-lm refuses: with mlx-lm's own attention and models over them."""

import mlx.core as mx
import pytest

import mlxrs_py
import mlxrs_py.cache as ours

from . import tiny_models
from .reference import base, cache, generate_step, prefill, tiny_llama

BITS = [2, 3, 4, 5, 6, 8]


def noise(seed, *shape):
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("bits", BITS)
def test_attention_over_a_quantized_ring_is_mlx_lms_over_the_same_rows(bits, keep, n_tokens):
    ring = ours.QuantizedRotatingKVCache(12, keep, group_size=32, bits=bits)
    plain = cache.RotatingKVCache(12, keep)
    for step, count in enumerate([7, 9, 1, 1, 4, 1, n_tokens]):
        rows = noise(step, 1, 2, count, 64), noise(100 + step, 1, 2, count, 64)
        queries = noise(200 + step, 1, 4, count, 64)
        mask = ring.make_mask(count)
        mine = base.scaled_dot_product_attention(
            mx.array(queries), *ring.update_and_fetch(*rows), cache=ring, scale=0.125, mask=mask
        )
        quantized = [mx.quantize(array, group_size=32, bits=bits) for array in plain.update_and_fetch(*rows)]
        other = base.quantized_scaled_dot_product_attention(
            mx.array(queries), *quantized, scale=0.125, mask=mask, group_size=32, bits=bits
        )
        assert mx.array_equal(mine, other)


def test_mlx_lms_generation_quantizes_our_rings_and_refuses_its_own():
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0, "prefill_step_size": 16}
    tokens = [(7 * i) % 61 for i in range(50)]
    model = tiny_models.make("gemma3")
    with pytest.raises(NotImplementedError):
        prefill(model, tokens, cache.make_prompt_cache(model), **options)
    caches = ours.make_prompt_cache(model)
    steps = generate_step(mx.array(tokens), model, max_tokens=20, prompt_cache=caches, **options)
    assert len(list(steps)) == 20
    assert {type(c) for c in caches} == {ours.QuantizedRotatingKVCache, ours.QuantizedKVCache}
    assert {c.offset for c in caches} == {70}


def test_our_prefill_quantizes_our_rings():
    model = tiny_llama(2)
    caches = [ours.RotatingKVCache(8, keep=2) for _ in range(2)]
    mlxrs_py.prefill(model, list(range(20)), caches, step_size=6, kv_bits=4, kv_group_size=32, quantized_kv_start=10)
    assert [type(c) for c in caches] == [ours.QuantizedRotatingKVCache] * 2
    assert [(c.offset, c.bits) for c in caches] == [(20, 4)] * 2


def test_a_model_with_attention_sinks_refuses_quantized_caches_in_plain_words():
    model = tiny_models.make("gpt_oss")
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0, "step_size": 8}
    caches = ours.make_prompt_cache(model)
    with pytest.raises(ValueError, match="does not support attention sinks"):
        mlxrs_py.prefill(model, list(range(20)), caches, **options)
    # The first window was computed before anything was quantized: it stays.
    assert {c.offset for c in caches} == {8}


def test_a_file_with_a_quantized_ring_is_refused_cleanly_by_mlx_lm(tmp_path):
    ring = ours.QuantizedRotatingKVCache(8, keep=2, group_size=32)
    ring.update_and_fetch(noise(1, 1, 2, 11, 32), noise(2, 1, 2, 11, 32))
    file = str(tmp_path / "ring.safetensors")
    ours.save_prompt_cache(file, [ring])
    with pytest.raises(KeyError, match="QuantizedRotatingKVCache"):
        cache.load_prompt_cache(file)
    with pytest.raises(ValueError, match=r"0\.31"):
        ours.save_prompt_cache(file, [ring], format="0.31")
    (loaded,) = ours.load_prompt_cache(file)
    assert (loaded.offset, loaded.keep, loaded.max_size, loaded.bits) == (11, 2, 8, 8)
