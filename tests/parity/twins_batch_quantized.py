"""A quantized batch of ours beside mlx-lm's plain one: its rows are those of the plain one, each quantized once.

Padding is zeros in both; quantized zeros have a scale that is none or tiny. So rows are compared dequantized.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

import mlxrs_py.cache as ours

from .reference import cache as theirs
from .twins import _NUMBERS, leaves, length
from .twins_batch import BatchKVTwins, paddings

GROUP_SIZE = 32


class BatchQuantizedTwins(BatchKVTwins):
    name = "BatchQuantizedKVCache"
    counted = (
        *("grew", "trimmed", "saved", "copied", "masked"),
        *("filtered", "extended", "extracted", "merged", "finalized", "padded left"),
    )
    pool = _NUMBERS
    head_dims = (32, 64)
    adopts = False

    # One dtype: it is the scales' that promotes, not the words'. mlx-lm has no such states.
    update_with_other_dtypes = adopt = exchange_states = None

    def __init__(self) -> None:
        super().__init__()
        self.bits = 8

    @initialize(left_padding=paddings, bits=st.sampled_from([2, 3, 4, 5, 6, 8]))
    def make(self, left_padding: list[int], bits: int) -> None:
        self.bits = bits
        self.ours, self.theirs = self.new_batch(left_padding)

    def new_batch(self, left_padding: list[int]) -> tuple[Any, Any]:
        return ours.BatchQuantizedKVCache(left_padding, GROUP_SIZE, self.bits), theirs.BatchKVCache(left_padding)

    def new_single(self) -> tuple[Any, Any]:
        return ours.QuantizedKVCache(GROUP_SIZE, self.bits), theirs.KVCache()

    def choose_dtype(self, dtype: str) -> None:
        pass

    def dequantized(self, tree: Any) -> list[mx.array]:
        """Give plain rows of quantized ones; MLX dequantizes no rows."""
        return [
            mx.dequantize(words, scales, biases, group_size=GROUP_SIZE, bits=self.bits)
            if words.size
            else mx.zeros((*scales.shape[:3], scales.shape[3] * GROUP_SIZE), scales.dtype)
            for words, scales, biases in tree
        ]

    def quantized_once(self, tree: Any) -> list[mx.array]:
        """Give what is left of plain rows once they were quantized."""
        return self.dequantized(mx.quantize(rows, group_size=GROUP_SIZE, bits=self.bits) for rows in tree)

    def feed(self, n_tokens: int, start: int) -> None:
        before = length(self.ours)
        self.feed_pair((self.ours, self.theirs), self.ours.left_padding.size, n_tokens, start)
        self.done(grew=length(self.ours) > before)

    def feed_pair(self, pair: tuple[Any, Any], batch: int, n_tokens: int, start: int) -> None:
        self.batch = batch
        rows = self.rows(n_tokens, start)
        seen = pair[0].update_and_fetch(*rows)
        assert leaves(self.dequantized(seen)) == leaves(
            self.quantized_once(pair[1].update_and_fetch(*map(mx.array, rows)))
        )

    @rule(left_padding=paddings, n_tokens=st.integers(0, 20), start=st.integers(0, 9999))
    def extend(self, left_padding: list[int], n_tokens: int, start: int) -> None:
        pair = self.new_batch(left_padding)
        if n_tokens:
            self.feed_pair(pair, len(left_padding), n_tokens, start)
        if self.ours.left_padding.size + len(left_padding) > 9:
            return
        self.ours.extend(pair[0])
        self.theirs.extend(pair[1])
        self.done(extended=True)

    def compare_single(self, mine: Any, other: Any) -> None:
        assert type(mine) is ours.QuantizedKVCache
        assert (mine.offset, length(mine), mine.bits) == (other.offset, length(other), self.bits)
        assert leaves(self.dequantized(mine.keys_and_values())) == leaves(self.quantized_once(other.keys_and_values()))

    def compare_rows(self, mine: Any, other: Any) -> None:
        assert leaves(self.dequantized(mine)) == leaves(self.quantized_once(other))

    @rule(way=st.sampled_from([copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def duplicate(self, way: Any) -> None:
        self.batch = self.ours.left_padding.size
        old, self.ours = self.ours, way(self.ours)
        # The original goes on a little, which must not be seen in the copy.
        old.update_and_fetch(*self.rows(1, 5))
        self.done(copied=True)

    @precondition(lambda self: self.theirs.keys is not None)
    @rule(padded=st.booleans())
    def save_and_load(self, padded: bool) -> None:
        before = leaves(self.ours.keys_and_values())
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "p.safetensors")
            ours.save_prompt_cache(file, [self.ours], padded=padded, durable=False)
            (loaded,) = ours.load_prompt_cache(file)
            mx.eval(loaded.state)
            with pytest.raises(KeyError, match="BatchQuantizedKVCache"):
                theirs.load_prompt_cache(file)
        assert type(loaded) is type(self.ours) and leaves(loaded.keys_and_values()) == before
        assert self.numbers(loaded) == self.numbers(self.ours)
        # What finalize rolls in depends on the padding behind: the state in memory goes on.
        self.ours = type(loaded).from_state(self.ours.state)
        self.done(saved=True)

    def compare(self) -> None:
        mine, other = self.ours, self.theirs
        assert type(mine) is ours.BatchQuantizedKVCache
        assert (mine.group_size, mine.bits) == (GROUP_SIZE, self.bits)
        assert self.numbers(mine) == self.numbers(other)
        assert (mine.size(), mine.empty(), length(mine)) == (other.size(), other.empty(), length(other))
        if not other.empty():
            self.compare_rows(mine.keys_and_values(), other.keys_and_values())
