"""Long caches are written in place: MLX may, because nothing else holds their buffers."""

import mlx.core as mx
import pytest

from mlxrs_py.cache import ChunkedKVCache, KVCache, QuantizedKVCache, QuantizedRotatingKVCache, RotatingKVCache
from tiny import active_memory

TOKENS = 65_536

LONG = {
    "KVCache": KVCache,
    "RotatingKVCache": lambda: RotatingKVCache(2 * TOKENS),
    "RotatingKVCache that is full": lambda: RotatingKVCache(TOKENS),
    "QuantizedKVCache": lambda: QuantizedKVCache(32),
    "QuantizedRotatingKVCache that is full": lambda: QuantizedRotatingKVCache(TOKENS, group_size=32),
    "ChunkedKVCache": lambda: ChunkedKVCache(2 * TOKENS),
}


@pytest.mark.parametrize("make", LONG.values(), ids=LONG)
def test_a_token_at_65536_copies_no_buffer(make):
    cache, row = make(), mx.ones((1, 1, 1, 32))
    cache.update_and_fetch(*(mx.ones((1, 1, TOKENS, 32)),) * 2)
    # The first token after many makes room, or puts a ring in order.
    seen = cache.update_and_fetch(row, row)
    mx.eval(seen, cache.state)
    del seen
    mx.clear_cache()
    before = active_memory()
    mx.reset_peak_memory()
    for _ in range(50):
        mx.eval(cache.update_and_fetch(row, row))
    one_buffer = cache.nbytes / 2
    assert mx.get_peak_memory() - before < one_buffer / 8
    assert cache.offset == TOKENS + 51


def test_the_measure_sees_a_copy():
    cache, row = KVCache(), mx.ones((1, 1, 1, 32))
    cache.update_and_fetch(*(mx.ones((1, 1, TOKENS + 1, 32)),) * 2)
    held = cache.keys
    mx.eval(held, cache.state)
    before = active_memory()
    mx.reset_peak_memory()
    mx.eval(cache.update_and_fetch(row, row))
    assert mx.get_peak_memory() - before >= held.nbytes
