"""Twins of lists of caches: plain and rotating rows, recurrent states, and a list in the list."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

import mlxrs_py.cache as ours

from .reference import cache as theirs
from .tiny_models import leaf_caches
from .twins import dtypes, leaves
from .twins_layers import DUPLICATES, Layers, numbers

KINDS = ("KVCache", "RotatingKVCache", "ArraysCache", "CacheList")


class ListTwins(Layers):
    name = "CacheList"
    counted = ("fed", "put", "trimmed", "copied", "saved", "adopted", "exchanged", "batched")

    @initialize(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), max_size=st.integers(1, 40))
    def make(self, kinds: list[str], max_size: int) -> None:
        def build(module: Any, kind: str) -> Any:
            if kind == "CacheList":
                return module.CacheList(module.KVCache(), module.RotatingKVCache(max_size))
            arguments = {"RotatingKVCache": (max_size, max_size // 3), "ArraysCache": (2,)}.get(kind, ())
            return getattr(module, kind)(*arguments)

        pair = (module.CacheList(*(build(module, kind) for kind in kinds)) for module in (ours, theirs))
        self.ours, self.theirs = pair

    def pairs(self, kind: type) -> list[tuple[Any, Any]]:
        both = zip(leaf_caches([self.ours]), leaf_caches([self.theirs]), strict=True)
        return [(mine, other) for mine, other in both if isinstance(other, theirs.ArraysCache) == (kind is mx.array)]

    @rule(n_tokens=st.integers(1, 30), start=st.integers(0, 9999), only=st.none() | st.integers(0, 3))
    def feed(self, n_tokens: int, start: int, only: int | None) -> None:
        pairs = self.pairs(tuple)
        for at, (mine, other) in enumerate(pairs):
            if only is None or at == only % len(pairs):
                rows = [numbers(start + 11 * i, (1, 2, n_tokens, 4), "float16") for i in (at, at + 5)]
                seen = mine.update_and_fetch(*rows)
                assert leaves(seen) == leaves(other.update_and_fetch(*map(mx.array, rows)))
        self.done("fed")

    @rule(slot=st.integers(0, 1), start=st.integers(0, 9999), dtype=dtypes)
    def put(self, slot: int, start: int, dtype: str) -> None:
        for mine, other in self.pairs(mx.array):
            mine[slot] = other[slot] = numbers(start, (1, 3, 2), dtype)
        self.done("put")

    @rule(n=st.integers(0, 9))
    def trim(self, n: int) -> None:
        if self.theirs.is_trimmable():
            # mlx-lm trims each as far as it goes: see test_layer_differences.
            n = min([n, *(child.offset for child in leaf_caches([self.theirs]))])
            assert self.ours.trim(n) == self.theirs.trim(n)
        self.done("trimmed")

    @rule(way=st.sampled_from(DUPLICATES))
    def duplicate(self, way: Any) -> None:
        old = self.ours
        self.ours, self.theirs = way(self.ours), copy.deepcopy(self.theirs)
        for child in leaf_caches([old]):
            child.state = type(child)(
                *{"RotatingKVCache": (8,), "ArraysCache": (1,)}.get(type(child).__name__, ())
            ).state
        self.done("copied")

    @rule(rebuild=st.booleans())
    def exchange_states(self, rebuild: bool) -> None:
        mine, other = as_theirs(self.ours.state), copy.deepcopy(self.theirs).state
        if rebuild:
            self.ours, self.theirs = ours.CacheList.from_state(other), theirs.CacheList.from_state(mine)
        else:
            self.ours.state, self.theirs.state = other, mine
        self.done("exchanged")

    @rule(ours_from_them=st.booleans(), number=st.sampled_from(["0.31", "0.32"]))
    def save_and_load(self, ours_from_them: bool, number: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            by_us, by_them = (str(Path(folder) / name) for name in ("ours.safetensors", "theirs.safetensors"))
            ours.save_prompt_cache(by_us, [self.ours, self.theirs], format=number, durable=False)
            theirs.save_prompt_cache(by_them, [self.theirs])
            mine, other = ours.load_prompt_cache(by_us)
            (from_them,) = ours.load_prompt_cache(by_them)
            (read_by_them,) = theirs.load_prompt_cache(by_them)
            mx.eval(mine.state, other.state, from_them.state, read_by_them.state)
        for loaded in (mine, other, from_them):
            assert type(loaded) is ours.CacheList
            assert valid(loaded) == valid(self.theirs)
        self.ours, self.theirs = from_them if ours_from_them else mine, read_by_them
        self.done("saved")

    @rule()
    def adopt(self) -> None:
        (self.ours,) = ours.adopt([copy.deepcopy(self.theirs)])
        assert type(self.ours) is ours.CacheList
        self.done("adopted")

    @rule(batch=st.integers(1, 5), start=st.integers(0, 9999), data=st.data())
    def merge_and_take_apart(self, batch: int, start: int, data: Any) -> None:
        """Lists of recurrent states, which every batch has; the list itself goes on."""
        both = []
        for module in (ours, theirs):
            lists = [module.CacheList(module.ArraysCache(1), module.ArraysCache(1)) for _ in range(batch)]
            for at, one in enumerate(lists):
                one[0][0], one[1][0] = (numbers(start + at + i, (1, 3), "float32") for i in (0, 99))
            both.append(module.CacheList.merge(lists))
        places = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=5))
        for merged in both:
            merged.prepare(lengths=[3] * batch)
            merged.filter(mx.array(places))
            merged.extend(copy.deepcopy(merged))
        assert leaves(both[0].state) == leaves(both[1].state)
        place = data.draw(st.integers(0, 2 * len(places) - 1))
        assert leaves(both[0].extract(place).state) == leaves(both[1].extract(place).state)
        for merged in both:
            merged.finalize()
        assert leaves(both[0].state) == leaves(both[1].state)
        self.done("batched")

    def compare(self) -> None:
        mine, other = self.ours, self.theirs
        assert valid(mine) == valid(other)
        assert (mine.size(), mine.is_trimmable()) == (other.size(), other.is_trimmable())
        if not isinstance(other[0], theirs.ArraysCache):
            assert mine.empty() == other.empty()


def as_theirs(state: Any) -> Any:
    """Give a state with the slots in lists, which mlx-lm writes into."""
    if isinstance(state, tuple):
        if len(state) == 3 and isinstance(state[0], tuple):
            return (list(state[0]), *state[1:])
        return tuple(map(as_theirs, state))
    return [as_theirs(part) for part in state] if isinstance(state, list) else state


def valid(cache: Any) -> list[Any]:
    """Give class names, numbers and valid rows: a load may leave other padding."""
    name = type(cache).__name__
    if name == "CacheList":
        return [name, *map(valid, cache.caches)]
    if name == "ArraysCache":
        return [name, leaves(cache.state)]
    rows = [] if cache.empty() else leaves(cache.keys_and_values())
    return [name, rows, [getattr(cache, number, None) for number in ("offset", "keep", "max_size", "_idx")]]
