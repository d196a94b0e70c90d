"""On a GPU: restores from a prompt store beside a load of one file and prefilling again, for Llama-8B's shape.

Run with ``PYTHONPATH`` on MLX-CUDA, mlx-lm and this project's wheel: ``python tests/gpu/store.py``. What is restored is
compared bit by bit; what is decoded from there is not, since MLX-CUDA gives other bits from run to run.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_map
from mlx_lm.models import llama

import mlxrs_py
from mlxrs_py import cache as ours

LENGTHS = (1024, 4096, 16_384, 65_536)
RUNS = 5


def make_model() -> Any:
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=14_336,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        vocab_size=32_000,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        max_position_embeddings=131_072,
    )
    model = llama.Model(arguments)
    model.update(tree_map(lambda p: (mx.random.normal(p.shape) * 0.02).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model


def timed(run: Callable[[], Any], runs: int) -> tuple[str, float, Any]:
    times, result = [], None
    for _ in range(runs):
        del result
        mx.synchronize()
        start = time.perf_counter()
        result = run()
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return f"min {min(times):.4f} median {statistics.median(times):.4f} s", min(times), result


def same(caches: list[Any], others: list[Any], tokens: int) -> None:
    for one, other in zip(caches, others, strict=True):
        assert one.offset == other.offset == tokens
        for rows, expected in ((one.keys, other.keys), (one.values, other.values)):
            a, b = rows[:, :, :tokens].view(mx.uint16), expected[:, :, :tokens].view(mx.uint16)
            assert mx.array_equal(a, b), "restored rows differ"


def measure(model: Any, store: Any, view: Any, n_tokens: int, folder: Path) -> None:
    ids = [(31 * i * i + 7 * i) % 31_991 for i in range(n_tokens)]
    text, cold, (_, caches, _) = timed(lambda: view.prefill(model, ids, policy="recompute"), 1)
    print(f"{n_tokens:6} tokens: first prefill through the store, storing   {cold:.4f} s")
    start = time.perf_counter()
    view.put(ids, caches).result()
    print(f"{n_tokens:6} tokens: then durable after                         {time.perf_counter() - start:.4f} s")
    longer = [*ids, 5]
    text, of_store, (restored, n) = timed(lambda: view.restore(longer), RUNS)
    assert n == n_tokens, n
    print(f"{n_tokens:6} tokens: restore from the store                     {text}")
    same(restored, caches, n_tokens)
    del restored
    file = folder / f"{n_tokens}.safetensors"
    fresh = view.restore(longer)[0]
    ours.save_prompt_cache(file, fresh, durable=False)
    del fresh
    text, of_file, _ = timed(lambda: ours.load_prompt_cache(file), RUNS)
    print(
        f"{n_tokens:6} tokens: load of one file                           {text}; store takes {of_store / of_file:.2f}"
    )
    file.unlink()

    def again_from_nothing() -> mx.array:
        caches = ours.make_prompt_cache(model)
        return mlxrs_py.prefill(model, ids, caches)

    text, of_prefill, _ = timed(again_from_nothing, 3)
    print(
        f"{n_tokens:6} tokens: prefill again, not storing                 {text}; {of_prefill / of_store:.1f} restores"
    )

    def again_into_the_store() -> None:
        view.prefill(model, ids, policy="recompute")

    times = []
    for _ in range(3):
        store.clear()
        times.append(timed(again_into_the_store, 1)[1])
    print(
        f"{n_tokens:6} tokens: prefill again, storing                     min {min(times):.4f} median "
        f"{statistics.median(times):.4f} s; {min(times) / of_prefill:.2f} of one that does not store"
    )


def main() -> None:
    device = mx.device_info()["device_name"]
    print(f"python {platform.python_version()}, mlx-lm {mlx_lm.__version__}, {mlxrs_py.build_info()}, {device}")
    model = make_model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "store").mkdir(mode=0o700)
        with mlxrs_py.PromptStore(folder / "store", ram_bytes=16 << 30, disk_bytes=40 << 30) as store:
            start = time.perf_counter()
            view = store.view(model, namespace="figures")
            print(f"fingerprint of the parameters {time.perf_counter() - start:.2f} s")
            for n_tokens in LENGTHS:
                try:
                    measure(model, store, view, n_tokens, folder)
                except Exception:
                    traceback.print_exc()


if __name__ == "__main__":
    main()
