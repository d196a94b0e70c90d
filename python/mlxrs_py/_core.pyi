"""The Rust core. Import it through ``mlxrs_py`` and ``mlxrs_py.cache``.

Shapes: B sequences, H key-value heads, S new tokens, L rows of a buffer, D and Dv head sizes of keys and values. Sizes
are in tokens (rows) unless a name says bytes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, SupportsIndex, TypeVar, final, overload

import mlx.core as mx
import numpy as np
from typing_extensions import disjoint_base

__all__ = [
    "ArraysCache",
    "AttentionCache",
    "BatchCache",
    "BatchKVCache",
    "BatchQuantizedKVCache",
    "BatchRotatingKVCache",
    "Cache",
    "CacheFormatError",
    "CacheList",
    "ChunkedKVCache",
    "ConcatenateKVCache",
    "KVCache",
    "LRUPromptCache",
    "MaskingCache",
    "MlxError",
    "MlxrsError",
    "PendingSave",
    "PromptStore",
    "PromptTrie",
    "PromptTrieResult",
    "QuantizedKVCache",
    "QuantizedRotatingKVCache",
    "RotatingKVCache",
    "StorePut",
    "StoreRecorder",
    "StoreView",
    "TokenBuffer",
    "__version__",
    "_live_handles",
    "adopt",
    "blake3_file",
    "blake3_hex",
    "build_info",
    "check_save",
    "convert_file",
    "create_attention_mask",
    "create_causal_mask",
    "inspect_file",
    "load_prompt_cache",
    "make_prompt_cache_from_config",
    "prefill",
    "prefill_recorded",
    "register",
    "save_prompt_cache",
    "save_prompt_cache_with_size",
    "trim_prompt_cache",
    "verify_file",
    "wait_for_saves",
]
_T = TypeVar("_T")

__version__: str

class MlxrsError(Exception):
    """Base of the exceptions of mlxrs_py."""

class MlxError(MlxrsError, RuntimeError):
    """A failure inside MLX: the operation and MLX's own words."""

class CacheFormatError(MlxrsError, ValueError):
    """A cache file that is damaged or lies: the file, the key, what the format asks for and what was found."""

@disjoint_base
class Cache:
    """What one layer keeps between tokens: what every cache class has.

    Methods are lazy: they record MLX operations and evaluate nothing. What fails leaves the cache as it was. Copies,
    states and adopted caches share memory with their origin until one of them writes.
    """

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self: ...
    @property
    def state(self) -> tuple[Any, ...]:
        """All that makes up the cache, in the order of mlx-lm 0.32.2: a snapshot that later updates do not change.

        Setting it checks the whole first: ValueError if the class cannot have such a state.
        """
    @state.setter
    def state(self, value: Any) -> None: ...
    @classmethod
    def from_state(cls, state: Any) -> Self:
        """Build a cache from a ``state``, without running the constructor."""
    def size(self) -> int:
        """Give the tokens whose rows are held."""
    def empty(self) -> bool:
        """Tell whether nothing was ever put in."""
    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, padding included; 0 when empty."""
    def is_trimmable(self) -> bool:
        """Tell whether the newest tokens can be taken back."""
    def copy(self) -> Self:
        """Give an independent cache of the same class."""
    def __copy__(self) -> Self: ...
    def __deepcopy__(self, memo: Any) -> Self: ...
    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[Any, ...]: ...
    def __setstate__(self, attributes: dict[str, Any]) -> None: ...
    def __setattr__(self, name: str, value: Any, /) -> None: ...
    def __delattr__(self, name: str, /) -> None: ...

class AttentionCache(Cache):
    """Keys and values of one attention layer."""

    #: Rows by which the buffers grow, 256. May be set on a subclass or an instance.
    step: ClassVar[int]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Take the keys and values of new tokens and give all that attention shall see.

        Shapes: ``keys`` (B, H, S, D), ``values`` (B, H, S, Dv). A quantized cache gives triples.

        Errors: ValueError if the shapes do not fit each other or what the cache holds.
        """
    @property
    def offset(self) -> int:
        """Tokens seen so far: the position of the next one."""
    @offset.setter
    def offset(self, value: int) -> None: ...
    @property
    def keys(self) -> Any:
        """Buffer of the keys (B, H, L, D), padding included; None before the first update."""
    @keys.setter
    def keys(self, value: Any) -> None: ...
    @property
    def values(self) -> Any:
        """Buffer of the values (B, H, L, Dv), padding included; None before the first update."""
    @values.setter
    def values(self, value: Any) -> None: ...
    def keys_and_values(self) -> tuple[Any, Any]:
        """Give the valid rows. ValueError when empty."""
    def trim(self, n: int) -> int:
        """Take back up to ``n`` of the newest tokens, and give how many. ValueError if ``n`` is negative."""

