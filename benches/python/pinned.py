"""The limit of a restore on CUDA: a file through a ring of pinned buffers into device memory, by ctypes alone."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from pathlib import Path
from typing import Any

from limits import PIECE, Pool

_PORTABLE = 1
_NON_BLOCKING = 1


class Ring:
    """Two pinned slots per thread: one is filled while the other is on its way."""

    def __init__(self, n_bytes: int, n_threads: int = 8) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._enter()
        self._device = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(self._device), ctypes.c_size_t(n_bytes))
        self.n_bytes = n_bytes
        self._slots = [[self._slot() for _ in range(2)] for _ in range(n_threads)]
        self._mine = threading.local()
        self._numbers = itertools.count()
        self._pool = Pool(n_threads, self._start_thread)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, name)(*arguments):
            raise RuntimeError(f"{name}: CUDA error {code}")

    def _enter(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def _start_thread(self) -> None:
        self._enter()
        self._mine.slots = itertools.cycle(self._slots[next(self._numbers)])

    def _slot(self) -> tuple[ctypes.c_void_p, memoryview, ctypes.c_void_p]:
        host, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(PIECE), ctypes.c_uint(_PORTABLE))
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        assert host.value is not None
        return host, memoryview((ctypes.c_char * PIECE).from_address(host.value)).cast("B"), stream

    def read(self, file: Path) -> None:
        """Bring the first ``n_bytes`` of a file into device memory."""
        descriptor = os.open(file, os.O_RDONLY)

        def piece(at: int, to: int) -> None:
            host, view, stream = next(self._mine.slots)
            self._call("cuStreamSynchronize", stream)
            got = 0
            while got < to - at:
                n = os.preadv(descriptor, [view[got : to - at]], at + got)
                if n == 0:
                    raise EOFError(file)
                got += n
            to_device = ctypes.c_uint64(self._device.value + at)
            self._call("cuMemcpyHtoDAsync_v2", to_device, host, ctypes.c_size_t(to - at), stream)

        try:
            self._pool.run(self.n_bytes, piece)
            for _, _, stream in itertools.chain.from_iterable(self._slots):
                self._call("cuStreamSynchronize", stream)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        self._pool.close()
        self._enter()
        for host, _, stream in itertools.chain.from_iterable(self._slots):
            self._call("cuStreamDestroy_v2", stream)
            self._call("cuMemFreeHost", host)
        self._call("cuMemFree_v2", self._device)
