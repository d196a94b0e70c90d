"""mlx-lm's server as a process that is killed: the next one answers from the disk."""

import pytest

from mlxrs_py.default_model import default_model_path

from .served import OURS, THEIRS, serve, wait_for_writes
from .tiny_folders import save, words

OPTIONS = ("--prefill-step-size", "512", "--log-level", "ERROR")


def conversation(text):
    return [
        {"role": "system", "content": text("You are a terse clerk.", 600)},
        {"role": "user", "content": text("Hi", 9)},
    ]


def killed_and_asked_again(model, messages, more, tmp_path, **options):
    store = ("--model", str(model), *OPTIONS, "--prompt-store", str(tmp_path / "store"))
    with serve(OURS, *store) as server:
        first, n_cached, _ = server.chat(messages, **options)
        assert n_cached == 0
        wait_for_writes(tmp_path / "store")
        server.kill()
    with serve(OURS, *store) as server:
        grown = [*messages, {"role": "assistant", "content": first}, more]
        return first, server.chat(messages, **options), server.chat(grown, **options), grown


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next", "llama4"])
@pytest.mark.parametrize("options", [{}, {"seed": 1}], ids=["batched", "alone"])
def test_tiny_models_go_on_after_a_kill(name, options, tmp_path):
    model = save(name, tmp_path / name)
    messages = conversation(lambda _, n: words(n))
    more = {"role": "user", "content": words(12, 50)}
    first, again, grown, _ = killed_and_asked_again(model, messages, more, tmp_path, **options)
    text, n_cached, n_tokens = again
    assert text == first and n_cached == n_tokens - 1
    assert grown[1] >= n_tokens - 1


@pytest.mark.real_model
def test_the_default_model_goes_on_after_a_kill(tmp_path):
    model = default_model_path()
    messages = conversation(lambda text, n: text + " Paper is sorted by colour." * (n // 6))
    more = {"role": "user", "content": "And now?"}
    first, again, grown, asked = killed_and_asked_again(model, messages, more, tmp_path)
    assert again[0] == first and again[1] == again[2] - 1
    # The end of the answer is not in the caches: the length was reached before.
    assert again[2] < grown[1] < grown[2]
    with serve(THEIRS, "--model", str(model), *OPTIONS) as server:
        assert server.chat(messages)[0] == first
        assert server.chat(asked)[0] == grown[0]
