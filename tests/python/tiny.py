"""Small arrays and a small language model for the tests; no mlx-lm."""

from __future__ import annotations

import copy
import gc
import struct
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxrs_py.cache import (
    BatchKVCache,
    BatchQuantizedKVCache,
    BatchRotatingKVCache,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    QuantizedRotatingKVCache,
    RotatingKVCache,
)

#: Every class with arguments that make one.
MAKERS: dict[str, Callable[[], Any]] = {
    "KVCache": KVCache,
    "RotatingKVCache": lambda: RotatingKVCache(max_size=8, keep=2),
    "QuantizedKVCache": lambda: QuantizedKVCache(group_size=32, bits=4),
    "QuantizedRotatingKVCache": lambda: QuantizedRotatingKVCache(max_size=8, keep=2, group_size=32, bits=4),
    "ConcatenateKVCache": ConcatenateKVCache,
    "ChunkedKVCache": lambda: ChunkedKVCache(chunk_size=8),
    "BatchKVCache": lambda: BatchKVCache([0]),
    "BatchRotatingKVCache": lambda: BatchRotatingKVCache(8, [0]),
    "BatchQuantizedKVCache": lambda: BatchQuantizedKVCache([0], group_size=32, bits=4),
}
#: Classes that format 0.31 has no form for.
ONLY_032 = {"QuantizedRotatingKVCache", "BatchQuantizedKVCache"}
every_class = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)

#: Every way to a copy that goes its own way.
COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "method": lambda cache: cache.copy()}


def noise(n_tokens: int, *, batch: int = 1, heads: int = 2, dim: int = 32, seed: int = 0) -> mx.array:
    """Give random keys or values ``(batch, heads, n_tokens, dim)``, float32."""
    return mx.random.normal((batch, heads, n_tokens, dim), key=mx.random.key(seed * 1009 + n_tokens))


def feed(cache: Any, *counts: int, **shape: int) -> Any:
    """Update with so many tokens, one count after the other, and give the cache."""
    for call, n_tokens in enumerate(counts):
        cache.update_and_fetch(noise(n_tokens, seed=2 * call, **shape), noise(n_tokens, seed=2 * call + 1, **shape))
    return cache


def positions(start: int, stop: int, dim: int = 2) -> mx.array:
    """Give rows ``(1, 1, stop - start, dim)`` that hold their own position."""
    return mx.broadcast_to(mx.arange(start, stop, dtype=mx.float32)[:, None], (1, 1, stop - start, dim))


def advance(cache: Any, *counts: int) -> list[int]:
    """Update with tokens that hold their own position; give what the last update returned, as positions."""
    seen = None
    for n_tokens in counts:
        start = cache.offset
        new = positions(start, start + n_tokens)
        keys, values = cache.update_and_fetch(new, new + 1000)
        seen = held(keys)
        assert [position + 1000 for position in seen] == held(values)
    assert seen is not None
    return seen


def held(rows: mx.array) -> list[int]:
    """Give the positions that rows of `positions` hold."""
    return [int(x) for x in rows[0, 0, :, 0].tolist()]


def active_memory() -> int:
    """Give the bytes of arrays that are alive, once nothing is on its way any more."""
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def raw(array: mx.array) -> tuple[Any, ...]:
    """Give dtype, shape and bytes: equal only for arrays that are equal bit by bit."""
    assert type(array) is mx.array
    data = np.array(array if array.dtype == mx.bool_ else array.view(mx.uint8))
    return str(array.dtype), tuple(array.shape), data.tobytes()


def leaves(tree: Any) -> list[Any]:
    """Give the leaves of nested tuples and lists, arrays as `raw`."""
    if isinstance(tree, (tuple, list)):
        return [leaf for branch in tree for leaf in leaves(branch)]
    return [raw(tree) if isinstance(tree, mx.array) else tree]


def payload_nans() -> mx.array:
    """Give two float32 NaNs that differ in their payloads only, as ``(1, 1, 1, 2)``."""
    words = struct.unpack("2I", struct.pack("2I", 0x7FC0_1234, 0xFFC0_4321))
    return mx.array(words, dtype=mx.uint32).view(mx.float32).reshape(1, 1, 1, 2)


class TinyModel(nn.Module):
    """Layers of attention with rotary positions; takes caches of every class. Vocabulary 61."""

    def __init__(self, n_layers: int = 2, seed: int = 3):
        super().__init__()
        mx.random.seed(seed)
        self.embed = nn.Embedding(61, 64)
        self.qkv = [nn.Linear(64, 3 * 64) for _ in range(n_layers)]
        self.out = nn.Linear(64, 61)
        self.rope = nn.RoPE(32)
        #: Called with the layer's number before and after each cache is updated.
        self.on_layer: Callable[[int], object] = lambda layer: None
        #: Tokens of every call.
        self.windows: list[int] = []
        self.tokens: list[list[int]] = []
        mx.eval(self.parameters())

    @property
    def layers(self) -> list[Any]:
        return self.qkv

    def __call__(self, tokens: mx.array, cache: list[Any], input_embeddings: mx.array | None = None) -> mx.array:
        h = self.embed(tokens) if input_embeddings is None else input_embeddings
        self.windows.append(h.shape[1])
        self.tokens.append(tokens[0].tolist())
        for layer, (qkv, own) in enumerate(zip(self.qkv, cache, strict=True)):
            self.on_layer(layer)
            h = h + self.attend(qkv(h), own)
            self.on_layer(layer)
        return self.out(h)

    def attend(self, qkv: mx.array, cache: Any) -> mx.array:
        batch, n_tokens = qkv.shape[:2]
        if hasattr(cache, "make_mask"):
            mask = cache.make_mask(n_tokens, return_array=False, window_size=None)
        else:  # a chunked cache, handled as llama4 does it
            cache.maybe_trim_front()
            mask = mx.arange(cache.size() + n_tokens) <= mx.arange(n_tokens)[:, None] + cache.size()
        q, k, v = (x.reshape(batch, n_tokens, 2, 32).transpose(0, 2, 1, 3) for x in mx.split(qkv, 3, axis=-1))
        q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
        keys, values = cache.update_and_fetch(k, v)
        if hasattr(cache, "bits"):
            keys, values = (
                mx.dequantize(*rows, group_size=cache.group_size, bits=cache.bits) for rows in (keys, values)
            )
        h = mx.fast.scaled_dot_product_attention(q, keys, values, scale=32**-0.5, mask=mask)
        return h.transpose(0, 2, 1, 3).reshape(batch, n_tokens, 64)
