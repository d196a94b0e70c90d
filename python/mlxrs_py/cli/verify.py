"""``mlxrs-py verify``: whether cache files are what they say."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mlxrs_py.cli import plain

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "verify",
        parents=[common],
        help="check cache files in full",
        description="Check cache files: header, classes, numbers and shapes against each other, and that every byte of "
        "data is there. One line a file; the exit code is 1 if any of them is bad.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="a cache file")
    parser.add_argument("--json", action="store_true", help="print one JSON array with an object per file")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    reports = []
    for file in arguments.files:
        report = _verify(file)
        reports.append(report)
        if not arguments.json:
            print(_line(report), flush=True)
    if arguments.json:
        print(json.dumps(reports, ensure_ascii=False, indent=2))
    return 0 if all(report["ok"] for report in reports) else 1


def _verify(file: str) -> dict[str, Any]:
    from mlxrs_py._core import CacheFormatError, verify_file

    try:
        info = verify_file(file)
    except (CacheFormatError, OSError) as error:
        return {"file": file, "ok": False, "error": str(error)}
    n_bytes = sum(layer["n_bytes"] for layer in info["layers"])
    counts = {"caches": len(info["layers"]), "n_bytes": n_bytes}
    return {"file": str(info["file"]), "ok": True, "format": info["format"], **counts}


def _line(report: dict[str, Any]) -> str:
    if not report["ok"]:
        # The error names the file.
        return f"bad  {plain(report['error'])}"
    size = f"{report['caches']} caches, {report['n_bytes'] / 1e6:.1f} MB"
    return f"ok   {plain(report['file'])}: mlx-lm {report['format']}, {size}"