class MaskingCache(AttentionCache):
    """Keys and values of one attention layer that makes its own masks."""

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> Any:  # noqa: N803
        """Make the mask for ``N`` tokens that are about to be updated.

        Gives None (all visible), ``"causal"``, or a bool array (N, K) that is True where a token may look; a ring gives
        (K,) for one token.
        """

class KVCache(MaskingCache):
    """Keys and values in buffers that grow by ``step`` rows."""

    def __init__(self) -> None: ...
    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedKVCache:
        """Give the same tokens in a QuantizedKVCache. ValueError for sizes that MLX does not support."""
    @classmethod
    def merge(cls, caches: Iterable[Any]) -> BatchKVCache:
        """Give a batch of the sequences in ``caches``, ours or mlx-lm's; the shorter ones get padding on the left.

        Errors: TypeError if classes differ, ValueError if there are none, if one holds several sequences or if sizes
        differ.
        """

class RotatingKVCache(MaskingCache):
    """The newest ``max_size`` tokens in a ring, behind the first ``keep``, which are never overwritten.

    Once ``max_size`` tokens have been seen nothing can be trimmed: ``trim`` raises ValueError then.
    """

    def __init__(self, max_size: int, keep: int = 0) -> None:
        """Make an empty ring. ValueError unless ``0 <= keep < max_size``."""
    @property
    def max_size(self) -> int:
        """Rows that the ring holds once full."""
    @max_size.setter
    def max_size(self, value: int) -> None: ...
    @property
    def keep(self) -> int:
        """First rows that are never overwritten."""
    @keep.setter
    def keep(self, value: int) -> None: ...
    @property
    def _idx(self) -> int:
        """Row after the last one written."""
    @_idx.setter
    def _idx(self, value: int) -> None: ...
    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedRotatingKVCache:
        """Give the same tokens in a QuantizedRotatingKVCache. ValueError for sizes that MLX does not support."""
    @classmethod
    def merge(cls, caches: Iterable[Any]) -> BatchRotatingKVCache:
        """Give a batch of the sequences in ``caches``, ours or mlx-lm's; the shorter ones get padding on the left.

        Errors: TypeError if classes differ, ValueError if there are none, if one holds several sequences or if sizes
        differ or tokens are kept (``keep`` > 0).
        """

class QuantizedKVCache(MaskingCache):
    """A KVCache whose rows are affine-quantized once, when they come.

    Keys and values are triples: packed words (B, H, L, D * bits / 32) uint32, scales and biases (B, H, L, D /
    group_size) in the type of the first update.
    """

    def __init__(self, group_size: int = 64, bits: int = 8) -> None:
        """Make an empty cache. ValueError unless group_size is 32, 64 or 128 and bits 1, 2, 3, 4, 5, 6 or 8."""
    @property
    def group_size(self) -> int:
        """Elements that share a scale and a bias."""
    @group_size.setter
    def group_size(self, value: int) -> None: ...
    @property
    def bits(self) -> int:
        """Bits per element."""
    @bits.setter
    def bits(self, value: int) -> None: ...
    @classmethod
    def merge(cls, caches: Iterable[Any]) -> BatchQuantizedKVCache:
        """Give a batch of the sequences in ``caches``, ours or mlx-lm's; the shorter ones get padding on the left.

        Errors: TypeError if classes differ, ValueError if there are none, if one holds several sequences or if sizes
        differ.
        """

class QuantizedRotatingKVCache(MaskingCache):
    """A RotatingKVCache whose rows are affine-quantized once, when they come; mlx-lm has none.

    Keys and values are triples, as in QuantizedKVCache. Models with attention sinks (gpt_oss) cannot use it: mlx-lm's
    quantized attention raises ValueError for them.
    """

    def __init__(self, max_size: int, keep: int = 0, group_size: int = 64, bits: int = 8) -> None:
        """Make an empty ring. ValueError as for RotatingKVCache and QuantizedKVCache."""
    @property
    def max_size(self) -> int:
        """Rows that the ring holds once full."""
    @property
    def keep(self) -> int:
        """First rows that are never overwritten."""
    @property
    def _idx(self) -> int:
        """Row after the last one written."""
    @property
    def group_size(self) -> int:
        """Elements that share a scale and a bias."""
    @property
    def bits(self) -> int:
        """Bits per element."""

class ConcatenateKVCache(MaskingCache):
    """Exactly the rows, joined anew at each update."""

    def __init__(self) -> None: ...

class ChunkedKVCache(AttentionCache):
    """The newest ``chunk_size`` tokens, once the front is trimmed; grows by ``step`` rows like a KVCache.

    ``offset`` counts all tokens, ``size()`` those whose rows are held. It makes no masks: its models do.
    """

    def __init__(self, chunk_size: int) -> None:
        """Make an empty cache. ValueError unless ``chunk_size`` is at least 1."""
    def maybe_trim_front(self) -> None:
        """Drop the oldest rows, so that at most ``chunk_size`` are left."""
    @property
    def chunk_size(self) -> int:
        """Rows that ``maybe_trim_front`` leaves at most."""
    @chunk_size.setter
    def chunk_size(self, value: int) -> None: ...
    @property
    def start_position(self) -> int:
        """Position of the first row."""
    @start_position.setter
    def start_position(self, value: int) -> None: ...

