"""What the machine can do: plain programs that read and write as many bytes, by several threads."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE = 8 << 20


def memory(n_bytes: int) -> mmap.mmap:
    """Give page-aligned memory, of huge pages where the system has them, every page of it touched."""
    space = fresh(n_bytes)
    for at in range(0, n_bytes, 4096):
        space[at] = 1
    return space


def fresh(n_bytes: int) -> mmap.mmap:
    space = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        space.madvise(mmap.MADV_HUGEPAGE)
    return space


class Pool:
    """Threads that take pieces of a file until none is left."""

    def __init__(self, n_threads: int, initializer: Callable[[], object] | None = None) -> None:
        self.n_threads = n_threads
        self._threads = ThreadPoolExecutor(n_threads, initializer=initializer)
        self.run(0, lambda _at, _to: None)

    def run(self, n_bytes: int, piece: Callable[[int, int], object]) -> None:
        starts = itertools.count(0, PIECE)  # one step of it is atomic

        def work(_: int) -> None:
            while (at := next(starts)) < n_bytes:
                piece(at, min(at + PIECE, n_bytes))

        list(self._threads.map(work, range(self.n_threads)))

    def close(self) -> None:
        self._threads.shutdown()


def read_into(pool: Pool, file: Path, view: memoryview) -> None:
    """Read a whole file into memory that is there, each byte once."""
    descriptor = os.open(file, os.O_RDONLY)

    def piece(at: int, to: int) -> None:
        while at < to:
            n = os.preadv(descriptor, [view[at:to]], at)
            if n == 0:
                raise EOFError(file)
            at += n

    try:
        pool.run(len(view), piece)
    finally:
        os.close(descriptor)


def read_fresh(pool: Pool, file: Path) -> mmap.mmap:
    """Read a whole file into memory that is new, as a program does that keeps what it reads."""
    space = fresh(file.stat().st_size)
    read_into(pool, file, memoryview(space))
    return space


def write(pool: Pool, file: Path, view: memoryview, *, sync: bool, early: bool = False, direct: bool = False) -> None:
    """Write a new file of these bytes; the disk begins ``early``, or ``direct`` goes past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    descriptor = os.open(file, flags, 0o600)

    def piece(at: int, to: int) -> None:
        start = at
        while at < to:
            at += os.pwrite(descriptor, view[at:to], at)
        if early:
            start_writeback(descriptor, start, to - start)

    try:
        n_bytes = len(view) // 4096 * 4096 if direct else len(view)
        if hasattr(os, "posix_fallocate"):
            with contextlib.suppress(OSError):
                os.posix_fallocate(descriptor, 0, n_bytes)
        pool.run(n_bytes, piece)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writeback(descriptor: int, at: int, n_bytes: int) -> None:
    """Have Linux bring written bytes to the disk, and do not wait."""
    ctypes.CDLL(None).sync_file_range(descriptor, ctypes.c_int64(at), ctypes.c_int64(n_bytes), 2)


def drop_from_page_cache(file: Path) -> float:
    """Sync a file and drop it from the page cache; give the part of it that is still there, of some samples."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return _cached(descriptor, file.stat().st_size)
    finally:
        os.close(descriptor)


def _cached(descriptor: int, n_bytes: int, n_samples: int = 16) -> float:
    there, byte = 0, bytearray(1)
    for at in range(0, n_bytes, max(1, n_bytes // n_samples)):
        try:
            there += os.preadv(descriptor, [byte], at, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except (OSError, AttributeError):
            return float("nan")  # this file system cannot tell
    return there / n_samples


def settle(file: Path) -> None:
    """Have a file on the disk and in the page cache, with nothing left to write, and the blocks of older ones freed."""
    with file.open("rb", buffering=0) as stream:
        os.fsync(stream.fileno())
        space = bytearray(PIECE)
        while stream.readinto(space):
            pass
    wait_for_disks()


def wait_for_disks(seconds: float = 5.0) -> None:
    """Wait until all is written and no disk does anything: a freed file's blocks are given back long after its name."""
    end, statistics = time.perf_counter() + seconds, Path("/proc/diskstats")
    for _ in range(2):  # what the first sync waits for may let go of files
        os.sync()
        earlier = ""
        while (
            statistics.exists()
            and (now := statistics.read_text(encoding="ascii")) != earlier
            and time.perf_counter() < end
        ):
            earlier = now
            time.sleep(0.2)
