"""What ``compression="zstd"`` saves and costs: rows that the default model computes of this project's own guide."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlxrs_py  # first: on Linux CPUs it brings MLX a fast BLAS
from mlxrs_py.cache import KVCache

# isort: split
import mlx.core as mx

#: Forms of the rows, and the bits of quantized ones.
FORMS = {"bfloat16": None, "float16": None, "float32": None, "8 bits": 8, "4 bits": 4}
WAYS: tuple[Literal["zstd"] | None, ...] = (None, "zstd")


def rows(model: Any, prompt: list[int]) -> list[Any]:
    """Compute the prompt once, in float32."""
    model.set_dtype(mx.float32)
    with mlxrs_py.PromptStore(disk_bytes=0) as store:
        return store.view(model).prefill(model, prompt)[1]


def cast(caches: list[Any], form: str, bits: int | None) -> list[Any]:
    found = []
    for cache in caches:
        keys, values = (rows[..., : cache.offset, :] for rows in (cache.keys, cache.values))
        dtype = mx.bfloat16 if bits else getattr(mx, form)
        other = KVCache()
        other.update_and_fetch(keys.astype(dtype), values.astype(dtype))
        found.append(other.to_quantized(group_size=64, bits=bits) if bits else other)
    mx.eval([cache.state for cache in found])
    return found


def fastest(call: Callable[[], Any], runs: int) -> str:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return f"{min(times):.3g} ({statistics.median(times):.3g})"


def measured(model: Any, prompt: list[int], caches: list[Any], bits: int | None, way: Any, runs: int) -> list[Any]:
    """Give the bytes of the files, seconds until a put is durable, and seconds of a restore."""
    with tempfile.TemporaryDirectory() as folder, mlxrs_py.PromptStore(folder, compression=way) as store:

        def view(namespace: object) -> Any:
            return store.view(model, namespace=str(namespace), kv_bits=bits)

        views = [view(run) for run in range(runs)]
        handles = iter(views)
        put = fastest(lambda: next(handles).put(prompt, caches).result(), runs)
        n_bytes = sum(file.stat().st_size for file in Path(folder, "records").iterdir()) // runs

        def restore() -> None:
            restored, n_tokens = views[0].restore([*prompt, 1])
            mx.eval([cache.state for cache in restored])
            assert n_tokens == len(prompt)

        return [n_bytes, put, fastest(restore, runs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    import mlx_lm

    from mlxrs_py.default_model import default_model_path

    model, tokenizer = mlx_lm.load(str(default_model_path()))
    text = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    prompt = tokenizer.encode(text)[: arguments.tokens]
    computed = rows(model, prompt)
    print(f"{len(prompt)} tokens\n")
    print("| rows | MB | zstd, MB | of them | put, s | zstd | restore, s | zstd |")
    print("| --- | --: | --: | --: | --- | --- | --- | --- |")
    for form, bits in FORMS.items():
        caches = cast(computed, form, bits)
        plain, packed = (measured(model, prompt, caches, bits, way, arguments.runs) for way in WAYS)
        sizes = f"{plain[0] / 1e6:.1f} | {packed[0] / 1e6:.1f} | {100 * packed[0] / plain[0]:.0f} %"
        print(f"| {form} | {sizes} | {plain[1]} | {packed[1]} | {plain[2]} | {packed[2]} |", flush=True)


if __name__ == "__main__":
    main()
