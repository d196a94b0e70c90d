"""On a GPU: saving a cache of Llama-8B's shape, beside mlx-lm and beside what a plain program writes and reads.

Run with ``PYTHONPATH`` on MLX-CUDA, mlx-lm and this project's wheel: ``python tests/gpu/save.py [folder]``. Prints
minimum and median, both sides in turns. What fails is printed, and the rest still runs. ``MLXRS_SMALL=1`` makes all of
it small, to try the script anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlxrs_py
from mlxrs_py import cache as ours

# isort: split
# Before these, the BLAS that serves MLX was chosen.
import mlx.core as mx
import mlx_lm.models.cache as theirs
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama

SMALL = "MLXRS_SMALL" in os.environ
LAYERS, HEADS, HEAD_DIM, TOKENS = (4, 2, 64, 2048) if SMALL else (32, 8, 128, 16_384)
RUNS = 4
PIECE = 8 << 20
START = time.perf_counter()


def filled(module: Any) -> list[Any]:
    caches = [module.KVCache() for _ in range(LAYERS)]
    for layer, cache in enumerate(caches):
        keys = [mx.random.key(2 * layer + half) for half in range(2)]
        rows = [mx.random.normal((1, HEADS, TOKENS, HEAD_DIM), key=key).astype(mx.bfloat16) for key in keys]
        cache.update_and_fetch(*rows)
        mx.eval(cache.state)
    return caches


def seconds(work: Callable[[], Any]) -> float:
    # What earlier runs left to the disk is not this one's.
    os.sync()
    mx.synchronize()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def show(what: str, times: list[float], unit: str = "s", note: str = "") -> None:
    each = " ".join(f"{x:.3f}" for x in times)
    print(f"{what:46} min {min(times):.4f} median {statistics.median(times):.4f} {unit}  [{each}] {note}", flush=True)


@contextlib.contextmanager
def section(what: str) -> Iterator[None]:
    print(f"\n## {what} ({time.perf_counter() - START:.0f} s)", flush=True)
    try:
        yield
    except Exception:
        traceback.print_exc(file=sys.stdout)
    gc.collect()


def in_threads(work: Callable[[int], object], n_bytes: int, threads: int) -> None:
    places, lock = iter(range(0, n_bytes, PIECE)), threading.Lock()

    def run() -> None:
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            work(place)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def plain_write(file: Path, data: memoryview, threads: int, *, early: bool, sync: bool, direct: bool = False) -> None:
    """Write as a program without MLX would: from the host, in large pieces, by several threads."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
    stream = os.open(file, flags)
    libc = ctypes.CDLL(None)

    def piece(at: int) -> None:
        os.pwrite(stream, data[at : at + PIECE], at)
        if early:
            libc.sync_file_range(stream, ctypes.c_long(at), ctypes.c_long(PIECE), 2)

    try:
        with contextlib.suppress(OSError):
            os.posix_fallocate(stream, 0, len(data))
        in_threads(piece, len(data), threads)
        if sync:
            os.fsync(stream)
    finally:
        os.close(stream)


def plain_read(file: Path, threads: int) -> None:
    """Read as a program without MLX would, into memory that is used again."""
    stream = os.open(file, os.O_RDONLY)
    buffers = threading.local()

    def piece(at: int) -> None:
        if not hasattr(buffers, "memory"):
            buffers.memory = mmap.mmap(-1, PIECE)
        os.preadv(stream, [buffers.memory], at)

    in_threads(piece, os.fstat(stream).st_size, threads)
    os.close(stream)


def limits(folder: Path, n_bytes: int) -> None:
    n_bytes = max(n_bytes // PIECE, 2) * PIECE
    memory = mmap.mmap(-1, n_bytes)
    for at in range(0, n_bytes, 4096):
        memory[at] = at >> 12 & 0xFF
    data, file = memoryview(memory), folder / "plain"
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("page cache, not durable", {"early": False, "sync": False}),
        ("page cache, then sync", {"early": False, "sync": True}),
        ("page cache, written early, then sync", {"early": True, "sync": True}),
        ("past the page cache, then sync", {"early": False, "sync": True, "direct": True}),
    ]
    for threads in (2, 8):
        for what, options in kinds:
            try:
                times = [seconds(lambda o=options, n=threads: plain_write(file, data, n, **o)) for _ in range(2)]
                show(f"plain, {threads} threads, {what}", times)
            except OSError as error:
                print(f"plain, {threads} threads, {what}: {error}")
    file.unlink()


