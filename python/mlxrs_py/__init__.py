"""Prompt caches for mlx-lm, in Rust: fast, durable, bit-exact.

``mlxrs_py.cache`` has the names of ``mlx_lm.models.cache``; the functions here run and save whole prompts.
"""

from importlib.metadata import version as _installed_version

#: The one MLX that the core is built for: MLX's C++ interface changes between patch releases.
_MLX_VERSION = "0.32.4"

if (_found := _installed_version("mlx")) != _MLX_VERSION:
    raise ImportError(
        f"mlxrs_py is built for MLX {_MLX_VERSION}, but MLX {_found} is installed: pip install mlx=={_MLX_VERSION}"
    )

from mlxrs_py import _blas  # noqa: E402

_blas.activate()

# mlx.core loads libmlx, which the core then finds by its name and shares.
import mlx.core  # noqa: E402, F401

from mlxrs_py import cache  # noqa: E402
from mlxrs_py._core import CacheFormatError, MlxError, MlxrsError, __version__, build_info  # noqa: E402
from mlxrs_py.cache import CacheConfig  # noqa: E402
from mlxrs_py.install import install, uninstall  # noqa: E402
from mlxrs_py.prefill import prefill  # noqa: E402
from mlxrs_py.prompt import PromptInfo, cache_prompt, cache_prompt_ids  # noqa: E402
from mlxrs_py.store import PromptStore  # noqa: E402

__all__ = [
    "CacheConfig",
    "CacheFormatError",
    "MlxError",
    "MlxrsError",
    "PromptInfo",
    "PromptStore",
    "__version__",
    "build_info",
    "cache",
    "cache_prompt",
    "cache_prompt_ids",
    "install",
    "prefill",
    "uninstall",
]
