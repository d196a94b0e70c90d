"""Models for the commands: their flags, and how they are loaded."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

__all__ = ["add_flags", "load", "quiet", "read_prompt", "resolve"]


def add_flags(parser: argparse.ArgumentParser, *, model_help: str) -> None:
    """Add the flags that say which model, as mlx-lm's commands have them."""
    parser.add_argument("--model", metavar="MODEL", help=model_help)
    parser.add_argument("--adapter-path", metavar="FOLDER", help="adapters for the model")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer's repository run code")
    parser.add_argument("--eos-token", metavar="TOKEN", help="ends generation in place of the tokenizer's own")


def resolve(model: str | None) -> str:
    """Give the model that was asked for, or the folder of the embedded default."""
    if model is not None:
        return model
    from mlxrs_py.default_model import default_model_path

    return str(default_model_path())


def load(model: str, adapter_path: str | None, tokenizer_config: dict[str, Any]) -> tuple[Any, Any]:
    """Load a model and its tokenizer through mlx-lm."""
    from mlxrs_py.prompt import load_model

    quiet()
    return load_model(model, adapter_path=adapter_path, tokenizer_config=tokenizer_config)


def quiet() -> None:
    """Keep the loader's chatter off the output; set before its libraries are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def read_prompt(prompt: str) -> str:
    """Give the prompt, or what standard input holds for "-"."""
    return sys.stdin.read() if prompt == "-" else prompt
