"""What the core tells arrives in Python's logging."""

import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import mlxrs_py
from tiny import TinyModel

PROMPT = list(range(40))


def open_store(folder):
    return mlxrs_py.PromptStore(folder, ram_bytes=0, disk_bytes=1 << 30, block_tokens=16)


def damaged_store(folder):
    """Make a store whose records all have a wrong bit."""
    with open_store(folder) as store:
        view = store.view(TinyModel())
        view.put(PROMPT, view.prefill(TinyModel(), PROMPT)[1]).result()
    for record in (folder / "records").iterdir():
        raw = bytearray(record.read_bytes())
        raw[len(raw) // 2] ^= 1
        record.write_bytes(raw)


def test_a_warning_of_the_core_is_a_record_of_logging(tmp_path, caplog):
    damaged_store(tmp_path / "store")
    caplog.set_level(logging.WARNING)
    with open_store(tmp_path / "store") as store:
        assert store.view(TinyModel()).restore(PROMPT)[1] == 0
    # It comes from a thread of its own.
    until = time.monotonic() + 30
    while not caplog.records and time.monotonic() < until:
        time.sleep(0.01)
    record = caplog.records[0]
    assert (record.levelname, record.name.split(".")[0]) == ("WARNING", "mlxrs_py")
    assert "record" in record.getMessage()


def stderr_of(program, **environment):
    program = 'import logging; logging.basicConfig(level=0, format="%(levelname)s %(name)s %(message)s")\n' + program
    command = [sys.executable, "-c", textwrap.dedent(program)]
    folder = Path(__file__).parent
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=env).stderr


def test_what_is_told_last_is_heard_before_the_process_ends(tmp_path):
    damaged_store(tmp_path / "store")
    program = f"""
import mlxrs_py
from tiny import TinyModel
store = mlxrs_py.PromptStore({str(tmp_path / "store")!r}, ram_bytes=0, disk_bytes=1 << 30, block_tokens=16)
assert store.view(TinyModel()).restore(list(range(40)))[1] == 0
"""
    assert "WARNING mlxrs_py." in stderr_of(program)


@pytest.mark.parametrize("level", ["", "debug"])
def test_small_things_are_told_if_they_are_asked_for(level, tmp_path):
    stray = tmp_path / ".p.safetensors.1.0123456789abcdef.tmp.safetensors"
    stray.touch()
    program = f"""
import mlxrs_py
from mlxrs_py.cache import KVCache, save_prompt_cache
save_prompt_cache({str(tmp_path / "p")!r}, [KVCache()])
"""
    told = stderr_of(program, MLXRS_PY_LOG=level)
    assert not stray.exists()
    assert ("DEBUG mlxrs_py.persist.atomic.sweep removed a dead temporary file" in told) == (level == "debug")


def test_a_handler_that_fails_stops_nothing(tmp_path, caplog, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)

    class Failing(logging.Handler):
        def emit(self, record):
            raise ValueError("no")

    damaged_store(tmp_path / "store")
    logger = logging.getLogger("mlxrs_py")
    handler = Failing()
    logger.addHandler(handler)
    try:
        with open_store(tmp_path / "store") as store:
            assert store.view(TinyModel()).restore(PROMPT)[1] == 0
        until = time.monotonic() + 30
        while not seen and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        logger.removeHandler(handler)
    assert seen and isinstance(seen[0].exc_value, ValueError)