class ArraysCache(Cache):
    """Recurrent states of a layer: arrays (B, ...) in slots, which are read and written by index.

    There are no rows, so there is nothing to trim, and ``size()`` is 0. Methods that take a place count negative ones
    from the end and raise ValueError for one that is no sequence.
    """

    def __init__(self, size: int, left_padding: Any = None) -> None:
        """Make ``size`` empty slots. ``left_padding``: integers (B,); an empty list counts as None."""
    def __getitem__(self, index: Any, /) -> Any: ...
    def __setitem__(self, index: Any, value: Any, /) -> None: ...
    @property
    def cache(self) -> list[Any]:
        """The slots, None where nothing was put yet: a new list. Assigning it sets all slots."""
    @cache.setter
    def cache(self, value: Iterable[Any]) -> None: ...
    @property
    def left_padding(self) -> mx.array | None:
        """Tokens that each sequence must not see at its start (B,), or None."""
    @left_padding.setter
    def left_padding(self, value: Any) -> None: ...
    @property
    def lengths(self) -> mx.array | None:
        """Tokens that each sequence has (B,), or None."""
    @lengths.setter
    def lengths(self, value: Any) -> None: ...
    @property
    def batch_size(self) -> int:
        """Sequences that are held, told by the first slot that is set, else by padding or lengths; else 1."""
    def make_mask(self, N: int) -> mx.array | None:  # noqa: N803
        """Make the bool mask (B, N) that is True for tokens and False for padding; None if nothing is padded."""
    def prepare(self, lengths: Any = None, **_others: Any) -> None:
        """Say how many tokens each sequence has in what comes next, (B,). Other arguments are for other caches."""
    def finalize(self) -> None:
        """Forget padding and lengths."""
    def advance(self, N: int) -> None:  # noqa: N803
        """Count ``N`` tokens that went through the layer: padding and lengths become less by it."""
    def filter(self, batch_indices: Any) -> None:
        """Keep the sequences at these places, in that order. An array of places is evaluated."""
    def extend(self, other: Any) -> None:
        """Append the sequences of another ArraysCache. What only one of the two has set is zeros in the other."""
    def extract(self, idx: int) -> ArraysCache:
        """Give the sequence at this place alone, without padding and lengths."""
    @classmethod
    def merge(cls, caches: Iterable[Any]) -> Self:
        """Make one batch of caches of one sequence each; slots that one of them lacks are zeros there."""

@disjoint_base
class CacheList(Cache):
    """Several caches of one layer, of any class, ours or not: by index, or in `caches`.

    The children are the very objects that were put in. What is asked of the list is asked of each of them; if one
    raises, those of our classes and mlx-lm's are as they were before. ``state`` is a list of pairs (state, class name).
    """

    def __init__(self, *caches: Any) -> None:
        """Hold these caches. ValueError for a list inside of itself, or more than 8 levels of lists."""
    @property
    def caches(self) -> tuple[Any, ...]:
        """The children."""
    @caches.setter
    def caches(self, value: Iterable[Any]) -> None: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    @property
    def state(self) -> Any:
        """Pairs of each child's state and the name of its class. Setting it makes new children, of our classes."""
    @state.setter
    def state(self, value: Any) -> None: ...
    def size(self) -> int:
        """Give the largest size of a child; 0 without children."""
    def empty(self) -> bool:
        """Tell whether the first child is empty; True without children."""
    def trim(self, n: int) -> int:
        """Take back up to ``n`` of the newest tokens of every child, and give how many: the same number for all.

        ValueError if ``n`` is negative, or if a child cannot be trimmed.
        """
    def filter(self, batch_indices: Any) -> None:
        """Keep the sequences at these places."""
    def extend(self, other: Any) -> None:
        """Append the sequences of another list, child by child. ValueError for another number of children."""
    def extract(self, idx: Any) -> CacheList:
        """Give a list with the sequence at this place alone."""
    def prepare(self, **arguments: Any) -> None:
        """Hand the arguments to every child."""
    def finalize(self) -> None:
        """Tell every child that what was prepared is done."""
    @classmethod
    def merge(cls, caches: Iterable[Any]) -> Self:
        """Make a list of the children merged, each with its like. ValueError unless all have the same number."""

