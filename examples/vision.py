"""The text path of an mlx-vlm model on a store: ``python examples/vision.py FOLDER MODEL``; needs mlx-vlm.

mlx-vlm has caches of its own, which a store does not take; its language models run on ours. Images are not looked up:
two of them give the same tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlxrs_py  # first: on Linux CPUs it brings MLX a fast BLAS

# isort: split
import mlx.core as mx

QUESTIONS = ("What is a prefix?", "What is a prefix? Answer in one word.")


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"You are a terse teacher of languages. {question}"}]


def answer(language: Any, view: Any, prompt: list[int], n_tokens: int) -> tuple[list[int], int]:
    """Give the tokens of a greedy answer, and how many of the prompt were there."""

    def forward(tokens: mx.array, cache: list[Any]) -> mx.array:
        return language(tokens, cache=cache).logits

    logits, caches, n_restored = view.prefill(forward, prompt)
    tokens: list[int] = []
    for _ in range(n_tokens):
        tokens.append(mx.argmax(logits, axis=-1).item())
        logits = forward(mx.array([tokens[-1:]]), caches)[:, -1, :]
    mx.eval(logits)
    view.put(prompt + tokens, caches, keep=True)
    return tokens, n_restored


def main() -> None:
    from mlx_vlm import load

    model, processor = load(sys.argv[2])
    tokenizer = getattr(processor, "tokenizer", processor)
    with mlxrs_py.PromptStore(Path(sys.argv[1])) as store:
        view = store.view(model.language_model, source=sys.argv[2])
        for question in QUESTIONS:
            prompt = tokenizer.apply_chat_template(messages(question), add_generation_prompt=True, return_dict=False)
            tokens, n_restored = answer(model.language_model, view, prompt, 20)
            print(f"{question} [{n_restored} of {len(prompt)} tokens were there]\n{tokenizer.decode(tokens)}")


if __name__ == "__main__":
    main()
