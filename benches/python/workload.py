"""What is measured on: caches of known shapes, models, and one call per side for each thing done.

Knows ``mlxrs_py`` only where a side asks for it, so that mlx-lm can run as it is installed.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

OURS, THEIRS = "mlxrs_py", "mlx-lm"


@dataclass(frozen=True)
class Shape:
    n_layers: int
    n_heads: int
    head_dim: int
    dtype: str
    name: str

    def n_bytes(self, n_tokens: int) -> int:
        return 2 * self.n_layers * self.n_heads * self.head_dim * n_tokens * getattr(mx, self.dtype).size

    as_dict = asdict


LLAMA_8B = Shape(32, 8, 128, "bfloat16", "Llama-8B")
HALF_LLAMA_8B = Shape(16, 8, 128, "bfloat16", "16 layers of Llama-8B")
SMOLLM2 = Shape(30, 3, 64, "float32", "SmolLM2-135M")


def cache_module(side: str) -> Any:
    return importlib.import_module("mlxrs_py.cache" if side == OURS else "mlx_lm.models.cache")


def filled(side: str, shape: Shape, n_tokens: int) -> list[Any]:
    """Give caches that hold noise, the same on each side."""
    caches = [cache_module(side).KVCache() for _ in range(shape.n_layers)]
    for i, cache in enumerate(caches):
        size = (1, shape.n_heads, n_tokens, shape.head_dim)
        keys, values = (
            mx.random.normal(size, key=mx.random.key(2 * i + j)).astype(getattr(mx, shape.dtype)) for j in range(2)
        )
        cache.update_and_fetch(keys, values)
        mx.eval(cache.state)
    return caches


def evaluate(caches: list[Any]) -> list[Any]:
    mx.eval([cache.state for cache in caches])
    mx.synchronize()
    return caches


def tidy() -> None:
    gc.collect()
    mx.clear_cache()
    mx.synchronize()


def restore(side: str, file: Path, **options: Any) -> list[Any]:
    """Load a file until it is ready to decode from."""
    return evaluate(cache_module(side).load_prompt_cache(str(file), **options))


def save(side: str, file: Path, caches: list[Any], **options: Any) -> Any:
    return cache_module(side).save_prompt_cache(str(file), caches, **options)


def takes(function: Callable[..., Any], option: str) -> bool:
    """Tell whether this version of a function has an option."""
    return option in inspect.signature(function).parameters


def big_model() -> Any:
    """Give a model of Llama-8B's shape, with random weights in bfloat16."""
    from mlx.utils import tree_map
    from mlx_lm.models import llama

    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=4096,
        num_hidden_layers=LLAMA_8B.n_layers,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=LLAMA_8B.n_heads,
        rms_norm_eps=1e-5,
        vocab_size=128_256,
    )
    model = llama.Model(arguments)
    model.update(tree_map(lambda p: (p * 0.02).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model


def small_model(folder: Path) -> Any:
    """Give the default model, SmolLM2-135M in float32, of its folder."""
    from mlx_lm.utils import load_model

    return load_model(folder)[0]


def random_tokens(n_tokens: int) -> mx.array:
    tokens = mx.random.randint(0, 32_000, (n_tokens,), key=mx.random.key(5))
    mx.eval(tokens)
    return tokens


def prefill(side: str, model: Any, tokens: mx.array, step_size: int) -> list[Any]:
    """Run a prompt through a model, and give the caches."""
    caches = cache_module(side).make_prompt_cache(model)
    if side == OURS:
        import mlxrs_py

        mlxrs_py.prefill(model, tokens, caches, step_size=step_size)
    else:
        from mlx_lm.generate import generate_step

        for _ in generate_step(tokens, model, max_tokens=0, prompt_cache=caches, prefill_step_size=step_size):
            pass
    return evaluate(caches)


def decode(model: Any, caches: list[Any], n_tokens: int, stop: Callable[[], bool] | None = None) -> tuple[float, list]:
    """Give greedy tokens per second behind a prompt, and the tokens; the caches are put back to where they were.

    ``stop`` ends it once at least 16 tokens are there.
    """
    from mlx_lm.generate import generate_step

    start_offset = caches[0].offset
    steps = generate_step(mx.array([1]), model, max_tokens=n_tokens + 1, prompt_cache=caches)
    found = [int(next(steps)[0])]
    start = time.perf_counter()
    for token, _ in steps:
        found.append(int(token))
        if stop is not None and len(found) > 16 and stop():
            break
    elapsed = time.perf_counter() - start
    steps.close()
    mx.synchronize()
    for cache in caches:
        cache.trim(cache.offset - start_offset)
    return (len(found) - 1) / elapsed, found
