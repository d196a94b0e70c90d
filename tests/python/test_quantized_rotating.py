import mlx.core as mx
import pytest

from mlxrs_py.cache import QuantizedRotatingKVCache, RotatingKVCache
from tiny import feed, leaves, noise


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("counts", [(3,), (8,), (12,), (3, 4, 1, 1, 1), (12, 1, 1)])
def test_a_ring_is_quantized_before_and_after_it_wraps(counts, keep):
    ring = feed(RotatingKVCache(8, keep), *counts)
    quantized = ring.to_quantized(group_size=32, bits=4)
    assert type(quantized) is QuantizedRotatingKVCache
    for step in range(10):
        new = noise(1, seed=50 + step), noise(1, seed=80 + step)
        expected = [mx.quantize(rows, group_size=32, bits=4) for rows in ring.update_and_fetch(*new)]
        assert leaves(quantized.update_and_fetch(*new)) == leaves(expected)
    assert (quantized.offset, quantized._idx, quantized.keep) == (ring.offset, ring._idx, keep)


def test_quantizing_leaves_the_ring_as_it_was():
    ring = feed(RotatingKVCache(8, 2), 11)
    before = leaves(ring.state)
    ring.to_quantized(group_size=32).update_and_fetch(noise(1), noise(1))
    assert leaves(ring.state) == before


def test_an_empty_ring_is_quantized_from_its_first_token():
    quantized = RotatingKVCache(8).to_quantized(group_size=32, bits=8)
    assert quantized.empty() and quantized.nbytes == 0
    (words, scales, _), _ = quantized.update_and_fetch(noise(3), noise(3))
    assert (words.dtype, scales.shape) == (mx.uint32, (1, 2, 3, 1))


def test_a_quantized_ring_is_not_quantized_again():
    assert not hasattr(QuantizedRotatingKVCache(8), "to_quantized")


def test_what_mlx_cannot_quantize_is_refused_and_changes_nothing():
    for arguments in ({"bits": 7}, {"group_size": 16}, {"keep": 8}):
        with pytest.raises(ValueError, match=r"bits among|group_size among|keep < max_size"):
            QuantizedRotatingKVCache(8, **arguments)
    ring = feed(RotatingKVCache(8), 3, dim=48)
    with pytest.raises(ValueError, match="multiple of the group size 32"):
        ring.to_quantized(group_size=32)
    quantized = feed(QuantizedRotatingKVCache(8, group_size=32), 3)
    before = leaves(quantized.state)
    for wrong in (noise(1, dim=64), noise(1, heads=3), noise(1).astype(mx.int32), noise(1, dim=33)):
        with pytest.raises(ValueError, match=r"QuantizedRotatingKVCache\.update_and_fetch"):
            quantized.update_and_fetch(wrong, wrong)
    assert leaves(quantized.state) == before


def test_a_trim_takes_back_tokens_until_the_ring_is_full():
    quantized = feed(QuantizedRotatingKVCache(8, group_size=32), 6)
    assert (quantized.trim(2), quantized.offset, quantized.is_trimmable()) == (2, 4, True)
    feed(quantized, 4)
    assert not quantized.is_trimmable()
    with pytest.raises(ValueError, match="max_size=8"):
        quantized.trim(1)
