"""Cache files written byte by byte, so that they can lie: no code of ours and none of mlx-lm's helps."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import mlxrs_py
from mlxrs_py import _core
from mlxrs_py.cache import load_prompt_cache

SIZES = {"F32": 4, "F16": 2, "I32": 4, "U32": 4, "I64": 8, "BOOL": 1, "U8": 1}


@dataclass
class Tensor:
    """A tensor of a file; zeros unless bytes are given."""

    dtype: str
    shape: list[int]
    data: bytes | None = None

    def bytes(self) -> bytes:
        n_elements = 1
        for dim in self.shape:
            n_elements *= dim
        return bytes(n_elements * SIZES[self.dtype]) if self.data is None else self.data


def text(value: str) -> Tensor:
    """Give a text as format 0.32 holds it."""
    return Tensor("I32", [len(value)], struct.pack(f"<{len(value)}i", *map(ord, value)))


def number(value: float) -> Tensor:
    """Give a number as format 0.32 holds it."""
    match value:
        case bool():
            return Tensor("BOOL", [], bytes([value]))
        case float():
            return Tensor("F32", [], struct.pack("<f", value))
        case _ if -(2**31) <= value < 2**31:
            return Tensor("I32", [], struct.pack("<i", value))
        case _:
            return Tensor("I64", [], struct.pack("<q", value))


class Raw:
    """A file that can be changed before it is written."""

    def __init__(self, layout: str) -> None:
        self.layout = layout
        self.tensors: dict[str, Tensor] = {}
        self.meta: dict[str, Any] = {}
        #: Numbers of the entries in the table of kinds.
        self.table: dict[str, int] = {}

    @property
    def class_group(self) -> int:
        return 2 if self.layout == "0.31" else 1

    def put(self, key: str, value: Any) -> None:
        """Put a value of format 0.32 at a key, with its entry in the table if it is no array."""
        match value:
            case Tensor():
                self.tensors[key] = value
            case tuple() | list():
                for at, item in enumerate(value):
                    self.put(f"{key}.{at}", item)
            case None:
                self.stand_in(key, Tensor("F32", [0]), "none")
            case str():
                self.stand_in(key, text(value), "string")
            case _:
                self.stand_in(key, number(value), "scalar")

    def stand_in(self, key: str, tensor: Tensor, kind: str) -> None:
        place = self.table.setdefault(key, 1 + len(self.table))
        self.tensors[key] = tensor
        self.meta |= {f"2.{place}.0": key, f"2.{place}.1": kind}

    def entries(self) -> tuple[list[tuple[str, str]], bytes]:
        """Give keys and JSON texts of the header, in order, and the data."""
        entries = [("__metadata__", json.dumps(self.meta))]
        data = b""
        for name, tensor in self.tensors.items():
            raw = tensor.bytes()
            offsets = [len(data), len(data) + len(raw)]
            entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            entries.append((name, json.dumps(entry)))
            data += raw
        return entries, data

    def content(self) -> bytes:
        entries, data = self.entries()
        return content(entries, data)


def content(entries: list[tuple[str, str]], data: bytes) -> bytes:
    """Give the bytes of a file with this header; a key may stand twice."""
    header = ("{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in entries) + "}").encode()
    return struct.pack("<Q", len(header)) + header + data


def rows(n: int = 4) -> Tensor:
    return Tensor("F32", [1, 1, n, 2])


def packed(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Give quantized rows of head size 64 at 4 bits and group size 32."""
    groups = Tensor("F16", [1, 1, n, 2])
    return Tensor("U32", [1, 1, n, 8]), groups, groups


