"""After ``install()`` mlx-lm says on the default model what it says without, and our caches ran."""

import pytest

import mlxrs_py
import mlxrs_py.cache as ours
from mlxrs_py.default_model import default_model_path

from .reference import cache as theirs
from .reference import generate, load, stream_generate
from .served import OURS, THEIRS, serve
from .spy import by_class, calls

pytestmark = pytest.mark.real_model

PROMPT = "The capital of France is"
CLASSES = [theirs.KVCache, theirs.BatchKVCache, ours.KVCache, *filter(None, [getattr(ours, "BatchKVCache", None)])]


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
    assert server.counts["mlxrs_py.cache.KVCache"] >= 30
