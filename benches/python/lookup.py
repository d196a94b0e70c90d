"""fetch_nearest_cache on one stored prompt that diverges late or early, from a list and from NumPy.

mlx-lm copies a list for each stored token behind the divergence, so that an early one costs it seconds: it runs once.
"""

from __future__ import annotations

import time
from typing import Any

import common
import mlx.core as mx
import mlx_lm.models.cache as theirs
import numpy as np

import mlxrs_py.cache as ours

RUNS = 30


def stored(module: Any, n_tokens: int) -> Any:
    """Give an LRUPromptCache that holds one prompt, with a small cache: its copy is part of the time."""
    cache = module.KVCache()
    rows = mx.zeros((1, 1, 1, 32))
    cache.update_and_fetch(rows, rows)
    mx.eval(cache.state)
    lru = module.LRUPromptCache()
    lru.insert_cache("model", list(range(n_tokens)), [cache])
    return lru


def seconds(lru: Any, query: Any, n_common: int) -> float:
    start = time.perf_counter()
    caches, left = lru.fetch_nearest_cache("model", query)
    elapsed = time.perf_counter() - start
    assert caches is not None and len(query) - len(left) == n_common
    return elapsed


def diverging(n_tokens: int, n_common: int) -> list[int]:
    return [*range(n_common), *range(n_tokens, 2 * n_tokens - n_common)]


def main() -> None:
    common.header()
    n_tokens = 100_000
    mine, other = stored(ours, n_tokens), stored(theirs, n_tokens)
    for what, n_common, runs in (("late", n_tokens - 100, RUNS), ("early", 100, 1)):
        query = diverging(n_tokens, n_common)
        theirs_seconds = [seconds(other, query, n_common) for _ in range(runs)]
        for form, tokens in (("list", query), ("NumPy", np.array(query))):
            samples = [seconds(mine, tokens, n_common) for _ in range(RUNS)]
            common.line(f"100,000 tokens, diverging {what}, {form}", samples, theirs_seconds, "ms", 1e3)
    long, late = stored(ours, 10 * n_tokens), n_tokens - 100
    for form, make in (("list", list), ("NumPy", np.array)):
        queries = make(diverging(n_tokens, late)), make(diverging(10 * n_tokens, 10 * late))
        short_samples, long_samples = common.in_turns(
            lambda q=queries[0]: seconds(mine, q, late), lambda q=queries[1]: seconds(long, q, 10 * late), RUNS
        )
        what = f"100,000 tokens beside 1,000,000, {form}"
        common.line(what, short_samples, long_samples, "ms", 1e3, other="ten times")


if __name__ == "__main__":
    main()
