"""After ``install()`` mlx-lm says on the default model what it says without, and our caches ran."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import mlxrs_py
import mlxrs_py.cache as ours
from mlxrs_py.default_model import default_model_path

from .reference import batch_generate, generate, load, stream_generate
from .reference import cache as theirs
from .served import OURS, THEIRS, serve
from .spy import by_class, calls

pytestmark = pytest.mark.real_model

PROMPT = "The capital of France is"
CLASSES = [theirs.KVCache, theirs.BatchKVCache, ours.KVCache, ours.BatchKVCache]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return load(str(default_model_path()))


def both(say):
    """Say it without and with our caches; give what was said with the calls, by method, into ours."""
    expected = say()
    with mlxrs_py.install(), calls(CLASSES) as counts:
        found = say()
    assert found == expected
    assert all(name.startswith("mlxrs_py.") for name in by_class(counts)), counts
    return found, {name: n for (_, name), n in counts.items()}


def test_generate(model_and_tokenizer):
    text, ran = both(lambda: generate(*model_and_tokenizer, PROMPT, max_tokens=4))
    assert "Paris" in text and ran["update_and_fetch"] >= 4 * 30


def test_stream_generate(model_and_tokenizer):
    parts, ran = both(lambda: [part.text for part in stream_generate(*model_and_tokenizer, PROMPT, max_tokens=4)])
    assert len(parts) == 4 and ran["update_and_fetch"] >= 4 * 30


def test_batch_generate(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts = [tokenizer.encode(text) for text in (PROMPT, "The capital of Italy, a country in Europe, is")]
    texts, ran = both(lambda: batch_generate(model, tokenizer, prompts, max_tokens=4).texts)
    assert "Paris" in texts[0] and texts[1] not in ("", texts[0]) and ran["merge"] >= 30


def test_speculative_decoding(model_and_tokenizer):
    """The draft is the model without its last layers, so that it is often wrong."""
    draft, _ = load(str(default_model_path()))
    draft.model.layers = draft.model.layers[:20]
    options = {"draft_model": draft, "num_draft_tokens": 2, "max_tokens": 5}
    parts, ran = both(
        lambda: [(part.token, part.from_draft) for part in stream_generate(*model_and_tokenizer, PROMPT, **options)]
    )
    assert len(parts) == 5 and ran["trim"] >= 30
    assert not all(from_draft for _, from_draft in parts)


def test_the_server():
    """The second request begins with what was said before, so most of its prompt is cached."""
    said = []
    model = ["--model", str(default_model_path()), "--log-level", "ERROR"]
    for code in (THEIRS, OURS):
        with serve(code, *model) as server:
            first = server.complete(PROMPT)
            second = server.complete(f"{PROMPT} {first[0]} And of Italy it is", stream=True)
        said.append((first, second))
    assert said[0] == said[1]
    assert "Paris" in said[1][0][0] and said[1][1][1] >= 10
    assert all(name.startswith("mlxrs_py.") for name in server.counts), server.counts
    assert sum(n for name, n in server.counts.items() if name.endswith(".update_and_fetch")) >= 30, server.counts


def test_two_requests_at_once_are_quantized_in_one_batch():
    """mlx-lm's server runs requests one by one as soon as it gets --kv-bits."""
    model = [
        "--model",
        str(default_model_path()),
        "--log-level",
        "ERROR",
        "--kv-bits",
        "8",
        "--quantized-kv-start",
        "4",
    ]
    answers = []
    with serve(OURS, *model) as server, ThreadPoolExecutor() as pool:

        def join_in():
            if len(answers) == 0:
                answers.append(pool.submit(server.complete, "The capital of Italy is"))

        first, _ = server.complete(PROMPT, on_line=join_in, max_tokens=24, stream=True)
        second, _ = answers[0].result()
    assert "Paris" in first and "Rome" in second
    assert all(name.startswith("mlxrs_py.") for name in server.counts), server.counts
    # Each of the 30 layers took the second request into a batch that ran.
    assert server.counts["mlxrs_py.cache.BatchQuantizedKVCache.extend"] == 30
    assert server.counts["mlxrs_py.cache.BatchQuantizedKVCache.update_and_fetch"] >= 30 * 20
