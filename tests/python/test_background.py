"""Saves that go on after their call."""

import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import mlx.core as mx
import pytest

from mlxrs_py import _core
from mlxrs_py.cache import (
    KVCache,
    PendingSave,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
    wait_for_saves,
)
from test_threads import elsewhere
from tiny import feed, leaves


def large(rows=4000, seed=0):
    """A cache of 16 KB a row: saving it takes a while."""
    cache = KVCache()
    keys, values = (mx.random.normal((1, 8, rows, 256), key=mx.random.key(seed + i)) for i in range(2))
    cache.update_and_fetch(keys, values)
    return cache


def held(cache):
    return leaves(cache.keys_and_values())


def script(text, *args):
    """Run a program of its own, in which `large` is known."""
    text = f"import os, sys, mlxrs_py; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + textwrap.dedent(text)
    return subprocess.run([sys.executable, "-c", text, *map(str, args)], capture_output=True, text=True, timeout=120)


def test_the_file_is_the_one_that_a_save_in_the_call_writes(tmp_path):
    caches = [feed(KVCache(), 300), feed(RotatingKVCache(8), 11), large(10)]
    assert save_prompt_cache(tmp_path / "a", caches, {"k": "v"}) is None
    pending = save_prompt_cache(tmp_path / "b", caches, {"k": "v"}, background=True)
    assert isinstance(pending, PendingSave)
    assert pending.result() is None and pending.done() and pending.exception() is None
    assert repr(pending) == f"<PendingSave of '{tmp_path}/b.safetensors', done>"
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("padded", [False, True])
def test_the_bytes_are_those_of_the_calls_moment(padded, tmp_path):
    cache, ring = large(), feed(RotatingKVCache(64), 64)
    expected = held(cache), held(ring)
    pending = save_prompt_cache(tmp_path / "p", [cache, ring], padded=padded, background=True)
    # Rows are appended, written over and taken back, all while the save runs or before.
    for _ in range(5):
        cache.update_and_fetch(mx.ones((1, 8, 3, 256)), mx.ones((1, 8, 3, 256)))
        cache.trim(100)
        mx.eval(cache.state)
        feed(ring, 5)
        mx.eval(ring.state)
    cache.keys = mx.zeros((1, 8, 4000, 256))
    pending.result()
    assert tuple(held(loaded) for loaded in load_prompt_cache(tmp_path / "p")) == expected


def test_lazy_arrays_are_computed_in_the_call(tmp_path):
    cache = feed(KVCache(), 20)
    rows = mx.random.normal((1, 2, 5, 32))
    cache.update_and_fetch(rows, rows * 2)
    save_prompt_cache(tmp_path / "p", [cache], background=True).result()
    assert held(load_prompt_cache(tmp_path / "p")[0]) == held(cache)


def test_of_saves_to_one_file_the_last_call_wins_and_handles_may_go(tmp_path):
    for seed in range(5):
        save_prompt_cache(tmp_path / "p", [large(500, seed)], background=True, durable=False)
    assert wait_for_saves() is True
    assert held(load_prompt_cache(tmp_path / "p")[0]) == held(large(500, 4))
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


def test_what_is_known_in_the_call_is_raised_by_it(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_prompt_cache(tmp_path / "missing" / "p", [feed(KVCache(), 3)], background=True)
    with pytest.raises(ValueError, match="padded"):
        save_prompt_cache(tmp_path / "p", [KVCache()], format="0.31", padded=True, background=True)
    with pytest.raises(ValueError, match="threads"):
        save_prompt_cache(tmp_path / "p", [KVCache()], threads=0, background=True)
    assert wait_for_saves(0) is True and list(tmp_path.iterdir()) == []


FULL = """
    import resource
    from test_background import *
    file = sys.argv[1]
    save_prompt_cache(file, [large(3)])
    before = open(file, "rb").read()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    pending = save_prompt_cache(file, [large()], background=True)
"""


def test_errors_are_kept_and_raised_each_time(tmp_path):
    text = f"""
    {FULL}
    for _ in range(2):
        try:
            pending.result()
        except OSError as error:
            assert error.filename == file and "File too large" in str(error), error
        else:
            raise AssertionError("no error")
        assert isinstance(pending.exception(), OSError) and pending.done()
    assert open(file, "rb").read() == before and len(os.listdir(os.path.dirname(file))) == 1
    """
    done = script(text, tmp_path / "p.safetensors")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_error_that_nobody_asks_for_is_told_at_the_end(tmp_path):
    done = script(FULL + "    del pending\n", tmp_path / "p.safetensors")
    assert done.returncode == 0 and "RuntimeWarning: a save in the background failed" in done.stderr, done
    assert "File too large" in done.stderr


def test_the_end_of_the_process_waits(tmp_path):
    text = """
    from test_background import *
    for at in range(3):
        save_prompt_cache(f"{sys.argv[1]}/{at}", [large(2000, at)], background=True)
    print(wait_for_saves(0))
    """
    done = script(text, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
    for at in range(3):
        assert held(load_prompt_cache(tmp_path / str(at))[0]) == held(large(2000, at))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_forked_child_neither_waits_nor_writes(tmp_path):
    text = """
    from test_background import *
    pending = [save_prompt_cache(f"{sys.argv[1]}/{at}", [large(2000, at)], background=True) for at in range(3)]
    child = os.fork()
    if child == 0:
        for save in pending:
            try:
                save.result()
            except RuntimeError as error:
                assert "a forked child" in str(error) and not save.done()
        assert wait_for_saves() is True
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for save in pending:
        save.result()
    """
    done = script(text, tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done
    for at in range(3):
        assert held(load_prompt_cache(tmp_path / str(at))[0]) == held(large(2000, at))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("wait", [lambda last: last.result(), lambda last: wait_for_saves()])
def test_ctrl_c_ends_the_waiting_and_not_the_saves(wait, tmp_path):
    pending = [save_prompt_cache(tmp_path / str(at), [large(3000, at)], background=True) for at in range(4)]
    threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        wait(pending[-1])
        # Over before it struck: it strikes here.
        threading.Event().wait(5)
    for at, save in enumerate(pending):
        save.result()
        assert held(load_prompt_cache(tmp_path / str(at))[0]) == held(large(3000, at))


def test_a_timeout_ends_the_waiting_and_not_the_save(tmp_path):
    pending = [save_prompt_cache(tmp_path / str(at), [large()], background=True) for at in range(3)]
    assert wait_for_saves(0) is False
    with pytest.raises(TimeoutError, match="goes on"):
        pending[-1].result(timeout=0)
    with pytest.raises(TimeoutError, match="goes on"):
        pending[-1].exception(-1)
    with pytest.raises(ValueError, match="nan"):
        pending[-1].result(float("nan"))
    assert pending[-1].result(timeout=1e30) is None


def test_any_thread_may_begin_a_save_and_any_may_wait(tmp_path):
    cache = large(300)
    mx.eval(cache.state)
    expected = held(cache)
    pending = elsewhere(lambda: save_prompt_cache(tmp_path / "p", [cache], background=True))
    elsewhere(pending.result)
    assert held(load_prompt_cache(tmp_path / "p")[0]) == expected


def test_nothing_is_held_when_the_save_is_over(tmp_path):
    before = _core._live_handles()
    pending = save_prompt_cache(tmp_path / "p", [feed(KVCache(), 20)], background=True)
    pending.result()
    wait_for_saves()
    assert _core._live_handles() == before
