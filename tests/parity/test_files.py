"""Files of ours read by mlx-lm, and mlx-lm's by us: all classes, metadata, files of mlx-lm 0.31.3 and 0.32.2."""

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import pytest

import mlxrs_py
import mlxrs_py.cache as ours

from .reference import cache as theirs
from .twins import leaves

DATA = Path(__file__).parent.parent / "data"
EXPECTED = {
    name: expected
    for version in ("v031", "v032")
    for name, expected in json.loads((DATA / f"expected_{version}.json").read_text(encoding="utf-8")).items()
}


def feed(cache, *counts, batch=1):
    for n_tokens in counts:
        rows = mx.random.normal((batch, 2, n_tokens, 64), key=mx.random.key(n_tokens))
        cache.update_and_fetch(rows, rows + 1)
    return cache


def slots(*arrays):
    cache = theirs.ArraysCache(len(arrays))
    for at, array in enumerate(arrays):
        cache[at] = array
    return cache


def chunked():
    cache = feed(theirs.ChunkedKVCache(8), 300, 5)
    cache.maybe_trim_front()
    return feed(cache, 1)


CACHES = {
    "KVCache": lambda: feed(theirs.KVCache(), 300, 5),
    "RotatingKVCache": lambda: feed(theirs.RotatingKVCache(8, 2), 5, 4, 6, 1),
    "QuantizedKVCache": lambda: feed(theirs.KVCache(), 300).to_quantized(),
    "ConcatenateKVCache": lambda: feed(theirs.ConcatenateKVCache(), 3, 4),
    "ChunkedKVCache": chunked,
    "ArraysCache": lambda: slots(mx.ones((1, 3)), None, mx.zeros((1, 2, 2))),
    "CacheList": lambda: theirs.CacheList(
        feed(theirs.KVCache(), 3), theirs.CacheList(slots(mx.ones((1, 2))), feed(theirs.RotatingKVCache(8), 12, 1))
    ),
    "BatchKVCache": lambda: feed(theirs.BatchKVCache([1, 3, 0]), 4, 1, batch=3),
}
every_class = pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)


def tree(cache):
    """Give class names, numbers and valid rows, whoever's class it is."""
    name = type(cache).__name__
    if hasattr(cache, "caches"):
        return name, [tree(child) for child in cache.caches]
    if name == "ArraysCache":
        return name, leaves(cache.state)
    if name == "BatchKVCache":
        rows = [array[..., : cache._idx, :] for array in (cache.keys, cache.values)]
        return name, cache._idx, leaves([*rows, cache.offset, cache.left_padding])
    attributes = ("offset", "_idx", "keep", "max_size", "group_size", "bits", "chunk_size", "start_position")
    numbers = {attribute: getattr(cache, attribute, None) for attribute in attributes}
    if name == "ChunkedKVCache":
        valid = cache.offset - cache.start_position
        return name, numbers, leaves([cache.keys[..., :valid, :], cache.values[..., :valid, :]])
    return name, numbers, leaves(cache.keys_and_values())


@every_class
def test_a_file_of_mlx_lm_is_read_by_us(make, tmp_path):
    file, cache = str(tmp_path / "p.safetensors"), make()
    theirs.save_prompt_cache(file, [cache, cache], {"model": "m"})
    loaded, metadata = ours.load_prompt_cache(file, return_metadata=True)
    assert [tree(c) for c in loaded] == [tree(cache)] * 2
    assert metadata == {"model": "m"}
    assert type(loaded[0]).__module__ == ("mlxrs_py.cache" if hasattr(ours, type(cache).__name__) else theirs.__name__)


def test_children_of_a_list_are_ours_after_a_load(tmp_path):
    ours.save_prompt_cache(tmp_path / "p", [CACHES["CacheList"]()])
    (loaded,) = ours.load_prompt_cache(tmp_path / "p")
    assert (type(loaded), type(loaded[0]), type(loaded[1])) == (ours.CacheList, ours.KVCache, ours.CacheList)
    assert [type(child) for child in loaded[1].caches] == [ours.ArraysCache, ours.RotatingKVCache]


