"""The store of many prompts."""

from __future__ import annotations

import atexit
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from mlxrs_py import _core
from mlxrs_py.cache import make_prompt_cache
from mlxrs_py.store.fingerprint import FileHashes, fingerprint
from mlxrs_py.store.view import View

__all__ = ["Handle", "PromptStore", "PutReport", "default_path"]

#: Switches the disk off when it is "off": stores then live in memory alone.
_SWITCH = "MLXRS_PY_STORE"

_open: weakref.WeakSet[PromptStore] = weakref.WeakSet()


class PutReport(NamedTuple):
    """What a put wrote."""

    #: Records that were not there before.
    n_records: int
    #: Their bytes.
    n_bytes: int
    #: Records that stay in memory only: there is no disk, or no room under its limits.
    n_in_memory: int = 0


class Handle:
    """A put on its way to the disk. Dropping it does not stop it."""

    def __init__(self, parts: list[_core.StorePut]) -> None:
        self._parts = parts

    def result(self, timeout: float | None = None) -> PutReport:
        """Wait until everything is durable.

        Raises:
            OSError: If the disk is full or fails. The store is then as before.
            TimeoutError: After so many seconds.

        """
        reports = [part.wait(timeout) for part in self._parts]
        return PutReport(*map(sum, zip(*reports, strict=True))) if reports else PutReport(0, 0)

    def done(self) -> bool:
        """Tell whether there is nothing left to wait for."""
        return all(part.done() for part in self._parts)


