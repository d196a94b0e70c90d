"""A fast BLAS for MLX on Linux CPUs.

MLX's wheel for the CPU multiplies matrices with the reference BLAS, about fifteen times slower than OpenBLAS. The
loader binds libmlx's three functions to the first object that has their names, so one that passes them on to
OpenBLAS must be there before ``mlx.core`` is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

_SHIM = Path(__file__).with_name("mlxrs_blas.so")
#: How long threads spin for more work before they sleep, as a power of two of clock ticks. OpenBLAS's own 28 is a tenth
#: of a second, which on a busy box keeps the cores from whoever has work; 16 is about what falling asleep costs.
_TIMEOUT = "OPENBLAS_THREAD_TIMEOUT", "16"
_GEMMS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")

#: What multiplies matrices on the CPU, as far as this package knows: its name and version, or None for MLX's own.
active: str | None = None
#: Loaded for as long as the process lives.
_libraries: list[ctypes.CDLL] = []


def activate() -> None:
    """Make OpenBLAS serve libmlx, where that is possible and ``MLXRS_PY_BLAS`` is not 0.

    Threads follow ``OPENBLAS_NUM_THREADS`` and ``OMP_NUM_THREADS``; they soon sleep when they have nothing to do, or as
    ``OPENBLAS_THREAD_TIMEOUT`` says.

    Raises:
        ValueError: If ``MLXRS_PY_BLAS`` is neither 0 nor 1.
        ImportError: If it is 1 and OpenBLAS is not installed.

    """
    global active
    wanted = os.environ.get("MLXRS_PY_BLAS", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"MLXRS_PY_BLAS: expected 0 or 1, got {wanted!r}")
    if wanted == "0" or active is not None or not _SHIM.exists():
        return
    try:
        with _soon_asleep():  # the import loads it, and only then it reads its variables
            import scipy_openblas32
    except ModuleNotFoundError as error:
        if wanted == "1":
            raise ImportError("MLXRS_PY_BLAS=1 needs OpenBLAS: pip install 'mlxrs_py[cpu]'") from error
        return
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx came before mlxrs_py and keeps its slow BLAS: import mlxrs_py first, or set MLXRS_PY_BLAS=0",
            UserWarning,
            stacklevel=3,
        )
        return
    library = Path(scipy_openblas32.get_lib_dir()) / f"{scipy_openblas32.get_library(fullname=True)}"
    openblas = ctypes.CDLL(str(library))
    shim = ctypes.CDLL(str(_SHIM), mode=ctypes.RTLD_GLOBAL)
    shim.mlxrs_blas_use(*(ctypes.cast(getattr(openblas, f"scipy_{name}"), ctypes.c_void_p) for name in _GEMMS))
    _libraries.extend((openblas, shim))
    config = openblas.scipy_openblas_get_config
    config.restype = ctypes.c_char_p
    active = " ".join(config().decode().split()[:2])


@contextlib.contextmanager
def _soon_asleep() -> Iterator[None]:
    """Tell the OpenBLAS that is loaded here, and no other copy or child process, how long its threads spin."""
    name, ticks = _TIMEOUT
    if name in os.environ:
        yield
        return
    os.environ[name] = ticks
    try:
        yield
    finally:
        del os.environ[name]
