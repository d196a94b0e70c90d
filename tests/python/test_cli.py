"""The command line, as a process: what a person and a script see."""

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
from tiny import TinyModel

ESCAPE = "\x1b"


def run(*arguments, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mlxrs_py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False, **options)


@pytest.fixture
def saved(tmp_path):
    return mlxrs_py.cache_prompt_ids(
        TinyModel(), [1, 2, 3], tmp_path / "p", model_id="tiny", metadata={"note": "hello"}
    ).file


def test_help_names_every_command():
    result = run("--help")
    assert result.returncode == 0
    for command in ("cache-prompt", "generate", "inspect", "default-model"):
        assert command in result.stdout
        assert run(command, "--help").returncode == 0


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
    assert "note = hello" in result.stdout and ESCAPE not in result.stdout


def test_inspect_gives_json(saved):
    info = json.loads(run("inspect", "--json", saved).stdout)
    assert info["format"] == "0.32" and info["metadata"]["model"] == "tiny"
    assert [(layer["class"], layer["offset"], layer["shape"]) for layer in info["layers"]] == [
        ("KVCache", 3, [1, 2, 3, 32])
    ] * 2


def test_an_error_is_one_line_and_debug_shows_its_traceback(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not a cache file")
    for file in (tmp_path / "bad.safetensors", tmp_path / "missing"):
        result = run("inspect", file)
        assert result.returncode == 1
        assert result.stdout == "" and len(result.stderr.splitlines()) == 1 and str(file) in result.stderr
    result = run("inspect", "--debug", tmp_path / "missing")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_a_reader_that_goes_away_is_no_traceback(saved):
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxrs_py", "inspect", "--json", saved], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()


def test_inspect_needs_no_mlx_lm(saved):
    code = "import sys; sys.modules['mlx_lm'] = None; from mlxrs_py.cli import main; sys.exit(main(['inspect', sys.argv[1]]))"
    assert subprocess.run([sys.executable, "-c", code, saved], check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A prompt that the default model was run on by the command line, in a pipe."""
    file = tmp_path_factory.mktemp("cli") / "alice.safetensors"
    prompt = "Alice has a red bicycle and Bob has a blue car. "
    result = run(
        "cache-prompt",
        "--prompt",
        prompt,
        "--prompt-cache-file",
        file,
        "--metadata",
        "who=me",
        "--prefill-step-size",
        16,
    )
    return file, result


@pytest.mark.real_model
def test_cache_prompt_prints_plain_lines_into_a_pipe(cached):
    file, result = cached
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and ESCAPE not in result.stderr and "\r" not in result.stderr
    assert "16/37 tokens" in result.stderr and "37/37 tokens" in result.stderr
    info = _core.inspect_file(file)
    assert info["metadata"]["who"] == "me" and {layer["offset"] for layer in info["layers"]} == {37}


@pytest.mark.real_model
def test_generate_answers_from_the_cache_as_mlx_lm_does(cached):
    file, _ = cached
    question = ("--prompt-cache-file", str(file), "--prompt", "What color is the bicycle?", "--max-tokens", "12")
    ours = run("generate", *question, "--json")
    assert ours.returncode == 0, ours.stderr
    answer = json.loads(ours.stdout)
    assert answer["cache"] == ["mlxrs_py.cache.KVCache"] and answer["generation_tokens"] == 12
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    folder = run("default-model").stdout.strip()
    theirs = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", "--model", folder, *question, "--verbose", "False"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=280,
    )
    assert theirs.stdout.strip() == answer["text"].strip()


@pytest.mark.real_model
def test_generate_reads_what_mlx_lm_saved(cached, tmp_path):
    file, _ = cached
    folder = run("default-model").stdout.strip()
    theirs = tmp_path / "theirs.safetensors"
    prompt = "Alice has a red bicycle and Bob has a blue car. "
    subprocess.run(
        [
            sys.executable,
            "-m",
            "mlx_lm",
            "cache_prompt",
            "--model",
            folder,
            "--prompt",
            prompt,
            "--prompt-cache-file",
            theirs,
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=280,
    )
    question = ("--prompt", "What color is the bicycle?", "--max-tokens", "12")
    answers = [run("generate", "--prompt-cache-file", f, *question) for f in (file, theirs)]
    assert [a.returncode for a in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout


@pytest.mark.real_model
def test_generate_refuses_the_cache_of_another_model_and_a_wrong_number_of_layers(cached, tmp_path):
    from mlxrs_py.cache import load_prompt_cache, save_prompt_cache

    caches, metadata = load_prompt_cache(cached[0], return_metadata=True)
    save_prompt_cache(tmp_path / "other", caches, {**metadata, "mlxrs_config_blake3": "0" * 64})
    save_prompt_cache(tmp_path / "short", caches[:-1], metadata)
    named = {k: v for k, v in metadata.items() if not k.startswith("mlxrs")}
    save_prompt_cache(tmp_path / "named", caches, {**named, "model": "somebody/else"})
    for name, words, extra in [
        ("other", "another model", ()),
        ("short", "expected 30 caches", ()),
        ("named", "somebody/else", ("--model", metadata["model"])),
    ]:
        result = run("generate", "--prompt-cache-file", tmp_path / name, "--prompt", "Hi", *extra)
        assert result.returncode == 1 and words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.real_model
def test_a_terminal_sees_a_bar_and_ctrl_c_leaves_no_file(tmp_path):
    screen, terminal = pty.openpty()
    prompt = "one two three four five six seven eight nine ten " * 40
    command = [
        sys.executable,
        "-m",
        "mlxrs_py",
        "cache-prompt",
        "--prompt",
        prompt,
        "--prompt-cache-file",
        str(tmp_path / "x"),
        "--prefill-step-size",
        "8",
    ]
    process = subprocess.Popen(
        command,
        stderr=terminal,
        stdout=terminal,
        stdin=terminal,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm", "COLUMNS": "100"},
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