class BatchCache(AttentionCache):
    """Keys and values of several sequences, one under the other, the shorter ones padded on the left.

    A column is one place in all of them. The numbers per sequence are int32 arrays (B,), made anew at each reading;
    assigning them evaluates what is assigned. Numbers may be given as lists, NumPy arrays or mlx arrays, which are
    evaluated.
    """

    @classmethod
    def merge(cls, caches: Iterable[Any]) -> Self:
        """Give a batch of the sequences in ``caches``, ours or mlx-lm's; the shorter ones get padding on the left.

        Errors: TypeError if classes differ or form another batch, ValueError if there are none, if one holds several
        sequences or if sizes differ.
        """
    @property  # type: ignore[override]
    def offset(self) -> mx.array:
        """Tokens seen by each sequence: the positions of the next ones. Negative while padding is still to come."""
    @offset.setter
    def offset(self, value: Any) -> None: ...
    @property
    def left_padding(self) -> mx.array:
        """Columns before the first token of each sequence. Negative once a ring has overwritten tokens."""
    @left_padding.setter
    def left_padding(self, value: Any) -> None: ...
    def filter(self, batch_indices: Any) -> None:
        """Keep the sequences at these places, in that order; a negative place counts from the end.

        Errors: ValueError if there are none, IndexError for one out of range.
        """
    def extend(self, other: Any) -> None:
        """Append the sequences of another batch of the same class, ours or mlx-lm's, which does not change.

        Errors: TypeError for another class, ValueError if sizes differ or padding is still to be finalized.
        """
    def extract(self, idx: int) -> Any:
        """Give one sequence alone, without padding; a negative place counts from the end.

        Errors: IndexError if it is out of range, ValueError if the batch is empty or padding is still to be finalized.
        """
    def prepare(self, *, left_padding: Any = None, lengths: Any = None, right_padding: Any = None) -> None:
        """Say which of the columns to come are padding; each argument has one number per sequence.

        ``left_padding`` columns come before the first tokens: only while the batch is empty. Up to ``finalize`` a
        sequence gets ``lengths`` tokens, then ``right_padding`` columns of padding; a ring needs both.

        Errors: ValueError unless there are B numbers of at least 0, TypeError for a ring without ``lengths``.
        """
    def finalize(self) -> None:
        """Move the right padding that was announced to the left of the tokens."""
    @property
    def _pending(self) -> list[int] | None:
        """What ``prepare`` has announced and ``finalize`` has not done yet, for pickles."""
    @_pending.setter
    def _pending(self, value: list[int] | None) -> None: ...
    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[Any, ...]: ...

class BatchKVCache(BatchCache):
    """A KVCache of several sequences."""

    def __init__(self, left_padding: Any) -> None:
        """Make an empty batch, to whose sequences so many columns of padding will come first."""
    @property
    def _idx(self) -> int:
        """Columns filled so far."""
    @_idx.setter
    def _idx(self, value: int) -> None: ...
    @property
    def _right_padding(self) -> mx.array | None:
        """Padding behind each sequence that ``finalize`` will move."""
    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:  # noqa: N803
        """Make the mask for ``N`` columns that are about to be updated: bool (B, 1, N, ``_idx`` + N), always."""

class BatchQuantizedKVCache(BatchCache):
    """A QuantizedKVCache of several sequences, whose rows are quantized once, when they come; mlx-lm has none.

    Keys and values are triples, as in QuantizedKVCache.
    """

    def __init__(self, left_padding: Any, group_size: int = 64, bits: int = 8) -> None:
        """Make an empty batch. ValueError unless group_size is 32, 64 or 128 and bits 1, 2, 3, 4, 5, 6 or 8."""
    @property
    def _idx(self) -> int:
        """Columns filled so far."""
    @property
    def _right_padding(self) -> mx.array | None:
        """Padding behind each sequence that ``finalize`` will move."""
    @property
    def group_size(self) -> int:
        """Elements that share a scale and a bias."""
    @property
    def bits(self) -> int:
        """Bits per element."""
    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:  # noqa: N803
        """Make the mask for ``N`` columns that are about to be updated: bool (B, 1, N, ``_idx`` + N), always."""

class BatchRotatingKVCache(BatchCache):
    """The newest ``max_size`` columns of several sequences in a ring. No token is kept for ever.

    Once ``max_size`` columns have been seen nothing can be trimmed: ``trim`` raises ValueError then. A single token
    raises RuntimeError if all columns that ``prepare`` announced have come and ``finalize`` was not called.
    """

    def __init__(self, max_size: int, left_padding: Any) -> None:
        """Make an empty ring, to whose sequences so many columns of padding will come first."""
    @property
    def max_size(self) -> int:
        """Columns that the ring holds once full."""
    @max_size.setter
    def max_size(self, value: int) -> None: ...
    @property
    def _offset(self) -> int:
        """Columns seen so far."""
    @_offset.setter
    def _offset(self, value: int) -> None: ...
    @property
    def _idx(self) -> int:
        """Column after the last one written."""
    @_idx.setter
    def _idx(self, value: int) -> None: ...
    @property
    def rotated(self) -> bool:
        """True if the oldest column is the one at ``_idx``, not the first one."""
    @rotated.setter
    def rotated(self, value: bool) -> None: ...
    @property
    def _lengths(self) -> mx.array | None:
        """Offsets at which the announced tokens of the sequences end."""
    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> mx.array:  # noqa: N803
        """Make the mask for ``N`` columns that are about to be updated, always an array.

        Shape: bool (B, 1, N, min(max_size - 1, ``_offset``) + N).
        """
    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """Raise NotImplementedError, as mlx-lm does."""

