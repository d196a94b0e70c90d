"""mlx-lm's models, tiny and with random weights, by name. Vocabulary 61.

Every kind of layer of a model occurs, and windows are short, so that a prompt of 50 tokens fills rings and has chunks
trimmed.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path

from .reference import model_module

VOCABULARY = 61

#: Two query heads on one of keys, of size 32.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
COMMON = {**HEADS, "hidden_size": 64, "intermediate_size": 96, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY}

#: By the names of mlx-lm's modules: the arguments of each model. Comments tell the layers' caches.
SHAPES: dict[str, dict[str, Any]] = {
    # KV, rotating
    "llama": {
        **COMMON,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 12,
        "tie_word_embeddings": False,
    },
    # KV (no hook)
    "qwen3": {
        **COMMON,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    # rotating, rotating, KV
    "gemma3": {
        "vocab_size": VOCABULARY,
        "text_config": {
            **COMMON,
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 12,
            "sliding_window_pattern": 3,
        },
    },
    # rotating, KV; attention sinks
    "gpt_oss": {
        **COMMON,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    # three chunked, KV
    "llama4": {
        "text_config": {
            **COMMON,
            "model_type": "llama4_text",
            "num_hidden_layers": 5,
            "head_dim": 32,
            "attention_bias": False,
            "attention_chunk_size": 12,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
            "max_position_embeddings": 256,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "use_qk_norm": True,
            # As if far into a long text.
            "floor_scale": 8,
        }
    },
    # arrays
    "mamba": {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": True,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "tie_word_embeddings": False,
    },
    # arrays
    "mamba2": {
        "vocab_size": VOCABULARY,
        "num_heads": 4,
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 16,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 2,
        "use_bias": True,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        "time_step_limit": (0.001, 100.0),
        "time_step_rank": 4,
    },
    # three arrays, KV
    "qwen3_next": {
        **COMMON,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 256,
    },
    # arrays of one slot, KV
    "lfm2": {
        **HEADS,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "max_position_embeddings": 256,
        "norm_eps": 1e-5,
        "conv_bias": True,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "full_attn_idxs": [1, 3],
    },
    # arrays, KV
    "jamba": {
        **COMMON,
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    },
    # lists of arrays and KV
    "falcon_h1": {
        **COMMON,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "mamba_d_state": 16,
        "mamba_n_groups": 2,
        "mamba_n_heads": 4,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    },
    # lists of two KV: latent attention, and the indexer that chooses 16 tokens
    "deepseek_v32": {
        **COMMON,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "index_head_dim": 32,
        "index_n_heads": 2,
        "index_topk": 16,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "qk_nope_head_dim": 32,
        "first_k_dense_replace": 1,
    },
    # rotating, KV; the last two layers share the caches before
    "gemma3n": {
        "text_config": {
            **COMMON,
            "model_type": "gemma3n_text",
            "num_hidden_layers": 6,
            "head_dim": 32,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "sliding_window": 12,
            "max_position_embeddings": 256,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4,
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    },
    # arrays, arrays, rotating
    "recurrent_gemma": {
        **COMMON,
        "num_hidden_layers": 6,
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "rope_theta": 10000.0,
        "attention_window_size": 12,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
}


def make(name: str, seed: int = 7) -> Any:
    """Give the model of that name with random weights, for inference."""
    module = model_module(name)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **SHAPES[name]}))
    model.update(tree_map_with_path(_weight, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _weight(path: str, default: mx.array) -> mx.array:
    """Give random weights that keep the scale of what passes through; vectors stay near their default."""
    noise = mx.random.normal(default.shape)
    if default.ndim == 1 or path.endswith("A_log"):
        return default + 0.2 * noise
    # A convolution of each channel alone has its inputs on the last axis but one.
    n_inputs = default.shape[-1] if default.shape[-1] > 1 else default.shape[-2]
    return noise * n_inputs**-0.5


def leaf_caches(caches: list[Any]) -> list[Any]:
    """Give the caches with those inside of lists in place of the lists."""
    return [leaf for cache in caches for leaf in (leaf_caches(cache.caches) if hasattr(cache, "caches") else [cache])]


def tokens(n_tokens: int, start: int = 0) -> list[int]:
    """Give tokens that seem random."""
    return [(7 * i * i + 3 * i) % VOCABULARY for i in range(start, start + n_tokens)]
