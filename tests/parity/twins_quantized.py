"""A quantized ring of ours beside mlx-lm's plain ring: its rows are those of the plain one, each quantized once.

Quantization works row by row, so what the quantized ring hands out must be, bit for bit, what ``mx.quantize`` makes of
the rows that mlx-lm's `RotatingKVCache` hands out.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

import mlxrs_py.cache as ours

from .reference import cache as theirs
from .twins import _NUMBERS, RotatingTwins, leaves

GROUP_SIZE = 32


class QuantizedRotatingTwins(RotatingTwins):
    name = "QuantizedRotatingKVCache"
    counted = ("grew", "trimmed", "saved", "wrapped", "quantized")
    pool = _NUMBERS
    head_dims = (32, 64)

    # Dtypes promote in other places: scales have them, words have not. States have other forms.
    update_with_other_dtypes = exchange_states = adopt = None

    def __init__(self) -> None:
        super().__init__()
        self.bits = 8

    @initialize(bits=st.sampled_from([2, 3, 4, 5, 6, 8]))
    def choose(self, bits: int) -> None:
        self.bits = bits
        if self.ours is not None:
            self.make(self.ours.max_size, self.ours.keep)

    @initialize(max_size=st.one_of(st.integers(1, 20), st.integers(1, 700)), keep=st.integers(0, 8))
    def make(self, max_size: int, keep: int) -> None:
        keep = min(keep, max_size - 1)
        self.ours = ours.QuantizedRotatingKVCache(max_size, keep, group_size=GROUP_SIZE, bits=self.bits)
        self.theirs = theirs.RotatingKVCache(max_size, keep)

    def quantized(self, rows: Any) -> list[Any]:
        """Give what rows of the plain ring are once quantized."""
        return [mx.quantize(array, group_size=GROUP_SIZE, bits=self.bits) for array in rows]

    def feed(self, n_tokens: int, start: int) -> None:
        rows, before = self.rows(n_tokens, start), 0 if self.ours.empty() else self.ours.keys[0].shape[2]
        seen = self.ours.update_and_fetch(*rows)
        assert leaves(seen) == leaves(self.quantized(self.theirs.update_and_fetch(*map(mx.array, rows))))
        grew = self.ours.keys[0].shape[2] > before
        self.done(grew=grew, wrapped=before > 0 and self.ours.offset > self.ours.max_size)

    @rule()
    def quantize_the_plain_ring(self) -> None:
        plain = ours.RotatingKVCache.from_state(copy.deepcopy(self.theirs).state)
        self.ours = plain.to_quantized(group_size=GROUP_SIZE, bits=self.bits)
        self.done(quantized=True)

    @rule(way=st.sampled_from([copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def duplicate(self, way: Any) -> None:
        old, self.ours = self.ours, way(self.ours)
        # The original goes on a little, which must not be seen in the copy.
        old.update_and_fetch(*self.rows(1, 5))
        self.done(copied=True)

    @precondition(lambda self: self.theirs.keys is not None)
    @rule(padded=st.booleans())
    def save_and_load(self, padded: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "p.safetensors")
            ours.save_prompt_cache(file, [self.ours], padded=padded, durable=False)
            (self.ours,) = ours.load_prompt_cache(file)
        self.done(saved=True)

    def compare(self) -> None:
        mine, other = self.ours, self.theirs
        assert type(mine) is ours.QuantizedRotatingKVCache
        assert (mine.group_size, mine.bits) == (GROUP_SIZE, self.bits)
        for name in ("offset", "_idx", "keep", "max_size"):
            assert getattr(mine, name) == getattr(other, name), name
        assert (mine.size(), mine.empty(), mine.is_trimmable()) == (other.size(), other.empty(), other.is_trimmable())
        if not other.empty():
            assert leaves(mine.keys_and_values()) == leaves(self.quantized(other.keys_and_values()))
