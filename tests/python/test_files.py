"""Saving and loading our caches from Python: what comes back, what a file holds, how errors look."""

import json
import struct

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlxrs_py
from mlxrs_py.cache import (
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from tiny import MAKERS, ONLY_032, feed, leaves, noise, raw

FORMATS = [("0.32", False), ("0.32", True), ("0.31", False)]
both_formats = pytest.mark.parametrize(("layout", "padded"), FORMATS)
every_class_in_its_formats = pytest.mark.parametrize(
    ("make", "layout", "padded"),
    [
        pytest.param(make, layout, padded, id=f"{name}-{layout}-{padded}")
        for name, make in MAKERS.items()
        for layout, padded in FORMATS
        if layout == "0.32" or name not in ONLY_032
    ],
)


def header(file):
    """Read the JSON header of a safetensors file, and where its data starts."""
    data = file.read_bytes()
    (n_bytes,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n_bytes]), 8 + n_bytes


def names(folder):
    return [entry.name for entry in folder.iterdir()]


def numbers(cache):
    return {name: getattr(cache, name, None) for name in ("offset", "_idx", "keep", "max_size", "group_size", "bits")}


@every_class_in_its_formats
@given(updates=st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=12), cut=st.integers(0, 9))
def test_a_loaded_cache_goes_on_bit_equal(make, layout, padded, tmp_path_factory, updates, cut):
    file = tmp_path_factory.mktemp("caches") / "p.safetensors"
    cache = feed(make(), *updates)
    if cache.is_trimmable():
        cache.trim(cut)
    save_prompt_cache(file, [cache], format=layout, padded=padded, durable=False)
    (loaded,) = load_prompt_cache(file)
    assert type(loaded) is type(cache)
    assert numbers(loaded) == numbers(cache)
    assert leaves(loaded.keys_and_values()) == leaves(cache.keys_and_values())
    for n_tokens in (1, 5, 1, 1, 300):
        rows = noise(n_tokens)
        assert leaves(loaded.update_and_fetch(rows, -rows)) == leaves(cache.update_and_fetch(rows, -rows))
        assert numbers(loaded) == numbers(cache)


@every_class_in_its_formats
def test_an_empty_cache_comes_back_empty(make, layout, padded, tmp_path):
    save_prompt_cache(tmp_path / "p", [make()], format=layout, padded=padded)
    (loaded,) = load_prompt_cache(tmp_path / "p")
    assert leaves(loaded.state) == leaves(make().state)
    assert feed(loaded, 3).offset == 3


@both_formats
def test_several_caches_keep_their_order(layout, padded, tmp_path):
    caches = [feed(KVCache(), 1 + i) for i in range(12)]
    save_prompt_cache(tmp_path / "p", caches, format=layout, padded=padded)
    assert [c.offset for c in load_prompt_cache(tmp_path / "p")] == list(range(1, 13))
    save_prompt_cache(tmp_path / "p", [], format=layout)
    assert load_prompt_cache(tmp_path / "p", return_metadata=True) == ([], {})


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_buffer_is_rounded_up_to_whole_steps_after_a_load(dtype, tmp_path):
    cache = KVCache()
    cache.update_and_fetch(noise(300).astype(dtype), noise(300).astype(dtype))
    feed(cache, 300)
    assert cache.keys.shape[2] == 812
    save_prompt_cache(tmp_path / "p", [cache])
    assert load_prompt_cache(tmp_path / "p")[0].keys.shape[2] == 768


def test_a_trimmed_cache_writes_its_valid_rows_and_no_byte_of_the_others(tmp_path):
    secret = mx.full((1, 2, 900, 32), 12345.678)
    marker = struct.pack("<f", 12345.678)
    for cache in (KVCache(), ConcatenateKVCache(), RotatingKVCache(2000)):
        feed(cache, 100)
        cache.update_and_fetch(secret, secret)
        cache.trim(900)
        file = tmp_path / "p.safetensors"
        for layout, padded in FORMATS:
            save_prompt_cache(file, [cache], format=layout, padded=padded)
            assert marker not in file.read_bytes()
            if not padded:
                assert file.stat().st_size - header(file)[1] <= 1.05 * 2 * 100 * 2 * 32 * 4


def test_a_quantized_cache_writes_its_valid_rows(tmp_path):
    cache = feed(QuantizedKVCache(32), 1000)
    cache.trim(900)
    file = tmp_path / "p.safetensors"
    save_prompt_cache(file, [cache])
    assert file.stat().st_size - header(file)[1] <= 1.05 * 2 * 100 * 2 * (32 + 4 + 4)


def test_padding_is_zeroed(tmp_path):
    cache = feed(KVCache(), 200)
    cache.trim(150)
    file = tmp_path / "p.safetensors"
    save_prompt_cache(file, [cache], padded=True)
    keys = mx.load(str(file))["0.0"]
    assert keys.shape == (1, 2, 256, 32)
    assert not keys[..., 50:, :].any().item()
    assert raw(keys[..., :50, :]) == raw(cache.keys_and_values()[0])


def test_the_header_fills_whole_pages(tmp_path):
    save_prompt_cache(tmp_path / "p", [feed(KVCache(), 3)], {"model": "m"})
    assert header(tmp_path / "p.safetensors")[1] % 4096 == 0


def test_metadata_comes_back(tmp_path):
    metadata = {"model": "ü 漢字", "empty": "", "tokenizer_config": '{"a": 1}', "a_b": "x" * 10_000}
    save_prompt_cache(tmp_path / "p", [KVCache()], metadata)
    assert load_prompt_cache(tmp_path / "p", return_metadata=True)[1] == metadata
    assert load_prompt_cache(tmp_path / "p", True)[1] == metadata


