"""Files whose arrays are read at first use."""

import os
from pathlib import Path

import mlx.core as mx
import pytest

from mlxrs_py.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from test_threads import elsewhere
from tiny import feed, leaves

OPEN_FILES = Path("/proc/self/fd")


def all_caches():
    states = ArraysCache(3)
    states[0], states[2] = mx.arange(6).reshape(2, 3), mx.zeros((0, 4))
    return [
        feed(KVCache(), 300),
        feed(KVCache(), 256),
        KVCache(),
        feed(QuantizedKVCache(32), 7),
        feed(RotatingKVCache(8), 11),
        feed(ConcatenateKVCache(), 5),
        feed(ChunkedKVCache(16), 20),
        states,
        CacheList(feed(KVCache(), 3), feed(RotatingKVCache(8), 3)),
    ]


@pytest.mark.parametrize(("layout", "padded"), [("0.32", False), ("0.32", True), ("0.31", False)])
def test_lazy_arrays_are_those_of_an_eager_load(layout, padded, tmp_path):
    caches = all_caches() if layout == "0.32" else all_caches()[:7]
    save_prompt_cache(tmp_path / "p", caches, {"k": "v"}, format=layout, padded=padded)
    eager, metadata = load_prompt_cache(tmp_path / "p", return_metadata=True)
    lazy, same = load_prompt_cache(tmp_path / "p", return_metadata=True, lazy=True)
    assert metadata == same
    for one, other in zip(lazy, eager, strict=True):
        assert type(one) is type(other) and one.nbytes == other.nbytes
        assert leaves(one.state) == leaves(other.state)
    for one, other in zip(lazy[:6], eager[:6], strict=True):
        assert leaves(feed(one, 4).state) == leaves(feed(other, 4).state)


def large(tmp_path, file="p"):
    cache = KVCache()
    rows = mx.random.normal((1, 2, 3000, 64))
    cache.update_and_fetch(rows, rows + 1)
    save_prompt_cache(tmp_path / file, [cache])
    return cache


def test_a_file_that_a_save_replaces_is_read_all_the_same(tmp_path):
    cache = large(tmp_path)
    lazy = load_prompt_cache(tmp_path / "p", lazy=True)[0]
    large(tmp_path)
    assert leaves(lazy.keys_and_values()) == leaves(cache.keys_and_values())
    (tmp_path / "p.safetensors").unlink()
    assert leaves(lazy.keys_and_values()) == leaves(cache.keys_and_values())


def shorten(file):
    os.truncate(file, 100_000)


def write_into(file):
    with file.open("r+b") as stream:
        stream.seek(50_000)
        stream.write(b"x")
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize("damage", [shorten, write_into])
def test_a_file_that_changes_is_an_error_at_first_use(damage, tmp_path):
    large(tmp_path)

    def use():
        lazy = load_prompt_cache(tmp_path / "p", lazy=True)[0]
        damage(tmp_path / "p.safetensors")
        mx.eval(lazy.state)

    # Not on the main thread: there MLX may wait for ever after a computation that failed.
    with pytest.raises(RuntimeError, match=r"Unable to read from file .*p\.safetensors: the file (ends|changed)"):
        elsewhere(use)


def test_a_short_file_is_refused_before_anything_is_used(tmp_path):
    large(tmp_path)
    shorten(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"p\.safetensors"):
        load_prompt_cache(tmp_path / "p", lazy=True)


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="the system does not tell which files are open")
def test_the_file_is_closed_when_all_is_read(tmp_path):
    large(tmp_path)
    before = len(list(OPEN_FILES.iterdir()))
    lazy = load_prompt_cache(tmp_path / "p", lazy=True)
    assert len(list(OPEN_FILES.iterdir())) == before + 1
    mx.eval([cache.state for cache in lazy])
    mx.synchronize()
    assert len(list(OPEN_FILES.iterdir())) == before
