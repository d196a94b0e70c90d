"""``mlxrs-py convert``: a cache file in the format of another mlx-lm."""

from __future__ import annotations

import argparse
from typing import Any

from mlxrs_py.cli import plain

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "convert",
        parents=[common],
        help="write a cache file in the format of another mlx-lm",
        description="Write the caches and the metadata of a cache file into another one, which appears whole or not at "
        "all and may be the same. What the format cannot say is an error; docs/files.md lists it.",
    )
    parser.add_argument("file", metavar="IN", help="the cache file, of either format")
    parser.add_argument("new_file", metavar="OUT", help="the file to write; .safetensors is added")
    parser.add_argument("--format", required=True, choices=["0.31", "0.32"], help="the mlx-lm that shall read it")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlxrs_py._core import convert_file

    file, n_bytes = convert_file(arguments.file, arguments.new_file, arguments.format)
    print(f"{plain(file)}: mlx-lm {arguments.format}, {n_bytes / 1e6:.1f} MB")
    return 0
