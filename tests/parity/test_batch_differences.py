"""Where our batches differ from mlx-lm's on purpose: each test shows what mlx-lm does, and what we do."""

import copy

import mlx.core as mx
import pytest

import mlxrs_py.cache as ours

from .reference import cache as theirs
from .reference import scaled_dot_product_attention
from .twins import leaves

BITS = [2, 3, 4, 5, 6, 8]
CLASSES = {"BatchKVCache": (), "BatchRotatingKVCache": (8,)}
both_classes = pytest.mark.parametrize("name", CLASSES)


def rows(n_tokens, batch=1, heads=1, dim=2, start=1):
    """Rows ``(batch, heads, n_tokens, dim)``, all different."""
    shape = batch, heads, n_tokens, dim
    return mx.arange(start, start + batch * heads * n_tokens * dim, dtype=mx.float32).reshape(shape)


def batches(name, left_padding, *counts):
    """Ours and mlx-lm's, fed with so many columns."""
    caches = [getattr(module, name)(*CLASSES[name], left_padding) for module in (ours, theirs)]
    for cache in caches:
        for n_columns in counts:
            cache.update_and_fetch(rows(n_columns, len(left_padding)), rows(n_columns, len(left_padding)))
    return caches


def singles(name, lengths, *arguments):
    """Ours and mlx-lm's, a list of each."""
    lists = [[getattr(module, name)(*arguments) for _ in lengths] for module in (ours, theirs)]
    for caches in lists:
        for cache, n_tokens in zip(caches, lengths, strict=True):
            if n_tokens:
                cache.update_and_fetch(rows(n_tokens), rows(n_tokens))
    return lists


def refused(cache, error, call, match=None):
    """Check that `call` raises and changes nothing."""
    before = leaves(cache.state)
    with pytest.raises(error, match=match):
        call()
    assert leaves(cache.state) == before


def test_padding_that_is_still_to_come_is_not_cut():
    mine, other = batches("BatchKVCache", [1, 3])
    mine.filter([1])
    other.filter([1])
    assert (mine._idx, mine.left_padding.tolist(), mine.offset.tolist()) == (0, [3], [-3])
    assert (other._idx, other.left_padding.tolist()) == (-3, [0])
    mine.update_and_fetch(rows(5), rows(5))
    assert mine.make_mask(1).tolist() == [[[[False] * 3 + [True] * 3]]]
    with pytest.raises(ValueError, match="broadcast"):
        other.update_and_fetch(rows(4), rows(4))

    mine, other = batches("BatchKVCache", [5, 7], 3)
    mine.filter([1])
    other.filter([1])
    assert (mine._idx, mine.left_padding.tolist(), other._idx) == (0, [4], -4)


@both_classes
def test_a_batch_that_was_loaded_can_go_on(name, tmp_path):
    file = str(tmp_path / "p.safetensors")
    mine, other = batches(name, [1, 0], 3)
    theirs.save_prompt_cache(file, [other])
    (loaded,), (broken,) = ours.load_prompt_cache(file), theirs.load_prompt_cache(file)
    loaded.finalize()
    for cache in (loaded, mine):
        cache.update_and_fetch(rows(1, 2), rows(1, 2))
    assert leaves(loaded.keys_and_values()) == leaves(mine.keys_and_values())
    with pytest.raises(AttributeError, match=r"_right_padding|_lengths"):
        broken.finalize()


def test_rings_of_different_sizes_do_not_join():
    mine, other = (module.BatchRotatingKVCache(8, [0]) for module in (ours, theirs))
    short, shorter = (module.BatchRotatingKVCache(4, [0]) for module in (ours, theirs))
    for cache in (mine, other, short, shorter):
        cache.update_and_fetch(rows(3), rows(3))
    refused(mine, ValueError, lambda: mine.extend(short), "expected max_size=8, got 4")
    other.extend(shorter)
    assert other.max_size == 8


def test_the_other_batch_does_not_change_when_it_is_joined():
    caches = batches("BatchRotatingKVCache", [0], 3)
    turned = batches("BatchRotatingKVCache", [0], 8, 1)
    for cache, other, stays in zip(caches, turned, (True, False), strict=True):
        cache.extend(other)
        assert other.rotated is stays
    assert leaves(caches[0].state) == leaves(caches[1].state)


def test_a_merge_does_not_lose_kept_tokens():
    mine, others = singles("RotatingKVCache", [12, 3], 8, 2)
    with pytest.raises(ValueError, match="keep=0: a batch keeps no tokens, got 2"):
        ours.RotatingKVCache.merge(mine)
    merged = theirs.RotatingKVCache.merge(others)
    # Of the 12 tokens it holds the newest 8, not the first.
    assert merged.keys[0, 0, :, 0].tolist() == rows(12)[0, 0, 4:, 0].tolist()


