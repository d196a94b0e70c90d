"""The examples run, twice: the second time they find what the first one stored."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def started(*arguments, text="", path=""):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": str(path)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def counts(output):
    return [(int(n), int(of)) for n, of in re.findall(r"\[(\d+) of (\d+) tokens were there", output)]


def run(name, *arguments, text=""):
    return counts(started(EXAMPLES / name, *arguments, text=text))


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


#: Saves the tiny model; then prints mlx-vlm's own answers to the example's questions. A process of its own, since
#: importing mlx-vlm changes transformers.
VLM = """
import sys
from pathlib import Path

import mlxrs_py

sys.path.insert(0, sys.argv[2])
from mlx_vlm import generate, load
from parity.tiny_folders import save_llava
from vision import QUESTIONS, messages

model, processor = load(str(save_llava(Path(sys.argv[1]))))
for question in QUESTIONS:
    text = processor.tokenizer.apply_chat_template(messages(question), add_generation_prompt=True, tokenize=False)
    print(generate(model, processor, text, max_tokens=20, temperature=0.0, verbose=False).text)
"""


def test_a_vision_model_answers_as_mlx_vlm_does_and_finds_its_prompts_again(tmp_path):
    model, store = tmp_path / "model", tmp_path / "store"
    expected = started("-c", VLM, model, EXAMPLES.parent / "tests", path=EXAMPLES).splitlines()
    outputs = [started(EXAMPLES / "vision.py", store, model) for _ in range(2)]
    assert [output.splitlines()[1::2] for output in outputs] == [expected] * 2
    (first, second), again = counts(outputs[0]), counts(outputs[1])
    # The questions are alike up to their ends.
    assert first[0] == 0 and second[0] >= first[1] - 1
    assert again == [(n_tokens - 1, n_tokens) for _, n_tokens in (first, second)]
