"""Every class of mlx-lm in both formats, empty and filled, alone and in lists, saved by either side and converted."""

import mlx.core as mx
import pytest

import mlxrs_py.cache as ours
from mlxrs_py import _core

from .reference import cache as theirs
from .test_files import CACHES, feed, slots
from .twins import leaves

FILLED = CACHES | {
    "ConcatenateKVCache of no rows": lambda: feed(theirs.ConcatenateKVCache(), 0),
    "KVCache trimmed to nothing": lambda: trimmed(feed(theirs.KVCache(), 3), 3),
    "RotatingKVCache that fills": lambda: feed(theirs.RotatingKVCache(8, 2), 1, 3),
    "BatchRotatingKVCache that fills": lambda: feed(theirs.BatchRotatingKVCache(8, [1, 0]), 3, batch=2),
    "BatchRotatingKVCache": lambda: feed(theirs.BatchRotatingKVCache(4, [1, 0]), 3, 1, 1, batch=2),
    "ArraysCache with padding": lambda: padded(theirs.ArraysCache(2, left_padding=[1, 0])),
}
EMPTY = {
    "KVCache": theirs.KVCache,
    "RotatingKVCache": lambda: theirs.RotatingKVCache(8, 2),
    "QuantizedKVCache": lambda: theirs.QuantizedKVCache(32, 4),
    "ConcatenateKVCache": theirs.ConcatenateKVCache,
    "ChunkedKVCache": lambda: theirs.ChunkedKVCache(8),
    "ArraysCache": lambda: theirs.ArraysCache(2),
    "ArraysCache of no slots": lambda: theirs.ArraysCache(0),
    "CacheList": lambda: theirs.CacheList(theirs.KVCache(), theirs.ArraysCache(1)),
    "CacheList of no children": theirs.CacheList,
    "BatchKVCache": lambda: theirs.BatchKVCache([1, 0]),
    "BatchRotatingKVCache": lambda: theirs.BatchRotatingKVCache(8, [1, 0]),
}
#: What format 0.31 cannot say.
ONLY_032 = {"ArraysCache with padding"}
NESTS = {
    "alone": lambda cache: [cache],
    "between": lambda cache: [feed(theirs.KVCache(), 2), cache, theirs.RotatingKVCache(4)],
    "in a list": lambda cache: [theirs.CacheList(cache, slots(mx.ones((1, 3))))],
    "deep": lambda cache: [
        theirs.CacheList(theirs.CacheList(theirs.KVCache(), theirs.CacheList(cache)), theirs.KVCache())
    ],
}
CASES = [
    pytest.param(layout, make, nest, id=f"{kind} {name}, {place}, {layout}")
    for kind, makers in (("filled", FILLED), ("empty", EMPTY))
    for name, make in makers.items()
    for place, nest in NESTS.items()
    for layout in ("0.31", "0.32")
    if layout == "0.32" or name not in ONLY_032
]


def trimmed(cache, n):
    cache.trim(n)
    return cache


def padded(cache):
    cache[0], cache[1] = mx.ones((2, 3)), mx.zeros((2, 1, 4))
    cache.prepare(lengths=[3, 2])
    return cache


def spelled(cache):
    """Give class, numbers and valid rows, whoever's class it is."""
    name = type(cache).__name__
    if name == "CacheList":
        return name, [spelled(child) for child in cache.caches]
    state = list(cache.state)
    if name != "ArraysCache" and state[0] is not None:
        rows = valid_rows(name, state)
        state[:2] = [cut(side, rows) for side in state[:2]]
    return name, leaves(state)


def valid_rows(name, state):
    match name:
        case "KVCache" | "QuantizedKVCache" | "RotatingKVCache":
            return state[2]
        case "ChunkedKVCache":
            return state[2] - state[4]
        case "BatchKVCache":
            return state[4]
        case "BatchRotatingKVCache":
            return None if state[7] else state[6]
        case _:
            return None


def cut(side, rows):
    return side[..., :rows, :] if isinstance(side, mx.array) else [cut(part, rows) for part in side]


@pytest.mark.parametrize(("layout", "make", "nest"), CASES)
def test_every_class_comes_back_from_both_formats_and_through_a_conversion(layout, make, nest, tmp_path):
    caches = nest(make())
    expected = [spelled(cache) for cache in caches]
    ours.save_prompt_cache(tmp_path / "p", caches, {"model": "m"}, format=layout, durable=False)
    for file, target in (("q", layout), ("r", "0.32")):
        loaded, metadata = ours.load_prompt_cache(tmp_path / "p", return_metadata=True)
        assert [spelled(cache) for cache in loaded] == expected and metadata == {"model": "m"}
        _core.convert_file(tmp_path / "p", tmp_path / file, target, durable=False)
        loaded = ours.load_prompt_cache(tmp_path / file)
        assert [spelled(cache) for cache in loaded] == expected


@pytest.mark.parametrize("nest", [NESTS["alone"], NESTS["in a list"]], ids=["alone", "in a list"])
@pytest.mark.parametrize("make", FILLED.values(), ids=FILLED)
def test_a_file_of_mlx_lm_that_was_converted_there_and_back_is_read_by_mlx_lm(make, nest, tmp_path):
    caches, file = nest(make()), str(tmp_path / "p.safetensors")
    theirs.save_prompt_cache(file, caches, {"model": "m"})
    if make is not FILLED["ArraysCache with padding"]:
        _core.convert_file(file, file, "0.31", durable=False)
    _core.convert_file(file, file, "0.32", durable=False)
    loaded, metadata = theirs.load_prompt_cache(file, return_metadata=True)
    assert [spelled(cache) for cache in loaded] == [spelled(cache) for cache in caches] and metadata == {"model": "m"}


@pytest.mark.parametrize("name", ["QuantizedRotatingKVCache", "Mine"])
def test_a_class_that_only_we_know_is_refused_by_mlx_lm(name, tmp_path):
    class Mine(ours.KVCache):
        pass

    ours.register(Mine)
    cache = feed(Mine(), 3) if name == "Mine" else feed(ours.QuantizedRotatingKVCache(8), 3)
    file = str(tmp_path / "p.safetensors")
    ours.save_prompt_cache(file, [cache])
    assert type(ours.load_prompt_cache(file)[0]).__name__ == name
    with pytest.raises(KeyError, match=name):
        theirs.load_prompt_cache(file)
    ours.save_prompt_cache(file, [theirs.CacheList(cache)])
    (loaded,) = ours.load_prompt_cache(file)
    assert type(loaded[0]) is type(cache) and loaded[0].offset == 3
    with pytest.raises(KeyError, match=name):
        theirs.load_prompt_cache(file)


def test_padding_of_arrays_is_refused_for_format_031(tmp_path):
    with pytest.raises(ValueError, match=r"no left_padding and no lengths in format 0\.31"):
        ours.save_prompt_cache(tmp_path / "p", [FILLED["ArraysCache with padding"]()], format="0.31")
    theirs.save_prompt_cache(str(tmp_path / "p.safetensors"), [FILLED["ArraysCache with padding"]()])
    with pytest.raises(ValueError, match=r"convert: expected layer 0: no left_padding"):
        _core.convert_file(tmp_path / "p", tmp_path / "q", "0.31")
    assert not (tmp_path / "q.safetensors").exists()