def test_only_caches_of_one_class_and_size_merge():
    (kv,), (their_kv,) = singles("KVCache", [0])
    (ring,), (their_ring,) = singles("RotatingKVCache", [0], 8)
    with pytest.raises(TypeError, match="merge: expected caches of the class of the first, KVCache"):
        type(kv).merge([kv, ring])
    assert type(theirs.KVCache.merge([their_kv, their_ring])) is theirs.BatchKVCache

    mine, others = ([module.KVCache() for _ in range(2)] for module in (ours, theirs))
    for caches in (mine, others):
        caches[0].update_and_fetch(rows(2, heads=2), rows(2, heads=2))
        caches[1].update_and_fetch(rows(2), rows(2))
    with pytest.raises(ValueError, match="merge: expected heads and head sizes"):
        ours.KVCache.merge(mine)
    assert theirs.KVCache.merge(others).keys.shape == (2, 2, 2, 2)
    for module in (ours, theirs):
        with pytest.raises(ValueError, match=r"none|empty"):
            module.BatchKVCache.merge([])


@both_classes
def test_places_count_from_the_end_and_must_be_there(name):
    mine, other = batches(name, [1, 0], 3)
    assert leaves(mine.extract(-1).state) == leaves(mine.extract(1).state)
    assert other.extract(-1).keys.shape[0] == 0
    for call in (lambda: mine.extract(2), lambda: mine.extract(-3), lambda: mine.filter([0, 2])):
        refused(mine, IndexError, call, r"expected one of 2 sequences, got -?\d")
    with pytest.raises(ValueError, match="gather"):
        other.filter([])
    refused(mine, ValueError, lambda: mine.filter([]), "at least one sequence")


@both_classes
def test_arrays_that_were_read_do_not_change(name):
    held = []
    for cache in batches(name, [1, 0]):
        held.append(cache.left_padding)
        cache.prepare(left_padding=[2, 2])
        assert cache.left_padding.tolist() == [3, 2]
    assert [array.tolist() for array in held] == [[1, 0], [3, 2]]


def test_an_announced_chunk_may_be_one_column_long():
    mine, other = batches("BatchRotatingKVCache", [0, 0])
    for cache in (mine, other):
        cache.prepare(lengths=[3, 1], right_padding=[0, 2])
        cache.update_and_fetch(rows(2, 2), rows(2, 2))
    mine.update_and_fetch(rows(1, 2), rows(1, 2))
    with pytest.raises(RuntimeError, match="finalize"):
        other.update_and_fetch(rows(1, 2), rows(1, 2))
    refused(mine, RuntimeError, lambda: mine.update_and_fetch(rows(1, 2), rows(1, 2)), "finalize")
    mine.finalize()
    assert (mine.offset.tolist(), mine.left_padding.tolist()) == ([3, 1], [0, 2])


@both_classes
def test_a_batch_that_waits_for_finalize_does_not_take_padding_for_tokens(name):
    mine, other = batches(name, [0, 0])
    for cache in (mine, other):
        cache.prepare(lengths=[1, 3], right_padding=[2, 0])
        cache.update_and_fetch(rows(3, 2), rows(3, 2))
    assert other.extract(0).offset == 3
    refused(mine, ValueError, lambda: mine.extract(0), "finalize")
    refused(mine, ValueError, lambda: mine.extend(batches(name, [0], 2)[0]), "finalize")
    with pytest.raises(ValueError, match="finalize"):
        ours.adopt([other])
    for cache in (mine, other):
        cache.filter([0])
    mine.finalize()
    assert (mine.offset.tolist(), mine.left_padding.tolist()) == ([1], [2])
    if name == "BatchKVCache":
        other.finalize()
        assert other.offset.tolist() == [1, 3]


def test_a_trim_into_the_padding_leaves_no_negative_offset():
    mine, other = batches("BatchRotatingKVCache", [2, 0], 4)
    for cache in (mine, other):
        cache.trim(3)
    assert [cache.extract(0).offset for cache in (mine, other)] == [0, -1]


def test_an_update_of_no_columns_loses_none():
    mine, other = batches("BatchRotatingKVCache", [0], 8, 1, 0)
    assert sorted(mine.keys[0, 0, :, 0].tolist()) == sorted(
        batches("BatchRotatingKVCache", [0], 8, 1)[0].keys[0, 0, :, 0].tolist()
    )
    assert other.keys.shape[2] == 7


@both_classes
def test_numbers_must_be_one_for_each_sequence(name):
    mine, other = batches(name, [0, 0])
    for arguments in ({"left_padding": [1]}, {"left_padding": [-1, 0]}, {"right_padding": [1], "lengths": [1]}):
        refused(mine, ValueError, lambda arguments=arguments: mine.prepare(**arguments), "for each of 2 sequences")
    refused(mine, ValueError, lambda: mine.prepare(left_padding=[1, 1], lengths=[1, 1], right_padding=[1]))
    refused(mine, ValueError, lambda: mine.update_and_fetch(rows(3), rows(3)), "rows of 2 sequences, got 1")
    other.prepare(left_padding=[1])
    other.update_and_fetch(rows(3), rows(3))
    assert (other.left_padding.tolist(), other.keys.shape[0]) == ([1, 1], 1)


