"""Questions about one long document, computed once: ``python examples/document.py FOLDER [DOCUMENT [MODEL]]``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import mlxrs_py  # first: on Linux CPUs it brings MLX a fast BLAS

# isort: split
from mlx_lm import load, stream_generate

from mlxrs_py.default_model import default_model_path

QUESTIONS = ("On what date was this text written?", "What are we engaged in now?", "Who wrote this text?")


def main() -> None:
    document = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("document.txt")
    path = sys.argv[3] if len(sys.argv) > 3 else str(default_model_path())
    model, tokenizer = load(path)
    text = f"Read this text, then answer the question about it.\n\n{document.read_text(encoding='utf-8')}\n"
    with mlxrs_py.PromptStore(Path(sys.argv[1])) as store:
        view = store.view(model, source=path)
        for question in QUESTIONS:
            messages = [{"role": "user", "content": f"{text}\n{question}"}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            start = time.perf_counter()
            _, caches, n_restored = view.prefill(model, prompt[:-1])
            seconds = time.perf_counter() - start
            print(f"{question} [{n_restored} of {len(prompt)} tokens were there, ready after {seconds:.2f} s]")
            for part in stream_generate(model, tokenizer, prompt[-1:], max_tokens=20, prompt_cache=caches):
                print(part.text, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
