"""A llama model in a GGUF file as a folder that mlx-lm loads.

MLX reads the tensors and the metadata of GGUF itself; here they get the names and the files of a model folder. Weights
are dequantized to float32: MLX's 4-bit path on CPUs is slower than its float32 one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

__all__ = ["convert"]

#: GGUF's name of a part of a block, and the model folder's.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

#: GGUF's token type of control tokens.
_CONTROL = 3
#: Elements that share a scale in GGUF's Q4_1 and Q8_0.
_GROUP_SIZE = 32


def convert(source: Path, folder: Path) -> None:
    """Write the llama model of the GGUF file ``source`` into the existing, empty ``folder``.

    Raises:
        ValueError: If the file holds another architecture or another kind of tokenizer.

    """
    loaded: Any = mx.load(str(source), format="gguf", return_metadata=True)
    weights, metadata = loaded
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"{source}: expected a model of architecture llama, got {architecture!r}")
    weights = _rename(_dequantize(weights))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    tied = "lm_head.weight" not in weights
    _write_json(folder / "config.json", _config(metadata, tied_embeddings=tied))
    _write_tokenizer(folder, metadata)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dequantize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Give every weight as float32 under its own name."""
    plain = {}
    for name, weight in weights.items():
        if name.endswith((".scales", ".biases")):
            continue
        base = name.removesuffix(".weight")
        scales = weights.get(f"{base}.scales")
        if scales is not None:
            bits = weight.shape[-1] * 32 // (scales.shape[-1] * _GROUP_SIZE)
            biases = weights[f"{base}.biases"]
            weight = mx.dequantize(
                weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size=_GROUP_SIZE, bits=bits
            )
        plain[base] = weight.astype(mx.float32)
    return plain


def _rename(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Give the tensors the names of mlx-lm's llama."""
    renamed = {}
    for name, weight in weights.items():
        if name.startswith("blk."):
            _, layer, part = name.split(".", 2)
            renamed[f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight"] = weight
        else:
            renamed[f"{_TOP_NAMES[name]}.weight"] = weight
    return renamed


def _config(metadata: dict[str, Any], *, tied_embeddings: bool) -> dict[str, Any]:
    def number(key: str) -> Any:
        return metadata[f"llama.{key}"].item()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        # GGUF stores single floats; their shortest decimal is the number that was meant.
        "rms_norm_eps": float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{number('rope.freq_base'):.6g}"),
        # GGUF permutes the rows of q and k for this kind of rotation.
        "rope_traditional": True,
        "max_position_embeddings": number("context_length"),
        "vocab_size": number("vocab_size"),
        "tie_word_embeddings": tied_embeddings,
        "torch_dtype": "float32",
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
    }


def _write_tokenizer(folder: Path, metadata: dict[str, Any]) -> None:
    """Write the byte-level BPE tokenizer with individual digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"expected a tokenizer of kind ('gpt2', 'smollm'), got {kind}")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(name: str) -> str:
        return tokens[metadata[f"tokenizer.ggml.{name}_token_id"].item()]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": metadata["tokenizer.chat_template"],
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "model_max_length": metadata["llama.context_length"].item(),
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config)
