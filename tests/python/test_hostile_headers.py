"""Files whose header is damaged or lies about the data, in both formats and for every kind of cache."""

import json
import struct
import subprocess
import sys

import pytest

from mlxrs_py.cache import load_prompt_cache
from raw_files import Raw, Tensor, assert_refused, content, each_kind, each_layout, first, good, write


def entry(name, **fields):
    """Change an entry of the header; a field that is None goes."""

    def change(file):
        entries, data = file.entries()
        at = list(dict(entries)).index(name)
        spec = {k: v for k, v in (json.loads(entries[at][1]) | fields).items() if v is not None}
        return content([*entries[:at], (name, json.dumps(spec)), *entries[at + 1 :]], data)

    return change


def header(change):
    """Change the text of the header."""

    def changed(file):
        entries, data = file.entries()
        raw = content(entries, b"")[8:]
        raw = change(raw)
        return struct.pack("<Q", len(raw)) + raw + data

    return changed


def with_first(**fields):
    return lambda file: entry(first(file), **fields)(file)


def twice(which):
    """Let an entry of the header stand twice."""

    def change(file):
        entries, data = file.entries()
        return content([*entries, entries[which]], data)

    return change


def overlapping(file):
    """Let the last tensor lie on the first bytes of the data."""
    entries, data = file.entries()
    sizes = {name: len(tensor.bytes()) for name, tensor in file.tensors.items()}
    names = [name for name, size in sizes.items() if size]
    spec = json.loads(dict(entries)[names[-1]]) | {"data_offsets": [0, sizes[names[-1]]]}
    return content([(n, json.dumps(spec) if n == names[-1] else e) for n, e in entries], data)


def length(n):
    return lambda file: struct.pack("<Q", n) + file.content()[8:]


BYTES = {
    "empty": lambda file: b"",
    "three bytes": lambda file: b"abc",
    "nothing but a length": lambda file: struct.pack("<Q", 0),
    "a header length of 1,000 in a file of 9 bytes": lambda file: struct.pack("<Q", 1000) + b"{",
    "a header length of a trillion": length(10**12),
    "a header length of 2**63": length(2**63),
    "a header length of 2**64 - 8": length(2**64 - 8),
    "a header length of 2**64 - 1": length(2**64 - 1),
    "no JSON": lambda file: struct.pack("<Q", 4) + b"nope",
    "a list": lambda file: struct.pack("<Q", 2) + b"[]",
    "JSON and more": header(lambda raw: raw + b"}"),
    "a header that is cut": header(lambda raw: raw[:-1]),
    "a header that is no UTF-8": header(lambda raw: raw.replace(b"model", b"mod\xff\xfe")),
    "data that is cut": lambda file: file.content()[:-1],
    "no data": lambda file: file.content()[: 8 + struct.unpack("<Q", file.content()[:8])[0]],
    "a shape that does not fit the bytes": with_first(shape=[7, 7]),
    "a negative axis": with_first(shape=[1, -1, 4, 2]),
    "an axis of 2**32": with_first(shape=[2**32, 0]),
    "axes whose product overflows": with_first(shape=[2**31 - 1] * 4),
    "a fractional axis": with_first(shape=[1.5]),
    "33 axes": with_first(shape=[1] * 33),
    "reversed data_offsets": with_first(data_offsets=[8, 0]),
    "negative data_offsets": with_first(data_offsets=[-8, 0]),
    "data_offsets near 2**64": with_first(data_offsets=[2**64 - 32, 2**64 - 1]),
    "data_offsets beyond 2**64": with_first(data_offsets=[0, 2**65]),
    "three data_offsets": with_first(data_offsets=[0, 16, 32]),
    "an unknown dtype": with_first(dtype="XX"),
    "a dtype that MLX cannot read": with_first(dtype="F64"),
    "a dtype that is a number": with_first(dtype=3),
    "no dtype": with_first(dtype=None),
    "no shape": with_first(shape=None),
    "no data_offsets": with_first(data_offsets=None),
    "a field too many": with_first(extra=[[]]),
    "a tensor that is null": lambda file: content([*file.entries()[0][:-1], (first(file), "null")], file.entries()[1]),
    "tensors that overlap": overlapping,
    "a tensor's key twice": twice(-1),
    "the metadata twice": twice(0),
    "a metadata key twice": header(lambda raw: raw.replace(b'{"', b'{"2.0": "", "', 2)),
    "a field twice": header(lambda raw: raw.replace(b'{"dtype"', b'{"dtype": "F32", "dtype"', 1)),
    "JSON that is 3,000 levels deep": header(lambda raw: b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"," + raw[1:]),
}


@pytest.mark.parametrize("damage", BYTES.values(), ids=BYTES)
@each_layout
@each_kind
def test_a_damaged_header_is_refused(damage, layout, kind, tmp_path):
    assert_refused(write(tmp_path, damage(good(layout, kind))))


#: Files that would cost: how they are made, and megabytes that reading may need beyond twice their size.
COSTLY = {
    "a header of more than 100 MB": "header = b'{' + b' ' * (100_000_000) + b'}'",
    "100 MB that are no JSON": "header = b'{' + b'x' * (99_999_999)",
    "100 MB of one string": "header = b'{\"__metadata__\":{\"2.0\":\"' + b'x' * 99_999_000 + b'\"}}'",
    "100 MB of strings": (
        "header = b'{\"__metadata__\":{' + b','.join(b'\"%x\":\"\"' % n for n in range(9_000_000)) + b'}}'"
    ),
    "100 MB of tensors": (
        'header = b\'{\' + b\',\'.join(b\'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}\' % n'
        " for n in range(1_600_000)) + b'}'"
    ),
    "100 MB of brackets": "header = b'{\"a\":' + b'[' * 99_000_000",
}
READ = """
import resource, struct, sys
import mlxrs_py
from mlxrs_py.cache import load_prompt_cache
path = sys.argv[1]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_prompt_cache(path)
except mlxrs_py.CacheFormatError:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(grown * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize("recipe", COSTLY.values(), ids=COSTLY)
def test_a_costly_file_is_refused_within_a_few_times_its_size(recipe, tmp_path):
    made: dict = {}
    exec(recipe, {}, made)
    path = write(tmp_path, struct.pack("<Q", len(made["header"])) + made["header"])
    del made
    assert path.stat().st_size > 80_000_000
    command = [sys.executable, "-c", READ, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    path.unlink()
    assert 0 <= int(result.stdout) < 4 * 100_000_000, result.stdout


def test_padding_after_a_load_is_bounded(tmp_path):
    # One row of four million sequences: padded to 256 rows it would be 4 GB.
    file = Raw("0.32")
    file.meta |= {"1.0": "KVCache", "2.0": ""}
    file.put("0", (Tensor("F16", [4_000_000, 1, 1, 1]), Tensor("F16", [4_000_000, 1, 1, 1]), 1))
    (cache,) = load_prompt_cache(write(tmp_path, file.content()))
    assert cache.keys.shape == cache.values.shape == (4_000_000, 1, 1, 1) and cache.offset == 1