@pytest.mark.parametrize("padded", [False, True])
@every_class
def test_a_file_of_ours_is_read_by_mlx_lm(make, padded, tmp_path):
    file, cache = str(tmp_path / "p.safetensors"), make()
    adopted = ours.adopt([make()])
    ours.save_prompt_cache(file, [cache, *adopted], {"model": "m"}, padded=padded)
    loaded, metadata = theirs.load_prompt_cache(file, return_metadata=True)
    assert [tree(c) for c in loaded] == [tree(cache)] * 2
    assert metadata == {"model": "m"}


@every_class
def test_format_031_comes_back(make, tmp_path):
    if make is chunked or make is CACHES["ArraysCache"]:
        # That format has no place for an offset beyond the buffer, nor for an empty slot.
        return
    file, cache = tmp_path / "p", make()
    ours.save_prompt_cache(file, [cache], format="0.31")
    assert [tree(c) for c in ours.load_prompt_cache(file)] == [tree(cache)]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_files_that_mlx_lm_wrote(name):
    caches, metadata = ours.load_prompt_cache(DATA / name, return_metadata=True)
    assert metadata == EXPECTED[name]["metadata"]
    assert [described(cache) for cache in caches] == EXPECTED[name]["layers"]


def described(cache):
    """Spell a cache out as tests/data does."""
    layer = {"class": type(cache).__name__}
    if hasattr(cache, "caches"):
        return layer | {"caches": [described(child) for child in cache.caches]}
    names = (
        *("offset", "keep", "max_size", "_idx", "_offset", "rotated", "group_size", "bits"),
        *("chunk_size", "start_position", "left_padding", "lengths"),
    )
    values = {name: getattr(cache, name) for name in names if hasattr(cache, name)}
    layer["attributes"] = {n: v.tolist() if isinstance(v, mx.array) else v for n, v in values.items()}
    if layer["class"] == "ArraysCache":
        return layer | {"cache": [None if slot is None else digest(slot) for slot in cache.cache]}
    match layer["class"]:
        case "ChunkedKVCache":
            rows = cache.offset - cache.start_position
        case "BatchKVCache":
            rows = cache._idx
        case "BatchRotatingKVCache":
            rows = None if cache.rotated else cache._idx
        case "ConcatenateKVCache":
            rows = None
        case _:
            rows = cache.offset
    for name in ("keys", "values"):
        held = getattr(cache, name)
        parts = [held] if held is None or isinstance(held, mx.array) else held
        spelled = [None if part is None else digest(part[:, :, :rows]) for part in parts]
        layer[name] = spelled[0] if parts is not held else spelled
    return layer


def digest(array):
    """Give shape, dtype and hash of the elements in row-major order."""
    raw = mx.contiguous(array).reshape(-1).view(mx.uint8)
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype).removeprefix("mlx.core."),
        "sha256": hashlib.sha256(bytes(memoryview(raw))).hexdigest(),
    }


@pytest.mark.parametrize("metadata", [{}, {"model": "m", "x": ""}, {"a": {"b": "c", "d": ["x", "y"]}}])
def test_metadata_of_mlx_lm_comes_back_as_mlx_lm_gives_it(metadata, tmp_path):
    file = str(tmp_path / "p.safetensors")
    theirs.save_prompt_cache(file, [feed(theirs.KVCache(), 3)], metadata)
    expected = theirs.load_prompt_cache(file, return_metadata=True)[1]
    assert ours.load_prompt_cache(file, return_metadata=True)[1] == expected == metadata


@pytest.mark.parametrize("metadata", [{"a.b": "c"}, {"0": "x"}, {"": "x"}])
def test_metadata_that_mlx_lm_changes_is_refused_by_us(metadata, tmp_path):
    file = str(tmp_path / "p.safetensors")
    theirs.save_prompt_cache(file, [feed(theirs.KVCache(), 3)], metadata)
    assert theirs.load_prompt_cache(file, return_metadata=True)[1] != metadata
    with pytest.raises(ValueError, match="metadata keys"):
        ours.save_prompt_cache(file, [ours.KVCache()], metadata)


