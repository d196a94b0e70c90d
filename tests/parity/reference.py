"""mlx-lm, as the tests see it; the only file that imports it."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
from mlx_lm import batch_generate, generate, load, server, stream_generate
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import base, cache, llama
from mlx_lm.models.base import create_attention_mask, create_causal_mask, scaled_dot_product_attention
from mlx_lm.server import ResponseGenerator

__all__ = [
    "BatchGenerator",
    "ResponseGenerator",
    "base",
    "batch_generate",
    "cache",
    "create_attention_mask",
    "create_causal_mask",
    "generate",
    "generate_step",
    "llama",
    "load",
    "model_module",
    "prefill",
    "scaled_dot_product_attention",
    "server",
    "stream_generate",
    "tiny_llama",
]


def tiny_llama(n_layers: int = 4, **options: Any) -> Any:
    """Give a llama with random weights: two query heads on one of keys, of size 32; vocabulary 61."""
    mx.random.seed(11)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=n_layers,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rms_norm_eps=1e-5,
        vocab_size=61,
        **options,
    )
    model = llama.Model(arguments)
    mx.eval(model.parameters())
    return model


def model_module(name: str) -> Any:
    """Import the module of a model, which may be while other classes are installed."""
    return importlib.import_module(f"mlx_lm.models.{name}")


def prefill(model: Any, tokens: list[int], caches: list[Any], **options: Any) -> None:
    """Run mlx-lm's own prefill, which gives no logits."""
    for _ in generate_step(mx.array(tokens), model, max_tokens=0, prompt_cache=caches, **options):
        pass