@both_classes
def test_a_batch_of_no_sequences_has_integers(name):
    mine, other = batches(name, [])
    assert (mine.offset.dtype, mine.left_padding.dtype) == (mx.int32, mx.int32)
    assert (other.offset.dtype, other.left_padding.dtype) == (mx.float32, mx.float32)


def test_batches_of_other_sizes_or_classes_do_not_join():
    mine, other = batches("BatchKVCache", [0], 3)
    wide = [module.BatchKVCache([0]) for module in (ours, theirs)]
    for cache in wide:
        cache.update_and_fetch(rows(3, heads=2), rows(3, heads=2))
    refused(mine, ValueError, lambda: mine.extend(wide[0]), "heads and head sizes")
    refused(mine, TypeError, lambda: mine.extend(batches("BatchRotatingKVCache", [0], 3)[0]))
    refused(mine, TypeError, lambda: mine.extend(ours.KVCache()))
    refused(mine, ValueError, lambda: mine.extend(ours.BatchQuantizedKVCache([0])))
    refused(mine, TypeError, lambda: mine.extend(3))
    with pytest.raises(ValueError, match="concatenate"):
        other.extend(wide[1])


def test_quantized_caches_merge_and_mlx_lms_do_not():
    mine, other = ours.QuantizedKVCache(), theirs.QuantizedKVCache()
    assert hasattr(mine, "merge") and not hasattr(other, "merge")
    merged = mine.merge([mine, copy.copy(mine)])
    assert type(merged) is ours.BatchQuantizedKVCache and (merged.group_size, merged.bits) == (64, 8)
    for wrong in (ours.QuantizedKVCache(bits=4), ours.QuantizedKVCache(group_size=32)):
        with pytest.raises(ValueError, match="quantized by"):
            mine.merge([mine, wrong])


@pytest.mark.parametrize("grouped", [1, 2], ids=["as many queries as keys", "two queries on one of keys"])
@pytest.mark.parametrize("bits", BITS)
def test_attention_over_a_quantized_batch_is_mlx_lms_over_the_same_rows(bits, grouped):
    scheme = {"group_size": 32, "bits": bits}
    random = lambda n, heads=2, batch=3: mx.random.normal((batch, heads, n, 32), key=mx.random.key(n + heads))  # noqa: E731
    tokens = random(9), random(9) + 1
    # Sequences of 9, 4 and 6 tokens.
    starts, singles = (0, 5, 3), []
    for at, start in enumerate(starts):
        single = ours.QuantizedKVCache(**scheme)
        single.update_and_fetch(*(part[at : at + 1, :, start:] for part in tokens))
        singles.append(single)
    batch = ours.QuantizedKVCache.merge(singles)
    mask = batch.make_mask(2, return_array=True)
    new = random(2), random(2) - 1
    seen = batch.update_and_fetch(*new)
    queries = random(2, 2 * grouped)
    together = scaled_dot_product_attention(queries + 0, *seen, batch, scale=0.2, mask=mask)
    whole = [mx.quantize(mx.concatenate([old, more], axis=2), **scheme) for old, more in zip(tokens, new, strict=True)]
    expected = scaled_dot_product_attention(queries + 0, *whole, batch, scale=0.2, mask=mask)
    assert leaves([together]) == leaves([expected])
    # And each sequence sees what it would see alone, up to the order of sums.
    for at, start in enumerate(starts):
        alone = [[part[at : at + 1, :, start:] for part in triple] for triple in whole]
        one = scaled_dot_product_attention(queries[at : at + 1] + 0, *alone, batch, scale=0.2, mask="causal")
        assert mx.allclose(one, together[at : at + 1], atol=1e-5).item()


def test_rings_become_a_batch_of_rings_whoever_is_asked():
    caches = [[module.RotatingKVCache(max_size=4) for _ in range(2)] for module in (ours, theirs)]
    assert type(theirs.KVCache.merge(caches[1])) is theirs.BatchKVCache
    batch = ours.KVCache.merge(caches[0])
    assert type(batch) is ours.BatchRotatingKVCache and batch.max_size == 4


def test_a_batch_may_hold_more_rows_than_it_has_numbers_for_but_joins_no_other():
    for module in (ours, theirs):
        batch = module.BatchKVCache([1])
        batch.update_and_fetch(mx.ones((3, 1, 2, 4)), mx.ones((3, 1, 2, 4)))
        assert batch.offset.tolist() == [1]
    batch, other = ours.BatchKVCache([1]), ours.BatchKVCache([0])
    batch.update_and_fetch(mx.ones((3, 1, 2, 4)), mx.ones((3, 1, 2, 4)))
    other.update_and_fetch(mx.ones((1, 1, 2, 4)), mx.ones((1, 1, 2, 4)))
    for one, two in ((batch, other), (other, batch)):
        with pytest.raises(ValueError, match="rows of 1 sequences, got 3"):
            one.extend(two)
