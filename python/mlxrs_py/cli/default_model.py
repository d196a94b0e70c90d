"""``mlxrs-py default-model``: where the embedded default model is."""

from __future__ import annotations

import argparse
from typing import Any

from mlxrs_py.cli import models

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "default-model",
        parents=[common],
        help="print the folder of the embedded default model",
        description=(
            "Print the folder of the embedded default model, making it first if need be. It lies in your cache folder, "
            "or under MLXRS_PY_CACHE_DIR."
        ),
    )
    parser.set_defaults(run=_run)


def _run(_arguments: argparse.Namespace) -> int:
    print(models.make_default())
    return 0
