"""Batches of ours and mlx-lm's twins: rows come and go, sequences of all lengths are padded left and right."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

import mlxrs_py.cache as ours

from .reference import cache as theirs
from .twins import DTYPES, Twins, counts_of_tokens, dtypes, leaves, length

#: Forms in which callers give the places of sequences.
FORMS = (list, tuple, np.array, mx.array)
paddings = st.lists(st.integers(0, 6), min_size=1, max_size=5)
lengths_of_prompts = st.lists(st.integers(0, 12), min_size=1, max_size=5)
starts = st.integers(0, 9999)


class BatchTwins(Twins):
    """The operations of all batches. A subclass says how a batch and a cache of one sequence are made."""

    counted = (
        *("grew", "trimmed", "saved", "changed dtype", "copied", "masked", "exchanged", "adopted"),
        *("filtered", "extended", "extracted", "merged", "finalized", "padded left"),
    )

    def new_batch(self, left_padding: list[int]) -> tuple[Any, Any]:
        """Make an empty batch of ours and mlx-lm's."""
        raise NotImplementedError

    def new_single(self) -> tuple[Any, Any]:
        """Make an empty cache of one sequence of ours and mlx-lm's."""
        raise NotImplementedError

    @initialize(left_padding=paddings)
    def make(self, left_padding: list[int]) -> None:
        self.ours, self.theirs = self.new_batch(left_padding)

    def feed(self, n_tokens: int, start: int) -> None:
        self.batch = self.ours.left_padding.size
        super().feed(n_tokens, start)

    def feed_pair(self, pair: tuple[Any, Any], batch: int, n_tokens: int, start: int) -> None:
        """Update another pair."""
        self.batch = batch
        rows = self.rows(n_tokens, start)
        seen = pair[0].update_and_fetch(*rows)
        assert leaves(seen) == leaves(pair[1].update_and_fetch(*map(mx.array, rows)))

    @rule(data=st.data(), form=st.sampled_from(FORMS))
    def filter(self, data: Any, form: Any) -> None:
        n = self.ours.left_padding.size
        indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5), "indices")
        if not self.filters_agree(indices):
            return
        self.ours.filter(form(indices))
        self.theirs.filter(indices)
        self.done(filtered=True)

    def filters_agree(self, indices: list[int]) -> bool:
        return True

    @rule(
        left_padding=paddings, n_tokens=st.integers(0, 20), n_steps=st.integers(0, 3), start=starts, swap=st.booleans()
    )
    def extend(self, left_padding: list[int], n_tokens: int, n_steps: int, start: int, swap: bool) -> None:
        pair = self.new_batch(left_padding)
        for count in [n_tokens] * (n_tokens > 0) + [1] * n_steps:
            self.feed_pair(pair, len(left_padding), count, start)
        if self.ours.left_padding.size + len(left_padding) > 9:
            return
        if swap:
            pair, (self.ours, self.theirs) = (self.ours, self.theirs), pair
        # mlx-lm's own extend turns the other batch too.
        before = leaves(pair[0].state) if not pair[0].empty() else []
        self.ours.extend(pair[0] if swap or start % 2 else copy.deepcopy(pair[1]))
        assert before == (leaves(pair[0].state) if not pair[0].empty() else [])
        self.theirs.extend(pair[1])
        self.done(extended=True)

    @precondition(lambda self: self.theirs.keys is not None)
    @rule(data=st.data(), n_tokens=st.integers(1, 9), start=starts)
    def extract(self, data: Any, n_tokens: int, start: int) -> None:
        n = self.ours.left_padding.size
        at = data.draw(st.integers(0, n - 1), "sequence")
        if not self.extracts_agree(at):
            return
        pair = self.ours.extract(at - data.draw(st.sampled_from([0, n]), "from the end")), self.theirs.extract(at)
        assert type(pair[0]).__name__ == type(self.new_single()[0]).__name__
        self.compare_rows(pair[0].keys_and_values(), pair[1].keys_and_values())
        self.compare_single(*pair)
        self.feed_pair(pair, 1, n_tokens, start)
        self.compare_single(*pair)
        self.done(extracted=True)

    def extracts_agree(self, at: int) -> bool:
        return True

    def compare_single(self, mine: Any, other: Any) -> None:
        assert leaves(mine.state) == leaves(other.state)

    def compare_rows(self, mine: Any, other: Any) -> None:
        assert leaves(mine) == leaves(other)

    @rule(prompts=lengths_of_prompts, n_steps=st.integers(0, 9), start=starts, by_class=st.booleans(), dtype=dtypes)
    def merge(self, prompts: list[int], n_steps: int, start: int, by_class: bool, dtype: str) -> None:
        pairs = [self.new_single() for _ in prompts]
        self.choose_dtype(dtype)
        for pair, n_tokens in zip(pairs, prompts, strict=True):
            for count in [n_tokens] * (n_tokens > 0) + [1] * (n_steps if n_tokens % 2 else 0):
                self.feed_pair(pair, 1, count, start + count)
        mine, others = zip(*pairs, strict=True)
        self.ours = (type(mine[0]) if by_class else mine[0]).merge(
            others if start % 3 == 0 and self.adopts else list(mine)
        )
        self.theirs = type(others[0]).merge(list(others))
        self.exact = True
        self.done(merged=True)

    #: False for a class that mlx-lm lacks.
    adopts = True

    def choose_dtype(self, dtype: str) -> None:
        self.dtypes = [DTYPES[dtype]] * 2

    @rule(data=st.data(), chunk=st.integers(2, 9), start=starts, way=st.sampled_from(["", "copy", "pickle"]))
    def prompt(self, data: Any, chunk: int, start: int, way: str) -> None:
        n = self.ours.left_padding.size
        lengths = data.draw(st.lists(st.integers(0, 14), min_size=n, max_size=n), "lengths")
        longest = max(*lengths, 2)
        # mlx-lm's rings take a last chunk of one token for a generation step.
        longest += longest % chunk == 1
        padding = [longest - count for count in lengths]
        for cache in (self.ours, self.theirs):
            cache.prepare(lengths=lengths, right_padding=padding)
        if way == "copy":
            self.ours, self.theirs = copy.deepcopy(self.ours), copy.deepcopy(self.theirs)
        elif way == "pickle":
            self.ours = pickle.loads(pickle.dumps(self.ours))
        for at in range(0, longest, chunk):
            self.feed(min(chunk, longest - at), start + at)
        self.before_finalize(any(padding))
        self.ours.finalize()
        self.theirs.finalize()
        self.done(finalized=any(padding))

    def before_finalize(self, padded: bool) -> None:
        pass

    @rule(left_padding=paddings, data=st.data(), n_tokens=counts_of_tokens, start=starts)
    def pad_left(self, left_padding: list[int], data: Any, n_tokens: int, start: int) -> None:
        self.ours, self.theirs = self.new_batch(left_padding)
        self.exact = True
        n = len(left_padding)
        more = data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n), "more")
        self.ours.prepare(left_padding=more)
        self.theirs.prepare(left_padding=more)
        self.done(**{"padded left": any(more)})
        self.feed(n_tokens, start)
        for cache in (self.ours, self.theirs):
            with pytest.raises(ValueError, match="empty"):
                cache.prepare(left_padding=more)

    @rule(n_tokens=st.integers(1, 30), window=st.none() | st.integers(1, 40), return_array=st.booleans())
    def mask(self, n_tokens: int, window: int | None, return_array: bool) -> None:
        arguments = {"window_size": window, "return_array": return_array}
        mine, other = (cache.make_mask(n_tokens, **arguments) for cache in (self.ours, self.theirs))
        assert leaves([mine, self.ours.make_mask(n_tokens)]) == leaves([other, self.theirs.make_mask(n_tokens)])
        self.done(masked=True)

    @rule(way=st.sampled_from([copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def duplicate(self, way: Any) -> None:
        self.batch = self.ours.left_padding.size
        super().duplicate(way)

    @rule(rebuild=st.booleans())
    def exchange_states(self, rebuild: bool) -> None:
        super().exchange_states(rebuild)
        self.complete()

    def complete(self) -> None:
        """Give mlx-lm's batch the attribute that it lacks after a load: see test_batch_differences."""
        self.theirs._right_padding = None
        self.theirs._lengths = None

    @precondition(lambda self: self.theirs.keys is not None)
    @rule(layout=st.sampled_from([("0.32", False), ("0.32", True), ("0.31", False)]))
    def save_and_load(self, layout: tuple[str, bool]) -> None:
        (number, padded), before = layout, leaves(self.ours.keys_and_values())
        with tempfile.TemporaryDirectory() as folder:
            by_us, by_them = (str(Path(folder) / name) for name in ("ours.safetensors", "theirs.safetensors"))
            ours.save_prompt_cache(by_us, [self.ours, self.theirs], format=number, padded=padded, durable=False)
            theirs.save_prompt_cache(by_them, [self.theirs])
            mine, other = ours.load_prompt_cache(by_us)
            (from_them,) = ours.load_prompt_cache(by_them)
            read_by_them = theirs.load_prompt_cache(by_us if number == "0.32" else by_them)[0]
            mx.eval(mine.state, other.state, from_them.state, read_by_them.state)
        for loaded in (mine, other, from_them):
            assert type(loaded) is type(self.ours)
            assert leaves(loaded.keys_and_values()) == before
            assert self.numbers(loaded) == self.numbers(self.ours)
        assert leaves(read_by_them.keys_and_values()) == before
        # What finalize rolls in depends on the padding behind, which may have changed: both go on from one file.
        self.ours, self.theirs = mine, type(self.theirs).from_state(mine.state)
        self.complete()
        self.done(saved=True)

    def numbers(self, cache: Any) -> list[Any]:
        names = ("_idx", "_offset", "rotated", "max_size")
        return leaves([cache.offset, cache.left_padding, *(getattr(cache, name, None) for name in names)])

    def compare(self) -> None:
        mine, other = self.ours, self.theirs
        assert (mine.size(), mine.empty(), mine.is_trimmable()) == (other.size(), other.empty(), other.is_trimmable())
        assert self.numbers(mine) == self.numbers(other)
        for name in ("_right_padding", "_lengths"):
            assert leaves([getattr(mine, name, None)]) == leaves([getattr(other, name, None)])
        if not other.empty():
            assert leaves(mine.keys_and_values()) == leaves(other.keys_and_values())
            assert leaves(mine.state) == leaves(other.state)
            assert leaves([mine.keys, mine.values]) == leaves([other.keys, other.values])
            assert mine.nbytes == other.nbytes


class BatchKVTwins(BatchTwins):
    name = "BatchKVCache"

    def new_batch(self, left_padding: list[int]) -> tuple[Any, Any]:
        return ours.BatchKVCache(left_padding), theirs.BatchKVCache(left_padding)

    def new_single(self) -> tuple[Any, Any]:
        return ours.KVCache(), theirs.KVCache()

    def filters_agree(self, indices: list[int]) -> bool:
        # mlx-lm cuts columns that have not come yet.
        return min(self.theirs.left_padding.tolist()[at] for at in indices) <= (
            self.theirs._idx if length(self.ours) else 0
        )


class BatchRotatingTwins(BatchTwins):
    name = "BatchRotatingKVCache"
    counted = (*BatchTwins.counted, "wrapped")

    @initialize(max_size=st.one_of(st.integers(1, 20), st.integers(1, 700)), left_padding=paddings)
    def make(self, max_size: int, left_padding: list[int]) -> None:
        self.max_size = max_size
        self.ours, self.theirs = self.new_batch(left_padding)

    def new_batch(self, left_padding: list[int]) -> tuple[Any, Any]:
        return tuple(module.BatchRotatingKVCache(self.max_size, left_padding) for module in (ours, theirs))

    def new_single(self) -> tuple[Any, Any]:
        return ours.RotatingKVCache(self.max_size), theirs.RotatingKVCache(self.max_size)

    def extracts_agree(self, at: int) -> bool:
        # mlx-lm gives an offset below 0 after a trim into the padding.
        return self.theirs.offset.tolist()[at] >= 0

    def before_finalize(self, padded: bool) -> None:
        if padded:
            for cache in (self.ours, self.theirs):
                with pytest.raises(RuntimeError, match="finalize"):
                    cache.update_and_fetch(*self.rows(1, 0))

    @rule(room=st.integers(1, 300), n_tokens=counts_of_tokens, cut=st.integers(1, 30), left_padding=paddings)
    def start_again_and_trim(self, room: int, n_tokens: int, cut: int, left_padding: list[int]) -> None:
        # Random rings are nearly always full, and then they cannot be trimmed.
        self.make(n_tokens + room, left_padding)
        self.feed(n_tokens, cut)
        self.trim(cut)

    def happened(self, length_before: int, dtypes_before: list[mx.Dtype]) -> dict[str, bool]:
        return {**super().happened(length_before, dtypes_before), "wrapped": self.ours.rotated}