def saves(folder: Path, a: list[Any], b: list[Any]) -> None:
    mine, other = folder / "ours.safetensors", str(folder / "theirs.safetensors")
    first = seconds(lambda: ours.save_prompt_cache(mine, a))
    print(f"first save of the process, which pins        {first:.4f} s")
    samples: dict[str, list[float]] = {"durable": [], "durable=False": [], "durable, new file": [], "mlx-lm": []}
    samples |= {"durable, direct": [], "durable, direct, new file": []}
    for run in range(RUNS):
        samples["durable"].append(seconds(lambda: ours.save_prompt_cache(mine, a)))
        samples["mlx-lm"].append(seconds(lambda: theirs.save_prompt_cache(other, b)))
        samples["durable=False"].append(seconds(lambda: ours.save_prompt_cache(mine, a, durable=False)))
        new = folder / f"new{run}.safetensors"
        samples["durable, new file"].append(seconds(lambda new=new: ours.save_prompt_cache(new, a)))
        new.unlink()
        samples["durable, direct"].append(seconds(lambda: ours.save_prompt_cache(mine, a, direct=True)))
        new = folder / f"direct{run}.safetensors"
        samples["durable, direct, new file"].append(
            seconds(lambda new=new: ours.save_prompt_cache(new, a, direct=True))
        )
        new.unlink()
    for what, times in samples.items():
        note = "" if what == "mlx-lm" else f"{min(samples['mlx-lm']) / min(times):.2f} times mlx-lm, minima"
        show(what, times, note=note)
    for threads in (2, 4, 16):
        for durable in (True, False):
            options = {"threads": threads, "durable": durable}
            took = seconds(lambda o=options: ours.save_prompt_cache(mine, a, **o))
            print(f"{threads} threads, durable={durable}: {took:.3f} s")


def rows_of_saves(folder: Path, a: list[Any], b: list[Any]) -> None:
    """Save again and again, at once and after a pause: freed blocks go back to the disk long after their file."""
    mine, other = folder / "ours.safetensors", str(folder / "theirs.safetensors")
    for pause in (0.0, 2.0):
        sides: dict[str, Callable[[], Any]] = {
            "over the one before": lambda: ours.save_prompt_cache(mine, a),
            "over the one before, direct": lambda: ours.save_prompt_cache(mine, a, direct=True),
            "mlx-lm": lambda: theirs.save_prompt_cache(other, b),
        }
        for what, save in sides.items():
            times = []
            for _ in range(RUNS):
                time.sleep(pause)
                times.append(seconds(save))
            show(f"{what}, {pause:.0f} s after it", times)


def equal(folder: Path, a: list[Any]) -> None:
    file = str(folder / "ours.safetensors")
    for padded in (False, True):
        ours.save_prompt_cache(file, a, padded=padded)
        for module in (ours, theirs):
            for cache, loaded in zip(a, module.load_prompt_cache(file), strict=True):
                for rows, expected in ((loaded.keys, cache.keys), (loaded.values, cache.values)):
                    rows, expected = (one[..., :TOKENS, :].view(mx.uint16) for one in (rows, expected))
                    assert mx.array_equal(rows, expected), (padded, module.__name__)
    kinds = [ours.KVCache(), ours.QuantizedKVCache(64, 8), ours.RotatingKVCache(100, 4), ours.ConcatenateKVCache()]
    for tokens in (1, 300, 5000):
        for cache in kinds:
            cache.update_and_fetch(*(mx.random.normal((2, HEADS, tokens, 64)).astype(mx.bfloat16) for _ in range(2)))
        for padded in (False, True):
            ours.save_prompt_cache(file, kinds, padded=padded)
            for cache, loaded in zip(kinds, ours.load_prompt_cache(file), strict=True):
                pairs = zip(leaves(cache), leaves(loaded), strict=True)
                assert all(mx.array_equal(x, y) for x, y in pairs), (padded, tokens, type(cache))
    print("bit-equal: ours and mlx-lm's load of our files, padded or not; odd lengths, quantized, rotating")


def leaves(cache: Any) -> list[mx.array]:
    return [rows for _, rows in tree_flatten(list(cache.keys_and_values()))]


def background(folder: Path, a: list[Any]) -> None:
    file = folder / "background.safetensors"
    free, total = [], []
    for _ in range(RUNS):
        os.sync()
        start = time.perf_counter()
        pending = ours.save_prompt_cache(file, a, background=True)
        free.append(time.perf_counter() - start)
        pending.result()
        total.append(time.perf_counter() - start)
    show("background: the caller is free after", free)
    show("background: durable after", total)
    loaded = ours.load_prompt_cache(file)
    for cache, other in zip(a, loaded, strict=True):
        assert mx.array_equal(other.keys[..., :TOKENS, :].view(mx.uint16), cache.keys[..., :TOKENS, :].view(mx.uint16))
    print("background: bit-equal")


