"""Chunked prefill of any callable model."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableSequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from mlxrs_py import _core

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import mlx.core as mx
    import numpy as np

__all__ = ["prefill"]


def prefill(
    model: Callable[..., mx.array],
    tokens: list[int] | np.ndarray | mx.array,
    cache: MutableSequence[Any],
    *,
    step_size: int | Literal["auto"] = 2048,
    input_embeddings: mx.array | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    progress: Callable[[int, int], object] | bool | None = None,
) -> mx.array:
    """Run a prompt through a model and give the logits ``(1, V)`` of its last token, evaluated.

    The windows, the memory barrier after each and the points where caches are quantized are those of mlx-lm 0.32.2's
    ``generate_step(max_tokens=0)``: chunks of ``step_size`` for all but the last token, then that token alone. While
    one window is computed the next is built, so at most two are under way. Buffers that MLX no longer needs are kept
    for the next window, and go back to the system when they take more than a quarter of MLX's memory limit.

    If anything is raised on the way, Ctrl-C included, every cache is first put back to the end of the last whole
    window, so that a later call can go on with the rest of the tokens.

    Args:
        model: Called as ``model(tokens[None], cache=cache)``, and with ``input_embeddings`` if they are given.
        tokens: Token ids ``(P,)``; may be empty when there are embeddings.
        cache: One cache per layer: ours, mlx-lm's or a mixture.
        step_size: Tokens per window, at least 1. ``"auto"`` starts with 512 and goes on with the most, up to 4,096,
            that the memory allows by what those took: bits may then differ with the machine, as between any two steps.
        input_embeddings: Embeddings ``(P, D)`` in place of the tokens' own.
        kv_bits: If given, caches are replaced in the list by quantized ones once they hold ``quantized_kv_start``
            tokens.
        kv_group_size: Elements that share a scale.
        quantized_kv_start: Tokens from which on caches are quantized.
        progress: Called with ``(done, total)`` tokens as each window is computed, when the caches may hold the next one
            already; True draws a bar on a terminal.

    Raises:
        ValueError: For an empty prompt, or tokens and embeddings that do not fit.
        NotImplementedError: If ``kv_bits`` would meet a rotating cache of mlx-lm's.
        MlxError: If MLX fails, or in a forked child.

    """
    bar: AbstractContextManager[Callable[[int, int], object] | None]
    bar = _bar() if progress is True else nullcontext(progress or None)
    with bar as report:
        return _core.prefill(
            model,
            tokens,
            cache,
            step_size=step_size,
            input_embeddings=input_embeddings,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            progress=report,
        )


class _bar:  # noqa: N801  (reads as a verb where it is used)
    """A bar with tokens, tokens per second and time to go, on standard error; nothing if that is no terminal."""

    def __enter__(self) -> Callable[[int, int], object]:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError as error:
            raise ImportError("progress=True needs rich: pip install 'mlxrs_py[lm]'") from error
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("prefill"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._progress.__enter__()
        self._task = self._progress.add_task("prefill", total=None, count="")
        self._start = time.perf_counter()
        return self._report

    def _report(self, done: int, total: int) -> None:
        elapsed = time.perf_counter() - self._start
        count = f"{done}/{total} tokens" + (f", {done / elapsed:.1f} tok/s" if done and elapsed else "")
        self._progress.update(self._task, completed=done, total=total, count=count)

    def __exit__(self, *exception: object) -> None:
        self._progress.__exit__(*exception)  # type: ignore[arg-type]
