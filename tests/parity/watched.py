"""``mlx_lm.server`` as a process that tells how much it holds: memory, caches, the store's folder, files, threads.

In the process, :func:`main` runs the server; its standard input takes questions, a line each. Outside,
:class:`Watched` asks it, and looks at its folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from .served import Server, serve

#: The process: options as JSON, then the server's arguments.
CODE = "from parity.watched import main; main()"


@dataclass
class Caps:
    """Limits of a run, small enough that both tiers must let go of prompts again and again."""

    cache_bytes: int = 3_000_000
    cache_size: int = 12
    #: What waits to be written.
    ram_bytes: int = 2_000_000
    disk_bytes: int = 24_000_000


class Watched:
    """A server that runs, and what it holds."""

    def __init__(self, server: Server, folder: Path | None) -> None:
        self.server = server
        self._folder = folder

    def sample(self) -> dict[str, Any]:
        """Tell what it holds now."""
        process = self.server.process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        found = json.loads(process.stdout.readline())
        status = Path(f"/proc/{process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        found["rss"] = 1024 * int(lines["VmRSS"].split()[0])
        found["threads"] = int(lines["Threads"])
        found["files"] = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        if self._folder is not None:
            found["disk"] = disk_usage(self._folder)
        return found


def disk_usage(folder: Path) -> int:
    """Give what ``du`` does: bytes that the files of a folder take."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # Evicted meanwhile.
            stat = path.stat()
            total += 512 * stat.st_blocks if not path.is_dir() else 0
    return total


@contextlib.contextmanager
def watched(model: Path, folder: Path | None, caps: Caps, *arguments: str) -> Iterator[Watched]:
    """Run a server until the end of the block; without a folder without our store."""
    settings = {"folder": None if folder is None else str(folder), **vars(caps)}
    limits = ["--prompt-cache-bytes", str(caps.cache_bytes), "--prompt-cache-size", str(caps.cache_size)]
    told = ["--model", str(model), "--log-level", "ERROR", *limits, *arguments]
    with serve(CODE, json.dumps(settings), *told) as server:
        yield Watched(server, folder)


def main() -> None:
    """Run the server in this process: with a folder on our store, else mlx-lm as it is."""
    settings = json.loads(sys.argv.pop(1))
    # A shell hands its background processes an ignored SIGINT, which is how the server is ended.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import mlxrs_py

    # isort: split
    import mlx.core as mx
    from mlx_lm import server

    from mlxrs_py.serving import StoredPromptCache

    store = None
    owner: type = server.LRUPromptCache
    if settings["folder"] is not None:
        store = mlxrs_py.PromptStore(
            settings["folder"], ram_bytes=settings["ram_bytes"], disk_bytes=settings["disk_bytes"]
        )
        mlxrs_py.install(store=store)
        owner = StoredPromptCache
    n_kept = 0
    #: Since the last question.
    most = {"cache_bytes": 0, "cache_size": 0}
    insert = owner.insert_cache

    def insert_cache(self: Any, *args: Any, **options: Any) -> None:
        nonlocal n_kept
        insert(self, *args, **options)
        n_kept += 1
        most["cache_bytes"] = max(most["cache_bytes"], self.nbytes)
        most["cache_size"] = max(most["cache_size"], len(self))

    def answer() -> None:
        for _ in sys.stdin:
            found: dict[str, Any] = {"active": mx.get_active_memory(), "cached": mx.get_cache_memory()}
            found |= {"n_kept": n_kept, **most}
            most.update(dict.fromkeys(most, 0))
            found["store"] = None if store is None else store.stats()
            print(json.dumps(found), flush=True)

    threading.Thread(target=answer, daemon=True).start()
    with mock.patch.object(owner, "insert_cache", insert_cache):
        server.main()
    if store is not None:
        store.close()
    print("{}", flush=True)
    os._exit(0)
