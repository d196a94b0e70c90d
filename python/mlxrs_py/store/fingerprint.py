"""What a model is, in 32 bytes: prompts of two models are never mixed up."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxrs_py import _core

__all__ = ["FileHashes", "fingerprint"]

#: What a forward pass depends on; tokenizers and generation settings are not among it.
_WEIGHTS = ("*.safetensors", "*.npz", "*.gguf")
_CONFIG = ("config.json", "adapter_config.json")


class FileHashes:
    """BLAKE3 of files, remembered by path, size, time and inode, in a file beside the store if it has one."""

    def __init__(self, memory: Path | None) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if memory is not None:
            try:
                known = json.loads(memory.read_text(encoding="utf-8"))
                self._known = {k: v for k, v in known.items() if isinstance(v, str) and len(v) == 64}
            except (OSError, ValueError, AttributeError):
                pass  # Hashed again.

    def of(self, path: Path) -> str:
        """Hash a file, or remember its hash."""
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {stat.st_dev}"
        with self._lock:
            if key in self._known:
                return self._known[key]
        found = _core.blake3_file(path)
        with self._lock:
            self._known[key] = found
            text = json.dumps(self._known)
        if self._memory is not None:
            self._write(text)
        return found

    def _write(self, text: str) -> None:
        assert self._memory is not None
        temporary = self._memory.with_name(f"{self._memory.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(text)
            temporary.replace(self._memory)
        except OSError:
            temporary.unlink(missing_ok=True)


def fingerprint(
    model: Any, *, source: str | os.PathLike[str] | None, adapter: str | os.PathLike[str] | None, hashes: FileHashes
) -> bytes:
    """Give what identifies a model: its weights by their files or else by themselves, and how they were loaded.

    Args:
        model: Any callable; only those with ``parameters()`` can be told apart without a source.
        source: Folder or file of the weights, or a name in the local hub cache.
        adapter: The same for an adapter.
        hashes: Remembers hashes of files.

    Raises:
        FileNotFoundError: If there are no weights at ``source`` or ``adapter``.
        ValueError: If there is neither a source nor anything in the model to tell it by.

    """
    content: dict[str, Any] = {"structure": _structure(model)}
    for name, place in (("source", source), ("adapter", adapter)):
        if place is not None:
            content[name] = {path.name: hashes.of(path) for path in _files(place)}
    if source is None:
        content["parameters"] = _parameters(model)
    text = json.dumps(content, sort_keys=True, default=str)
    return bytes.fromhex(_core.blake3_hex(text.encode()))


def _structure(model: Any) -> dict[str, Any]:
    arguments: Any = getattr(model, "args", None)
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "args": dataclasses.asdict(arguments) if dataclasses.is_dataclass(type(arguments)) else None,
        "weights": [(name, list(weight.shape), str(weight.dtype)) for name, weight in _weights(model)],
    }


def _weights(model: Any) -> list[tuple[str, mx.array]]:
    if not hasattr(model, "parameters"):
        return []
    flat: Any = tree_flatten(model.parameters())
    return sorted(((name, weight) for name, weight in flat if isinstance(weight, mx.array)), key=lambda item: item[0])


def _parameters(model: Any) -> str:
    import numpy as np

    weights = _weights(model)
    if not weights:
        raise ValueError(
            "PromptStore.view: expected a model with parameters() or a source, which tell one model from another; "
            "got neither: pass source= or namespace="
        )
    hashes = []
    for name, weight in weights:
        flat = weight.reshape(-1)
        data = flat.astype(mx.uint8) if flat.dtype == mx.bool_ else flat.view(mx.uint8)
        hashes.append((name, _core.blake3_hex(np.asarray(data).tobytes())))
    return _core.blake3_hex(json.dumps(hashes).encode())


def _files(place: str | os.PathLike[str]) -> list[Path]:
    path = Path(place)
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = _snapshot(str(place))
    found = sorted({file for pattern in _WEIGHTS for file in path.glob(pattern)})
    if not found:
        raise FileNotFoundError(2, "PromptStore.view: expected weights in the source, got none", str(path))
    return found + _present(path / name for name in _CONFIG)


def _present(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_file()]


def _snapshot(name: str) -> Path:
    """Give the folder of a model that the hub's library downloaded before."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:
        raise FileNotFoundError(
            2, "PromptStore.view: expected a folder or a model of the local hub cache", name
        ) from error
