"""The driver: a prompt goes through a model into fresh caches, and those into a file."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxrs_py import _core
from mlxrs_py.cache import CacheConfig, make_prompt_cache
from mlxrs_py.prefill import prefill

if TYPE_CHECKING:
    import numpy as np

    from mlxrs_py.store import Handle, PromptStore, View

__all__ = [
    "PromptInfo",
    "cache_prompt",
    "cache_prompt_ids",
    "chat_prompt",
    "load_model",
    "model_fingerprint",
    "question_prompt",
    "wait_stored",
]

#: Metadata keys of mlx-lm.
META_MODEL = "model"
META_TOKENIZER_CONFIG = "tokenizer_config"
#: Ours: the number of tokens; BLAKE3 of their ids as little-endian 64-bit integers; the model's fingerprint.
META_TOKENS = "mlxrs_tokens"
META_TOKENS_BLAKE3 = "mlxrs_tokens_blake3"
META_CONFIG_BLAKE3 = "mlxrs_config_blake3"

#: Numbers of each weight that go into a fingerprint.
_SAMPLE_SIZE = 16


@dataclass(frozen=True)
class PromptInfo:
    """What a prompt cost and where it went."""

    #: Tokens that went into the caches.
    tokens_processed: int
    #: Seconds of prefill and saving.
    seconds: float
    #: Tokens per second of the prefill alone, without those that were restored.
    tokens_per_second: float
    #: Most bytes that MLX held at once.
    peak_memory: int
    #: The file that was written.
    file: Path
    #: Its size in bytes.
    n_bytes: int
    #: Of the tokens, those that came from a store.
    tokens_restored: int = 0


def cache_prompt_ids(
    model: Callable[..., mx.array],
    tokens: list[int] | np.ndarray | mx.array,
    file_name: str | PathLike[str],
    *,
    config: CacheConfig | None = None,
    max_kv_size: int | None = None,
    model_id: str = "",
    tokenizer_config: str = "{}",
    step_size: int = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    metadata: Mapping[str, str] | None = None,
    format: str = "0.32",  # noqa: A002  (the name of the file's format, as in save_prompt_cache)
    durable: bool = True,
    progress: Callable[[int, int], object] | bool | None = None,
    view: View | None = None,
) -> PromptInfo:
    """Run token ids through a model into fresh caches and save them.

    Args:
        model: As :func:`mlxrs_py.prefill` takes it.
        tokens: Token ids ``(P,)``, at least one.
        file_name: Gets ``.safetensors`` added if it lacks it.
        config: How the caches are made; else as :func:`mlxrs_py.cache.make_prompt_cache` makes them.
        max_kv_size: For ``make_prompt_cache``.
        model_id: Written as metadata ``model``.
        tokenizer_config: JSON, written as metadata ``tokenizer_config``.
        step_size: Tokens per window of the prefill.
        kv_bits: If given, caches are quantized on the way; see :func:`mlxrs_py.prefill`.
        kv_group_size: Elements that share a scale.
        quantized_kv_start: Tokens from which on caches are quantized.
        metadata: Further strings for the file; keys that the driver writes itself are not taken from here.
        format: The mlx-lm whose layout the file gets: "0.32" or "0.31".
        durable: The file survives a crash of the machine from the moment this returns.
        progress: As for :func:`mlxrs_py.prefill`.
        view: Where the prompt is put too; what is there already is not computed. It makes the caches, quantized or not.

    Raises:
        ValueError: For an empty prompt, metadata that a file cannot hold, or ``config`` or ``max_kv_size`` with a view,
            before any work; no file is written.
        OSError: If the file cannot be written; an older one then stays as it was. A missing folder, or a folder in
            place of the file, is told before any work. If the store cannot take the prompt; the file is written then.

    """
    ids = _token_ids(tokens)
    _check_target(file_name)
    if view is not None:
        _check_stored("cache_prompt_ids", config, max_kv_size)
    entries = dict(metadata or {})
    entries.pop(META_CONFIG_BLAKE3, None)
    entries[META_MODEL] = model_id
    entries[META_TOKENIZER_CONFIG] = tokenizer_config
    entries[META_TOKENS] = str(ids.size)
    entries[META_TOKENS_BLAKE3] = _core.blake3_hex(ids.astype("<i8").tobytes())
    _core.check_save(entries, format)

    n_restored, put = 0, None
    mx.reset_peak_memory()
    start = time.perf_counter()
    if view is not None:
        _, caches, n_restored = view.prefill(model, ids, step_size=step_size, progress=progress)
        put = view.put(ids, caches, keep=True)
    else:
        caches = config.make() if config is not None else make_prompt_cache(model, max_kv_size)
        prefill(
            model,
            mx.array(ids),
            caches,
            step_size=step_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            progress=progress,
        )
    prefilled = time.perf_counter()
    # Not earlier: it evaluates, and in a forked child only the prefill raises instead of hanging.
    if (fingerprint := model_fingerprint(model)) is not None:
        entries[META_CONFIG_BLAKE3] = fingerprint
    file, n_bytes = _core.save_prompt_cache_with_size(file_name, caches, entries, format=format, durable=durable)
    if view is not None and put is not None:
        wait_stored(view, put)
    return PromptInfo(
        tokens_processed=int(ids.size),
        seconds=time.perf_counter() - start,
        tokens_per_second=(ids.size - n_restored) / max(prefilled - start, 1e-9),
        peak_memory=mx.get_peak_memory(),
        file=Path(file),
        n_bytes=n_bytes,
        tokens_restored=n_restored,
    )


def cache_prompt(
    model_path: str | PathLike[str],
    prompt: str,
    file_name: str | PathLike[str],
    *,
    adapter_path: str | None = None,
    trust_remote_code: bool = False,
    eos_token: str | None = None,
    config: CacheConfig | None = None,
    max_kv_size: int | None = None,
    step_size: int = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    metadata: Mapping[str, str] | None = None,
    format: str = "0.32",  # noqa: A002  (the name of the file's format, as in save_prompt_cache)
    durable: bool = True,
    progress: Callable[[int, int], object] | bool | None = None,
    store: PromptStore | None = None,
) -> PromptInfo:
    """Load a model through mlx-lm, run one user message through it and save the caches.

    If the tokenizer has a chat template the prompt becomes the beginning of a user message, as in
    ``mlx_lm.cache_prompt``: a later question continues that message.

    Args:
        model_path: A folder, or a name that ``mlx_lm.load`` knows; written as metadata ``model``.
        prompt: The text; not empty.
        file_name: Gets ``.safetensors`` added if it lacks it.
        adapter_path: Adapters for the model.
        trust_remote_code: Lets the code of the model's and the tokenizer's repository run.
        eos_token: Ends generation in place of the tokenizer's own.
        config: This and all that follow are those of :func:`cache_prompt_ids`.
        max_kv_size: For ``make_prompt_cache``.
        step_size: Tokens per window of the prefill.
        kv_bits: If given, caches are quantized on the way.
        kv_group_size: Elements that share a scale.
        quantized_kv_start: Tokens from which on caches are quantized.
        metadata: Further strings for the file.
        format: The mlx-lm whose layout the file gets: "0.32" or "0.31".
        durable: The file survives a crash of the machine from the moment this returns.
        progress: As for :func:`mlxrs_py.prefill`.
        store: Where the prompt is put too; what is there already is not computed. ``kv_bits`` then holds from the first
            token on.

    Raises:
        ImportError: If mlx-lm is not installed.
        ValueError: For an empty prompt, metadata that a file cannot hold, or ``config`` or ``max_kv_size`` with a
            store, before the model is loaded.
        OSError: If the file cannot be written; an older one then stays as it was.

    """
    if not prompt:
        raise ValueError("cache_prompt: expected a text, got an empty prompt")
    _check_target(file_name)
    if store is not None:
        _check_stored("cache_prompt", config, max_kv_size)
    _core.check_save(dict(metadata or {}), format)
    tokenizer_config: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if eos_token is not None:
        tokenizer_config["eos_token"] = eos_token
    model, tokenizer = load_model(
        model_path, adapter_path=adapter_path, tokenizer_config=tokenizer_config, trust_remote_code=trust_remote_code
    )
    view = None
    if store is not None:
        view = store.view(model, source=model_path, adapter=adapter_path, kv_bits=kv_bits, kv_group_size=kv_group_size)
    return cache_prompt_ids(
        model,
        chat_prompt(tokenizer, prompt),
        file_name,
        config=config,
        max_kv_size=max_kv_size,
        model_id=str(model_path),
        tokenizer_config=json.dumps(tokenizer_config),
        step_size=step_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
        metadata=metadata,
        format=format,
        durable=durable,
        progress=progress,
        view=view,
    )


def load_model(
    model_path: str | PathLike[str],
    *,
    adapter_path: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer through mlx-lm."""
    try:
        import mlx_lm
    except ImportError as error:
        raise ImportError("loading a model needs mlx-lm: pip install 'mlxrs_py[lm]'") from error
    model, tokenizer, *_ = mlx_lm.load(
        str(model_path),
        adapter_path=adapter_path,
        tokenizer_config=tokenizer_config or {},
        trust_remote_code=trust_remote_code,
    )
    return model, tokenizer


