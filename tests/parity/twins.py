"""A cache of ours and mlx-lm's twin, driven through the same operations and compared bit by bit after each."""

from __future__ import annotations

import copy
import math
import pickle
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import mlxrs_py.cache as ours

from .reference import cache as theirs

#: Per class: operations in all, and how many grew a buffer, wrapped a ring and so on.
COUNTS: dict[str, Counter[str]] = {}

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_RANDOM = np.random.default_rng(17)
#: Every bit pattern there is, NaNs with payloads included.
_WORDS = _RANDOM.integers(0, 2**32, 1_500_000, dtype=np.uint32)
_NUMBERS = _RANDOM.standard_normal(1_500_000, dtype=np.float32)


def raw(array: mx.array) -> tuple[Any, ...]:
    """Give dtype, shape and bytes: equal only for arrays that are equal bit by bit."""
    assert type(array) is mx.array
    data = np.array(array if array.dtype == mx.bool_ else array.view(mx.uint8))
    return str(array.dtype), tuple(array.shape), data.tobytes()


def leaves(tree: Any) -> list[Any]:
    """Give the leaves of nested tuples and lists, arrays as `raw`."""
    if isinstance(tree, (tuple, list)):
        return [leaf for branch in tree for leaf in leaves(branch)]
    return [raw(tree) if isinstance(tree, mx.array) else tree]


def first(buffers: Any) -> mx.array | None:
    """Give the array of a buffer, the packed words of a quantized one."""
    return buffers[0] if isinstance(buffers, (tuple, list)) else buffers


def length(cache: Any) -> int:
    """Give the rows of a cache's buffers."""
    return 0 if cache.keys is None else first(cache.keys).shape[2]


def summary(name: str) -> str:
    """Give one line of counts."""
    counts = COUNTS[name]
    total, sequences = counts["operations"], counts["sequences"]
    parts = [f"{what} {n} ({n / total:.1%})" for what, n in counts.items() if what not in ("operations", "sequences")]
    return f"{name}: {total} operations in {sequences} sequences: {', '.join(parts)}"


dtypes = st.sampled_from(sorted(DTYPES))
counts_of_tokens = st.one_of(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 700), st.sampled_from([255, 256, 257, 512])
)


