"""The examples run, twice: the second time they find what the first one stored."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlxrs_py

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments, text=""):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [(int(n), int(of)) for n, of in re.findall(r"\[(\d+) of (\d+) tokens were there", result.stdout)]


@pytest.mark.real_model
def test_a_chat_goes_on_after_its_program_has_ended(tmp_path):
    ((first, n_tokens),) = run("chat.py", tmp_path, text="My name is Ada.\n")
    (second, third) = run("chat.py", tmp_path, text="What is my name?\nAnd who are you?\n")
    assert first == 0
    assert second[0] >= n_tokens - 1 and third[0] >= second[1] - 1


@pytest.mark.real_model
def test_a_document_is_computed_once(tmp_path):
    first = run("document.py", tmp_path)
    assert [n > 0.9 * of for n, of in first] == [False, True, True]
    assert all(n >= of - 2 for n, of in run("document.py", tmp_path))


@pytest.mark.real_model
def test_agents_share_a_system_prompt_over_a_restart(tmp_path):
    first = run("agents.py", tmp_path)
    assert [n > 0.9 * of for n, of in first] == [False, True, True]
    assert all(n > 0.9 * of for n, of in run("agents.py", tmp_path))


def test_the_language_model_of_a_vision_model_runs_on_a_store():
    language = pytest.importorskip("mlx_vlm.models.llava.language")
    config = importlib.import_module("mlx_vlm.models.llava.config")
    spec = importlib.util.spec_from_file_location("vision", EXAMPLES / "vision.py")
    vision = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vision)
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 61, "rope_theta": 1e4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    model = language.LanguageModel(config.TextConfig(model_type="llama", **shape, **heads))
    prompt = [(7 * i * i + 3 * i) % 61 for i in range(100)]
    with mlxrs_py.PromptStore(disk_bytes=0, block_tokens=16) as store:
        view = store.view(model)
        tokens, n_restored = vision.answer(model, view, prompt, 5)
        assert n_restored == 0
        assert vision.answer(model, view, prompt, 5) == (tokens, 99)
        assert vision.answer(model, view, prompt + tokens + [3], 5)[1] == 105
