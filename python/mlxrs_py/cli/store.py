"""``mlxrs-py store``: what a prompt store holds, and its upkeep."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxrs_py._units import size_text
from mlxrs_py.cli import HelpFormatter, models, plain

if TYPE_CHECKING:
    from mlxrs_py.store import PromptStore

__all__ = ["add"]

#: What ``stats`` and ``verify`` count in bytes.
_BYTES = {"bytes", "disk_bytes", "disk_limit", "written_today"}

#: Numbers that do not begin at 0 with each process that opens the store.
_OF_ALL_PROCESSES = ("disk_records", "disk_bytes", "disk_limit", "quarantined", "written_today")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "store",
        help="look into a store of prompts, check it, make room",
        formatter_class=HelpFormatter,
        description="Look into a store of prompts, check it, make room. See docs/prompt-store.md.",
    )
    place = argparse.ArgumentParser(add_help=False, parents=[common])
    place.add_argument("--store", metavar="FOLDER", help="its folder (default: the one in your cache folder)")
    place.add_argument("--json", action="store_true", help="print JSON instead of text")
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def action(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = "") -> Any:
        description = f"{text[0].upper()}{text[1:]}.{more}"
        added = actions.add_parser(name, parents=[place], help=text, description=description)
        added.set_defaults(run=run)
        return added

    action("ls", _ls, "list the records, a line each", " Those that others go on come first.")
    stats = action("stats", _stats, "show how full the store is and how often it helped")
    stats.add_argument("--plot", metavar="FILE", help="draw the tree of prefixes, with hits and bytes, into FILE")
    verify = action("verify", _verify, "check every byte", " The exit code is 1 if anything is wrong.")
    verify.add_argument("--repair", action="store_true", help="set damaged records aside, and make the index right")
    prune = action("prune", _prune, "remove what dead programs left, and what was used longest ago", " Pins stay.")
    prune.add_argument(
        "--to", type=models.size, metavar="N", help="bytes that may stay, such as 20GB (default: the store's limit)"
    )
    for name, run, text in (
        ("pin", _pin, "keep a record, and those that it goes on, from being taken out"),
        ("unpin", _unpin, "let them be taken out again"),
    ):
        action(name, run, text).add_argument("id", metavar="ID", help="the beginning of the id that ls shows")
    clear = action("clear", _clear, "take out everything, pinned or not")
    clear.add_argument("--yes", action="store_true", help="do not ask")


def _opened(arguments: argparse.Namespace) -> PromptStore:
    """Open a store that is there, with its own limit: looking at one neither makes it nor makes it smaller."""
    from mlxrs_py.store import PromptStore
    from mlxrs_py.store.prompt_store import default_path

    folder = default_path() if arguments.store is None else Path(arguments.store)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not folder.is_dir() or not any(folder.iterdir()):
        raise FileNotFoundError(errno.ENOENT, "No prompt store there", str(folder))
    # On a disk that takes no writes it can still be looked at.
    is_a_look = arguments.run in (_ls, _stats) or (arguments.run is _verify and not arguments.repair)
    read_only = is_a_look and not os.access(folder, os.W_OK)
    return PromptStore(folder, read_only=read_only)


def _ls(arguments: argparse.Namespace) -> int:
    with _opened(arguments) as store:
        records = store.ls()
    if arguments.json:
        _print_json(records)
        return 0
    for line in _table(records):
        print(line)
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    with _opened(arguments) as store:
        stats, records = store.stats(), store.ls()
    facts: dict[str, Any] = {"folder": str(store.path)}
    facts |= {name: stats[name] for name in _OF_ALL_PROCESSES}
    facts["models"] = len({record["space"] for record in records})
    facts["pinned"] = sum(record["pinned"] for record in records)
    facts["hits"] = sum(record["hits"] for record in records)
    if arguments.plot is not None:
        from mlxrs_py.store.plot import plot

        plot(records, arguments.plot)
    _print_facts(arguments, facts)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with _opened(arguments) as store:
        report = store.verify(repair=arguments.repair)
    _print_facts(arguments, report)
    return 0 if report["sound"] else 1


def _prune(arguments: argparse.Namespace) -> int:
    with _opened(arguments) as store:
        n_bytes = store.prune(arguments.to)
    _tell(arguments, {"bytes": n_bytes}, f"{size_text(n_bytes)} taken out")
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    with _opened(arguments) as store:
        n_records = store.pin(arguments.id)
    _tell(arguments, {"records": n_records}, f"{n_records} records pinned")
    return 0


def _unpin(arguments: argparse.Namespace) -> int:
    with _opened(arguments) as store:
        n_records = store.unpin(arguments.id)
    _tell(arguments, {"records": n_records}, f"{n_records} records let go")
    return 0


def _clear(arguments: argparse.Namespace) -> int:
    with _opened(arguments) as store:
        n_records = len(store.ls())
        if not arguments.yes:
            if not sys.stdin.isatty():
                raise ValueError("store clear: expected --yes where nobody can be asked")
            answer = input(f"Take out all {n_records} records of {plain(store.path)}? [y/N] ")
            if answer.strip().lower() not in ("y", "yes"):
                print("mlxrs-py: nothing was changed", file=sys.stderr)
                return 1
        store.clear()
    _tell(arguments, {"records": n_records}, f"{n_records} records taken out")
    return 0


def _table(records: list[dict[str, Any]]) -> list[str]:
    """Give one aligned line per record; a head on a terminal."""
    now = time.time()
    head = ("id", "model", "kind", "tokens", "bytes", "hits", "used", "tier", "pinned")
    rows = [head] if sys.stdout.isatty() else []
    rows += [
        (
            record["id"][:12],
            record["space"][:8],
            record["kind"],
            f"{record['start']}-{record['end']}" if record["kind"] == "rows" else f"at {record['end']}",
            size_text(record["bytes"]),
            str(record["hits"]),
            _ago(now - record["used"]),
            record["tier"],
            "pinned" if record["pinned"] else "-",
        )
        for record in records
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _print_facts(arguments: argparse.Namespace, facts: dict[str, Any]) -> None:
    if arguments.json:
        _print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = size_text(value) if name in _BYTES and value is not None else value
        if isinstance(value, list):
            shown = ", ".join(map(str, value)) or "none"
        elif isinstance(value, bool) or value is None:
            shown = {True: "yes", False: "no", None: "-"}[value]
        print(f"{name.replace('_', ' '):{width}}  {plain(shown)}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def _tell(arguments: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    """Say what was done: to a program if it asked, to a person if there is one."""
    if arguments.json:
        _print_json(facts)
    elif sys.stdout.isatty():
        print(text)


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds / length)} {unit} ago"
    return "now"
