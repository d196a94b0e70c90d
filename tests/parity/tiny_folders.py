"""Tiny models as folders that ``mlx_lm.load`` and the server take: weights, configuration, a tokenizer of 61 words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from . import tiny_models

SPECIAL = ("<eos>", "<system>", "<user>", "<assistant>")
#: A message is its role, its words and an end, which is also how an answer ends.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save(name: str, folder: Path, seed: int = 7) -> Path:
    """Save the tiny model of that name."""
    return _save(folder, tiny_models.make(name, seed), {"model_type": name, **tiny_models.SHAPES[name]})


def save_llava(folder: Path) -> Path:
    """Save a tiny model of mlx-vlm, which sees pictures of 28 by 28."""
    import mlx_vlm.models.llava as llava

    text = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": tiny_models.VOCABULARY}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    configs = {"text_config": llava.TextConfig(**text), "vision_config": llava.VisionConfig(**vision)}
    mx.random.seed(7)
    model = llava.Model(llava.ModelConfig(model_type="llava", **configs))
    _save(folder, model, {"model_type": "llava", "text_config": text, "vision_config": vision})
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **sizes})
    )
    return folder


def _save(folder: Path, model: Any, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0, **config}))
    names = [*SPECIAL, *(f"w{i}" for i in range(tiny_models.VOCABULARY - len(SPECIAL)))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def words(n_words: int, start: int = 0) -> str:
    """Give a text of so many tokens."""
    n_names = tiny_models.VOCABULARY - len(SPECIAL)
    return " ".join(f"w{(7 * i * i + 3 * i) % n_names}" for i in range(start, start + n_words))
