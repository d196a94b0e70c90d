"""``mlxrs-py run``, as a process."""

import os
import subprocess
import sys

import pytest

#: Needs mlx-lm, although no real model.
needs_mlx_lm = pytest.mark.real_model

PROGRAM = """
import sys
from mlx_lm.models.cache import KVCache
from mlx_lm.models.llama import KVCache as imported_there

print(__name__, KVCache.__module__, imported_there.__module__, sys.argv[1:])
if "fail" in sys.argv:
    raise RuntimeError("a fault of the program")
sys.exit(3)
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "mlxrs_py", "run", *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    return run


@needs_mlx_lm
def test_a_module_runs_as_main_with_our_caches_its_arguments_and_its_exit_code(run):
    result = run("program", "--flag", "-h", "word")
    expected = "__main__ mlxrs_py.cache mlxrs_py.cache ['--flag', '-h', 'word']\n"
    assert (result.returncode, result.stdout, result.stderr) == (3, expected, "")


@needs_mlx_lm
def test_an_error_of_the_module_is_shown_as_python_shows_it(run):
    result = run("program", "fail")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback") and "RuntimeError: a fault of the program" in result.stderr


@needs_mlx_lm
def test_the_store_is_taken_out_of_the_servers_arguments_and_before_the_module_of_any(run):
    store, other = ("--prompt-store", "folder", "--prompt-store-bytes", "20MB"), ("--prompt-store", "other")
    result = run(*store, "program", *other)
    assert (result.returncode, result.stdout) == (3, f"__main__ mlxrs_py.cache mlxrs_py.cache {list(other)}\n")
    for server in (("mlx_lm.server",), ("mlx_lm", "server")):
        result = run(*server, *store, "--no-such-flag")
        assert result.returncode == 2 and result.stderr.endswith("unrecognized arguments: --no-such-flag\n")


@needs_mlx_lm
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mlx_lm.server", "--prompt-store"], "--prompt-store: expected one argument"),
        (["mlx_lm.server", "--prompt-store", "x", "--prompt-store-bytes", "many"], "500MB"),
        (["mlx_lm.server", "--prompt-store-bytes", "1GB"], "--prompt-store-bytes needs --prompt-store"),
    ],
)
def test_a_wrong_store_is_told_before_the_server_runs(run, arguments, words):
    result = run(*arguments)
    assert result.returncode in (1, 2) and words in result.stderr and "Traceback" not in result.stderr


@needs_mlx_lm
def test_help_of_the_server_makes_no_store(run, tmp_path):
    result = run("mlx_lm.server", "--prompt-store", "folder", "--help")
    assert result.returncode == 0 and "--prompt-cache-bytes" in result.stdout
    assert not (tmp_path / "folder").exists()
    # Of another module nobody knows what -h means.
    assert run("--prompt-store", "folder", "program", "-h").returncode == 3
    assert (tmp_path / "folder").exists()


@needs_mlx_lm
@pytest.mark.parametrize("words", [("mlx_lm.generate",), ("mlx_lm", "generate")], ids=".".join)
def test_commands_of_mlx_lm_run_under_both_of_their_names(run, words):
    result = run(*words, "--help")
    assert result.returncode == 0 and "--prompt-cache-file" in result.stdout


def test_an_absent_mlx_lm_is_told_in_one_line(run, tmp_path):
    (tmp_path / "mlx_lm.py").write_text("raise ModuleNotFoundError(name='mlx_lm')")
    result = run("program")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "mlxrs-py: mlxrs_py.install needs mlx-lm: pip install mlx-lm==0.32.2\n"


def test_a_module_must_be_named(run):
    assert run().returncode == 2
