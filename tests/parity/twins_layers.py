"""Twins of the caches of layers that are no plain attention: chunks and recurrent states."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import mlxrs_py.cache as ours

from .reference import cache as theirs
from .twins import _WORDS, COUNTS, DTYPES, Twins, dtypes, leaves

DUPLICATES = [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]


class ChunkedTwins(Twins):
    name = "ChunkedKVCache"
    counted = (*Twins.counted, "front dropped")
    #: It has none.
    mask = None

    @initialize(chunk_size=st.one_of(st.integers(1, 20), st.integers(1, 700)))
    def make(self, chunk_size: int) -> None:
        self.ours, self.theirs = ours.ChunkedKVCache(chunk_size), theirs.ChunkedKVCache(chunk_size)

    @rule(n_tokens=st.integers(0, 12), start=st.integers(0, 9999))
    def drop_the_front_and_go_on(self, n_tokens: int, start: int) -> None:
        before = self.ours.start_position
        self.ours.maybe_trim_front()
        self.theirs.maybe_trim_front()
        self.done(**{"front dropped": self.ours.start_position > before})
        self.feed(n_tokens, start)

    @rule(chunk_size=st.integers(1, 300))
    def change_the_size(self, chunk_size: int) -> None:
        self.ours.chunk_size = self.theirs.chunk_size = chunk_size
        self.done()

    def numbers(self, cache: Any) -> list[Any]:
        return [cache.offset, cache.start_position, cache.chunk_size]

    def has_right_size(self) -> bool:
        return False


def numbers(start: int, shape: tuple[int, ...], dtype: str) -> mx.array:
    """Give an array of that shape, of any bits."""
    n, size = mx.zeros(shape).size, DTYPES[dtype].size
    words = _WORDS[start : start + n]
    return mx.array(words if size == 4 else words.astype("uint16")).view(DTYPES[dtype]).reshape(shape)


class Layers(RuleBasedStateMachine):
    """The operations of caches that have no rows of their own. A subclass makes the pair, and compares it."""

    name: str
    counted: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.ours: Any = None
        self.theirs: Any = None
        self.counts = COUNTS.setdefault(self.name, Counter(operations=0, sequences=0))
        self.counts["sequences"] += 1

    def done(self, *happened: str) -> None:
        """Count one operation, and compare."""
        self.counts["operations"] += 1
        self.counts.update(happened)
        self.compare()

    def compare(self) -> None:
        raise NotImplementedError


#: Shapes of the slots behind the batch.
SLOTS = [(3, 4), (5,), (2, 1, 3), ()]
MAX_BATCH = 5
batches = st.integers(1, MAX_BATCH)


class ArraysTwins(Layers):
    name = "ArraysCache"
    counted = ("set", "padded", "advanced", "filtered", "extended", "extracted", "merged", "masked", "saved", "adopted")

    @initialize(n_slots=st.integers(1, len(SLOTS)), batch=batches, data=st.data())
    def make(self, n_slots: int, batch: int, data: Any) -> None:
        padding = data.draw(st.none() | st.lists(st.integers(0, 5), min_size=batch, max_size=batch))
        self.batch = batch
        self.ours, self.theirs = ours.ArraysCache(n_slots, padding), theirs.ArraysCache(n_slots, padding)

    @property
    def n_slots(self) -> int:
        return len(self.ours.cache)

    def filled(self, batch: int, slots: Any, data: Any) -> tuple[Any, Any]:
        """Give another pair, in which these slots are set."""
        pair = ours.ArraysCache(self.n_slots), theirs.ArraysCache(self.n_slots)
        for slot in slots:
            start, dtype = data.draw(st.integers(0, 9999)), data.draw(dtypes)
            for cache in pair:
                cache[slot] = numbers(start, (batch, *SLOTS[slot]), dtype)
        return pair

    @rule(slot=st.integers(0, 3), start=st.integers(0, 9999), dtype=dtypes)
    def put(self, slot: int, start: int, dtype: str) -> None:
        slot %= self.n_slots
        for cache in (self.ours, self.theirs):
            cache[slot] = numbers(start, (self.batch, *SLOTS[slot]), dtype)
        self.done("set")

    @rule(start=st.integers(0, 9999), dtype=dtypes)
    def put_all(self, start: int, dtype: str) -> None:
        for slot in range(self.n_slots):
            self.put(slot, start + slot, dtype)

    @rule(data=st.data())
    def prepare(self, data: Any) -> None:
        lengths = data.draw(st.lists(st.integers(0, 9), min_size=self.batch, max_size=self.batch))
        for cache in (self.ours, self.theirs):
            cache.prepare(lengths=lengths, right_padding=[0] * self.batch)
        self.done("padded")

    @rule(n=st.integers(0, 4))
    def advance(self, n: int) -> None:
        self.ours.advance(n)
        self.theirs.advance(n)
        self.done("advanced")

    @rule()
    def finalize(self) -> None:
        self.ours.finalize()
        self.theirs.finalize()
        self.done()

    @rule(n=st.integers(0, 9))
    def mask(self, n: int) -> None:
        assert leaves([self.ours.make_mask(n)]) == leaves([self.theirs.make_mask(n)])
        self.done("masked")

    @rule(data=st.data())
    def filter(self, data: Any) -> None:
        size = self.theirs.batch_size
        places = data.draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=MAX_BATCH))
        self.ours.filter(places)
        self.theirs.filter(mx.array(places))
        self.done("filtered")

    @precondition(lambda self: self.theirs.batch_size < MAX_BATCH)
    @rule(data=st.data(), padded=st.booleans())
    def extend(self, data: Any, padded: bool) -> None:
        batch = data.draw(st.integers(1, MAX_BATCH - self.theirs.batch_size))
        slots = data.draw(st.sets(st.integers(0, self.n_slots - 1)))
        pair = self.filled(batch, slots, data)
        if padded:
            for cache in pair:
                cache.left_padding = mx.array([3] * batch)
        before = leaves(pair[0].state)
        self.ours.extend(pair[0])
        self.theirs.extend(pair[1])
        assert leaves(pair[0].state) == before
        self.done("extended")

    @rule(place=st.integers(0, MAX_BATCH - 1), go_on=st.booleans())
    def extract(self, place: int, go_on: bool) -> None:
        place %= self.theirs.batch_size
        mine, other = self.ours.extract(place), copy.deepcopy(self.theirs)
        # mlx-lm's own raises where a slot is not set: see test_layer_differences.
        other.cache = [slot if slot is None else slot[place : place + 1] for slot in other.cache]
        other.finalize()
        if all(slot is not None for slot in self.theirs.cache):
            assert leaves(self.theirs.extract(place).state) == leaves(mine.state)
        assert leaves(mine.state) == leaves(other.state)
        if go_on:
            self.ours, self.theirs = mine, other
        self.done("extracted")

    @rule(data=st.data(), n_others=st.integers(0, MAX_BATCH - 1), empty=st.booleans())
    def merge(self, data: Any, n_others: int, empty: bool) -> None:
        first = set() if empty else set(range(self.n_slots))
        slots = [
            first,
            *(data.draw(st.sets(st.sampled_from(sorted(first)))) if first else set() for _ in range(n_others)),
        ]
        pairs = [self.filled(1, some, data) for some in slots]
        order = data.draw(st.permutations(range(len(pairs))))
        self.ours = ours.ArraysCache.merge([pairs[at][0] for at in order])
        self.theirs = theirs.ArraysCache.merge([pairs[at][1] for at in order])
        self.done("merged")

    @rule(way=st.sampled_from(DUPLICATES))
    def duplicate(self, way: Any) -> None:
        old = self.ours, self.theirs
        self.ours, self.theirs = way(self.ours), copy.deepcopy(self.theirs)
        for cache in old:
            cache.advance(1)
            cache[0] = None
        self.done("copied")

    @rule(rebuild=st.booleans())
    def exchange_states(self, rebuild: bool) -> None:
        mine, other = self.ours.state, copy.deepcopy(self.theirs).state
        mine = (list(mine[0]), *mine[1:])
        if rebuild:
            self.ours, self.theirs = ours.ArraysCache.from_state(other), theirs.ArraysCache.from_state(mine)
        else:
            self.ours.state, self.theirs.state = other, mine
        self.done("exchanged")

    @rule(ours_from_them=st.booleans(), theirs_from_us=st.booleans(), old=st.booleans())
    def save_and_load(self, ours_from_them: bool, theirs_from_us: bool, old: bool) -> None:
        padded = self.theirs.left_padding is not None or self.theirs.lengths is not None
        number = "0.31" if old and not padded else "0.32"
        before = leaves(self.ours.state)
        with tempfile.TemporaryDirectory() as folder:
            by_us, by_them = (str(Path(folder) / name) for name in ("ours.safetensors", "theirs.safetensors"))
            ours.save_prompt_cache(by_us, [self.ours, self.theirs], format=number, durable=False)
            theirs.save_prompt_cache(by_them, [self.theirs])
            mine, other = ours.load_prompt_cache(by_us)
            (from_them,) = ours.load_prompt_cache(by_them)
            read_by_them = theirs.load_prompt_cache(by_us if theirs_from_us and number == "0.32" else by_them)[0]
            mx.eval(mine.state, other.state, from_them.state, read_by_them.state)
        for loaded in (mine, other, from_them):
            assert type(loaded) is ours.ArraysCache
            assert leaves(loaded.state) == before
        self.ours, self.theirs = from_them if ours_from_them else mine, read_by_them
        self.done("saved")

    @rule()
    def adopt(self) -> None:
        (self.ours,) = ours.adopt([copy.deepcopy(self.theirs)])
        assert type(self.ours) is ours.ArraysCache
        self.done("adopted")

    def compare(self) -> None:
        mine, other = self.ours, self.theirs
        assert leaves(mine.state) == leaves(other.state)
        assert leaves(mine.cache) == leaves(other.cache)
        assert (mine.batch_size, mine.nbytes, mine.size()) == (other.batch_size, other.nbytes, other.size())
        assert (mine.is_trimmable(), mine.empty()) == (False, all(slot is None for slot in other.cache))
        # An empty cache takes a batch of any size.
        if leaves(mine.state).count(None) < len(leaves(mine.state)):
            self.batch = mine.batch_size
