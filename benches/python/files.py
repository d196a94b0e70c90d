"""Save and load of 1 GB, ours and mlx-lm's in turns, beside a plain write and read of as many bytes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import mlx.core as mx
import mlx_lm.models.cache as theirs

import mlxrs_py.cache as ours

LAYERS, HEADS, TOKENS, HEAD_DIM, RUNS = 16, 8, 16_384, 128, 5


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def filled(module) -> list:
    caches = [module.KVCache() for _ in range(LAYERS)]
    for i, cache in enumerate(caches):
        rows = mx.random.normal((1, HEADS, TOKENS, HEAD_DIM), key=mx.random.key(i)).astype(mx.bfloat16)
        cache.update_and_fetch(rows, rows)
        mx.eval(cache.state)
    return caches


def load(module, file: str) -> None:
    mx.eval([cache.state for cache in module.load_prompt_cache(file)])


def plain_write(file: Path, data: bytes, durable: bool) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        if durable:
            os.fsync(stream.fileno())


def main() -> None:
    common.header()
    a, b = filled(ours), filled(theirs)
    n_bytes = sum(cache.nbytes for cache in a)
    print(f"{n_bytes / 1e9:.3f} GB, {LAYERS} layers, {TOKENS} tokens, bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        mine, other, raw = (str(Path(folder) / f"{name}.safetensors") for name in ("ours", "theirs", "raw"))
        data = bytes(n_bytes)

        def save_theirs() -> float:
            return seconds(lambda: theirs.save_prompt_cache(other, b))

        for durable in (True, False):
            samples = common.in_turns(
                lambda d=durable: seconds(lambda: ours.save_prompt_cache(mine, a, durable=d)), save_theirs, RUNS
            )
            common.line(f"save, {'durable (mlx-lm: not)' if durable else 'not durable'}", *samples, "s")
            limit = [seconds(lambda d=durable: plain_write(Path(raw), data, d)) for _ in range(RUNS)]
            common.line("  the same beside a plain write", samples[0], limit, "s", other="plain")
        samples = common.in_turns(
            lambda: seconds(lambda: load(ours, mine)), lambda: seconds(lambda: load(theirs, other)), RUNS
        )
        common.line("load, page cache", *samples, "s")
        limit = [seconds(lambda: Path(raw).read_bytes()) for _ in range(RUNS)]
        common.line("  the same beside a plain read", samples[0], limit, "s", other="plain")


if __name__ == "__main__":
    main()