def chat_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Give the token ids of an unfinished user message, or of the plain text if there is no chat template."""
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    return tokenizer.encode(prompt)


def question_prompt(tokenizer: Any, question: str) -> list[int]:
    """Give the token ids that continue a cached :func:`chat_prompt` with a question, up to where the answer begins.

    With a chat template that is the rest of the user message from the question on; what comes before is cached.
    """
    if not tokenizer.has_chat_template:
        return tokenizer.encode(question)

    def templated(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    mark = "<query>"
    start = templated(mark).index(mark)
    return tokenizer.encode(templated(question)[start:], add_special_tokens=False)


def wait_stored(view: View, put: Handle) -> None:
    """Wait until a prompt is on the disk. Whoever asked for that wants to know if the store has no room for it.

    Raises:
        OSError: If the disk is full or fails, or the limits of the store leave no room.

    """
    n_left = put.result().n_in_memory
    if n_left and view.path is not None:
        message = f"PromptStore.put: expected room under the store's limits, got none for {n_left} records"
        raise OSError(errno.ENOSPC, message, str(view.path))


def model_fingerprint(model: Any) -> str | None:
    """Hash what tells a model from others: its arguments; names, shapes and dtypes of its weights; a sample of each.

    So another quantization, an adapter and a fine-tuned sister all differ, whatever the model's name. None for a
    callable that is no ``mlx.nn.Module``.
    """
    from mlx.nn.layers.base import Module

    if not isinstance(model, Module):
        return None
    flat: Any = tree_flatten(model.parameters())  # type: ignore[no-untyped-call]  # MLX's modules are untyped
    weights = sorted(flat, key=lambda item: item[0])
    arguments: Any = getattr(model, "args", None)
    content = {
        "model": type(model).__module__.rsplit(".", 1)[-1],
        "args": dataclasses.asdict(arguments) if dataclasses.is_dataclass(type(arguments)) else None,
        "parameters": [(name, list(weight.shape), str(weight.dtype)) for name, weight in weights],
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return _core.blake3_hex(text.encode() + _sample([weight for _, weight in weights if weight.size]))


def _sample(weights: list[mx.array]) -> bytes:
    """Give the first numbers of each weight's first row; indexing by row copies nothing else."""
    import numpy as np

    rows = [weight[(0,) * (weight.ndim - 1)][:_SAMPLE_SIZE] if weight.ndim else weight[None] for weight in weights]
    rows = [(row.astype(mx.uint8) if row.dtype == mx.bool_ else row.view(mx.uint8)) for row in rows]
    mx.eval(rows)
    return b"".join(np.asarray(row).tobytes() for row in rows)


def _check_stored(op: str, config: CacheConfig | None, max_kv_size: int | None) -> None:
    if config is not None or max_kv_size is not None:
        raise ValueError(f"{op}: expected a store or one of config and max_kv_size, got both")


def _check_target(file_name: str | PathLike[str]) -> None:
    """Refuse a file that could not be written anyway, before minutes of work."""
    path = Path(file_name)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "cache_prompt: no such folder", str(path.parent))
    target = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"cache_prompt: {os.strerror(errno.EISDIR)}", str(target))


def _token_ids(tokens: Any) -> np.ndarray:
    import numpy as np

    ids = np.asarray(tokens.tolist() if isinstance(tokens, mx.array) else tokens)
    if ids.size == 0:
        raise ValueError("cache_prompt_ids: expected at least one token, got an empty prompt")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"cache_prompt_ids: expected token ids (P,) of an integer type, got {ids.shape} {ids.dtype}")
    return ids
