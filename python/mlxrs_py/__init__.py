"""Prompt caches for mlx-lm, in Rust: fast, durable, bit-exact."""

from importlib.metadata import version as _installed_version

#: The one MLX that the core is built for: MLX's C++ interface changes between patch releases.
_MLX_VERSION = "0.32.4"

if (_found := _installed_version("mlx")) != _MLX_VERSION:
    raise ImportError(f"mlxrs_py is built for MLX {_MLX_VERSION}, but MLX {_found} is installed: pip install mlx=={_MLX_VERSION}")

import mlx.core  # noqa: E402, F401  (loads libmlx, which the core then shares)

from mlxrs_py._core import CacheFormatError, MlxError, MlxrsError, __version__  # noqa: E402

__all__ = ["CacheFormatError", "MlxError", "MlxrsError", "__version__"]
