"""A folder with a tiny random llama model and a tokenizer of single ASCII letters, as mlx-lm loads it. Needs mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def make(folder: Path, *, seed: int = 0, n_layers: int = 2, chat: bool = True, rope_theta: float = 10000.0) -> Path:
    """Write the model, with random weights of that seed, into the folder, and give the folder."""
    from mlx_lm.models.llama import Model, ModelArgs

    folder.mkdir(exist_ok=True)
    vocabulary = write_tokenizer(folder, chat=chat)
    config = {
        "model_type": "llama",
        "hidden_size": 128,
        "num_hidden_layers": n_layers,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "rope_theta": rope_theta,
        "tie_word_embeddings": False,
        "eos_token_id": vocabulary - 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(seed)
    # Larger projections than usual: every token then depends on all before it, and no answer repeats one letter.
    weights = {
        name: weight * 6 if "proj" in name else weight
        for name, weight in tree_flatten(Model(ModelArgs.from_dict(config)).parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def write_tokenizer(folder: Path, *, chat: bool) -> int:
    """Write a tokenizer without merges; give its number of tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Printable ASCII, and a byte-level tokenizer's letters for the space and the end of a line.
    vocabulary = {letter: i for i, letter in enumerate([*map(chr, range(33, 127)), "Ġ", "Ċ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[1]}
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary) + len(SPECIAL)
