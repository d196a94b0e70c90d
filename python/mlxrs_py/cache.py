"""The names of ``mlx_lm.models.cache``."""

from mlxrs_py._core import (
    Cache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    create_attention_mask,
)

__all__ = [
    "Cache",
    "ConcatenateKVCache",
    "KVCache",
    "QuantizedKVCache",
    "RotatingKVCache",
    "create_attention_mask",
]
