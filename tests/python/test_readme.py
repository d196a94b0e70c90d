"""What the README and the page of the prompt store say is run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
STORE = (PROJECT / "docs" / "prompt-store.md").read_text(encoding="utf-8")


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.real_model
@pytest.mark.parametrize("code", blocks("python") + blocks("python", STORE))
def test_the_python_examples_run(code, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.real_model
def test_the_commands_run(tmp_path):
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("mlxrs-py")]
    assert len(commands) == 9
    for command in commands:
        words = [sys.executable, "-m", "mlxrs_py", *shlex.split(command, comments=True)[1:]]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            words, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=280, check=False
        )
        assert result.returncode == 0, (command, result.stderr)


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
