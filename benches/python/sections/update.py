"""Host time of update_and_fetch."""

from __future__ import annotations

import time

import mlx.core as mx

import workload
from rows import OURS, THEIRS, Report, Row

UPDATES, RUNS = 200, 60


def host_seconds(side: str, name: str, arguments: tuple[int, ...], keys: mx.array) -> float:
    module = workload.cache_module(side)
    cache = getattr(module, name)(*arguments)
    assert type(cache).__module__ == module.__name__
    cache.update_and_fetch(keys, keys)
    start = time.perf_counter()
    for _ in range(UPDATES):
        cache.update_and_fetch(keys, keys)
    elapsed = time.perf_counter() - start
    mx.eval(cache.state)
    return elapsed / UPDATES


def run(report: Report) -> None:
    keys = mx.random.normal((1, 8, 1, 128)).astype(mx.bfloat16)
    mx.eval(keys)

    def one(name: str, arguments: tuple[int, ...]) -> None:
        sides = {side: lambda side=side: host_seconds(side, name, arguments, keys) for side in (OURS, THEIRS)}
        samples = report.in_turns(sides, RUNS, warm=True)
        report.add(Row("update", name, "us", samples, scale=1e6))

    for name, arguments in [("KVCache", ()), ("RotatingKVCache", (4096,)), ("QuantizedKVCache", ())]:
        report.attempt(f"update {name}", lambda name=name, arguments=arguments: one(name, arguments))
