"""The caches that make_v031.py and make_v032.py write, and what a reader must find in them.

Runs with mlx-lm 0.31.3 and with 0.32.2; only classes and calls that both have are used.
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as lm

METADATA = {"model": "a/model", "tokenizer_config": '{"trust_remote_code": false}', "note": "ü 漢字"}
# Attributes that a reader must restore, where the class has them.
ATTRIBUTES = (
    *("offset", "keep", "max_size", "_idx", "_offset", "rotated", "group_size", "bits"),
    *("chunk_size", "start_position", "left_padding", "lengths"),
)


def tensor(*shape: int, dtype: mx.Dtype = mx.float16, seed: int = 0) -> mx.array:
    """Numbers that every dtype holds exactly, different in every row."""
    n = 1
    for dim in shape:
        n *= dim
    numbers = (mx.arange(n, dtype=mx.int32) * 37 + seed * 11) % 101 - 50
    return (numbers.astype(mx.float32) / 8).reshape(shape).astype(dtype)


def feed(cache: Any, *sizes: int, batch: int = 1, heads: int = 1, dims: tuple[int, int] = (4, 4), **kind: Any) -> Any:
    """Updates `cache` with so many tokens each time."""
    for call, size in enumerate(sizes):
        keys, values = (
            tensor(batch, heads, size, dim, seed=2 * call + which, **kind) for which, dim in enumerate(dims)
        )
        cache.update_and_fetch(keys, values)
    return cache


def slots(*arrays: mx.array) -> Any:
    """An ArraysCache with these slots."""
    cache = lm.ArraysCache(len(arrays))
    for at, array in enumerate(arrays):
        cache[at] = array
    return cache


def trimmed(cache: Any, n: int) -> Any:
    """The cache without its `n` newest tokens."""
    assert cache.trim(n) == n
    return cache


def chunk(*, front: bool) -> Any:
    """A ChunkedKVCache; 256 tokens fill the buffer, so that both versions cut the front alike."""
    cache = feed(lm.ChunkedKVCache(8), 256 if front else 5)
    if front:
        cache.maybe_trim_front()
        assert (cache.offset, cache.start_position) == (256, 248)
    return cache


def quantized(group_size: int, bits: int) -> Any:
    """A QuantizedKVCache of head size 64, in a buffer of 8 rows that keeps the file small."""
    cache = lm.KVCache()
    cache.step = 8
    return feed(cache, 3, dims=(64, 64)).to_quantized(group_size=group_size, bits=bits)


CASES: dict[str, Callable[[], list[Any]]] = {
    "kv": lambda: [
        feed(lm.KVCache(), 3, dtype=mx.bfloat16),
        trimmed(feed(lm.KVCache(), 6, 1, heads=2, dims=(4, 2)), 3),
    ],
    "rotating": lambda: [
        feed(lm.RotatingKVCache(8), 3),
        trimmed(feed(lm.RotatingKVCache(8), 6), 2),
        feed(lm.RotatingKVCache(8), 1, 1),
        feed(lm.RotatingKVCache(8), *[1] * 11),
        feed(lm.RotatingKVCache(8, keep=2), *[1] * 14),
        feed(lm.RotatingKVCache(8, keep=2), 12, 1),
        feed(lm.RotatingKVCache(8, keep=2), 5, 4, 6),
    ],
    "quantized": lambda: [quantized(64, 8), quantized(32, 4), quantized(32, 3)],
    "concatenate": lambda: [feed(lm.ConcatenateKVCache(), 3, 2, dtype=mx.float32)],
    "chunked": lambda: [chunk(front=False), chunk(front=True)],
    "arrays": lambda: [slots(tensor(2, 3), tensor(2, 3, 4, dtype=mx.float32)), slots(tensor(1, 5))],
    "list": lambda: [
        lm.CacheList(feed(lm.KVCache(), 2), slots(tensor(1, 3))),
        lm.CacheList(lm.CacheList(feed(lm.RotatingKVCache(4, keep=1), 3, 4, 1)), feed(lm.KVCache(), 1)),
    ],
    "batch": lambda: [feed(lm.BatchKVCache([1, 3, 0]), 4, 1, batch=3)],
    "batch_rotating": lambda: [
        feed(lm.BatchRotatingKVCache(4, [1, 0]), 3, batch=2),
        feed(lm.BatchRotatingKVCache(4, [1, 0]), 3, 1, 1, batch=2),
        feed(lm.BatchRotatingKVCache(4, [1, 0]), 3, 5, batch=2),
    ],
    "none": list,
}


def described(array: mx.array) -> dict[str, Any]:
    """Shape, dtype and hash of the elements in row-major order."""
    raw = mx.contiguous(array).reshape(-1).view(mx.uint8)
    digest = hashlib.sha256(bytes(memoryview(raw))).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype).removeprefix("mlx.core."), "sha256": digest}


def valid_rows(cache: Any) -> int | None:
    """Rows of the buffers that hold tokens; None for all."""
    if isinstance(cache, lm.ChunkedKVCache):
        return cache.offset - cache.start_position
    if isinstance(cache, lm.BatchKVCache):
        return cache._idx
    if isinstance(cache, lm.BatchRotatingKVCache):
        return None if cache.rotated else cache._idx
    if isinstance(cache, lm.ConcatenateKVCache):
        return None
    return cache.offset


def expected(cache: Any) -> dict[str, Any]:
    """Class, attributes and valid rows of one cache."""
    layer: dict[str, Any] = {"class": type(cache).__name__}
    if isinstance(cache, lm.CacheList):
        return layer | {"caches": [expected(child) for child in cache.caches]}
    values = {name: getattr(cache, name) for name in ATTRIBUTES if hasattr(cache, name)}
    layer["attributes"] = {
        name: value.tolist() if isinstance(value, mx.array) else value for name, value in values.items()
    }
    if isinstance(cache, lm.ArraysCache):
        return layer | {"cache": [None if slot is None else described(slot) for slot in cache.cache]}
    rows = valid_rows(cache)
    for name in ("keys", "values"):
        held = getattr(cache, name)
        if held is None:
            layer[name] = None
        elif isinstance(held, mx.array):
            layer[name] = described(held[:, :, :rows])
        else:
            layer[name] = [described(part[:, :, :rows]) for part in held]
    return layer


def write(lm_version: str, tag: str, cases: dict[str, Callable[[], list[Any]]]) -> None:
    """Writes a file per case, and what is in them as `expected_<tag>.json`."""
    found = version("mlx-lm"), version("mlx")
    assert found == (lm_version, "0.32.4"), f"needs mlx-lm {lm_version} and mlx 0.32.4, got {found}"
    folder = Path(__file__).parent
    files = []
    for name, make in cases.items():
        caches = make()
        metadata = METADATA if caches else {}
        file = f"{tag}_{name}.safetensors"
        lm.save_prompt_cache(str(folder / file), caches, metadata)
        layers = ",\n".join("   " + json.dumps(expected(cache)) for cache in caches)
        meta = json.dumps(metadata, ensure_ascii=False)
        files.append(f' "{file}": {{\n  "metadata": {meta},\n  "layers": [\n{layers}\n  ]\n }}')
    text = "{\n" + ",\n".join(files) + "\n}\n"
    json.loads(text)
    (folder / f"expected_{tag}.json").write_text(text, encoding="utf-8")