def big_model() -> Any:
    sizes = (128, 256, 512) if SMALL else (4096, 14_336, 128_256)
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=sizes[0],
        num_hidden_layers=LAYERS,
        intermediate_size=sizes[1],
        num_attention_heads=2 if SMALL else 32,
        num_key_value_heads=HEADS,
        rms_norm_eps=1e-5,
        vocab_size=sizes[2],
    )
    model = llama.Model(args)
    model.update(tree_map(lambda p: (p * 0.02).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model


def decode(model: Any, caches: list[Any], tokens: int) -> float:
    """Give tokens per second, one after the other, each waited for one later as mlx-lm does."""
    token = mx.array([[1]])
    start = time.perf_counter()
    for _ in range(tokens):
        following = mx.argmax(model(token, caches)[:, -1:], axis=-1)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    return tokens / (time.perf_counter() - start)


def decoding(folder: Path, a: list[Any]) -> None:
    model, file = big_model(), folder / "decode.safetensors"
    n = 20 if SMALL else 120

    def back(caches: list[Any]) -> None:
        for cache in caches:
            cache.trim(cache.offset - TOKENS)

    decode(model, a, 10)
    back(a)
    quiet, busy, restored, again = [], [], [], []
    ours.save_prompt_cache(file, a)
    for _ in range(RUNS):
        quiet.append(decode(model, a, n))
        back(a)
        other = ours.load_prompt_cache(file)
        decode(model, other, 3)
        back(other)
        restored.append(decode(model, other, n))
        del other
        again.append(decode(model, a, n))
        back(a)
    show("decode, never saved", quiet, "tok/s")
    show("decode, never saved, once more", again, "tok/s")
    quick = statistics.median(quiet + again)
    show("decode after a restore", restored, "tok/s", f"{statistics.median(restored) / quick:.3f} of never saved")
    covered = []
    for _ in range(RUNS):
        os.sync()
        start = time.perf_counter()
        pending = ours.save_prompt_cache(file, a, background=True)
        busy.append(decode(model, a, n))
        end = time.perf_counter()
        pending.result()
        covered.append((end - start) / (time.perf_counter() - start))
        back(a)
    show("decode while a save runs", busy, "tok/s", f"{statistics.median(busy) / quick:.3f} of never saved")
    print("  how much of the save the decoding took:", " ".join(f"{part:.2f}" for part in covered))


def cold(folder: Path) -> None:
    file = folder / "ours.safetensors"

    def drop() -> None:
        stream = os.open(file, os.O_RDONLY)
        os.fsync(stream)
        os.posix_fadvise(stream, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(stream)

    samples: dict[str, list[float]] = {"restore, cold": [], "plain read, cold": [], "restore, page cache": []}
    load = lambda: mx.eval([cache.state for cache in ours.load_prompt_cache(file)])  # noqa: E731
    for _ in range(3):
        drop()
        samples["plain read, cold"].append(seconds(lambda: plain_read(file, 8)))
        drop()
        samples["restore, cold"].append(seconds(load))
        samples["restore, page cache"].append(seconds(load))
    for what, times in samples.items():
        show(what, times)
    print(
        f"restore, cold, against the plain read: {min(samples['plain read, cold']) / min(samples['restore, cold']):.3f}"
    )


def one_step(which: str, step: str, file: str) -> None:
    """Run one save or load in a process of its own, and print its time."""
    module = {"ours": ours, "theirs": theirs}[which]
    if step == "save":
        caches = filled(module)
        took = seconds(lambda: module.save_prompt_cache(file, caches))
    else:
        mx.eval(mx.random.normal((1024, 1024)))
        took = seconds(lambda: mx.eval([cache.state for cache in module.load_prompt_cache(file)]))
    print(took)


def sums(folder: Path) -> None:
    times: dict[str, list[float]] = {}
    for _ in range(2):
        for which in ("ours", "theirs"):
            file = str(folder / f"sum_{which}.safetensors")
            total = 0.0
            for step in ("save", "load"):
                command = [sys.executable, __file__, "--step", which, step, file]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                took = float(done.stdout.split()[-1])
                total += took
                times.setdefault(f"{which}, {step} in a process of its own", []).append(took)
            times.setdefault(f"{which}, save and load", []).append(total)
    for what, each in times.items():
        show(what, each)
    pair = [min(times[f"{which}, save and load"]) for which in ("theirs", "ours")]
    print(f"save and load, each the first of its process: {pair[0] / pair[1]:.2f} times mlx-lm")


def main() -> None:
    if sys.argv[1:2] == ["--step"]:
        one_step(*sys.argv[2:])
        return
    print(f"python {platform.python_version()}, {mlxrs_py.build_info()}, {mx.device_info().get('device_name')}")
    print(f"kernel {platform.release()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        a, b = filled(ours), filled(theirs)
        n_bytes = sum(cache.nbytes for cache in a)
        print(f"{n_bytes / 1e9:.3f} GB in {folder}")
        with section("saved files"):
            equal(folder, a)
        with section("saves"):
            saves(folder, a, b)
        with section("saves in a row"):
            rows_of_saves(folder, a, b)
        b.clear()
        gc.collect()
        with section("in the background"):
            background(folder, a)
        with section("cold files"):
            ours.save_prompt_cache(folder / "ours.safetensors", a)
            cold(folder)
        with section("save in one process, load in the next"):
            sums(folder)
        with section("decoding"):
            decoding(folder, a)
        with section("what a plain program takes"):
            limits(folder, n_bytes)
    print(f"\n{time.perf_counter() - START:.0f} s in all")


if __name__ == "__main__":
    main()
