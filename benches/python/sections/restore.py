"""From a file until ready to decode: in the page cache, cold, at first in a process, and by prompt length."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

import limits
import machine
import workload
from children import Child
from rows import LIMIT, OURS, THEIRS, Report, Row, seconds

RUNS = 12
PLAIN_FRESH = "plain read into new memory"


def main_shape(report: Report) -> tuple[workload.Shape, int]:
    shape = workload.LLAMA_8B if machine.on_gpu() else workload.HALF_LLAMA_8B
    return shape, 2048 if report.quick else 16_384


def lengths(report: Report) -> list[int]:
    """Give prompt lengths whose caches fit three times into what is free."""
    free = 60e9 if machine.on_gpu() else machine.free_bytes()
    shape = length_shape()
    all_lengths = [1024, 4096] if report.quick else [1024, 4096, 16_384, 65_536]
    return [n for n in all_lengths if 3 * shape.n_bytes(n) < free]


def length_shape() -> workload.Shape:
    """Give the shape of the model that the section prefill runs, so that the two can be compared."""
    return workload.LLAMA_8B if machine.on_gpu() else workload.SMOLLM2


@contextmanager
def limit_of(report: Report, n_bytes: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Give a plain program that brings a file to where MLX would have it: memory that is there already."""
    ring = None
    if machine.on_cuda():
        try:
            from pinned import Ring

            ring = Ring(n_bytes)
        except Exception as error:
            report.failed("the pinned ring", error)
    if ring is not None:
        try:
            yield "8 threads, pinned ring into device memory", ring.read
        finally:
            ring.close()
        return
    pool = limits.Pool(min(os.cpu_count() or 1, 8))
    space = limits.memory(n_bytes)
    view = memoryview(space)
    try:
        yield f"{pool.n_threads} threads read into warm memory", lambda file: limits.read_into(pool, file, view)
    finally:
        view.release()
        pool.close()


def restored_seconds(side: str, file: Path, **options: object) -> float:
    mx.synchronize()
    return seconds(lambda: workload.restore(side, file, **options))


@contextmanager
def restores(files: dict[str, Path]) -> Iterator[dict[str, Callable[[], float]]]:
    """Give one restore of each side. On a CPU mlx-lm has its own process: what ours has MLX keep would serve it too."""
    sides = {side: lambda side=side: restored_seconds(side, files[side]) for side in (OURS, THEIRS)}
    if machine.on_gpu():
        yield sides
        return
    with child(THEIRS) as theirs:
        sides[THEIRS] = lambda: theirs.ask(do="restore", file=str(files[THEIRS]))["seconds"]
        yield sides


def child(side: str) -> Child:
    shape = workload.SMOLLM2.as_dict()
    return Child(side=side, n_tokens=0, do="files", device=machine.device(), shape=shape, filled=False)


def run(report: Report) -> None:
    shape, n_tokens = main_shape(report)
    with tempfile.TemporaryDirectory() as name:
        files = {side: Path(name) / f"{side}.safetensors" for side in (OURS, THEIRS)}
        for side, file in files.items():
            workload.save(side, file, workload.filled(side, shape, n_tokens))
            limits.settle(file)
        workload.tidy()
        n_bytes = shape.n_bytes(n_tokens)
        what = f"{n_bytes / 1e9:.3f} GB"
        parts = {
            "restore from the page cache": lambda: from_page_cache(report, files, n_bytes, what),
            "restore, lazy": lambda: lazy(report, files, n_bytes, what),
            "first restore of a process": lambda: first(report, files, n_bytes, what),
            "restore, cold": lambda: cold(report, files, n_bytes, what),
        }
        for part, function in parts.items():
            report.attempt(part, function)
    for n in lengths(report):
        report.attempt(f"restore {n} tokens", lambda n=n: by_length(report, n))


def from_page_cache(report: Report, files: dict[str, Path], n_bytes: int, what: str) -> None:
    with limit_of(report, files[OURS].stat().st_size) as (limit, plain), restores(files) as sides:
        sides[LIMIT] = lambda: seconds(lambda: plain(files[OURS]))
        pool = limits.Pool(min(os.cpu_count() or 1, 8))
        if not machine.on_gpu():
            sides[PLAIN_FRESH] = lambda: seconds(lambda: limits.read_fresh(pool, files[OURS]))
        for sample in sides.values():  # what the first one pays is another row
            sample()
        samples = report.in_turns(sides, RUNS, 30)
        note = "" if machine.on_gpu() else _faults(sides)
        pool.close()
    report.add(Row("restore", f"{what}, page cache", "s", samples, limit=limit, n_bytes=n_bytes, note=note))


