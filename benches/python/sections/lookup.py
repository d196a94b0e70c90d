"""fetch_nearest_cache on one stored prompt that diverges late or early, from a list and from NumPy.

mlx-lm copies a list for each stored token behind the divergence, so that an early one costs it seconds: it runs once.
"""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import numpy as np

import workload
from rows import OURS, THEIRS, Report, Row

RUNS, TOKENS = 30, 100_000


def stored(side: str, n_tokens: int) -> Any:
    """Give an LRUPromptCache that holds one prompt, with a small cache: its copy is part of the time."""
    module = workload.cache_module(side)
    cache = module.KVCache()
    rows = mx.zeros((1, 1, 1, 32))
    cache.update_and_fetch(rows, rows)
    mx.eval(cache.state)
    lru = module.LRUPromptCache()
    lru.insert_cache("model", list(range(n_tokens)), [cache])
    return lru


def lookup_seconds(lru: Any, query: Any, n_common: int) -> float:
    start = time.perf_counter()
    caches, left = lru.fetch_nearest_cache("model", query)
    elapsed = time.perf_counter() - start
    assert caches is not None and len(query) - len(left) == n_common
    return elapsed


def diverging(n_tokens: int, n_common: int) -> list[int]:
    return [*range(n_common), *range(n_tokens, 2 * n_tokens - n_common)]


def run(report: Report) -> None:
    mine, other = stored(OURS, TOKENS), stored(THEIRS, TOKENS)

    def one(name: str, n_common: int, runs: int) -> None:
        query = diverging(TOKENS, n_common)
        forms = {"list": query, "NumPy": np.array(query)}
        slow = {THEIRS: lambda: lookup_seconds(other, query, n_common)}
        theirs = [slow[THEIRS]()] if runs == 1 else report.in_turns(slow, runs)[THEIRS]
        for form, tokens in forms.items():
            sides = {OURS: lambda tokens=tokens: lookup_seconds(mine, tokens, n_common)}
            samples = report.in_turns(sides, RUNS) | {THEIRS: theirs}
            note = "" if form == "list" else "mlx-lm takes a list"
            report.add(Row("lookup", f"{name}, {form}", "ms", samples, scale=1e3, n_tokens=TOKENS, note=note))

    def longer() -> None:
        long, late = stored(OURS, 10 * TOKENS), TOKENS - 100
        queries = np.array(diverging(TOKENS, late)), np.array(diverging(10 * TOKENS, 10 * late))
        sides = {
            OURS: lambda: lookup_seconds(mine, queries[0], late),
            "ten times the tokens": lambda: lookup_seconds(long, queries[1], 10 * late),
        }
        report.add(Row("lookup", "diverges after 99,900, NumPy", "ms", report.in_turns(sides, RUNS), scale=1e3))

    report.attempt("lookup late", lambda: one("diverges after 99,900", TOKENS - 100, RUNS))
    report.attempt("lookup early", lambda: one("diverges after 100", 100, 1))
    report.attempt("lookup ten times the tokens", longer)
