"""Puts a store behind mlx-lm's server: its loading of models, its prompt cache and its two ways through a prompt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlxrs_py._units import size_text
from mlxrs_py._wrappers import Wrappers
from mlxrs_py.serving.prompt_cache import StoredPromptCache
from mlxrs_py.serving.stored_model import Quantization, StoredModel

if TYPE_CHECKING:
    from mlxrs_py.store import PromptStore

__all__ = ["install", "uninstall"]

_Function = Callable[..., Any]

_log = logging.getLogger("mlxrs_py")

#: Who loads the models of the server whose thread this is.
_provider: ContextVar[Any] = ContextVar("_provider", default=None)

_wrappers = Wrappers()


def install(generate: ModuleType, server: ModuleType, store: PromptStore) -> None:
    """Put the wrappers into mlx-lm 0.32.2's modules ``generate`` and ``server``."""
    _wrappers.put(server.ModelProvider, "reset", _reset)
    _wrappers.put(server.ModelProvider, "_load", lambda original: _load(original, store))
    _wrappers.put(server.ResponseGenerator, "__init__", _response_generator_init)
    _wrappers.put(server.ResponseGenerator, "_generate", _generate)
    _wrappers.put(server, "stream_generate", _stream_generate)
    _wrappers.put(generate.PromptProcessingBatch, "prompt", _prompt)


def uninstall() -> None:
    """Put back what stood there. Servers that run go on; their prompts are no longer stored."""
    _wrappers.undo()


def _reset(original: _Function) -> _Function:
    def reset(self: Any) -> None:
        # It holds the model, which is let go here.
        self._stored_model = None
        original(self)

    return reset


def _load(original: _Function, store: PromptStore) -> _Function:
    def load(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self._stored_model = _stored_model(self, store)

    return load


def _stored_model(provider: Any, store: PromptStore) -> StoredModel | None:
    source, adapter, draft = provider.model_key
    if draft is not None or provider.is_distributed:
        _log.warning("Prompt store: prompts are not stored with a draft model or on several machines")
        return None
    told = provider.cli_args
    quantization = None
    if told.kv_bits is not None:
        quantization = Quantization(told.kv_bits, told.kv_group_size, told.quantized_kv_start)
    try:
        stored = StoredModel(store, provider.model, source=source, adapter=adapter, quantization=quantization)
    except Exception:  # whatever it is: the model is served without
        _log.warning("Prompt store: prompts of %s are not stored", source, exc_info=True)
        return None
    _log.info("Prompt store: %s", _described(store))
    return stored


def _described(store: PromptStore) -> str:
    stats, tier = store.stats(), "ram" if store.path is None else "disk"
    held, limit = (size_text(stats[f"{tier}_{what}"]) for what in ("bytes", "limit"))
    return f"{store.path or 'in memory'}, {stats[f'{tier}_records']} records, {held} of {limit}"


def _response_generator_init(original: _Function) -> _Function:
    def init(self: Any, model_provider: Any, prompt_cache: Any) -> None:
        def stored_model(key: Any) -> StoredModel | None:
            return getattr(model_provider, "_stored_model", None) if model_provider.model_key == key else None

        # The server itself looks at this limit only when a request joins a batch.
        if (n_bytes := model_provider.cli_args.prompt_cache_bytes) is not None:
            prompt_cache.max_bytes = min(prompt_cache.max_bytes, n_bytes)
        original(self, model_provider, StoredPromptCache(prompt_cache, stored_model))

    return init


def _generate(original: _Function) -> _Function:
    def generate(self: Any) -> None:
        token = _provider.set(self.model_provider)
        try:
            original(self)
        finally:
            _provider.reset(token)

    return generate


def _of_thread(model: Any) -> StoredModel | None:
    """Give what is stored of the model, if the server of this thread has loaded it."""
    stored = getattr(_provider.get(), "_stored_model", None)
    return stored if stored is not None and stored.model is model else None


def _stream_generate(original: _Function) -> _Function:
    """Wrap how requests are served alone."""

    def stream_generate(*args: Any, **options: Any) -> Iterator[Any]:
        stored = None if args or options.get("input_embeddings") is not None else _of_thread(options.get("model"))
        if stored is not None and (prompt := stored.prompt) is not None:
            # The prompt that was looked up is this one, of which the last tokens are left.
            stored.prompt = None
            n_before = len(prompt) - len(options["prompt"])
            recording, caches, report = stored.recording(), options["prompt_cache"], options["prompt_progress_callback"]

            n_timed, since = 0, time.perf_counter()

            def progress(n_done: int, n_total: int) -> None:
                nonlocal n_timed, since
                stored.computed(n_done - n_timed, time.perf_counter() - since)
                report(n_done, n_total)
                # At the end the caches already hold the first token of the answer.
                if 0 < n_done < n_total:
                    recording.note(prompt[: n_before + n_done], caches, is_last=n_done + 1 == n_total)
                n_timed, since = n_done, time.perf_counter()

            options["prompt_progress_callback"] = progress
        return original(*args, **options)

    return stream_generate


def _prompt(original: _Function) -> _Function:
    """Wrap how prompts of a batch are computed, a chunk of each at a time."""

    def prompt(self: Any, tokens: list[list[int]]) -> None:
        start = time.perf_counter()
        original(self, tokens)
        stored = _of_thread(self.model)
        if stored is None or not tokens:
            return
        stored.computed(sum(map(len, tokens)), time.perf_counter() - start)
        before = getattr(self, "_recordings", {})
        self._recordings = {uid: before.get(uid) or stored.recording() for uid in self.uids}
        for place, (uid, so_far) in enumerate(zip(self.uids, self.tokens, strict=True)):
            self._recordings[uid].note(so_far, self.extract_cache(place))

    return prompt
