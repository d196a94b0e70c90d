"""Into a file: all ways of saving in turns, and saving in one process plus restoring in the next."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import limits
import machine
import workload
from children import Child
from rows import LIMIT, OURS, THEIRS, Report, Row, Samples, seconds
from sections.restore import main_shape

RUNS = 6
DURABLE, PAST, FAST = "durable", "durable, direct", "not durable"
FREE, DONE = "background, caller free", "background, all done"
SYNCED, WRITTEN = "plain write and fsync", "plain write"
EARLY, DIRECT = "plain write, begun early, and fsync", "plain O_DIRECT write and fsync"


def run(report: Report) -> None:
    report.attempt("save", lambda: in_one_process(report))
    report.attempt("save, then restore in the next process", lambda: two_processes(report))


def in_one_process(report: Report) -> None:
    """Each saves over its own older file; nothing is left to write when one begins."""
    shape, n_tokens = main_shape(report)
    n_bytes = shape.n_bytes(n_tokens)
    caches = {side: workload.filled(side, shape, n_tokens) for side in (OURS, THEIRS)}
    with tempfile.TemporaryDirectory() as name, plain_writes(Path(name), n_bytes) as plain:
        sides = {what: lambda o=o: saved_seconds(OURS, name, caches, **o) for what, o in options().items()}
        if workload.takes(workload.cache_module(OURS).save_prompt_cache, "background"):
            sides[FREE] = lambda: in_background(name, caches)[0]
            sides[DONE] = lambda: in_background(name, caches)[1]
        sides[THEIRS] = lambda: saved_seconds(THEIRS, name, caches)
        for side in (FAST, THEIRS):
            sides[side]()  # the older file
        samples = report.in_turns(sides | plain, RUNS, 60)
    rows(report, samples, n_bytes, f"{n_bytes / 1e9:.3f} GB")


def options() -> dict[str, dict[str, bool]]:
    return {DURABLE: {"durable": True}, PAST: {"direct": True}, FAST: {"durable": False}}


def rows(report: Report, samples: Samples, n_bytes: int, what: str) -> None:
    durable = [side for side in (SYNCED, EARLY, DIRECT) if side in samples]
    limit_of = {DURABLE: durable, PAST: durable, FAST: [WRITTEN], DONE: durable}
    for way in (DURABLE, PAST, FAST, FREE, DONE):
        if way not in samples or THEIRS not in samples:
            continue
        sides = {OURS: samples[way], THEIRS: samples[THEIRS]}
        plain = [side for side in limit_of.get(way, []) if side in samples]
        fastest = min(plain, key=lambda side: min(samples[side]), default="")
        if fastest:
            sides[LIMIT] = samples[fastest]
        note = "" if way == FAST else "mlx-lm's is not durable"
        limit = f"{fastest}, {writers()} threads" if fastest else ""
        report.add(Row("save", f"{what}, {way}", "s", sides, limit=limit, n_bytes=n_bytes, note=note))


def file_of(folder: str, side: str) -> Path:
    return Path(folder) / f"{side}.safetensors"


def saved_seconds(side: str, folder: str, caches: dict[str, list[Any]], **how: bool) -> float:
    file = file_of(folder, side)
    elapsed = seconds(lambda: workload.save(side, file, caches[side], **how))
    limits.settle(file)
    return elapsed


def in_background(folder: str, caches: dict[str, list[Any]]) -> tuple[float, float]:
    start = time.perf_counter()
    handle = workload.save(OURS, file_of(folder, OURS), caches[OURS], background=True)
    free = time.perf_counter() - start
    handle.result()
    done = time.perf_counter() - start
    limits.settle(file_of(folder, OURS))
    return free, done


def writers() -> int:
    return min(os.cpu_count() or 1, 4)


@contextmanager
def plain_writes(folder: Path, n_bytes: int) -> Iterator[dict[str, Callable[[], float]]]:
    """Give plain programs that write as many bytes from host memory into a new file."""
    pool = limits.Pool(writers())
    view = memoryview(limits.memory(n_bytes))
    file = folder / "plain"

    def plain(**how: bool) -> float:
        try:
            elapsed = seconds(lambda: limits.write(pool, file, view, **how))
        finally:
            file.unlink(missing_ok=True)
            limits.wait_for_disks()
        return elapsed

    sides = {SYNCED: lambda: plain(sync=True), WRITTEN: lambda: plain(sync=False)}
    if sys.platform == "linux":
        sides[EARLY] = lambda: plain(sync=True, early=True)
    if hasattr(os, "O_DIRECT"):
        sides[DIRECT] = lambda: plain(sync=True, direct=True)
    try:
        yield sides
    finally:
        view.release()
        pool.close()


def two_processes(report: Report) -> None:
    """One process saves in the default mode and ends; the next restores."""
    shape, n_tokens = main_shape(report)
    task = {"do": "files", "device": machine.device(), "shape": shape.as_dict(), "n_tokens": n_tokens}
    with tempfile.TemporaryDirectory() as name:
        parts: dict[str, Samples] = {"save": {OURS: [], THEIRS: []}, "restore": {OURS: [], THEIRS: []}}

        def both(side: str) -> float:
            file = str(file_of(name, side))
            for what in parts:
                with Child(side=side, filled=what == "save", **task) as child:
                    parts[what][side].append(child.ask(do=what, file=file)["seconds"])
            total = sum(part[side][-1] for part in parts.values())
            limits.settle(Path(file))
            return total

        sides = {side: lambda side=side: both(side) for side in (OURS, THEIRS)}
        samples = report.in_turns(sides, 3, 40)
    n_bytes = shape.n_bytes(n_tokens)
    title = f"{n_bytes / 1e9:.3f} GB, save in one process, restore in the next"
    report.add(Row("save", title, "s", samples, n_bytes=n_bytes, note="default mode; mlx-lm's is not durable"))
    for what, part in parts.items():
        report.add(Row("save", f"{title}: the {what} alone", "s", part, n_bytes=n_bytes))