class Twins(RuleBasedStateMachine):
    """The operations that all classes have. A subclass makes the pair, and says what to count."""

    name: str
    #: What a run must have done, each in at least one operation of a hundred.
    counted: tuple[str, ...] = ("grew", "trimmed", "saved", "changed dtype")
    #: Where keys and values come from.
    pool = _WORDS
    head_dims: Sequence[int] = (1, 3, 4, 8, 32)

    def __init__(self) -> None:
        super().__init__()
        self.ours: Any = None
        self.theirs: Any = None
        #: False after a load, which may leave other padding.
        self.exact = True
        self.counts = COUNTS.setdefault(self.name, Counter(operations=0, sequences=0))
        self.counts["sequences"] += 1

    @initialize(batch=st.integers(1, 2), heads=st.integers(1, 3), data=st.data(), dtype=dtypes)
    def shape(self, batch: int, heads: int, data: Any, dtype: str) -> None:
        self.batch, self.heads = batch, heads
        self.head_dims = [data.draw(st.sampled_from(self.head_dims), label) for label in ("key dim", "value dim")]
        self.dtypes = [DTYPES[dtype]] * 2

    def done(self, **happened: bool) -> None:
        """Count one operation, and compare."""
        self.counts["operations"] += 1
        for what, yes in happened.items():
            self.counts[what] += yes
        self.compare()

    def rows(self, n_tokens: int, start: int) -> list[mx.array]:
        """Give new keys and values."""
        arrays = []
        for dim, dtype in zip(self.head_dims, self.dtypes, strict=True):
            shape = self.batch, self.heads, n_tokens, dim
            chosen = self.pool[start : start + math.prod(shape)]
            if self.pool is _NUMBERS:
                array = mx.array(chosen).astype(dtype)
            else:
                array = mx.array(chosen if dtype.size == 4 else chosen.astype(np.uint16)).view(dtype)
            arrays.append(array.reshape(shape))
            start += 7
        return arrays

    def feed(self, n_tokens: int, start: int) -> None:
        rows = self.rows(n_tokens, start)
        before = length(self.ours), [] if self.ours.empty() else self.stored_dtypes()
        seen = self.ours.update_and_fetch(*rows)
        assert leaves(seen) == leaves(self.theirs.update_and_fetch(*map(mx.array, rows)))
        self.done(**self.happened(*before))

    def happened(self, length_before: int, dtypes_before: list[mx.Dtype]) -> dict[str, bool]:
        """Tell what an update has done."""
        changed = dtypes_before not in ([], self.dtypes)
        return {"grew": length(self.ours) > length_before, "changed dtype": changed}

    @rule(n_tokens=counts_of_tokens, start=st.integers(0, 9999))
    def update(self, n_tokens: int, start: int) -> None:
        self.feed(n_tokens, start)

    @rule(n_steps=st.integers(1, 10), start=st.integers(0, 9999))
    def decode(self, n_steps: int, start: int) -> None:
        for step in range(n_steps):
            self.feed(1, start + 31 * step)

    @precondition(lambda self: self.exact)
    @rule(dtype=dtypes, value_dtype=dtypes, n_tokens=counts_of_tokens, start=st.integers(0, 9999))
    def update_with_other_dtypes(self, dtype: str, value_dtype: str, n_tokens: int, start: int) -> None:
        self.dtypes = [DTYPES[dtype], DTYPES[value_dtype]]
        self.feed(n_tokens, start)

    @rule(n=st.one_of(st.integers(0, 20), st.integers(0, 900)))
    def trim(self, n: int) -> None:
        if self.theirs.is_trimmable():
            n_taken = self.ours.trim(n)
            assert n_taken == self.trim_theirs(n)
            self.done(trimmed=n_taken > 0)
        elif n > 0:
            with pytest.raises(ValueError, match="trim"):
                self.ours.trim(n)
            self.done()

    def trim_theirs(self, n: int) -> int:
        return self.theirs.trim(n)

    @rule(way=st.sampled_from([copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def duplicate(self, way: Any) -> None:
        # The originals go on a little, which must not be seen in the copies.
        old = self.ours, self.theirs
        self.ours, self.theirs = way(self.ours), copy.deepcopy(self.theirs)
        rows = self.rows(1, 5)
        assert leaves(old[0].update_and_fetch(*rows)) == leaves(old[1].update_and_fetch(*map(mx.array, rows)))
        self.done(copied=True)

    @rule(n_tokens=st.integers(1, 30), window=st.none() | st.integers(1, 40), return_array=st.booleans())
    def mask(self, n_tokens: int, window: int | None, return_array: bool) -> None:
        if self.masks_agree():
            arguments = {"window_size": window, "return_array": return_array}
            assert leaves([self.ours.make_mask(n_tokens, **arguments)]) == leaves(
                [self.theirs.make_mask(n_tokens, **arguments)]
            )
        self.done(masked=self.masks_agree())

    def masks_agree(self) -> bool:
        return True

    @rule(rebuild=st.booleans())
    def exchange_states(self, rebuild: bool) -> None:
        mine, other = self.ours.state, copy.deepcopy(self.theirs).state
        if self.ours.empty() and self.name == "ConcatenateKVCache":
            return
        if rebuild:
            self.ours, self.theirs = type(self.ours).from_state(other), type(self.theirs).from_state(mine)
        else:
            self.ours.state, self.theirs.state = other, mine
        self.done(exchanged=True)

    @precondition(lambda self: self.theirs.keys is not None)
    @rule(
        layout=st.sampled_from([("0.32", False), ("0.32", True), ("0.31", False)]),
        ours_from_them=st.booleans(),
        theirs_from_us=st.booleans(),
    )
    def save_and_load(self, layout: tuple[str, bool], ours_from_them: bool, theirs_from_us: bool) -> None:
        (number, padded), before = layout, leaves(self.ours.keys_and_values())
        with tempfile.TemporaryDirectory() as folder:
            by_us, by_them = (str(Path(folder) / name) for name in ("ours.safetensors", "theirs.safetensors"))
            ours.save_prompt_cache(by_us, [self.ours, self.theirs], format=number, padded=padded, durable=False)
            theirs.save_prompt_cache(by_them, [self.theirs])
            mine, other = ours.load_prompt_cache(by_us)
            (from_them,) = ours.load_prompt_cache(by_them)
            read_by_them = theirs.load_prompt_cache(by_us if theirs_from_us and number == "0.32" else by_them)[0]
            mx.eval(mine.state, other.state, from_them.state, read_by_them.state)
        for loaded in (mine, other, from_them):
            assert type(loaded) is type(self.ours)
            assert leaves(loaded.keys_and_values()) == before
            assert self.numbers(loaded) == self.numbers(self.ours)
        self.ours, self.theirs = from_them if ours_from_them else mine, read_by_them
        # Buffers may now grow at other moments, and that is when dtypes promote.
        self.exact, self.dtypes = False, self.stored_dtypes()
        self.done(saved=True)

    @rule()
    def adopt(self) -> None:
        if self.theirs.empty():
            return
        (self.ours,) = ours.adopt([copy.deepcopy(self.theirs)])
        self.exact = True
        self.done(adopted=True)

    def stored_dtypes(self) -> list[mx.Dtype]:
        """Give the dtypes of keys and values: those of the scales if they are quantized."""
        buffers = self.ours.keys, self.ours.values
        return [rows[1].dtype if isinstance(rows, tuple) else rows.dtype for rows in buffers]

    def numbers(self, cache: Any) -> list[Any]:
        return [getattr(cache, name, None) for name in ("offset", "_idx", "keep", "max_size", "group_size", "bits")]

    def compare(self) -> None:
        mine, other = self.ours, self.theirs
        assert (mine.offset, mine.empty(), mine.is_trimmable()) == (other.offset, other.empty(), other.is_trimmable())
        assert self.numbers(mine) == self.numbers(other)
        if self.has_right_size():
            assert mine.size() == other.size()
        if other.empty():
            return
        assert leaves(mine.keys_and_values()) == leaves(other.keys_and_values())
        if self.exact:
            assert leaves(mine.state) == leaves(other.state)
            assert leaves([mine.keys, mine.values]) == leaves([other.keys, other.values])
            assert mine.nbytes == other.nbytes

    def has_right_size(self) -> bool:
        return True


class KVTwins(Twins):
    name = "KVCache"
    head_dims = (3, 8, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.theirs = ours.KVCache(), theirs.KVCache()

    @precondition(lambda self: not any(dim % 32 for dim in self.head_dims))
    @rule(bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]))
    def quantize(self, bits: int) -> None:
        mine, other = (cache.to_quantized(group_size=32, bits=bits) for cache in (self.ours, self.theirs))
        if self.exact:
            assert leaves(mine.state) == leaves(other.state)
        if not mine.empty():
            assert leaves(mine.keys_and_values()) == leaves(other.keys_and_values())
        self.done(quantized=True)


class RotatingTwins(Twins):
    name = "RotatingKVCache"
    counted = (*Twins.counted, "wrapped")

    @initialize(max_size=st.one_of(st.integers(1, 20), st.integers(1, 700)), keep=st.integers(0, 8))
    def make(self, max_size: int, keep: int) -> None:
        keep = min(keep, max_size - 1)
        self.ours, self.theirs = ours.RotatingKVCache(max_size, keep), theirs.RotatingKVCache(max_size, keep)
        self.exact = True

    @rule(room=st.integers(1, 300), keep=st.integers(0, 8), n_tokens=counts_of_tokens, cut=st.integers(1, 30))
    def start_again_and_trim(self, room: int, keep: int, n_tokens: int, cut: int) -> None:
        # Random rings are nearly always full, and then they cannot be trimmed.
        self.make(n_tokens + room, keep)
        self.feed(n_tokens, cut)
        self.trim(cut)

    def happened(self, length_before: int, dtypes_before: list[mx.Dtype]) -> dict[str, bool]:
        wrapped = length_before > 0 and self.ours.offset > self.ours.max_size
        return {**super().happened(length_before, dtypes_before), "wrapped": wrapped}

    def masks_agree(self) -> bool:
        return self.ours.keep == 0


class QuantizedTwins(Twins):
    name = "QuantizedKVCache"
    pool = _NUMBERS
    head_dims = (64, 128)

    @initialize(bits=st.sampled_from([2, 4, 8]), group_size=st.sampled_from([32, 64]))
    def make(self, bits: int, group_size: int) -> None:
        arguments = {"group_size": group_size, "bits": bits}
        self.ours, self.theirs = ours.QuantizedKVCache(**arguments), theirs.QuantizedKVCache(**arguments)

    @rule(bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]), group_size=st.sampled_from([32, 64]), n=counts_of_tokens)
    def start_from_a_plain_cache(self, bits: int, group_size: int, n: int) -> None:
        rows = self.rows(n, 3)
        plain = ours.KVCache(), theirs.KVCache()
        for cache in plain:
            cache.update_and_fetch(*rows)
        self.ours, self.theirs = (cache.to_quantized(group_size=group_size, bits=bits) for cache in plain)
        self.exact = True
        self.done(quantized=True)

    def has_right_size(self) -> bool:
        return False


class ConcatenateTwins(Twins):
    name = "ConcatenateKVCache"

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.theirs = ours.ConcatenateKVCache(), theirs.ConcatenateKVCache()

    def trim_theirs(self, n: int) -> int:
        # mlx-lm's own trim leaves the rows: see test_differences.
        n = min(n, self.theirs.offset)
        if n:
            rest = self.theirs.offset - n
            self.theirs.state = tuple(rows[..., :rest, :] for rows in self.theirs.state)
        return n

    def has_right_size(self) -> bool:
        return False
