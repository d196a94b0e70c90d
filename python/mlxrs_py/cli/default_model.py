"""``mlxrs-py default-model``: where the embedded default model is."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "default-model",
        parents=[common],
        help="print the folder of the embedded default model",
        description="Print the folder of the embedded default model, making it first if need be.",
    )
    parser.set_defaults(run=_run)


def _run(_arguments: argparse.Namespace) -> int:
    from mlxrs_py.default_model import default_model_path

    print(default_model_path())
    return 0
