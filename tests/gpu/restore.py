"""On a GPU: a cache of Llama-8B's shape, from the page cache until ready to decode, beside mlx-lm's load and eval.

Run with ``PYTHONPATH`` on MLX-CUDA, mlx-lm and this project's wheel: ``python tests/gpu/restore.py``. What is loaded is
compared bit by bit first, padding included.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as theirs
from mlx.utils import tree_flatten

import mlxrs_py
from mlxrs_py import cache as ours

LAYERS, HEADS, HEAD_DIM, TOKENS = 32, 8, 128, 16_384


def noise(*shape: int) -> mx.array:
    return mx.random.normal(shape).astype(mx.bfloat16)


def seconds(load: Callable[..., list[Any]], file: Path, **options: int) -> tuple[float, list[Any]]:
    mx.synchronize()
    start = time.perf_counter()
    caches = load(str(file), **options)
    mx.eval([cache.state for cache in caches])
    mx.synchronize()
    return time.perf_counter() - start, caches


def report(what: str, load: Callable[..., list[Any]], file: Path, runs: int, **options: int) -> None:
    times = [seconds(load, file, **options)[0] for _ in range(runs)]
    print(f"{what:28} min {min(times):.4f} median {statistics.median(times):.4f} s")


def odd_lengths(folder: Path) -> None:
    for tokens in (1, 300, 5000):
        caches = [ours.KVCache(), ours.QuantizedKVCache(64, 8), ours.RotatingKVCache(100, 4)]
        for cache in caches:
            cache.update_and_fetch(noise(2, HEADS, tokens, HEAD_DIM), noise(2, HEADS, tokens, 64))
        ours.save_prompt_cache(folder / "odd.safetensors", caches)
        for loaded, cache in zip(ours.load_prompt_cache(folder / "odd.safetensors"), caches, strict=True):
            pairs = [dict(tree_flatten(list(one.keys_and_values()))) for one in (loaded, cache)]
            assert all(mx.array_equal(rows, pairs[1][key]) for key, rows in pairs[0].items()), (tokens, type(cache))
            seen = [
                one.update_and_fetch(noise(2, HEADS, 1, HEAD_DIM), noise(2, HEADS, 1, 64)) for one in (loaded, cache)
            ]
            mx.eval(seen)


def main() -> None:
    print(f"python {platform.python_version()}, {mlxrs_py.build_info()}, {mx.device_info()['device_name']}")
    caches = [ours.KVCache() for _ in range(LAYERS)]
    for cache in caches:
        cache.update_and_fetch(*(noise(1, HEADS, TOKENS, HEAD_DIM) for _ in range(2)))
    mx.eval([cache.state for cache in caches])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, other = folder / "ours.safetensors", folder / "theirs.safetensors"
        ours.save_prompt_cache(file, caches, durable=False)
        theirs.save_prompt_cache(str(other), [theirs.KVCache.from_state(cache.state) for cache in caches])
        first, loaded = seconds(ours.load_prompt_cache, file)
        for one, cache in zip(loaded, caches, strict=True):
            for rows, expected in ((one.keys, cache.keys), (one.values, cache.values)):
                rows, expected = rows.view(mx.uint16), expected.view(mx.uint16)
                assert mx.array_equal(rows[:, :, :TOKENS], expected[:, :, :TOKENS])
                assert not mx.any(rows[:, :, TOKENS:]).item()
        print("bit-equal")
        print(f"first load of the process         {first:.4f} s")
        for threads in (1, 2, 4, 6, 8, 12, 16):
            report(f"{threads} threads", ours.load_prompt_cache, file, 7, threads=threads)
        report("mlx-lm, load and eval", theirs.load_prompt_cache, other, 4)
        report("ours, mlx-lm's file", ours.load_prompt_cache, other, 4)
        odd_lengths(folder)
    print("odd lengths, quantized and rotating: bit-equal")


if __name__ == "__main__":
    main()
