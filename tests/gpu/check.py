"""On a GPU: the four classes against mlx-lm bit for bit, prefill, and save and load of a cache of Llama-8B's shape.

Run with ``PYTHONPATH`` on MLX-CUDA, mlx-lm and this project's wheel: ``python tests/gpu/check.py``. Prints versions,
what was compared, and minimum and median of each time beside mlx-lm's, measured in turns in the same run.
"""

from __future__ import annotations

import gc
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as reference
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models import llama

import mlxrs_py
from mlxrs_py import cache as ours

LAYERS, HEADS, HEAD_DIM, TOKENS = 32, 8, 128, 16_384


def bits(array: mx.array) -> mx.array:
    """Give the array as integers, so that equal means bit-equal."""
    return array.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size])


def assert_equal(a: object, b: object, what: str) -> None:
    a, b = [x for _, x in tree_flatten(a)], [x for _, x in tree_flatten(b)]
    assert len(a) == len(b), what
    for x, y in zip(a, b, strict=True):
        if isinstance(x, mx.array):
            assert x.shape == y.shape and x.dtype == y.dtype, (what, x.shape, y.shape)
            assert mx.array_equal(bits(x), bits(y)), what


def parity(sequences: int) -> None:
    rng = random.Random(7)
    kinds = [
        ("KVCache", ()),
        ("RotatingKVCache", (300, 4)),
        ("RotatingKVCache", (64, 0)),
        ("QuantizedKVCache", (64, 8)),
        ("ConcatenateKVCache", ()),
    ]
    compared = 0
    for name, args in kinds:
        for _ in range(sequences):
            a, b = getattr(ours, name)(*args), getattr(reference, name)(*args)
            dtype = rng.choice([mx.float32, mx.float16, mx.bfloat16])
            for _ in range(rng.randrange(2, 12)):
                n = rng.choice([1, 1, 1, rng.randrange(1, 700)])
                k = mx.random.normal((1, 2, n, 64)).astype(dtype)
                v = mx.random.normal((1, 2, n, 128)).astype(dtype)
                assert_equal(a.update_and_fetch(k, v), b.update_and_fetch(k, v), f"{name} {n}")
                assert a.offset == b.offset and a.nbytes == b.nbytes
                compared += 1
                if name in ("KVCache", "QuantizedKVCache") and rng.random() < 0.3:
                    cut = rng.randrange(0, n + 1)
                    assert a.trim(cut) == b.trim(cut)
    print(f"parity: {compared} updates of 4 classes bit-equal to mlx-lm")


def times(function, runs: int = 5) -> tuple[float, float]:
    samples = []
    for _ in range(runs):
        gc.collect()
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return min(samples), statistics.median(samples)


def show(what: str, a: tuple[float, float], b: tuple[float, float], unit: str = "s", scale: float = 1) -> None:
    print(
        f"{what:34} ours min {a[0] * scale:8.3f} median {a[1] * scale:8.3f} {unit}   "
        f"mlx-lm min {b[0] * scale:8.3f} median {b[1] * scale:8.3f} {unit}   ratio {b[0] / a[0]:.2f}"
    )


def update_times() -> None:
    for name, args in [("KVCache", ()), ("RotatingKVCache", (4096,)), ("QuantizedKVCache", ())]:
        k = mx.random.normal((1, HEADS, 1, HEAD_DIM)).astype(mx.bfloat16)
        mx.eval(k)

        def host(module, name=name, args=args, k=k) -> float:
            c = getattr(module, name)(*args)
            c.update_and_fetch(k, k)
            start = time.perf_counter()
            for _ in range(200):
                c.update_and_fetch(k, k)
            elapsed = time.perf_counter() - start
            mx.eval(c.state)
            return elapsed / 200

        samples = [(host(ours), host(reference)) for _ in range(30)]
        a, b = zip(*samples, strict=True)
        show(f"update_and_fetch {name}", (min(a), statistics.median(a)), (min(b), statistics.median(b)), "us", 1e6)


def filled(module) -> list:
    caches = [module.KVCache() for _ in range(LAYERS)]
    for i, c in enumerate(caches):
        k = mx.random.normal((1, HEADS, TOKENS, HEAD_DIM), key=mx.random.key(i)).astype(mx.bfloat16)
        c.update_and_fetch(k, k)
        mx.eval(c.state)
    return caches


def files(folder: Path) -> None:
    a, b = filled(ours), filled(reference)
    theirs, mine = str(folder / "theirs.safetensors"), str(folder / "ours.safetensors")
    saved = [
        times(lambda: ours.save_prompt_cache(mine, a, {"model": "m"}), 3),
        times(lambda: reference.save_prompt_cache(theirs, b, {"model": "m"}), 3),
    ]
    show("save 2.147 GB (ours durable)", *saved)
    show("save 2.147 GB, not durable", times(lambda: ours.save_prompt_cache(mine, a, durable=False), 3), saved[1])

    def load(module, file):
        caches = module.load_prompt_cache(file)
        mx.eval([c.state for c in caches])
        return caches

    show("load 2.147 GB, page cache", times(lambda: load(ours, mine)), times(lambda: load(reference, theirs)))
    for file in (mine, theirs):
        for x, y in zip(load(ours, file), load(reference, file), strict=True):
            assert x.offset == y.offset == TOKENS
            assert_equal(x.keys[..., :TOKENS, :], y.keys[..., :TOKENS, :], file)
            assert_equal(x.values[..., :TOKENS, :], y.values[..., :TOKENS, :], file)
    print("files: ours read by mlx-lm and theirs by us, bit-equal")


def prefill() -> None:
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=4096,
        num_hidden_layers=LAYERS,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=HEADS,
        rms_norm_eps=1e-5,
        vocab_size=128_256,
    )
    model = llama.Model(args)
    model.update(tree_map(lambda p: (p * 0.02).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    tokens = mx.random.randint(0, 128_256, (TOKENS,))

    def run_ours():
        c = ours.make_prompt_cache(model)
        mlxrs_py.prefill(model, tokens, c)
        return c

    def run_reference():
        c = reference.make_prompt_cache(model)
        for _ in generate_step(tokens, model, max_tokens=0, prompt_cache=c):
            pass
        mx.synchronize()
        return c

    a, b = run_ours(), run_reference()
    for x, y in zip(a, b, strict=True):
        assert type(x) is ours.KVCache
        assert_equal(x.keys[..., :TOKENS, :], y.keys[..., :TOKENS, :], "prefill")
    del a, b, x, y
    show("prefill 16,384 tokens, 8B bf16", times(run_ours, 3), times(run_reference, 3))


def main() -> None:
    print(f"python {platform.python_version()}, mlx {mx.__version__}, mlxrs_py {mlxrs_py.build_info()}")
    print(f"device {mx.default_device()} {mx.device_info()}")
    parity(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
    update_times()
    with tempfile.TemporaryDirectory() as folder:
        files(Path(folder))
    gc.collect()
    mx.clear_cache()
    prefill()
    print("all passed")


if __name__ == "__main__":
    main()
