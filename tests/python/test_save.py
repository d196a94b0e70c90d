import mlx.core as mx
import pytest

from mlxrs_py.cache import ArraysCache, KVCache, QuantizedKVCache, RotatingKVCache, load_prompt_cache, save_prompt_cache
from tiny import feed, leaves


@pytest.fixture
def caches():
    wide = KVCache()
    rows = mx.random.normal((2, 3, 5000, 128)).astype(mx.bfloat16)
    wide.update_and_fetch(rows, rows + 1)
    return [feed(KVCache(), 300), wide, feed(RotatingKVCache(8), 11), feed(QuantizedKVCache(32), 7), KVCache()]


@pytest.mark.parametrize("padded", [False, True])
def test_the_number_of_threads_and_the_page_cache_change_no_byte(caches, padded, tmp_path, monkeypatch):
    files = [tmp_path / f"{threads}.safetensors" for threads in (1, 2, 7)]
    for threads, file in zip((1, 2, 7), files, strict=True):
        save_prompt_cache(file, caches, padded=padded, threads=threads)
    monkeypatch.setenv("MLXRS_PY_THREADS", "3")
    files += [tmp_path / f"{name}.safetensors" for name in ("variable", "direct", "background")]
    save_prompt_cache(files[3], caches, padded=padded, durable=False)
    save_prompt_cache(files[4], caches, padded=padded, direct=True)
    save_prompt_cache(files[5], caches, padded=padded, direct=True, background=True).result()
    assert len({file.read_bytes() for file in files}) == 1
    for cache, loaded in zip(caches, load_prompt_cache(files[0]), strict=True):
        assert leaves(loaded.keys_and_values() if loaded.offset else None) == leaves(
            cache.keys_and_values() if cache.offset else None
        )


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_cannot_write(threads, tmp_path):
    with pytest.raises(ValueError, match=f"save_prompt_cache: expected threads of at least 1, got {threads}"):
        save_prompt_cache(tmp_path / "p", [KVCache()], threads=threads)
    assert list(tmp_path.iterdir()) == []


def test_arrays_are_written_row_by_row_however_they_lie(tmp_path):
    whole = mx.arange(6 * 10 * 64, dtype=mx.float32).reshape(6, 10, 64)
    states = [
        whole,
        whole[:, 2:7],
        whole[:, :, :33],
        whole[1:5, 3:4],
        whole[::2],
        whole[:, ::3],
        whole[:, :, ::2],
        whole[::-1],
        whole.transpose(2, 0, 1),
        whole.swapaxes(0, 1),
        mx.broadcast_to(whole[:, :1], (6, 9, 64)),
        mx.broadcast_to(whole[0], (5, 10, 64)),
        whole[0, 0, 5],
        whole[:0],
        (whole > 7)[:, 1:],
    ]
    cache = ArraysCache(len(states))
    cache.cache = states
    save_prompt_cache(tmp_path / "p", [cache], threads=2)
    for array, loaded in zip(states, load_prompt_cache(tmp_path / "p")[0].cache, strict=True):
        assert loaded.shape == array.shape and loaded.dtype == array.dtype
        assert mx.array_equal(loaded, array)


def test_a_file_replaced_again_and_again_is_the_last_one(caches, tmp_path):
    wide = caches[1]
    for n in (100, 5000, 4999, 3):
        wide.trim(wide.offset)
        rows = mx.random.normal((2, 3, n, 128)).astype(mx.bfloat16)
        wide.update_and_fetch(rows, rows * n)
        save_prompt_cache(tmp_path / "p", [wide], durable=n % 2 == 0)
        assert leaves(load_prompt_cache(tmp_path / "p")[0].keys_and_values()) == leaves(wide.keys_and_values())
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