@pytest.mark.parametrize(
    "metadata", [{"a.b": "c"}, {"0": "x"}, {"": "x"}, {1: "x"}, {"a": 1}, {"a": None}, [("a", "b")]]
)
def test_metadata_that_would_not_come_back_is_refused_before_a_file_is_touched(metadata, tmp_path):
    file = tmp_path / "p.safetensors"
    save_prompt_cache(file, [KVCache()])
    before = file.read_bytes()
    with pytest.raises((ValueError, TypeError), match="metadata"):
        save_prompt_cache(file, [feed(KVCache(), 3)], metadata)
    assert file.read_bytes() == before
    assert names(tmp_path) == ["p.safetensors"]


def test_names_with_and_without_the_suffix(tmp_path):
    save_prompt_cache(tmp_path / "p", [feed(KVCache(), 3)])
    assert names(tmp_path) == ["p.safetensors"]
    for name in (tmp_path / "p", str(tmp_path / "p.safetensors")):
        assert load_prompt_cache(name)[0].offset == 3
    (tmp_path / "p.safetensors").rename(tmp_path / "exact")
    assert load_prompt_cache(tmp_path / "exact")[0].offset == 3


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "p.safetensors", tmp_path / "p.safetensors"
    save_prompt_cache(target, [KVCache()])
    link.symlink_to(target)
    save_prompt_cache(link, [feed(KVCache(), 3)])
    assert link.is_symlink() and load_prompt_cache(target)[0].offset == 3


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "p.safetensors"
    save_prompt_cache(file, [feed(KVCache(), 3)])
    old = file.open("rb")
    save_prompt_cache(file, [feed(KVCache(), 5)])
    with old:
        assert len(old.read()) > 0 and load_prompt_cache(file)[0].offset == 5


def test_saving_does_not_change_a_cache(tmp_path):
    cache = feed(RotatingKVCache(8, 2), 5, 4, 6, 1)
    before = leaves(cache.state)
    save_prompt_cache(tmp_path / "p", [cache])
    assert leaves(cache.state) == before


def test_a_subclass_is_saved_as_the_class_that_it_extends(tmp_path):
    class Special(RotatingKVCache):
        pass

    save_prompt_cache(tmp_path / "p", [feed(Special(8), 3)])
    assert type(load_prompt_cache(tmp_path / "p")[0]) is RotatingKVCache


def test_system_errors_keep_their_type(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileNotFoundError) as missing:
        load_prompt_cache(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(missing.value) and missing.value.errno == 2
    with pytest.raises(FileNotFoundError):
        save_prompt_cache(tmp_path / "no" / "such" / "p", [KVCache()])
    with pytest.raises(IsADirectoryError):
        save_prompt_cache(tmp_path / "folder.safetensors", [KVCache()])
    with pytest.raises(OSError, match="director"):
        load_prompt_cache(tmp_path / "folder.safetensors")
    assert names(tmp_path) == ["folder.safetensors"]


@pytest.mark.parametrize("arguments", [(3, []), ("p", 3), ("p", [3]), ("p", [None]), ("p", None)])
def test_what_is_no_file_name_or_no_cache_is_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError):
        save_prompt_cache(*arguments)
    assert names(tmp_path) == []


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"format: expected '0.32' or '0.31', got '0.30'"):
        save_prompt_cache(tmp_path / "p", [KVCache()], format="0.30")
    with pytest.raises(ValueError, match="padded"):
        save_prompt_cache(tmp_path / "p", [KVCache()], format="0.31", padded=True)
    assert names(tmp_path) == []


def rewrite(file, change):
    """Change the JSON header of a file."""
    content, start = header(file)
    data = file.read_bytes()[start:]
    change(content)
    text = json.dumps(content).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


DAMAGE = {
    "no header": lambda file: file.write_bytes(b""),
    "three bytes": lambda file: file.write_bytes(b"abc"),
    "a header that is too long": lambda file: file.write_bytes(struct.pack("<Q", 10**12) + b"{}"),
    "no JSON": lambda file: file.write_bytes(struct.pack("<Q", 4) + b"nope"),
    "cut data": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "an unknown class": lambda file: rewrite(file, lambda h: h["__metadata__"].update({"1.0": "Nope"})),
    "another class": lambda file: rewrite(file, lambda h: h["__metadata__"].update({"1.0": "RotatingKVCache"})),
    "no values": lambda file: rewrite(file, lambda h: h.pop("0.1")),
    "no metadata": lambda file: rewrite(file, lambda h: h.pop("__metadata__")),
    "an integer dtype": lambda file: rewrite(file, lambda h: h["0.0"].update({"dtype": "I32"})),
    "another shape": lambda file: rewrite(file, lambda h: h["0.0"].update({"shape": [1, 2, 4, 32]})),
    "one layer too many": lambda file: rewrite(file, lambda h: h["__metadata__"].update({"1.1": "KVCache"})),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_told_by_name(damage, tmp_path):
    file = tmp_path / "p.safetensors"
    save_prompt_cache(file, [feed(KVCache(), 3)])
    damage(file)
    with pytest.raises(mlxrs_py.CacheFormatError) as error:
        load_prompt_cache(file)
    assert str(error.value).startswith(str(file))
    assert ": expected " in str(error.value) and ", got " in str(error.value)