def _faults(sides: dict[str, Callable[[], object]]) -> str:
    """Tell how often each side has the kernel find memory for it: times on a busy box hide that, counts do not."""

    def count(sample: Callable[[], object]) -> int:
        before = machine.page_faults()
        sample()
        return machine.page_faults() - before

    here = {side: sample for side, sample in sides.items() if side != THEIRS}
    counts = {side: min(count(sample) for _ in range(2)) for side, sample in here.items()}
    return "page faults: " + ", ".join(f"{side} {n:,}" for side, n in counts.items())


def lazy(report: Report, files: dict[str, Path], n_bytes: int, what: str) -> None:
    if not workload.takes(workload.cache_module(OURS).load_prompt_cache, "lazy"):
        return

    def loaded(side: str, **options: object) -> float:
        return seconds(lambda: workload.cache_module(side).load_prompt_cache(str(files[side]), **options))

    def first_layer(side: str, **options: object) -> float:
        mx.synchronize()
        start = time.perf_counter()
        caches = workload.cache_module(side).load_prompt_cache(str(files[side]), **options)
        workload.evaluate(caches[:1])
        return time.perf_counter() - start

    sides = {OURS: lambda: loaded(OURS, lazy=True), THEIRS: lambda: loaded(THEIRS)}
    report.add(Row("restore", f"{what}, lazy: back in the caller", "s", report.in_turns(sides, 6), n_bytes=n_bytes))
    sides = {OURS: lambda: first_layer(OURS, lazy=True), THEIRS: lambda: first_layer(THEIRS)}
    report.add(Row("restore", f"{what}, lazy: first layer ready", "s", report.in_turns(sides, 6), n_bytes=n_bytes))
    sides = {
        OURS: lambda: restored_seconds(OURS, files[OURS], lazy=True),
        THEIRS: lambda: restored_seconds(THEIRS, files[THEIRS]),
    }
    report.add(Row("restore", f"{what}, lazy: all ready", "s", report.in_turns(sides, 6), n_bytes=n_bytes))


def first(report: Report, files: dict[str, Path], n_bytes: int, what: str) -> None:
    """Of a process; on CUDA it pins its buffers then."""

    def fresh(side: str) -> float:
        with child(side) as process:
            return process.ask(do="restore", file=str(files[side]))["seconds"]

    sides = {side: lambda side=side: fresh(side) for side in files}
    pool = limits.Pool(min(os.cpu_count() or 1, 8))
    limit = ""
    if not machine.on_gpu():
        limit = f"{pool.n_threads} threads read into new memory"
        sides[LIMIT] = lambda: seconds(lambda: limits.read_fresh(pool, files[OURS]))
    samples = report.in_turns(sides, 5, 30)
    pool.close()
    name = f"{what}, page cache, first of a process"
    report.add(Row("restore", name, "s", samples, limit=limit, n_bytes=n_bytes))


def cold(report: Report, files: dict[str, Path], n_bytes: int, what: str) -> None:
    left: list[float] = []

    def dropped(file: Path, sample: Callable[[], float]) -> float:
        left.append(limits.drop_from_page_cache(file))
        return sample()

    pool = limits.Pool(8)
    space = limits.memory(files[OURS].stat().st_size)
    view = memoryview(space)
    with restores(files) as warm:
        sides = {side: lambda side=side: dropped(files[side], warm[side]) for side in files}
        sides[LIMIT] = lambda: dropped(files[OURS], lambda: seconds(lambda: limits.read_into(pool, files[OURS], view)))
        samples = report.in_turns(sides, 4, 20)
    view.release()
    pool.close()
    note = f"of the files, {max(left):.0%} at most was still cached" if max(left) == max(left) else "not checked"
    limit = "8 threads read the cold file into warm memory"
    report.add(Row("restore", f"{what}, cold file", "s", samples, limit=limit, n_bytes=n_bytes, note=note))


def by_length(report: Report, n_tokens: int) -> None:
    """Both sides read the file that we wrote; the layout is mlx-lm's."""
    shape = length_shape()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "prompt.safetensors"
        workload.save(OURS, file, workload.filled(OURS, shape, n_tokens), durable=False)
        workload.tidy()
        limits.settle(file)
        with limit_of(report, file.stat().st_size) as (limit, plain), restores({OURS: file, THEIRS: file}) as sides:
            sides[LIMIT] = lambda: seconds(lambda: plain(file))
            samples = report.in_turns(sides, 8 if n_tokens < 65_536 else 3, 12)
    name = f"{n_tokens:,} tokens of {shape.name}, page cache"
    n_bytes = shape.n_bytes(n_tokens)
    report.add(Row("restore", name, "s", samples, limit=limit, series="length", n_tokens=n_tokens, n_bytes=n_bytes))