@disjoint_base
class TokenBuffer:
    """The tokens of one sequence, int32 (n,), in a buffer that grows to whole steps."""

    #: Tokens by which the buffer grows, 256.
    step: int

    def __new__(cls, tokens: Any = None) -> Self: ...
    def update_and_fetch(self, tokens: Any) -> mx.array:
        """Append tokens (n,), an mlx array or integers, and give all of them. ValueError for another shape or type."""
    @property
    def state(self) -> mx.array:
        """The buffer, padding included."""
    @property
    def tokens(self) -> mx.array:
        """The tokens."""
    @property
    def _buffer(self) -> mx.array:
        """The buffer, padding included."""
    @property
    def _size(self) -> int:
        """Number of tokens."""
    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[Any, ...]: ...

@dataclass
class PromptTrieResult:
    """What a PromptTrie has for a query. If the query itself is stored, the other fields say nothing."""

    model: Any
    #: The query, if it is stored.
    exact: list[int] | None
    #: The longest stored proper prefix of the query, also one of no tokens.
    shorter: list[int] | None
    #: The shortest stored sequence that starts with the common prefix, if that is not empty.
    longer: list[int] | None
    #: Tokens at the start of the query that some stored sequence starts with too.
    common_prefix: int

@disjoint_base
class PromptTrie:
    """Values of any kind under sequences of tokens, per model: a compressed radix tree.

    ``model`` is any hashable object. ``tokens`` are ints of 64 bits in a list, a tuple, another sequence, or a NumPy or
    mlx array of one axis; the tree holds its own. Every method takes time linear in them; ``search`` also in the tokens
    of ``longer``, which it lists, and ``add`` in what it splits off a stored sequence.

    Errors: TypeError for what is no sequence of integers, ValueError for more than one axis, OverflowError for an int
    beyond 64 bits. What raises leaves the trie as it was.
    """

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self: ...
    def __init__(self) -> None: ...
    def add(self, model: Any, tokens: Any, value: Any) -> Any:
        """Store a value, and give the one that lay there, or None."""
    def get(self, model: Any, tokens: Any) -> Any:
        """Give the value under exactly these tokens. KeyError if there is none."""
    def pop(self, model: Any, tokens: Any) -> Any:
        """Take out the value under exactly these tokens. KeyError if there is none."""
    def pop_prefixes(self, model: Any, tokens: Any) -> list[tuple[int, Any]]:
        """Take out the values on all proper prefixes, each with its number of tokens, the shortest first.

        KeyError if no stored sequence starts with ``tokens``.
        """
    def search(self, model: Any, tokens: Any) -> PromptTrieResult:
        """Tell what is stored under these tokens, or nearest to them."""
    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[Any, ...]: ...
    def __setstate__(self, state: tuple[Any, ...]) -> None: ...

