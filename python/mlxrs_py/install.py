"""One line to switch: mlx-lm then runs on the caches of this package.

mlx-lm reaches its caches by name, in ``mlx_lm.models.cache`` and in the modules that imported from there. Those names
are set to ours; nothing else of mlx-lm holds its classes (a test looks for whatever does).
"""

from __future__ import annotations

import os
import sys
import threading
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

from mlxrs_py import _kv_bits, cache
from mlxrs_py.serving import hooks

if TYPE_CHECKING:
    from mlxrs_py.store import PromptStore

__all__ = ["CLASSES", "FUNCTIONS", "Installation", "install", "uninstall"]

#: The mlx-lm whose modules were read and tested; what another one does with a cache is unknown.
_TESTED = "0.32.2"
_CACHE_MODULE = "mlx_lm.models.cache"

#: What is swapped. Not there: ``_BaseCache`` and ``dynamic_roll``, which only mlx-lm's own classes use.
CLASSES = (
    "ArraysCache",
    "BatchKVCache",
    "BatchRotatingKVCache",
    "CacheList",
    "ChunkedKVCache",
    "ConcatenateKVCache",
    "KVCache",
    "LRUPromptCache",
    "PromptTrie",
    "PromptTrieResult",
    "QuantizedKVCache",
    "RotatingKVCache",
    "TokenBuffer",
)
FUNCTIONS = (
    "can_trim_prompt_cache",
    "create_attention_mask",
    "create_causal_mask",
    "load_prompt_cache",
    "make_prompt_cache",
    "save_prompt_cache",
    "trim_prompt_cache",
)

_lock = threading.RLock()
#: mlx-lm's objects and ours that stand for them; empty while nothing is installed.
_swapped: list[tuple[Any, Any]] = []
_installs = 0
#: Counts the uninstalls: a block that one of them overtook has nothing left to undo.
_epoch = 0
#: What is behind mlx-lm's server.
_store: PromptStore | None = None
#: It was made here, and is closed here.
_owns_store = False


class Installation:
    """What :func:`install` gives. As a context manager it takes this one call back at the end of the block."""

    def __init__(self, epoch: int) -> None:
        self._epoch: int | None = epoch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        global _installs
        with _lock:
            if self._epoch == _epoch:
                _installs -= 1
                if not _installs:
                    uninstall()
            self._epoch = None


def install(*, store: PromptStore | str | os.PathLike[str] | None = None, any_version: bool = False) -> Installation:
    """Let mlx-lm use our classes and functions from now on, in what it has imported and in what it will import.

    Call it before your own ``from mlx_lm.models.cache import …`` and before caches are made: modules outside of mlx-lm
    keep what they imported, and a cache keeps its class. Calling it again changes nothing. Any thread may call it.

    ``kv_bits`` reaches batches too: ``BatchGenerator`` and ``batch_generate`` take ``kv_bits``, ``kv_group_size`` (64)
    and ``quantized_kv_start`` (5000 tokens), and mlx-lm's server batches requests when it runs with ``--kv-bits``.

    With a store, mlx-lm's server keeps the prompts of its requests there; see docs/prompt-store.md.

    Args:
        store: A store, or the folder of one, which is then closed by :func:`uninstall`. Servers that run already do
            not get it.
        any_version: Take an mlx-lm that this package was not tested with. There the names are swapped and no more:
            batches are not quantized.

    Returns:
        A context manager: ``with mlxrs_py.install():`` ends with the block, unless another call still holds. It may
        be dropped; :func:`uninstall` then ends it.

    Raises:
        ImportError: If mlx-lm is absent, or of a version that was not tested.
        OSError: If the store cannot be opened.
        ValueError: If another store is installed, or for a store with a version that was not tested.

    """
    global _installs, _store, _owns_store
    # Outside the lock: an import takes locks of its own.
    version, theirs, generate, server = _import_mlx_lm()
    if version != _TESTED and not any_version:
        raise ImportError(
            f"mlxrs_py.install is tested with mlx-lm {_TESTED}, but mlx-lm {version} is installed: "
            f"pip install mlx-lm=={_TESTED}, or mlxrs_py.install(any_version=True)",
            name="mlx_lm",
        )
    if store is not None and version != _TESTED:
        raise ValueError(f"install: expected mlx-lm {_TESTED} for a store, got {version}")
    with _lock:
        # What can fail comes first.
        opened = None if store is None else _opened(store)
        if not _swapped:
            names = (name for name in (*CLASSES, *FUNCTIONS) if hasattr(theirs, name))
            _swapped.extend((getattr(theirs, name), getattr(cache, name)) for name in names)
            _replace(_swapped)
            if version == _TESTED:
                _kv_bits.install(generate, server)
        if opened is not None and _store is None:
            _store, _owns_store = opened
            hooks.install(generate, server, _store)
        _installs += 1
        return Installation(_epoch)


def _opened(store: PromptStore | str | os.PathLike[str]) -> tuple[PromptStore, bool]:
    """Give the store, and whether it was opened here."""
    from mlxrs_py.store import PromptStore

    if isinstance(store, PromptStore):
        found, is_ours = store, False
    elif _store is not None and _store.path == Path(store):
        found, is_ours = _store, _owns_store
    else:
        found, is_ours = PromptStore(store), True
    if _store is not None and found is not _store:
        if is_ours:
            found.close()
        raise ValueError(f"install: expected the store that is installed already, {_store.path}, got {found.path}")
    return found, is_ours


def uninstall() -> None:
    """Give mlx-lm its own classes and functions back, also in modules that it imported meanwhile.

    However often :func:`install` was called, once is enough; if it was not, nothing happens.
    """
    global _installs, _epoch, _store, _owns_store
    with _lock:
        hooks.uninstall()
        _kv_bits.uninstall()
        _replace([(ours, theirs) for theirs, ours in _swapped])
        _swapped.clear()
        _installs = 0
        _epoch += 1
        store, is_ours = _store, _owns_store
        _store, _owns_store = None, False
    if store is not None and is_ours:
        store.close()


def _import_mlx_lm() -> tuple[str, ModuleType, ModuleType, ModuleType]:
    try:
        version = import_module("mlx_lm").__version__
    except ModuleNotFoundError as error:
        if error.name != "mlx_lm":
            raise
        raise ImportError(f"mlxrs_py.install needs mlx-lm: pip install mlx-lm=={_TESTED}", name="mlx_lm") from error
    return version, import_module(_CACHE_MODULE), import_module("mlx_lm.generate"), import_module("mlx_lm.server")


def _replace(pairs: list[tuple[Any, Any]]) -> None:
    """Set every name in a module of mlx-lm that means the first of a pair to the second."""
    new_of = {id(old): new for old, new in pairs}
    # The module that the others import from comes first, so that one that is being imported finds what is new.
    names = [_CACHE_MODULE, *sys.modules]
    for module in [sys.modules.get(name) for name in names if name.partition(".")[0] == "mlx_lm"]:
        if isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if id(value) in new_of:
                    setattr(module, name, new_of[id(value)])