#: A cache of each kind: class, and state in format 0.32.
STATES: dict[str, Any] = {
    "KVCache": (rows(), rows(), 3),
    "RotatingKVCache": (rows(8), rows(8), 10, 2, 8, 4),
    "QuantizedKVCache": (packed(), packed(), 3, 32, 4),
    "ArraysCache": ((Tensor("F32", [1, 2]), Tensor("F32", [1, 3]), None), Tensor("I32", [1]), None),
    "CacheList": (((rows(), rows(), 3), "KVCache"), ((rows(8), rows(8), 10, 2, 8, 4), "RotatingKVCache")),
}
#: Places of their numbers: in format 0.32 (tensor) and 0.31 (metadata); None where a format has none.
PLACES: dict[str, dict[str, tuple[str, str | None]]] = {
    "KVCache": {"offset": ("0.2", None)},
    "RotatingKVCache": {
        "offset": ("0.2", "0.0.2"),
        "keep": ("0.3", "0.0.0"),
        "max_size": ("0.4", "0.0.1"),
        "_idx": ("0.5", "0.0.3"),
    },
    "QuantizedKVCache": {"offset": ("0.2", "0.0.0"), "group_size": ("0.3", "0.0.1"), "bits": ("0.4", "0.0.2")},
    "ArraysCache": {},
    "CacheList": {
        "offset": ("0.1.0.2", "0.0.1.1.2"),
        "keep": ("0.1.0.3", "0.0.1.1.0"),
        "max_size": ("0.1.0.4", "0.0.1.1.1"),
        "_idx": ("0.1.0.5", "0.0.1.1.3"),
    },
}


def good(layout: str, kind: str) -> Raw:
    """Give a file with one cache of this kind, which loads."""
    file = Raw(layout)
    if layout == "0.32":
        file.meta |= {"0.model": "m", "1.0": kind, "2.0": ""}
        file.put("0", STATES[kind])
        return file
    file.meta |= {"1.model": "m", "2.0": kind}
    numbers: dict[str, Any] = {
        "KVCache": {"0.0": ""},
        "RotatingKVCache": {"0.0.0": "2", "0.0.1": "8", "0.0.2": "10", "0.0.3": "4"},
        "QuantizedKVCache": {"0.0.0": "4", "0.0.1": "32", "0.0.2": "4"},
        "ArraysCache": {"0.0": "110"},
        "CacheList": {"0.0.0.0": "KVCache", "0.0.0.1": "RotatingKVCache", "0.0.1.0": ""}
        | {"0.0.1.1.0": "2", "0.0.1.1.1": "8", "0.0.1.1.2": "10", "0.0.1.1.3": "4"},
    }
    arrays: dict[str, Any] = {
        "KVCache": (rows(), rows()),
        "RotatingKVCache": (rows(8), rows(8)),
        "QuantizedKVCache": (packed(), packed()),
        "ArraysCache": (Tensor("F32", [1, 2]), Tensor("F32", [1, 3]), Tensor("F32", [0])),
        "CacheList": ((rows(), rows()), (rows(8), rows(8))),
    }
    file.meta |= numbers[kind]
    file.put("0", arrays[kind])
    return file


def write(folder: Path, raw: bytes) -> Path:
    path = folder / "p.safetensors"
    path.write_bytes(raw)
    return path


LAYOUTS = ["0.31", "0.32"]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_kind = pytest.mark.parametrize("kind", STATES)


def first(file: Raw) -> str:
    """Give the key of the first tensor."""
    return next(iter(file.tensors))


def assert_refused(path: Path, *words: str) -> None:
    """Assert that whoever reads the file refuses it, by name, and that nothing is written."""
    out = path.with_name("out.safetensors")
    for read in (
        load_prompt_cache,
        _core.inspect_file,
        _core.verify_file,
        lambda path: _core.convert_file(path, out, "0.32"),
        lambda path: _core.convert_file(path, out, "0.31"),
    ):
        with pytest.raises(mlxrs_py.CacheFormatError) as error:
            read(path)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and ": expected " in message and ", got " in message
        assert len(message) < 2000 + len(str(path)) and all(word in message for word in words)
    assert not out.exists()