class PromptStore:
    """Prompts that any number of processes share, on disk and in memory.

    A prompt is kept in blocks of tokens; prompts with one beginning share its blocks. A store knows no model:
    :meth:`view` binds one. It is a context manager; leaving it waits for what is being written.

    Args:
        path: Folder, made with mode 0700 if it is missing; by default one in the platform's cache folder.
        ram_bytes: Memory for records that wait to be written, and, without a disk, for all.
        disk_bytes: Everything in the folder stays below it; 0 keeps all in memory. By default the limit that the folder
            was given last, or else 32 GiB. One that is given takes effect at once: what is beyond goes.
        block_tokens: Tokens of a block.
        write_bytes_per_day: Most bytes written in a day, over restarts too; what is beyond is not stored.
        compression: "zstd" makes records smaller on the disk, which takes time. Whatever it is, all records are read.
        read_only: Only what is there is restored.
        allow_network: Take a folder on a network file system, whose locks may not hold between machines.

    Raises:
        OSError: If the folder cannot be made or used.
        ValueError: If the folder is someone else's, others may write to it, it is no store or a later one, or
            sizes make no sense.

    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        ram_bytes: int = 2 << 30,
        disk_bytes: int | None = None,
        block_tokens: int = 256,
        write_bytes_per_day: int | None = None,
        compression: Literal["zstd"] | None = None,
        read_only: bool = False,
        allow_network: bool = False,
    ) -> None:
        for name, value in (("ram_bytes", ram_bytes), ("disk_bytes", disk_bytes), ("block_tokens", block_tokens)):
            if value is not None and value < (least := 2 if name == "block_tokens" else 0):
                raise ValueError(f"PromptStore: expected {name} of at least {least}, got {value}")
        on_disk = disk_bytes != 0 and os.environ.get(_SWITCH, "").lower() not in ("off", "0", "false")
        #: The folder; None if all is in memory.
        self.path = (Path(path) if path is not None else default_path()) if on_disk else None
        self._core = _core.PromptStore(
            self.path,
            ram_bytes=ram_bytes,
            disk_bytes=disk_bytes if on_disk else 0,
            block_tokens=block_tokens,
            write_bytes_per_day=write_bytes_per_day,
            compression=compression,
            read_only=read_only,
            allow_network_fs=allow_network,
        )
        memory = None if self.path is None or read_only else self.path / "fingerprints.json"
        self._hashes = FileHashes(memory)
        #: How often each way was taken by :meth:`View.prefill`.
        self._decisions = {"restored": 0, "recomputed": 0, "missed": 0}
        _open.add(self)

    def view(
        self,
        model: Any,
        *,
        source: str | os.PathLike[str] | None = None,
        adapter: str | os.PathLike[str] | None = None,
        namespace: str = "",
        kv_bits: int | None = None,
        kv_group_size: int = 64,
    ) -> View:
        """Bind a model: prompts of other models, adapters, quantizations or namespaces are not seen.

        Args:
            model: What ``make_prompt_cache`` takes.
            source: Folder, file or hub name that the weights were loaded from; their files are hashed once and
                remembered. Without it the parameters themselves are hashed, which reads all of them.
            adapter: The same for an adapter that the model was loaded with.
            namespace: Keeps prompts apart, those of two users for instance.
            kv_bits: Caches are quantized from the first token on.
            kv_group_size: Elements that share a scale.

        Raises:
            ValueError: If nothing tells the model from another, or its caches cannot be cut into blocks.
            FileNotFoundError: If there are no weights at ``source``.

        """
        identity = fingerprint(model, source=source, adapter=adapter, hashes=self._hashes)

        def make_caches() -> list[Any]:
            caches = make_prompt_cache(model)
            if kv_bits is None:
                return caches
            return [
                c.to_quantized(group_size=kv_group_size, bits=kv_bits) if hasattr(c, "to_quantized") else c
                for c in caches
            ]

        core = self._core.view(identity + namespace.encode(), make_caches())
        return View(self._core, core, make_caches, identity.hex(), self._decisions, self.path)

    def stats(self) -> dict[str, Any]:
        """Give numbers of the store.

        Records and bytes on disk and in memory with their limits, what waits to be written, hits and misses of lookups,
        damaged records, bytes written today, and how often a prefill restored, recomputed or missed.
        """
        return {**self._core.stats(), "decisions": dict(self._decisions)}

    def ls(self) -> list[dict[str, Any]]:
        """List all records, parents before their children.

        Each has an ``id`` and that of its ``parent``, the ``space`` of its model, its ``kind`` ("rows" or "state"), its
        tokens from ``start`` to ``end``, ``bytes``, ``hits``, ``used`` (seconds since 1970), ``pinned`` and ``tier``.
        """
        return self._core.list()

    def pin(self, id: str) -> int:  # noqa: A002  (the name that ls gives it)
        """Keep a record and those before it from eviction; give how many there are.

        Args:
            id: The beginning of the record's id; :meth:`View.pin` takes tokens.

        Raises:
            ValueError: If no record is called so, or several are.

        """
        return self._core.pin_id(id, True)

    def unpin(self, id: str) -> int:  # noqa: A002
        """Take the pins of a record and those before it back; give how many there are."""
        return self._core.pin_id(id, False)

    def prune(self, n_bytes: int | None = None) -> int:
        """Remove what dead processes left, and the least recently used until ``n_bytes`` are left.

        Args:
            n_bytes: By default the limit.

        Returns:
            The bytes that were freed.

        """
        return self._core.prune(n_bytes)

    def verify(self, *, repair: bool = False) -> dict[str, Any]:
        """Read every record from its first byte to its last.

        Args:
            repair: Set what is damaged aside and make the index right.

        Returns:
            ``sound``, the number of ``records`` and their ``bytes``, the ``faults`` as texts, and whether they were
            ``repaired``.

        """
        return self._core.verify(repair)

    def clear(self) -> None:
        """Remove every record; pinned ones too."""
        self._core.clear()

    def close(self) -> None:
        """Wait for what is being written, and let go of the folder."""
        _open.discard(self)
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def default_path() -> Path:
    """Give the store's folder in the platform's cache folder."""
    from platformdirs import user_cache_path

    return user_cache_path("mlxrs_py") / "prompts"


@atexit.register
def _close_all() -> None:
    for store in list(_open):
        store.close()
