"""``mlxrs-py inspect``: what a cache file holds."""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

from mlxrs_py.cli import plain

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="show what a cache file holds",
        description="Show format, metadata and layers of a cache file. Only its header is read, and checked.",
    )
    parser.add_argument("file", metavar="FILE", help="the cache file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlxrs_py._core import inspect_file

    info = inspect_file(arguments.file)
    if arguments.json:
        print(json.dumps(info, default=str, ensure_ascii=False, indent=2))
        return 0
    layers = info["layers"]
    size = sum(layer["n_bytes"] for layer in layers)
    metadata = dict(info["metadata"])
    print(f"file     {plain(info['file'])}")
    print(f"format   mlx-lm {info['format']}")
    print(f"model    {plain(metadata.pop('model', '-'))}")
    print(f"caches   {len(layers)}, {size / 1e6:.1f} MB")
    for key, value in sorted(metadata.items()):
        print(f"metadata {plain(key)} = {plain(value)}")
    print()
    for line in _table(layers):
        print(line)
    return 0


def _table(layers: list[dict[str, Any]]) -> list[str]:
    """Give one aligned line per run of equal layers."""
    rows = [("layers", "class", "offset", "keys", "dtype", "bytes each")]
    numbered = enumerate(layers)
    for _, run in itertools.groupby(numbered, key=lambda item: tuple(map(str, item[1].values()))):
        members = list(run)
        first, layer = members[0]
        last = members[-1][0]
        shape = "-" if layer["shape"] is None else "x".join(map(str, layer["shape"]))
        offset = "-" if layer["offset"] is None else str(layer["offset"])
        span = str(first) if first == last else f"{first}-{last}"
        rows.append((span, layer["class"], offset, shape, layer["dtype"] or "-", f"{layer['n_bytes']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
