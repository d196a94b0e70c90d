"""What the benchmarks share: versions, interleaved samples, one line per comparison."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable

import mlxrs_py

# isort: split
# Before this, the BLAS that serves MLX was chosen.
import mlx.core as mx


def header() -> None:
    info = mlxrs_py.build_info()
    device = mx.device_info().get("device_name", "?")
    print(f"python {platform.python_version()}, mlx {info['mlx']}, mlxrs_py {info['version']}, {info['compiler']}")
    print(
        f"device {info['device']}, {device}, BLAS {info['blas'] or 'as MLX has it'}"
        + (", DEBUG BUILD" if info["debug"] else "")
    )


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], runs: int) -> tuple[list[float], list[float]]:
    """Sample both sides alternately, so that what else the machine does hits both."""
    pairs = [(ours(), theirs()) for _ in range(runs)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def line(what: str, ours: list[float], theirs: list[float], unit: str, scale: float = 1, other: str = "mlx-lm") -> None:
    a, b = ((min(x) * scale, statistics.median(x) * scale) for x in (ours, theirs))
    print(
        f"{what:44} ours min {a[0]:8.3f} median {a[1]:8.3f} {unit}   "
        f"{other} min {b[0]:8.3f} median {b[1]:8.3f} {unit}   ratio of minima {b[0] / a[0]:.2f}",
        flush=True,
    )
