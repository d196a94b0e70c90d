"""Time of one token's update, computed, in short and in long caches: a copy of the buffers would show.

On any device, ours and mlx-lm's in turns: the update alone; with attention, waiting for each token; and with attention,
one token ahead, as mlx-lm's generation goes. In the last MLX still holds what the token before reads, and copies.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import mlxrs_py
import mlxrs_py.cache as ours

# isort: split
# Before this, the BLAS that serves MLX was chosen.
import mlx.core as mx
import mlx_lm.models.cache as theirs

HEADS, HEAD_DIM, UPDATES, RUNS = 8, 128, 10, 5
LENGTHS = (1024, 65_536)
ALONE, WAITING, AHEAD = "alone", "waiting", "one ahead"
CASES = [
    ("KVCache", ALONE),
    ("RotatingKVCache", ALONE),
    ("QuantizedKVCache", ALONE),
    ("KVCache", WAITING),
    ("KVCache", AHEAD),
]


def filled(module: Any, name: str, n_tokens: int) -> Any:
    # A ring with room, so that all hold as many rows.
    cache = getattr(module, name)(*((2 * n_tokens,) if name == "RotatingKVCache" else ()))
    many, row = (mx.zeros((1, HEADS, n, HEAD_DIM), mx.bfloat16) for n in (n_tokens, 1))
    cache.update_and_fetch(many, many)
    # The first token makes room; with the next ones what it left behind is let go.
    for _ in range(3):
        cache.update_and_fetch(row, row)
        mx.eval(cache.state)
    return cache


def seconds_alone(cache: Any, row: mx.array) -> float:
    start = time.perf_counter()
    for _ in range(UPDATES):
        cache.update_and_fetch(row, row)
        mx.eval(cache.state)
    return time.perf_counter() - start


def seconds_read(cache: Any, row: mx.array, ahead: bool) -> float:
    start = time.perf_counter()
    for _ in range(UPDATES):
        # The next token depends on this one, as in generation.
        next_row = mx.fast.scaled_dot_product_attention(row, *cache.update_and_fetch(row, row), scale=1.0)
        mx.async_eval(next_row)
        mx.eval(row if ahead else next_row)
        row = next_row
    mx.eval(row)
    return time.perf_counter() - start


def measure(module: Any, name: str, n_tokens: int, way: str) -> tuple[float, float]:
    """Give seconds per token, and by how many buffers the peak of memory rose."""
    cache, row = filled(module, name, n_tokens), mx.zeros((1, HEADS, 1, HEAD_DIM), mx.bfloat16)
    mx.eval(row)
    mx.clear_cache()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    elapsed = seconds_alone(cache, row) if way == ALONE else seconds_read(cache, row, way == AHEAD)
    return elapsed / UPDATES, (mx.get_peak_memory() - before) / (cache.nbytes / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    options = parser.parse_args()
    print(f"python {platform.python_version()}, {mlxrs_py.build_info()}, {mx.device_info().get('device_name', '?')}")
    figures = []
    for name, way in CASES:
        for n_tokens in LENGTHS:
            samples = [[measure(side, name, n_tokens, way) for side in (ours, theirs)] for _ in range(RUNS)]
            for side, runs in zip(("ours", "mlx-lm"), zip(*samples, strict=True), strict=True):
                times, peaks = ([run[i] for run in runs] for i in (0, 1))
                best, median = min(times) * 1e6, statistics.median(times) * 1e6
                print(
                    f"{name:17} {n_tokens:6} held, {way:9} {side:7} min {best:10.1f} median {median:10.1f} us   "
                    f"memory + {min(peaks):.2f} buffers",
                    flush=True,
                )
                row = {"class": name, "tokens": n_tokens, "way": way, "side": side, "seconds": times, "buffers": peaks}
                figures.append(row)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
