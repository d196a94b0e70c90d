"""SmolLM2 answers the same from our saved and loaded cache as from mlx-lm's own."""

import mlx.core as mx
import pytest

import mlxrs_py
import mlxrs_py.cache as ours
from mlxrs_py.default_model import default_model_path

from .reference import cache as theirs
from .reference import generate_step, load, prefill

pytestmark = pytest.mark.real_model

PROMPT = (
    "The lighthouse of Alder Point was built in 1871 from grey granite. Its first keeper, Marta Lindqvist, lived there "
    "with two cats and a goat. Every evening she climbed the 127 steps, lit the lamp, and wrote the weather into a "
    "blue book. In the winter of 1882 a storm broke the great window, and she held a sail over the gap until morning, "
    "so that the ships in the bay saw the light all night. The town gave her a silver watch for it."
)
QUESTION = "\nQuestion: What was the name of the first keeper of the lighthouse?\nAnswer:"
N_TOKENS = 24


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return load(str(default_model_path()))


def answer(model, question, caches):
    """Generate greedily on these caches, and tell what was said."""
    return [token for token, _ in generate_step(mx.array(question), model, max_tokens=N_TOKENS, prompt_cache=caches)]


def compare(model_and_tokenizer, make, fill, expected_class, tmp_path, question=QUESTION):
    """Fill, save, load and go on, once with our classes and functions and once with mlx-lm's."""
    model, tokenizer = model_and_tokenizer
    prompt, question = tokenizer.encode(PROMPT), tokenizer.encode(question, add_special_tokens=False)
    assert len(prompt) > 100
    texts = []
    for module in (ours, theirs):
        caches = [make(module) for _ in model.layers]
        fill(module, model, prompt, caches)
        file = str(tmp_path / f"{module.__name__}.safetensors")
        module.save_prompt_cache(file, caches)
        loaded = module.load_prompt_cache(file)
        tokens = answer(model, question, loaded)
        assert {type(c) for c in (*caches, *loaded)} == {getattr(module, expected_class)}
        assert {c.offset for c in loaded} == {len(prompt) + len(question) + N_TOKENS}
        assert {c.offset for c in caches} == {len(prompt)}
        assert len(tokens) == N_TOKENS
        texts.append((tokens, tokenizer.decode(tokens)))
    assert texts[0] == texts[1]
    return texts[0][1]


def in_chunks(step, **options):
    """Run the prompt as a user would: with our prefill, or mlx-lm's."""

    def fill(module, model, prompt, caches):
        if module is ours:
            mlxrs_py.prefill(model, prompt, caches, step_size=step, **options)
        else:
            prefill(model, prompt, caches, prefill_step_size=step, **options)

    return fill


def test_a_plain_cache(model_and_tokenizer, tmp_path):
    text = compare(model_and_tokenizer, lambda m: m.KVCache(), in_chunks(2048), "KVCache", tmp_path)
    assert "Marta Lindqvist" in text


def test_a_quantized_cache(model_and_tokenizer, tmp_path):
    fill = in_chunks(64, kv_bits=8, quantized_kv_start=0)
    text = compare(model_and_tokenizer, lambda m: m.KVCache(), fill, "QuantizedKVCache", tmp_path)
    assert "Marta Lindqvist" in text


def test_rings_of_64_tokens(model_and_tokenizer, tmp_path):
    make = lambda m: m.RotatingKVCache(max_size=64, keep=0)  # noqa: E731
    compare(model_and_tokenizer, make, in_chunks(32), "RotatingKVCache", tmp_path)


def test_rings_of_64_tokens_that_keep_the_first_4(model_and_tokenizer, tmp_path):
    """The masks of several tokens that meet a full ring differ on purpose, so the ring fills one by one."""

    def fill(module, model, prompt, caches):
        model(mx.array([prompt[:60]]), cache=caches)
        for token in prompt[60:]:
            mx.eval(model(mx.array([[token]]), cache=caches))

    assert len(model_and_tokenizer[1].encode(" The", add_special_tokens=False)) == 1
    make = lambda m: m.RotatingKVCache(max_size=64, keep=4)  # noqa: E731
    compare(model_and_tokenizer, make, fill, "RotatingKVCache", tmp_path, question=" The")
