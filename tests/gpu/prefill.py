"""On a GPU: prefill of 16,384 tokens by a model of Llama-8B's shape, beside mlx-lm's own loop, at several steps.

Run with ``PYTHONPATH`` on MLX-CUDA, mlx-lm and this project's wheel: ``python tests/gpu/prefill.py``. Prints tokens per
second and the peak of MLX's memory, and compares the logits of equal windows bit by bit. What the overlap and the kept
memory are worth is told apart by runs that give them up in ``progress``.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as theirs
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models import llama

import mlxrs_py
from mlxrs_py import cache as ours

LAYERS, HEADS, TOKENS, RUNS = 32, 8, 16_384, 3
STEPS = (512, 1024, 2048, 4096)

#: Tokens per second and peak bytes of each way.
results: dict[str, tuple[float, float, int]] = {}


def build() -> Any:
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": HEADS}
    args = llama.ModelArgs(model_type="llama", num_hidden_layers=LAYERS, rms_norm_eps=1e-5, vocab_size=128_256, **shape)
    model = llama.Model(args)
    model.update(tree_map(lambda p: (p * 0.02).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model


def mlx_lm(model: Any, tokens: mx.array, step: int) -> list[Any]:
    caches = theirs.make_prompt_cache(model)
    for _ in generate_step(tokens, model, max_tokens=0, prompt_cache=caches, prefill_step_size=step):
        pass
    mx.synchronize()
    return caches


def mine(model: Any, tokens: mx.array, step: int | str, after: Callable[[list[Any]], None] | None = None) -> list[Any]:
    caches = ours.make_prompt_cache(model)
    progress = None if after is None else lambda done, total: after(caches)
    mlxrs_py.prefill(model, tokens, caches, step_size=step, progress=progress)
    mx.synchronize()
    return caches


def one_at_a_time(caches: list[Any]) -> None:
    mx.eval([cache.state for cache in caches])


def as_mlx_lm(caches: list[Any]) -> None:
    one_at_a_time(caches)
    mx.clear_cache()


def report(what: str, run: Callable[[], list[Any]]) -> None:
    try:
        run()
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        rates = []
        for _ in range(RUNS):
            start = time.perf_counter()
            run()
            rates.append(TOKENS / (time.perf_counter() - start))
        results[what] = (max(rates), statistics.median(rates), mx.get_peak_memory())
        best, median, peak = results[what]
        print(f"{what:40} best {best:8.0f} median {median:8.0f} tok/s   peak {peak / 1e9:6.2f} GB", flush=True)
    except Exception:
        traceback.print_exc()
    gc.collect()
    mx.clear_cache()


def compare(what: str, base: str) -> None:
    if what in results and base in results:
        (best, median, peak), other = results[what], results[base]
        print(
            f"{what} against {base}: {best / other[0]:.3f} (medians {median / other[1]:.3f}) times the speed, "
            f"{peak / other[2]:.3f} of the peak"
        )


def equal_logits(model: Any, tokens: mx.array, step: int) -> None:
    """Compare the logits of one more token, and what the caches hold, after equal windows."""
    caches, twins = mine(model, tokens, step), mlx_lm(model, tokens, step)
    for cache, twin in zip(caches, twins, strict=True):
        for rows, expected in ((cache.keys, twin.keys), (cache.values, twin.values)):
            assert rows.shape == expected.shape
            assert mx.array_equal(rows[:, :, :TOKENS].view(mx.uint16), expected[:, :, :TOKENS].view(mx.uint16)), step
    logits = [model(tokens[:1][None], cache=side).view(mx.uint16) for side in (caches, twins)]
    assert mx.array_equal(*logits), step
    print(f"step {step}: keys, values and logits bit-equal to mlx-lm's", flush=True)


def main() -> None:
    print(f"python {platform.python_version()}, {mlxrs_py.build_info()}, {mx.device_info()['device_name']}", flush=True)
    model, tokens = build(), mx.random.randint(0, 128_256, (TOKENS,))
    mx.eval(tokens)
    for step in STEPS:
        report(f"mlx-lm {step}", lambda step=step: mlx_lm(model, tokens, step))
        report(f"ours {step}", lambda step=step: mine(model, tokens, step))
    report("ours auto", lambda: mine(model, tokens, "auto"))
    for step in (512, 2048):
        report(f"ours {step}, one window at a time", lambda step=step: mine(model, tokens, step, one_at_a_time))
        report(f"ours {step}, memory returned each time", lambda step=step: mine(model, tokens, step, as_mlx_lm))
    for step in STEPS:
        compare(f"ours {step}", f"mlx-lm {step}")
        compare(f"ours {step}", "mlx-lm 2048")
    compare("ours auto", "mlx-lm 2048")
    for step in (512, 2048):
        try:
            equal_logits(model, tokens, step)
        except Exception:
            traceback.print_exc()
        gc.collect()
        mx.clear_cache()


if __name__ == "__main__":
    main()
