"""Writes the files of format 0.32 beside this script. Run with mlx-lm 0.32.2 and mlx 0.32.4."""

import mlx.core as mx
from mlx_lm.models import cache as lm

from cases import CASES, slots, tensor, write


def empty_caches() -> list:
    """One cache of every class that has seen nothing; mlx-lm 0.31 cannot write these."""
    return [
        lm.KVCache(),
        lm.RotatingKVCache(8, keep=2),
        lm.QuantizedKVCache(group_size=32, bits=4),
        lm.ConcatenateKVCache(),
        lm.ChunkedKVCache(8),
        lm.ArraysCache(2),
        lm.ArraysCache(0),
        lm.CacheList(),
        lm.CacheList(lm.KVCache(), lm.CacheList()),
        lm.BatchKVCache([1, 0]),
        lm.BatchRotatingKVCache(8, [1, 0]),
    ]


def padded_arrays() -> list:
    """ArraysCaches with an empty slot, left_padding or lengths."""
    padded = lm.ArraysCache(2, left_padding=[1, 0])
    padded[0] = tensor(2, 3)
    lengths = slots(tensor(2, 3))
    lengths.lengths = mx.array([3, 2])
    return [padded, lengths]


if __name__ == "__main__":
    write("0.32.2", "v032", CASES | {"empty": empty_caches, "padded_arrays": padded_arrays})
