"""Host time of update_and_fetch, ours and mlx-lm's in turns."""

from __future__ import annotations

import time

import common
import mlx.core as mx
import mlx_lm.models.cache as theirs

import mlxrs_py.cache as ours

UPDATES, RUNS = 200, 60


def host_seconds(module, name: str, arguments: tuple, keys: mx.array) -> float:
    cache = getattr(module, name)(*arguments)
    assert type(cache).__module__ == module.__name__
    cache.update_and_fetch(keys, keys)
    start = time.perf_counter()
    for _ in range(UPDATES):
        cache.update_and_fetch(keys, keys)
    elapsed = time.perf_counter() - start
    mx.eval(cache.state)
    return elapsed / UPDATES


def main() -> None:
    common.header()
    keys = mx.random.normal((1, 8, 1, 128)).astype(mx.bfloat16)
    mx.eval(keys)
    for name, arguments in [("KVCache", ()), ("RotatingKVCache", (4096,)), ("QuantizedKVCache", ())]:
        a, b = common.in_turns(
            lambda name=name, arguments=arguments: host_seconds(ours, name, arguments, keys),
            lambda name=name, arguments=arguments: host_seconds(theirs, name, arguments, keys),
            RUNS,
        )
        common.line(f"update_and_fetch, one token, {name}", a, b, "us", 1e6)


if __name__ == "__main__":
    main()
