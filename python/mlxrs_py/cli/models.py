"""Models and prompts for the commands: their flags, and how they are loaded."""

from __future__ import annotations

import argparse
import os
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

__all__ = [
    "add_flags",
    "add_store_bytes",
    "load",
    "load_named",
    "make_default",
    "positive",
    "quiet",
    "read_prompt",
    "size",
    "tokenizer_config",
]


def add_flags(parser: argparse.ArgumentParser, *, model_help: str) -> None:
    """Add the flags that say which model, as mlx-lm's commands have them."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help=model_help)
    group.add_argument("--adapter-path", metavar="FOLDER", help="adapters for the model")
    group.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its code")
    group.add_argument("--eos-token", metavar="TOKEN", help="ends generation in place of the tokenizer's own")


def add_store_bytes(group: Any) -> None:
    """Add the flag that says how large a store may become."""
    group.add_argument(
        "--store-bytes",
        type=size,
        metavar="N",
        help="the store stays below, from now on; 500MB and 20GB are understood (default: as before, or 32 GiB)",
    )


def positive(text: str) -> int:
    """Read a number of at least 1."""
    if not text.isdecimal() or (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return number


def size(text: str) -> int:
    """Read a number of bytes: 1000, 500MB, 1.5GB, 32GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i)?)?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a number of bytes such as 500MB or 20GB, got {text!r}")
    number, unit, binary = match.groups()
    power = " KMGT".index((unit or " ").upper())
    return int(Decimal(number) * (1024 if binary else 1000) ** power)


def make_default(*, silent: bool = False) -> str:
    """Give the folder of the embedded default model; tell if it has to be made."""
    from mlxrs_py.default_model import default_model_path

    def tell(folder: Path) -> None:
        if not silent:
            print(f"making the default model, once (0.54 GB): {folder}", file=sys.stderr)

    return str(default_model_path(tell))


def load(model: str, adapter_path: str | None, tokenizer_config: dict[str, Any]) -> tuple[Any, Any]:
    """Load a model and its tokenizer through mlx-lm."""
    from mlxrs_py.prompt import load_model

    quiet()
    return load_model(
        model,
        adapter_path=adapter_path,
        tokenizer_config=tokenizer_config,
        trust_remote_code=tokenizer_config["trust_remote_code"],
    )


def tokenizer_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give what the flags say of the tokenizer."""
    config: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.eos_token is not None:
        config["eos_token"] = arguments.eos_token
    return config


def load_named(arguments: argparse.Namespace) -> tuple[str, Any, Any]:
    """Load the model that the flags name, or the embedded default; give its path too."""
    path = make_default(silent=not sys.stderr.isatty()) if arguments.model is None else arguments.model
    return path, *load(path, arguments.adapter_path, tokenizer_config(arguments))


def quiet() -> None:
    """Keep the loader's chatter off the output; set before its libraries are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def read_prompt(prompt: str) -> str:
    """Give the prompt, or what standard input holds for "-"."""
    return sys.stdin.read() if prompt == "-" else prompt