@disjoint_base
class LRUPromptCache:
    """Prompt caches of many conversations by their tokens, under a limit of entries and one of bytes.

    A prompt cache is a list of caches, of any class. It is stored as it is, not copied: whoever put it in may use it
    further, so that sizes are counted anew (``nbytes`` of each cache) wherever they matter: of all entries by
    `insert_cache`, `trim_to`, `nbytes`, `stats_by_type` and setting `max_bytes`, of the entry that was found by
    `fetch_nearest_cache`. The limits hold after each of these.

    What goes: an entry that alone has more than ``max_bytes`` goes alone. Else the least recently used (stored or
    fetched) of the first type, in the order assistant, user, system, that has at least as many entries as the type
    after it; if no type has, of the system type.

    Errors: as `PromptTrie`, and what the caches raise. What raises leaves everything as it was.
    """

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self: ...
    def __init__(self, max_size: int = 10, max_bytes: int = ...) -> None:
        """Make an empty one; ``max_bytes`` is 2**63 by default. Limits are taken into the range 0 to 2**64 - 1."""
    @property
    def max_size(self) -> int:
        """Entries that may be stored. What is too much goes when it is set."""
    @max_size.setter
    def max_size(self, value: int) -> None: ...
    @property
    def max_bytes(self) -> int:
        """Bytes that all entries may have. What is too much goes when it is set."""
    @max_bytes.setter
    def max_bytes(self, value: int) -> None: ...
    def __len__(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
    def fetch_nearest_cache(self, model: Any, tokens: Any) -> tuple[Any, Any]:
        """Give a deep copy of the entry that covers most of ``tokens``, and the tokens that it does not cover.

        That is the entry under exactly these tokens; else a longer one, trimmed to what it has in common with them (but
        for the last token, which the model needs), if all its caches can be trimmed alike; else the longest stored
        prefix; else ``(None, tokens)``. Copies share the memory of arrays until one of the two writes. The entry then
        counts as used last.
        """
    def insert_cache(self, model: Any, tokens: Any, prompt_cache: Any, *, cache_type: str = "assistant") -> None:
        """Store a prompt cache under its tokens, in the place of one that was there.

        If all its caches can be trimmed, what is stored under proper prefixes goes. One that alone is over
        ``max_bytes`` is not stored, and nothing else goes.

        Errors: KeyError for a ``cache_type`` other than assistant, user and system.
        """
    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Take out entries until at most so many, and so many bytes, are left."""
    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Give ``n_sequences`` and ``n_bytes`` of each type."""
    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[Any, ...]: ...
    def __setstate__(self, state: tuple[Any, ...]) -> None: ...

@final
class PendingSave:
    """A save that goes on in the background; made by ``save_prompt_cache(..., background=True)``.

    Dropping it does not stop the save. In a forked child only what was over before the fork is known.
    """

    def done(self) -> bool:
        """Tell whether the save is over, well or not."""

    def result(self, timeout: float | None = None) -> None:
        """Wait until the save is over, and raise what it failed with, each time.

        Errors: those of ``save_prompt_cache``; TimeoutError after ``timeout`` seconds, and the save goes on;
        RuntimeError in a forked child.
        """

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait as ``result`` does, and give what the save failed with, or None."""

def adopt(caches: Iterable[Any]) -> list[Any]:
    """Replace mlx-lm's caches by ours with the same parameters, tokens and buffers; others stay.

    Memory is shared until one of the two writes. The children of a CacheList are adopted with it.
    """

def create_attention_mask(N: int, offset: int, return_array: bool, window_size: int | None) -> Any:  # noqa: N803
    """Make the mask of a cache that keeps every row: None, ``"causal"``, or a bool array (N, offset + N)."""

def create_causal_mask(
    N: int,  # noqa: N803
    offset: int = 0,
    window_size: int | None = None,
    right_padding: Any = None,
    left_padding: Any = None,
) -> mx.array:
    """Make the causal mask bool (N, offset + N): a token sees itself and the newest ``window_size`` tokens.

    With paddings, integers (B,), it is (B, 1, N, offset + N) and hides so many columns on that side of a sequence.
    """

def register(cls: type[_T]) -> type[_T]:
    """Let cache files hold caches of a class of yours, under its ``__name__``, and give the class: also as a decorator.

    ``cls`` needs what mlx-lm's classes have: ``state``, a tree of arrays, numbers, texts, None, tuples and lists, and
    ``from_state(state)``, which makes a cache of it; lists come as tuples. A subclass of ours has both. Files must be
    loaded where the class is registered too; only format 0.32 holds such caches, and mlx-lm refuses them. A class that
    is defined anew, with the same name in the same module, takes the place of the old one.

    Errors: TypeError for what is no such class; ValueError if the name is one of mlx-lm's or ours, or another class's.
    """

def make_prompt_cache_from_config(num_hidden_layers: int, sliding_window: int | None) -> list[Any]:
    """Make one fresh cache per layer: RotatingKVCache(sliding_window, keep=0) if there is a window, else KVCache."""

def prefill(
    model: Callable[..., mx.array],
    tokens: Any,
    cache: Any,
    *,
    step_size: int | Literal["auto"],
    input_embeddings: mx.array | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    progress: Callable[[int, int], object] | None = None,
) -> mx.array:
    """Run tokens through a model in windows; see ``mlxrs_py.prefill``."""

def trim_prompt_cache(cache: Iterable[Any], num_tokens: int) -> int:
    """Take back the newest tokens of every cache, and give how many: the same number for all of them.

    If one cache cannot be trimmed nothing changes and 0 is returned. If the caches hold different numbers of tokens,
    the shortest one limits all (mlx-lm trims each as far as it goes and gives the first one's count).

    Errors: ValueError if ``num_tokens`` is negative.
    """

@overload
def save_prompt_cache(
    file_name: str | PathLike[str],
    cache: Iterable[Any],
    metadata: Mapping[str, str] | None = None,
    *,
    format: str = "0.32",
    padded: bool = False,
    durable: bool = True,
    direct: bool = False,
    threads: int | None = None,
    background: Literal[False] = False,
) -> None: ...
@overload
def save_prompt_cache(
    file_name: str | PathLike[str],
    cache: Iterable[Any],
    metadata: Mapping[str, str] | None = None,
    *,
    format: str = "0.32",
    padded: bool = False,
    durable: bool = True,
    direct: bool = False,
    threads: int | None = None,
    background: Literal[True],
) -> PendingSave: ...
@overload
def save_prompt_cache(
    file_name: str | PathLike[str],
    cache: Iterable[Any],
    metadata: Mapping[str, str] | None = None,
    *,
    format: str = "0.32",
    padded: bool = False,
    durable: bool = True,
    direct: bool = False,
    threads: int | None = None,
    background: bool,
) -> PendingSave | None:
    """Save caches, ours or mlx-lm's, into one safetensors file.

    The file appears whole or not at all, and holds the valid rows only. ``.safetensors`` is added to a name without it.
    ``format`` is the mlx-lm that shall read the file. ``padded`` (0.32 only) writes mlx-lm's full buffers, the padding
    zeroed. ``durable``: the file survives a crash of the machine from the moment this returns. ``threads`` write at
    once, as they read in ``load_prompt_cache``; on CUDA from device memory through the same pinned memory. ``direct``
    writes past the system's page cache where the file system can (Linux, ``O_DIRECT``) and leaves it to others: the
    next load reads from the disk.

    ``background``: gives a ``PendingSave`` once the bytes of this moment are safe from what becomes of the caches, and
    writes while the caller goes on. On CUDA they are copied on the device, which takes as much of its memory; elsewhere
    the arrays are held, and the next update of each buffer copies it. Saves are written in the order of their calls. If
    those that are pending hold more than 4 GiB with this one, the call waits. The end of the process waits for all.

    Errors: ValueError or TypeError for metadata or states that a file cannot hold, MlxError if evaluating fails,
    OSError if the system refuses. An older file then stays as it was. In the background what the
    disk says comes from the ``PendingSave``.
    """

def save_prompt_cache_with_size(
    file_name: str | PathLike[str],
    cache: Iterable[Any],
    metadata: Mapping[str, str] | None = None,
    *,
    format: str = "0.32",  # noqa: A002
    padded: bool = False,
    durable: bool = True,
) -> tuple[Path, int]:
    """Save as ``save_prompt_cache`` does, and give the file and its size in bytes."""

def wait_for_saves(timeout: float | None = None) -> bool:
    """Wait until the saves in the background are over; False if they are not within ``timeout`` seconds.

    The end of the process does so by itself, after which it warns of each error that nobody asked for.
    """

def check_save(metadata: Mapping[str, str], format: str) -> None:  # noqa: A002
    """Raise what a save with this metadata and format would raise."""

def load_prompt_cache(
    file_name: str | PathLike[str],
    return_metadata: bool = False,
    *,
    threads: int | None = None,
    lazy: bool = False,
) -> Any:
    """Load the caches of a file that we or mlx-lm wrote, in either format.

    Tries the exact name, then with ``.safetensors``. Gives a list, or with ``return_metadata`` a pair (list, dict).
    Registered classes come back as ``from_state`` makes them.

    ``threads`` read at once, straight to each row's place; on CUDA through pinned memory into device memory. None: the
    environment variable ``MLXRS_PY_THREADS``, else the number of cores, at most 8. Pinned memory, 128 MiB at most, is
    kept for the next load. On Linux CPUs MLX is told to keep as much freed memory as a load takes, for the next one: at
    most a quarter of its memory limit, or ``MLXRS_PY_SPARE`` bytes; 0 leaves MLX's limit alone, and so does a program's
    own ``mx.set_cache_limit``.

    ``lazy``: header and sizes are checked, and MLX reads each array when it is first computed, as after mlx-lm's load.
    The arrays are the same, bit for bit. The file stays open until all are read; if it is short or was written by then,
    the computation fails. A save in its place is another file, and harms nothing. As all lazy arrays of MLX they are
    computed on the thread that made them.

    Errors: CacheFormatError for a file that is damaged or lies, before anything is built, or that changes while it is
    read; OSError if it cannot be read.
    """

def inspect_file(file_name: str | PathLike[str]) -> dict[str, Any]:
    """Tell what a cache file holds, from its checked header: file, format, metadata, layers."""

def verify_file(file_name: str | PathLike[str]) -> dict[str, Any]:
    """Check a cache file in full, and tell what it holds as ``inspect_file`` does.

    Header, classes, numbers and shapes are checked against each other, and every byte of every tensor is read.

    Errors: CacheFormatError for a file that is damaged or lies, OSError if it cannot be read.
    """

def convert_file(
    file_name: str | PathLike[str],
    new_file_name: str | PathLike[str],
    format: str,  # noqa: A002
    *,
    durable: bool = True,
) -> tuple[Path, int]:
    """Write what a cache file holds into another file in ``format``, and give that file and its size in bytes.

    Bytes and metadata are handed on; no array is built and mlx-lm is not needed. The new file holds the valid rows only
    and appears whole or not at all; it may be the old one. ``.safetensors`` is added to a name without it.

    Errors: CacheFormatError for a file that is damaged or lies, ValueError if ``format`` cannot say what it holds,
    OSError if the system refuses. An older file then stays as it was.
    """

@final
class PromptStore:
    """The core of :class:`mlxrs_py.PromptStore`, which documents the arguments. ``path`` None: all is in memory."""

    def __new__(
        cls,
        path: str | PathLike[str] | None,
        *,
        ram_bytes: int,
        disk_bytes: int | None,
        block_tokens: int,
        write_bytes_per_day: int | None,
        compression: str | None,
        read_only: bool,
        allow_network_fs: bool,
    ) -> Self: ...
    def close(self) -> None:
        """Wait for what is being written, and close."""
    def view(self, fingerprint: bytes, caches: Iterable[Any]) -> StoreView:
        """Bind the model that ``fingerprint`` stands for, whose fresh caches are ``caches``."""
    def stats(self) -> dict[str, int | None]:
        """Give the numbers of the store."""
    def list(self) -> list[dict[str, Any]]:
        """Give all records, parents before their children."""
    def pin_id(self, id: str, pins: bool) -> int:  # noqa: A002
        """Pin or unpin the record whose name begins with ``id``, and those before it; give how many.

        Errors: ValueError if there is no such record, or more than one.
        """
    def prune(self, target: int | None = None) -> int:
        """Evict until at most ``target`` bytes are left; give the bytes that were freed."""
    def verify(self, repair: bool) -> dict[str, Any]:
        """Read every record; with ``repair`` what is damaged is set aside and the index made right."""
    def clear(self) -> None:
        """Remove every record; pinned ones too."""
    def rate(self, name: str) -> float | None:
        """Give the average of a measured rate, such as bytes per second of restores."""
    def note_rate(self, name: str, value: float) -> None:
        """Take a measured rate into its average."""

@final
class StoreView:
    """The core of :class:`mlxrs_py.store.View`: one model's prompts. ``step`` is that of a prefill's windows."""

    def lookup(
        self, tokens: list[int] | np.ndarray | mx.array, step: int, exact: bool
    ) -> tuple[int, int, str | None, bool]:
        """Give the tokens that can be restored, the bytes to read, "ram", "disk" or None, and whether that is exact."""
    def restore(
        self,
        tokens: list[int] | np.ndarray | mx.array,
        caches: Iterable[Any],
        step: int,
        exact: bool,
        threads: int | None = None,
    ) -> tuple[int, int, bool]:
        """Fill fresh caches; give the tokens in them, the bytes that were read and whether that is exact."""
    def recorder(self, restored: int, step: int, exact: bool) -> StoreRecorder:
        """Begin to store a prompt as it grows; its first ``restored`` tokens came from the store."""
    def pin(self, tokens: list[int] | np.ndarray | mx.array) -> int:
        """Keep the prompt's records from eviction; give how many there are."""
    def unpin(self, tokens: list[int] | np.ndarray | mx.array) -> int:
        """Take a pin back; give how many records it held."""

def prefill_recorded(
    view: StoreView,
    model: Callable[..., mx.array],
    tokens: list[int] | np.ndarray | mx.array,
    caches: list[Any],
    *,
    restored: int,
    exact: bool,
    step_size: int,
    progress: Callable[[int, int], object] | None = None,
) -> mx.array:
    """Compute what ``caches`` lack of ``tokens``, whose first ``restored`` they hold; give the last logits ``(1, V)``.

    Windows end at multiples of ``step_size`` from the first token; each is stored while the next is computed.
    """

@final
class StoreRecorder:
    """Stores the prompt of one run as it grows."""

    def note(
        self, tokens: list[int] | np.ndarray | mx.array, caches: Iterable[Any], is_last: bool, keep: bool
    ) -> list[StorePut]:
        """Store what is new in ``caches``, which hold exactly ``tokens``; evaluates on the calling thread.

        Full blocks are stored and the states of recurrent layers; with ``is_last`` the block that is not full too.
        """

@final
class StorePut:
    """Records on their way to the disk."""

    def wait(self, timeout: float | None = None) -> tuple[int, int, int]:
        """Wait until the records are durable; give their number and bytes, and how many the disk has no room for.

        Errors: OSError if the disk is full or fails, TimeoutError after ``timeout`` seconds.
        """
    def done(self) -> bool:
        """Tell whether there is nothing left to wait for."""

def blake3_file(path: str | PathLike[str]) -> str:
    """Give the BLAKE3 hash of a file, as 64 hex digits.

    Errors: OSError if it cannot be read.
    """

def blake3_hex(data: bytes) -> str:
    """Give the BLAKE3 hash of some bytes, as 64 hex digits."""

def build_info() -> dict[str, Any]:
    """Tell what the core was built from, the device that it runs on now, and the BLAS (None: MLX's own)."""

def _live_handles() -> int:
    """Count the array handles alive now; 0 in release builds."""
