"""mlx-lm's own batched generation, on its caches and on ours: unequal prompts in chunks, sequences that end."""

import importlib

import pytest

import mlxrs_py

from .reference import tiny_llama

generate = importlib.import_module("mlx_lm.generate")
caches = importlib.import_module("mlx_lm.models.cache")

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 4], [5, 6, 7, 8, 9], [11]]
KINDS = {
    "growing": lambda: caches.KVCache(),
    "rings": lambda: caches.RotatingKVCache(6),
    "quantized": lambda: caches.QuantizedKVCache(32, 8),
}


def batched(kind):
    """Run all prompts in one batch, ends at different steps; give tokens and the caches of the first layer."""
    model = tiny_llama()
    generator = generate.BatchGenerator(model, prefill_step_size=4)
    rows = [[KINDS[kind]() for _ in model.layers] for _ in PROMPTS]
    uids = generator.insert(PROMPTS, max_tokens=[6, 9, 4, 12], caches=rows)
    tokens, last = {uid: [] for uid in uids}, {}
    for _ in range(100):
        for response in generator.next()[1]:
            tokens[response.uid].append(response.token)
            if response.finish_reason:
                last[response.uid] = response.prompt_cache[0]
        if len(last) == len(PROMPTS):
            break
    return [tokens[uid] for uid in uids], [last[uid] for uid in uids]


@pytest.mark.parametrize("kind", ["growing", "rings"])
def test_a_batch_generates_the_same_tokens_on_our_caches(kind, without_compiling):
    expected, others = batched(kind)
    with mlxrs_py.install():
        tokens, mine = batched(kind)
    assert tokens == expected and [len(row) for row in tokens] == [6, 9, 4, 12]
    assert [cache.offset for cache in mine] == [cache.offset for cache in others]
    assert {type(cache).__module__ for cache in mine} == {"mlxrs_py.cache"}


def test_quantized_caches_generate_in_a_batch_where_mlx_lm_refuses_them(without_compiling):
    with pytest.raises(ValueError, match="does not yet support batching with history"):
        batched("quantized")
    with mlxrs_py.install():
        tokens, mine = batched("quantized")
    assert [len(row) for row in tokens] == [6, 9, 4, 12]
    assert {(type(cache).__name__, cache.bits) for cache in mine} == {("QuantizedKVCache", 8)}
