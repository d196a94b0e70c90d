"""What a result depends on: versions, device, BLAS, cores."""

from __future__ import annotations

import os
import platform
import resource
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlxrs_py

# isort: split
# Before this, the BLAS that serves MLX was chosen.
import mlx.core as mx


def describe() -> dict[str, Any]:
    info = mlxrs_py.build_info()
    return {
        "python": platform.python_version(),
        "mlx": info["mlx"],
        "mlx_lm": _version("mlx-lm"),
        "mlxrs_py": info["version"],
        "debug_build": info["debug"],
        "compiler": info["compiler"],
        "blas": info["blas"],
        "device": device(),
        "device_name": str(mx.device_info().get("device_name", "")) if on_gpu() else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def header(machine: dict[str, Any]) -> str:
    return (
        f"mlx {machine['mlx']}, mlx-lm {machine['mlx_lm']}, mlxrs_py {machine['mlxrs_py']} ({machine['compiler']}"
        f"{', DEBUG BUILD' if machine['debug_build'] else ''}), CPython {machine['python']}\n"
        f"{machine['device']}: {machine['device_name']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['system']}, BLAS {machine['blas'] or 'as MLX has it'}"
    )


def device() -> str:
    return "gpu" if mx.default_device().type == mx.gpu else "cpu"


def on_gpu() -> bool:
    return device() == "gpu"


def on_cuda() -> bool:
    return on_gpu() and platform.system() == "Linux"


def free_bytes() -> int:
    """Give the memory that can be had without pushing anybody else's out."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def page_faults() -> int:
    """Give the page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
