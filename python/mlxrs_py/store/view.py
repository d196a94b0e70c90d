"""One model's prompts in a store."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlxrs_py import _core
from mlxrs_py.prefill import _bar

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np

    from mlxrs_py.store.prompt_store import Handle

__all__ = ["Lookup", "View"]

_POLICIES = ("auto", "restore", "recompute")

#: So many times a restore is taken for slower, then it is tried.
_TRIED_AGAIN = 16


class Lookup(NamedTuple):
    """What a store has of a prompt."""

    #: Tokens that can be restored; fewer than were asked for, so that one is left to compute.
    n_tokens: int
    #: Bytes that a restore reads.
    n_bytes: int
    #: "ram", "disk", or None if there is nothing.
    tier: str | None
    #: All of it was computed in full windows of the step, and a window ends there.
    exact: bool
    #: Seconds that a restore will take, by those before; None if there were none.
    seconds: float | None


class View:
    """One model's prompts. Made by :meth:`mlxrs_py.PromptStore.view`."""

    def __init__(
        self,
        store: _core.PromptStore,
        core: _core.StoreView,
        make_caches: Callable[[], list[Any]],
        identity: str,
        decisions: dict[str, int],
        path: Path | None,
    ) -> None:
        #: The store's folder; None if all is in memory.
        self.path = path
        self._store = store
        self._core = core
        self._make_caches = make_caches
        self._rate_name = f"prefill {identity}"
        self._decisions = decisions
        self._n_slower = 0

    def lookup(
        self, tokens: list[int] | np.ndarray | mx.array, *, step_size: int = 2048, exact: bool = False
    ) -> Lookup:
        """Tell what could be restored. Only the index is read.

        Args:
            tokens: Token ids ``(P,)``.
            step_size: The step of the windows that ``exact`` means.
            exact: Count only what was computed on that step's grid.

        """
        n_tokens, n_bytes, tier, is_exact = self._core.lookup(tokens, step_size, exact)
        rate = self._store.rate("restore")
        return Lookup(n_tokens, n_bytes, tier, is_exact, n_bytes / rate if rate and n_tokens else None)

    def restore(
        self, tokens: list[int] | np.ndarray | mx.array, *, step_size: int = 2048, exact: bool = False
    ) -> tuple[list[Any], int]:
        """Give caches and the number of tokens in them, fewer than ``tokens``; a miss gives fresh caches and 0.

        The caches have the bits that the storing run computed.

        Args:
            tokens: Token ids ``(P,)``.
            step_size: The step of the windows that ``exact`` means.
            exact: Restore only what was computed on that step's grid: continuing there equals a cold run.

        Raises:
            MlxError: If memory is short, or in a forked child.

        """
        caches, n_tokens, _ = self._restore(tokens, step_size, exact)
        return caches, n_tokens

    def _restore(self, tokens: Any, step_size: int, exact: bool) -> tuple[list[Any], int, bool]:
        caches = self._make_caches()
        start = time.perf_counter()
        n_tokens, n_bytes, is_exact = self._core.restore(tokens, caches, step_size, exact)
        seconds = time.perf_counter() - start
        if n_tokens and n_bytes:
            self._store.note_rate("restore", n_bytes / max(seconds, 1e-6))
        return caches, n_tokens, is_exact

    def put(self, tokens: list[int] | np.ndarray | mx.array, caches: list[Any], *, keep: bool = False) -> Handle:
        """Store caches that hold exactly ``tokens``; only what is not there yet is written, in the background.

        Args:
            tokens: Token ids ``(P,)``.
            caches: As this view's model makes them.
            keep: The states of recurrent layers at this token are not thinned out later: the end of a message.

        Returns:
            A handle; what is stored can be restored at once, and is durable when the handle says so.

        Raises:
            ValueError: If the caches are not at that token or not of this model.
            MlxError: If they cannot be computed, or in a forked child.

        """
        from mlxrs_py.store.prompt_store import Handle

        return Handle(self.recorder().note(tokens, caches, True, keep))

    def recorder(self) -> _core.StoreRecorder:
        """Begin to store a prompt that others compute, as it grows; its rows count as computed in any windows."""
        return self._core.recorder(0, 0, False)

    def prefill(
        self,
        model: Callable[..., mx.array],
        tokens: list[int] | np.ndarray | mx.array,
        *,
        step_size: int = 2048,
        exact: bool = False,
        policy: str = "auto",
        progress: Callable[[int, int], object] | bool | None = None,
    ) -> tuple[mx.array, list[Any], int]:
        """Restore what is stored of a prompt, compute the rest and store it.

        The windows end at multiples of ``step_size`` counted from the first token; then the rest, then the last token
        alone. Each window is stored while the next is computed: an interrupted call goes on there the next time.

        Args:
            model: Called as ``model(tokens[None], cache=caches)``.
            tokens: Token ids ``(P,)``, at least one.
            step_size: Tokens per window, at least 1.
            exact: Restore only what a run in these windows has computed: the result then equals a cold run's.
            policy: "restore", "recompute", or "auto": what is faster by the rates measured so far.
            progress: Called with ``(done, total)`` tokens after each window; True draws a bar on a terminal.

        Returns:
            The logits ``(1, V)`` of the last token, evaluated; the caches; the tokens that were restored.

        Raises:
            ValueError: For an empty prompt, a step below 1 or an unknown policy.
            MlxError: If MLX fails, or in a forked child.

        """
        import numpy as np

        if policy not in _POLICIES:
            raise ValueError(f"View.prefill: expected a policy among {', '.join(_POLICIES)}, got {policy!r}")
        if step_size < 1:
            raise ValueError(f"View.prefill: expected step_size of at least 1, got {step_size}")
        ids = np.asarray(tokens.tolist() if isinstance(tokens, mx.array) else tokens)
        if ids.size == 0 or ids.ndim != 1:
            raise ValueError(f"View.prefill: expected token ids (P,), at least one, got {ids.shape}")
        caches, n_restored, is_exact = self._begin(ids, step_size, exact, policy)
        bar: AbstractContextManager[Callable[[int, int], object] | None]
        bar = _bar() if progress is True else nullcontext(progress or None)
        total = len(ids)
        start = time.perf_counter()
        with bar as report:
            logits = _core.prefill_recorded(
                self._core,
                model,
                ids,
                caches,
                restored=n_restored,
                exact=is_exact,
                step_size=step_size,
                progress=report,
            )
        computed = total - n_restored
        if computed >= min(step_size, 256):
            self.note_prefill(computed, time.perf_counter() - start)
        return logits, caches, n_restored

    def _begin(self, ids: np.ndarray, step_size: int, exact: bool, policy: str) -> tuple[list[Any], int, bool]:
        if policy != "recompute":
            found = self.lookup(ids, step_size=step_size, exact=exact)
            if policy == "restore" or self.is_faster(found) is not False:
                caches, n_restored, is_exact = self._restore(ids, step_size, exact)
                self.count("restored" if n_restored else "missed")
                return caches, n_restored, is_exact
        self.count("recomputed")
        return self._make_caches(), 0, True

    def is_faster(self, found: Lookup, n_at_hand: int = 0) -> bool | None:
        """Tell by the rates measured so far whether a restore takes less time than computing; None without rates.

        Args:
            found: What a restore would give.
            n_at_hand: Tokens that need not be computed, and that a restore reads all the same.

        """
        rate = self._store.rate(self._rate_name)
        if found.seconds is None or rate is None:
            return None
        if found.seconds < (found.n_tokens - n_at_hand) / rate:
            return True
        # A rate that one slow restore has spoilt would otherwise never be measured again.
        self._n_slower += 1
        return self._n_slower % _TRIED_AGAIN == 0 and n_at_hand < found.n_tokens

    def note_prefill(self, n_tokens: int, seconds: float) -> None:
        """Take the time that computing tokens of a prompt took into the rate that :meth:`is_faster` compares."""
        self._store.note_rate(self._rate_name, n_tokens / max(seconds, 1e-6))

    def count(self, decision: str) -> None:
        """Count what was done with a prompt: "restored", "recomputed" or "missed"."""
        self._decisions[decision] += 1

    def pin(self, tokens: list[int] | np.ndarray | mx.array) -> int:
        """Keep the records of a prompt from eviction; give how many there are."""
        return self._core.pin(tokens)

    def unpin(self, tokens: list[int] | np.ndarray | mx.array) -> int:
        """Take a pin back; give how many records it held."""
        return self._core.unpin(tokens)
