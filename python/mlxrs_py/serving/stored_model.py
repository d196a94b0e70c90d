"""A model that a server has loaded, and what a store has of its prompts."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxrs_py.cache import ArraysCache, make_prompt_cache

if TYPE_CHECKING:
    from mlxrs_py import _core
    from mlxrs_py.store import Handle, PromptStore, View

__all__ = ["Quantization", "Recording", "StoredModel"]

#: Prompts that are remembered until their answers are there: as many as a server works on at once.
_MOST_RECORDINGS = 40

#: Until rates are measured a restore must bring more than this part of its tokens, and so many, over what is in memory:
#: it reads all of them.
_LEAST_PART, _LEAST_GAIN = 16, 8

#: Fewer tokens at a time tell nothing of how fast long prompts are computed.
_LEAST_TIMED = 128

_log = logging.getLogger("mlxrs_py")


class Quantization(NamedTuple):
    """How a server quantizes caches."""

    bits: int
    group_size: int
    #: Tokens from which on they are.
    start: int


class StoredModel:
    """One model and its prompts in a store. All methods run on the thread that generates.

    A request is worth more than its prompt's place in the store: nothing here raises once it is made. What fails is
    logged, and the request goes on as without a store.

    Args:
        store: Where the prompts are.
        model: As it was loaded.
        source: What it was loaded from.
        adapter: What its adapter was loaded from.
        quantization: How the server quantizes caches, if it does.

    Raises:
        ValueError: If the caches of the model cannot be cut into blocks.
        OSError: If its files cannot be read.

    """

    def __init__(
        self,
        store: PromptStore,
        model: Any,
        *,
        source: str,
        adapter: str | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        self.model = model
        #: The prompt that is being served alone.
        self.prompt: list[int] | None = None
        self._plain = store.view(model, source=source, adapter=adapter)
        self._quantized: View | None = None
        #: Below these many tokens no run has quantized caches.
        self._quantized_start = 0
        if quantization is not None:
            bits, group_size, start = quantization
            self._quantized_start = start
            self._quantized = store.view(
                model,
                source=source,
                adapter=adapter,
                namespace=f"quantized from token {start} on",
                kv_bits=bits,
                kv_group_size=group_size,
            )
        self._has_states = any(isinstance(leaf, ArraysCache) for leaf in _leaves(make_prompt_cache(model)))
        self._writing: deque[Handle] = deque()
        self._recordings: deque[Recording] = deque(maxlen=_MOST_RECORDINGS)

    def restore(self, tokens: list[int], *, beyond: int) -> tuple[list[Any], int] | None:
        """Give caches with more than ``beyond`` of the tokens, not all, and how many; None if computing is faster."""
        with _logged("looking up a prompt"):
            has_more = False
            for view, least in ((self._quantized, self._quantized_start), (self._plain, 0)):
                if view is None or (found := view.lookup(tokens)).n_tokens <= beyond or found.n_tokens < least:
                    continue
                has_more = True
                is_faster = view.is_faster(found, beyond)
                if is_faster is False or (is_faster is None and not _is_worth(found.n_tokens, beyond)):
                    _log.info("Prompt store: %d tokens that it has are computed instead", found.n_tokens - beyond)
                    continue
                caches, n_tokens = view.restore(tokens)
                if n_tokens > beyond and n_tokens >= least:
                    view.count("restored")
                    _log.info("Prompt store: %d of %d tokens restored", n_tokens, len(tokens))
                    return caches, n_tokens
            if has_more or beyond == 0:
                self._plain.count("recomputed" if has_more else "missed")
        return None

    def computed(self, n_tokens: int, seconds: float) -> None:
        """Note how long it took to compute a part of a prompt, or of several at once."""
        if n_tokens >= _LEAST_TIMED:
            with _logged("noting a rate"):
                self._plain.note_prefill(n_tokens, seconds)

    def put(self, tokens: list[int], caches: list[Any]) -> None:
        """Store caches that hold exactly the tokens, which are the end of a message."""
        # Who stored its prompt knows rows that rings have dropped since.
        known = [recording for recording in self._recordings if recording.is_of(tokens)]
        recording = max(known, key=lambda known: known.n_tokens, default=None) or Recording(self)
        if recording.n_tokens < len(tokens) and recording in self._recordings:
            self._recordings.remove(recording)
        recording.note(tokens, caches, is_last=True, keep=True)

    def recording(self) -> Recording:
        """Begin to store a prompt that is being computed."""
        self._recordings.append(recording := Recording(self))
        return recording

    def _view_of(self, caches: list[Any]) -> View:
        is_quantized = any(getattr(cache, "bits", None) is not None for cache in caches)
        return self._quantized if is_quantized and self._quantized is not None else self._plain

    def _note_written(self) -> None:
        """Tell of what could not be written meanwhile."""
        while self._writing and self._writing[0].done():
            with _logged("writing a prompt"):
                self._writing.popleft().result()


class Recording:
    """A prompt that is being computed, and stored on its way: rings drop rows, and a run may be killed."""

    def __init__(self, model: StoredModel) -> None:
        self._model = model
        self._tokens: list[int] = []
        self._recorders: dict[View, _core.StoreRecorder] = {}

    @property
    def n_tokens(self) -> int:
        """Tokens that are stored."""
        return len(self._tokens)

    def is_of(self, tokens: list[int]) -> bool:
        """Tell whether the tokens are the prompt, or go on after it."""
        n = self.n_tokens
        return 0 < n <= len(tokens) and tokens[n - 1] == self._tokens[-1] and tokens[:n] == self._tokens

    def note(self, tokens: list[int], caches: list[Any], *, is_last: bool = False, keep: bool = False) -> None:
        """Store what is new in caches that hold exactly the tokens.

        Args:
            tokens: The prompt so far.
            caches: Of one sequence.
            is_last: Nothing is to come before the answer.
            keep: The end of a message.

        """
        from mlxrs_py.store import Handle

        model = self._model
        with _logged("storing a prompt"):
            model._note_written()
            view = model._view_of(caches)
            if view not in self._recorders:
                self._recorders[view] = view.recorder()
            # A state can be restored where the rows of all tokens before it can, those of the last block included.
            handles = self._recorders[view].note(tokens, caches, is_last or model._has_states, keep)
            self._tokens = list(tokens)
            model._writing.append(Handle(handles))


def _is_worth(n_tokens: int, beyond: int) -> bool:
    return n_tokens - beyond >= max(_LEAST_GAIN, n_tokens // _LEAST_PART)


@contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a full disk, say: what it tells is enough
        _log.warning("Prompt store: %s failed: %s", what, error)
    except Exception:  # whatever it is: the request goes on
        _log.warning("Prompt store: %s failed", what, exc_info=True)


def _leaves(caches: Sequence[Any]) -> Iterator[Any]:
    for cache in caches:
        yield from _leaves(cache.caches) if hasattr(cache, "caches") else [cache]
