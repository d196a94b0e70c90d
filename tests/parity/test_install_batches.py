"""``kv_bits`` on mlx-lm's batch path, where mlx-lm itself drops or refuses it."""

import inspect
from argparse import Namespace
from types import SimpleNamespace

import mlx.core as mx
import pytest

import mlxrs_py
import mlxrs_py.cache as ours

from .reference import BatchGenerator, ResponseGenerator, tiny_llama
from .spy import calls

PROMPTS = [[5, 7, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12, 13, 14]]
OPTIONS = {"kv_bits": 8, "kv_group_size": 32}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(autouse=True)
def installed():
    with mlxrs_py.install():
        yield


def three(logprobs):
    return mx.full((logprobs.shape[0],), 3)


def generate(model, prompts=PROMPTS, late=(), caches=None, n_tokens=6, **options):
    """Run prompts as one batch, the late ones from the third step on, and give each one's caches at its end.

    Whatever the model says, the token is 3: so both runs see the same tokens.
    """
    generator = BatchGenerator(model, max_tokens=n_tokens, sampler=three, **options)
    uids = generator.insert([list(prompt) for prompt in prompts], caches=caches)
    finished, steps = {}, 0
    while len(finished) < len(prompts) + len(late):
        steps += 1
        if steps == 3 and late:
            uids += generator.insert([list(prompt) for prompt in late])
        for response in generator.next()[1]:
            if response.finish_reason:
                finished[response.uid] = response.prompt_cache
    generator.close()
    return [finished[uid] for uid in uids]


def assert_quantized_once(caches, plain):
    """The first layer's keys depend on the tokens alone, so both runs quantize the same rows there."""
    for row, plain_row in zip(caches, plain, strict=True):
        assert {type(c) for c in row} == {ours.QuantizedKVCache}
        keys = plain_row[0].keys_and_values()[0]
        expected = mx.quantize(keys, group_size=32, bits=8)
        for part, expected_part in zip(row[0].keys_and_values()[0], expected, strict=True):
            assert mx.array_equal(part, expected_part)


def test_a_batch_is_quantized_when_its_longest_sequence_reaches_the_start(model):
    plain = generate(model)
    assert {type(c) for row in plain for c in row} == {ours.KVCache}
    with calls([ours.BatchKVCache, ours.BatchQuantizedKVCache]) as counts:
        caches = generate(model, quantized_kv_start=12, **OPTIONS)
    assert_quantized_once(caches, plain)
    # The prompt and some steps ran before it.
    n_plain, n_quantized = (counts[cls, "update_and_fetch"] for cls in (ours.BatchKVCache, ours.BatchQuantizedKVCache))
    assert n_plain > 4 * 3 and n_quantized >= 4 * 2


def test_below_the_start_nothing_is_quantized(model):
    caches = generate(model, quantized_kv_start=100, **OPTIONS)
    assert {type(c) for row in caches for c in row} == {ours.KVCache}


def test_a_sequence_that_comes_late_joins_a_quantized_batch(model):
    late = [[21, 22, 23, 24], [31]]
    plain = generate(model, late=late)
    with calls([ours.BatchQuantizedKVCache]) as counts:
        caches = generate(model, late=late, quantized_kv_start=5, **OPTIONS)
    assert_quantized_once(caches, plain)
    assert counts[ours.BatchQuantizedKVCache, "extend"] >= 4


def test_a_long_sequence_that_comes_late_quantizes_the_short_ones(model):
    late = [list(range(1, 30))]
    plain = generate(model, [[5, 7, 9], [2, 3]], late=late, n_tokens=8)
    caches = generate(model, [[5, 7, 9], [2, 3]], late=late, n_tokens=8, quantized_kv_start=20, **OPTIONS)
    assert_quantized_once(caches, plain)


def test_quantized_and_plain_prompt_caches_become_one_batch(model):
    def filled(bits):
        caches = ours.make_prompt_cache(model)
        model(mx.array([[1, 2, 3, 4]]), cache=caches)
        return [c.to_quantized(group_size=32, bits=8) for c in caches] if bits else caches

    plain = [filled(None), filled(None)]
    plain = generate(model, [[5, 6], [7, 8, 9]], caches=plain)
    mixed = [filled(None), filled(8)]
    caches = generate(model, [[5, 6], [7, 8, 9]], caches=mixed)
    assert_quantized_once(caches, plain)
    assert mixed[0][0].offset == mixed[1][0].offset == 4 and type(mixed[0][0]) is ours.KVCache


def test_bits_that_cannot_be_are_refused_before_any_token(model):
    with pytest.raises(ValueError, match="bits"):
        BatchGenerator(model, kv_bits=7)
    with pytest.raises(ValueError, match="group"):
        BatchGenerator(model, kv_bits=8, kv_group_size=64)
    with pytest.raises(ValueError, match="expected caches that can be batched, got QuantizedRotatingKVCache"):
        BatchGenerator(tiny_llama(2, layer_types=["full_attention", "sliding_attention"], sliding_window=8), **OPTIONS)


def test_without_install_mlx_lm_takes_no_kv_bits():
    assert "kv_bits" in inspect.signature(BatchGenerator.__init__, follow_wrapped=False).parameters
    mlxrs_py.uninstall()
    assert "kv_bits" not in inspect.signature(BatchGenerator.__init__).parameters


@pytest.mark.parametrize(("group_size", "expected"), [(32, True), (64, False)])
def test_the_server_makes_batches_only_of_what_can_be_quantized(model, group_size, expected):
    options = Namespace(kv_bits=8, kv_group_size=group_size, quantized_kv_start=0)
    provider = SimpleNamespace(is_batchable=True, model=model, model_key="tiny", cli_args=options)
    server = SimpleNamespace(model_provider=provider, cli_args=options)
    is_batchable = ResponseGenerator._is_batchable
    assert is_batchable(server, Namespace(seed=None)) is expected
    assert is_batchable(server, Namespace(seed=1)) is False
