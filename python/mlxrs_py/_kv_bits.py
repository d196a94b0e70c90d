"""``kv_bits`` for batches: mlx-lm takes it for one sequence, and drops or refuses it where several run at once.

A batch is quantized between two steps of its ``BatchGenerator``, when its longest sequence has reached the start.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx

from mlxrs_py import cache
from mlxrs_py._wrappers import Wrappers

__all__ = ["install", "uninstall"]

_Function = Callable[..., Any]


class _Quantization(NamedTuple):
    bits: int
    group_size: int
    start: int = 0

    def batch(self, rows: list[Any]) -> Any:
        """Quantize caches of one sequence each, and join them."""
        quantized = [row.to_quantized(group_size=self.group_size, bits=self.bits) for row in rows]
        if not hasattr(quantized[0], "merge"):
            raise ValueError(f"kv_bits: expected caches that can be batched, got {type(quantized[0]).__name__}")
        return quantized[0].merge(quantized)

    def apply(self, caches: list[Any]) -> None:
        """Quantize, in the list, the batches whose longest sequence has reached the start."""
        for i, batch in enumerate(caches):
            if isinstance(batch, cache.BatchKVCache) and not batch.empty() and batch.size() >= self.start:
                caches[i] = self.batch(_rows(batch))
                # Lets go of the buffers that it was made from.
                mx.eval(caches[i].state)

    def try_on(self, model: Any, max_kv_size: int | None = None) -> None:
        """Raise what quantized batches of this model would raise. Graphs are built for that, nothing is computed."""
        token = mx.array([[0]])
        caches = cache.make_prompt_cache(model, max_kv_size)
        model(token, cache=caches)
        model(token, cache=[self.batch([c]) if hasattr(c, "to_quantized") else c.merge([c]) for c in caches])


#: What a server was started with, in the thread that makes its generators.
_of_server: ContextVar[_Quantization | None] = ContextVar("_of_server", default=None)

_wrappers = Wrappers()


def install(generate: ModuleType, server: ModuleType) -> None:
    """Put the wrappers into mlx-lm 0.32.2's modules ``generate`` and ``server``."""
    for owner, name, wrap in (
        (generate.BatchGenerator, "__init__", _generator_init),
        (generate.BatchGenerator, "_next", _generator_next),
        (generate, "_merge_caches", _merge_caches),
        (generate, "_extend_cache", _extend_cache),
        (server.ResponseGenerator, "_generate", _server_generate),
        (server.ResponseGenerator, "_is_batchable", _server_is_batchable),
    ):
        _wrappers.put(owner, name, wrap)


def uninstall() -> None:
    """Put back what stood there."""
    _wrappers.undo()


def _generator_init(original: _Function) -> _Function:
    def init(
        self: Any,
        *args: Any,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 5000,
        **options: Any,
    ) -> None:
        original(self, *args, **options)
        self._quantization = _of_server.get()
        if kv_bits is not None:
            self._quantization = _Quantization(kv_bits, kv_group_size, quantized_kv_start)
            self._quantization.try_on(self.model, self.max_kv_size)

    return init


def _generator_next(original: _Function) -> _Function:
    def step(self: Any) -> Any:
        responses = original(self)
        # A generator from before install() has no such attribute.
        if quantization := getattr(self, "_quantization", None):
            quantization.apply(self._prompt_batch.prompt_cache)
            quantization.apply(self._generation_batch.prompt_cache)
        return responses

    return step


def _merge_caches(original: _Function) -> _Function:
    def merge(caches: list[list[Any]]) -> Any:
        # A prompt cache may be from before install(), and some may be quantized while others are new.
        rows = [cache.adopt(row) for row in caches]
        for i in range(min(map(len, rows), default=0)):
            quantized = next((row[i] for row in rows if hasattr(row[i], "bits")), None)
            for row in rows:
                if quantized is not None and isinstance(row[i], cache.KVCache):
                    row[i] = row[i].to_quantized(group_size=quantized.group_size, bits=quantized.bits)
        return original(rows)

    return merge


def _extend_cache(original: _Function) -> _Function:
    def extend(ours: list[Any], theirs: list[Any]) -> Any:
        for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            ours[i], theirs[i] = _alike(a, b)
        return original(ours, theirs)

    return extend


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Quantize one of two batches if the other one is."""
    if hasattr(a, "bits") and isinstance(b, cache.BatchKVCache):
        return a, _Quantization(a.bits, a.group_size).batch(_rows(b))
    if hasattr(b, "bits") and isinstance(a, cache.BatchKVCache):
        return _Quantization(b.bits, b.group_size).batch(_rows(a)), b
    return a, b


def _rows(batch: Any) -> list[Any]:
    """Give the sequences of a batch, each in its own cache."""
    n_rows = batch.left_padding.size
    return [cache.KVCache() if batch.empty() else batch.extract(i) for i in range(n_rows)]


def _server_generate(original: _Function) -> _Function:
    def generate(self: Any) -> None:
        token = _of_server.set(_told(self.cli_args))
        try:
            original(self)
        finally:
            _of_server.reset(token)

    return generate


def _server_is_batchable(original: _Function) -> _Function:
    def is_batchable(self: Any, arguments: Any) -> bool:
        quantization = _told(self.cli_args)
        if quantization is None:
            return original(self, arguments)
        others = Namespace(**{**vars(self.cli_args), "kv_bits": None})
        would = original(SimpleNamespace(model_provider=self.model_provider, cli_args=others), arguments)
        return would and _takes_batches(self, quantization)

    return is_batchable


def _told(options: Namespace) -> _Quantization | None:
    """Read the server's command line."""
    if options.kv_bits is None:
        return None
    return _Quantization(options.kv_bits, options.kv_group_size, options.quantized_kv_start)


def _takes_batches(server: Any, quantization: _Quantization) -> bool:
    """Try it once per model; with one that cannot, requests are served one by one as in mlx-lm."""
    provider = server.model_provider
    tried, result = getattr(server, "_takes_batches", (None, False))
    if tried != provider.model_key:
        try:
            quantization.try_on(provider.model)
            result = True
        except Exception:  # whatever a model raises: the requests will be told
            result = False
        server._takes_batches = (provider.model_key, result)
    return result
