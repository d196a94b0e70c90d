"""A conversation that survives the program: ``python examples/chat.py FOLDER [MODEL]``, again and again.

Each turn sends the whole conversation. What was computed in an earlier turn, or before the program was ended, comes
from the store; only the new message is computed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlxrs_py  # first: on Linux CPUs it brings MLX a fast BLAS

# isort: split
from mlx_lm import load, stream_generate

from mlxrs_py.default_model import default_model_path


def main() -> None:
    folder = Path(sys.argv[1])
    path = sys.argv[2] if len(sys.argv) > 2 else str(default_model_path())
    model, tokenizer = load(path)
    transcript = folder / "transcript.json"
    messages = json.loads(transcript.read_text()) if transcript.exists() else []
    with mlxrs_py.PromptStore(folder / "prompts") as store:
        view = store.view(model, source=path)
        while True:
            print("> ", end="", flush=True)
            if not (text := sys.stdin.readline().strip()):
                break
            messages.append({"role": "user", "content": text})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            # The last token is left: it gives the first one of the answer.
            _, caches, n_restored = view.prefill(model, prompt[:-1])
            print(f"[{n_restored} of {len(prompt)} tokens were there]")
            answer, tokens = "", []
            for part in stream_generate(model, tokenizer, prompt[-1:], max_tokens=40, prompt_cache=caches):
                print(part.text, end="", flush=True)
                answer += part.text
                tokens.append(part.token)
            print()
            view.put(prompt + tokens, caches, keep=True)
            messages.append({"role": "assistant", "content": answer})
            transcript.write_text(json.dumps(messages))


if __name__ == "__main__":
    main()
