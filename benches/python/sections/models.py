"""The model that the sections share: made once, for the device."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import machine
import workload


@functools.cache
def model() -> Any:
    return workload.big_model() if machine.on_gpu() else workload.small_model(folder())


def folder() -> Path:
    from mlxrs_py.default_model import default_model_path

    return default_model_path()


def name() -> str:
    return "Llama-8B, random weights, bf16" if machine.on_gpu() else "SmolLM2-135M, float32"


def forget() -> None:
    model.cache_clear()
    workload.tidy()