def test_an_empty_concatenated_cache_comes_back(tmp_path):
    file = str(tmp_path / "p.safetensors")
    theirs.save_prompt_cache(file, [theirs.ConcatenateKVCache()])
    with pytest.raises(AttributeError):
        theirs.load_prompt_cache(file)
    assert ours.load_prompt_cache(file)[0].empty()


def test_a_class_that_cannot_be_loaded_is_not_saved(tmp_path):
    class LayerX(theirs.KVCache):
        pass

    file = str(tmp_path / "p.safetensors")
    theirs.save_prompt_cache(file, [feed(LayerX(), 3)])
    with pytest.raises(KeyError):
        theirs.load_prompt_cache(file)
    with pytest.raises(mlxrs_py.CacheFormatError, match=r"a class among .*'LayerX'"):
        ours.load_prompt_cache(file)
    with pytest.raises(ValueError, match=r"a class among .*'LayerX'"):
        ours.save_prompt_cache(str(tmp_path / "q"), [feed(LayerX(), 3)])
    assert not (tmp_path / "q.safetensors").exists()


def swapped(name):
    return lambda content, meta: meta.update({"1.0": name})


LIES = {
    "an ArraysCache that is a KVCache": swapped("ArraysCache"),
    "values that are missing": lambda content, meta: content.pop("0.1"),
    "a class without a state": lambda content, meta: meta.update({"1.1": "KVCache"}),
    "a state without a class": lambda content, meta: content.update({"1.0": content["0.0"]}),
    "an offset beyond the buffer": lambda content, meta: content.update({"0.2": mx.array(999)}),
    "an offset below 0": lambda content, meta: content.update({"0.2": mx.array(-3)}),
    "an offset that is a float": lambda content, meta: content.update({"0.2": mx.array(2.5)}),
    "values of another length": lambda content, meta: content.update({"0.1": content["0.1"][..., :2, :]}),
    "a number that is text": lambda content, meta: (
        content.update({"0.2": mx.array([51])}) or meta.update({"2.1.1": "string"})
    ),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_what_mlx_lm_loads_although_it_is_wrong_is_refused(lie, tmp_path):
    file = str(tmp_path / "p.safetensors")
    theirs.save_prompt_cache(file, [feed(theirs.KVCache(), 3)])
    content, meta = mx.load(file, return_metadata=True)
    lie(content, meta)
    mx.save_safetensors(file, content, meta)
    theirs.load_prompt_cache(file)
    with pytest.raises(mlxrs_py.CacheFormatError, match=f"^{file}: "):
        ours.load_prompt_cache(file)


def test_a_file_holds_the_valid_rows_only(tmp_path):
    cache = feed(theirs.KVCache(), 1000)
    cache.trim(900)
    sizes = {}
    for module in (ours, theirs):
        file = tmp_path / f"{module.__name__}.safetensors"
        module.save_prompt_cache(str(file), [cache])
        sizes[module] = file.stat().st_size
    n_bytes = 2 * 2 * 100 * 64 * 4
    assert sizes[ours] <= 1.05 * n_bytes + 4096 < 10 * n_bytes < sizes[theirs]


def test_no_class_in_a_file_needs_mlx_lm(tmp_path, monkeypatch):
    caches = [make() for make in CACHES.values()]
    ours.save_prompt_cache(tmp_path / "p", caches)
    monkeypatch.setitem(__import__("sys").modules, "mlx_lm.models.cache", None)
    loaded = ours.load_prompt_cache(tmp_path / "p")
    assert [type(cache) for cache in loaded] == [getattr(ours, type(cache).__name__) for cache in caches]


def test_a_number_of_a_sequence_beyond_32_bits_is_refused(tmp_path):
    batch = theirs.BatchKVCache([1, 0])
    batch.offset = mx.array([2**40, 0], mx.int64)
    theirs.save_prompt_cache(str(tmp_path / "p.safetensors"), [batch])
    with pytest.raises(mlxrs_py.CacheFormatError, match="numbers of 32 bits, got 1099511627776"):
        ours.load_prompt_cache(tmp_path / "p")
