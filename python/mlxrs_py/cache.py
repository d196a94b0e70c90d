"""The names of ``mlx_lm.models.cache``, with caches in Rust.

Every class takes and gives real, lazy ``mlx.core`` arrays; unmodified mlx-lm models run on them. Sizes are in tokens
unless a name says bytes. What differs from mlx-lm on purpose stands in docs/parity.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlxrs_py._core import (
    ArraysCache,
    AttentionCache,
    BatchCache,
    BatchKVCache,
    BatchQuantizedKVCache,
    BatchRotatingKVCache,
    Cache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    LRUPromptCache,
    MaskingCache,
    PendingSave,
    PromptTrie,
    PromptTrieResult,
    QuantizedKVCache,
    QuantizedRotatingKVCache,
    RotatingKVCache,
    TokenBuffer,
    adopt,
    create_attention_mask,
    create_causal_mask,
    load_prompt_cache,
    make_prompt_cache_from_config,
    register,
    save_prompt_cache,
    trim_prompt_cache,
    wait_for_saves,
)

__all__ = [
    "ArraysCache",
    "AttentionCache",
    "BatchCache",
    "BatchKVCache",
    "BatchQuantizedKVCache",
    "BatchRotatingKVCache",
    "Cache",
    "CacheConfig",
    "CacheList",
    "ChunkedKVCache",
    "ConcatenateKVCache",
    "KVCache",
    "LRUPromptCache",
    "MaskingCache",
    "PendingSave",
    "PromptTrie",
    "PromptTrieResult",
    "QuantizedKVCache",
    "QuantizedRotatingKVCache",
    "RotatingKVCache",
    "TokenBuffer",
    "adopt",
    "can_trim_prompt_cache",
    "create_attention_mask",
    "create_causal_mask",
    "load_prompt_cache",
    "make_prompt_cache",
    "register",
    "save_prompt_cache",
    "trim_prompt_cache",
    "wait_for_saves",
]


@dataclass(frozen=True)
class CacheConfig:
    """How caches are made for a model that does not make them itself.

    Args:
        num_hidden_layers: Layers, and so caches.
        sliding_window: Tokens that a layer looks back; None for all.

    """

    num_hidden_layers: int
    sliding_window: int | None = None

    def make(self) -> list[Any]:
        """Give fresh caches: ``RotatingKVCache(sliding_window, keep=0)`` with a window, else ``KVCache``."""
        return make_prompt_cache_from_config(self.num_hidden_layers, self.sliding_window)


def make_prompt_cache(model: Any, max_kv_size: int | None = None) -> list[Any]:
    """Make fresh caches for a model, one per layer or as its own ``make_cache`` says.

    Args:
        model: A model with ``make_cache()`` or ``layers``. What ``make_cache`` gives goes through :func:`adopt`.
        max_kv_size: If given, ``RotatingKVCache(max_kv_size, keep=4)`` per layer. As in mlx-lm it is ignored by a
            model with ``make_cache``; a UserWarning says so.

    Raises:
        ValueError: If ``max_kv_size`` leaves no row beside the 4 that are kept.

    """
    if hasattr(model, "make_cache"):
        if max_kv_size is not None:
            message = f"max_kv_size={max_kv_size} is ignored: {type(model).__module__} makes its own caches"
            warnings.warn(message, UserWarning, stacklevel=2)
        return adopt(model.make_cache())
    n_layers = len(model.layers)
    if max_kv_size is not None:
        return [RotatingKVCache(max_kv_size, keep=4) for _ in range(n_layers)]
    return [KVCache() for _ in range(n_layers)]


def can_trim_prompt_cache(cache: Iterable[Any]) -> bool:
    """Tell whether every cache can take back its newest tokens."""
    return all(c.is_trimmable() for c in cache)
