"""The prompt store: lookup, bytes written as a conversation grows, restore, restart: ``benches/python/store.py``.

Caches of random rows stand for a model's: Llama-8B's shape with ``--layers 32`` (2.1 GB at 16,384 tokens).
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlxrs_py
from mlxrs_py.cache import KVCache

# isort: split
# Before these, the BLAS that serves MLX was chosen.
import mlx.core as mx
import numpy as np

HEADS, HEAD_DIM = 8, 128


class Shape:
    """As much of a model as a view asks for."""

    def __init__(self, n_layers: int, heads: int, head_dim: int) -> None:
        self.layers = [None] * n_layers
        self.heads, self.head_dim = heads, head_dim

    def parameters(self) -> dict[str, mx.array]:
        return {"shape": mx.array([len(self.layers), self.heads, self.head_dim])}

    def rows(self, caches: list[Any], n_tokens: int) -> None:
        """Put so many tokens more into the caches."""
        for cache in caches:
            shape = (1, self.heads, n_tokens, self.head_dim)
            cache.update_and_fetch(*(mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2)))
        mx.eval([cache.state for cache in caches])


def measured(call: Callable[[], Any], runs: int) -> dict[str, float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {"min_s": min(times), "median_s": statistics.median(times)}


def ids(n_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128_000, n_tokens)


def lookups(folder: Path) -> dict[str, Any]:
    """Look up 100,000 tokens; then one of 10, and one of 10,000 stored prompts."""
    model = Shape(1, 1, 32)
    found = {}
    with mlxrs_py.PromptStore(folder / "long") as store:
        view = store.view(model)
        caches = [KVCache()]
        model.rows(caches, 100_000)
        prompt = ids(100_000)
        view.put(prompt, caches).result()
        assert view.lookup(prompt).n_tokens == 99_999
        found["100,000 tokens, NumPy"] = measured(lambda: view.lookup(prompt), 50)
        listed = prompt.tolist()
        found["100,000 tokens, list"] = measured(lambda: view.lookup(listed), 20)
    for n_prompts in (10, 10_000):
        with mlxrs_py.PromptStore(folder / f"many{n_prompts}") as store:
            view = store.view(model)
            caches = [KVCache()]
            model.rows(caches, 300)
            handles = []
            for seed in range(n_prompts):
                # A common beginning of a block, then a conversation of its own.
                prompt = np.concatenate([ids(256), ids(44, seed + 1)])
                handles.append(view.put(prompt, caches))
            for handle in handles:
                handle.result()
            prompt = np.concatenate([ids(256), ids(44, n_prompts // 2 + 1), ids(50, 1 << 40)])
            assert view.lookup(prompt).n_tokens == 300
            found[f"one of {n_prompts} prompts"] = measured(functools.partial(view.lookup, prompt), 200)
    return found


def growth(folder: Path, n_layers: int) -> dict[str, Any]:
    """Grow a conversation of 16,384 tokens by 1,024, and restore it."""
    model = Shape(n_layers, HEADS, HEAD_DIM)
    with mlxrs_py.PromptStore(folder / "grown") as store:
        view = store.view(model)
        caches = [KVCache() for _ in model.layers]
        model.rows(caches, 16_384)
        prompt = ids(16_384 + 1_024)
        start = time.perf_counter()
        handle = view.put(prompt[:16_384], caches)
        freed = time.perf_counter() - start
        first = handle.result()
        durable = time.perf_counter() - start
        model.rows(caches, 1_024)
        grown = view.put(prompt, caches).result()
        new = n_layers * 2 * HEADS * 1_024 * HEAD_DIM * 2
        restored = measured(lambda: mx.eval([c.state for c in view.restore([*prompt, 1])[0]]), 5)
        assert view.restore([*prompt, 1])[1] == len(prompt)
    with mlxrs_py.PromptStore(folder / "grown") as store:
        again = store.view(model).lookup([*prompt, 1])
        assert again.n_tokens == len(prompt)
    return {
        "bytes of 16,384 tokens": first.n_bytes,
        "caller free after": freed,
        "durable after": durable,
        "bytes written for 1,024 more": grown.n_bytes,
        "of their rows": grown.n_bytes / new,
        "restore of 17,408": restored,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="layers of the grown conversation (default: 4)")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"python": platform.python_version(), "build": mlxrs_py.build_info()}
    with tempfile.TemporaryDirectory() as name:
        figures["lookup"] = lookups(Path(name))
        figures["growth"] = growth(Path(name), arguments.layers)
    text = json.dumps(figures, indent=2, default=str)
    if arguments.json:
        Path(arguments.json).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
