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
    folder.mkdir(parents=True)
    model = tiny_models.make(name, seed)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config: dict[str, Any] = {"model_type": name, "eos_token_id": 0, **tiny_models.SHAPES[name]}
    (folder / "config.json").write_text(json.dumps(config))
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
