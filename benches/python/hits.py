"""Which prompts are found again, by mlx-lm and by us: prints the table of docs/prompt-store.md. ``hits.py [NAME...]``.

For each model four pairs of chats: the same again, another end, one that goes on, and another one behind the same
system prompt. A cell is how many tokens of the second chat's prompt need not be computed.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlxrs_py
from mlxrs_py.default_model import default_model_path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from parity import tiny_folders
from parity.reference import cache as theirs
from parity.reference import generate_step, load
from parity.served import OURS, THEIRS, Server, serve, wait_for_writes

TINY = ("gemma3", "gpt_oss", "qwen3_next", "mamba2", "jamba", "falcon_h1", "llama4")
DEFAULT = "SmolLM2-135M (default)"
CASES = ("exact repeat", "edited tail", "grown conversation", "shared system prompt")
N_SYSTEM, N_USER, N_ANSWER, STEP = 300, 400, 8, 256

Chat = list[dict[str, str]]
Text = Callable[[int, int], str]


def sentences(n_words: int, start: int) -> str:
    return " ".join(f"Paper {start + i} is sorted by colour." for i in range(n_words // 10))


def first_chat(case: int, text: Text) -> Chat:
    system = {"role": "system", "content": text(N_SYSTEM, 10_000 * case)}
    return [system, {"role": "user", "content": text(N_USER, 10_000 * case + 5_000)}]


def second_chat(case: int, text: Text, answer: str) -> Chat:
    system, user = first_chat(case, text)
    if CASES[case] == "exact repeat":
        return [system, user]
    if CASES[case] == "edited tail":
        words = user["content"].split(" ")
        return [system, {**user, "content": " ".join([*words[:-20], *text(20, 10_000 * case + 9_000).split(" ")])}]
    if CASES[case] == "grown conversation":
        answered = {"role": "assistant", "content": answer}
        return [system, user, answered, {"role": "user", "content": text(40, 10_000 * case + 9_500)}]
    return [system, {"role": "user", "content": text(60, 10_000 * case + 9_700)}]


class Library:
    """mlx-lm's LRU cache of prompts as a program would use it."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load(str(folder))
        self.memory = theirs.LRUPromptCache()

    def chat(self, messages: Chat) -> tuple[str, str]:
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        caches, rest = self.memory.fetch_nearest_cache("model", prompt)
        if not rest:
            return "", "none is left to compute"
        caches = caches or theirs.make_prompt_cache(self.model)
        import mlx.core as mx

        steps = generate_step(
            mx.array(rest), self.model, max_tokens=N_ANSWER, prompt_cache=caches, prefill_step_size=STEP
        )
        tokens = []
        for token, _ in steps:
            tokens.append(token)
            if token in self.tokenizer.eos_token_ids:
                break
        self.memory.insert_cache("model", prompt + tokens, caches)
        text = self.tokenizer.decode([t for t in tokens if t not in self.tokenizer.eos_token_ids])
        return text, str(len(prompt) - len(rest))


def by_server(server: Server, messages: Chat) -> tuple[str, int, int]:
    return server.chat(messages, max_tokens=N_ANSWER)


@contextlib.contextmanager
def running(code: str, folder: Path, *options: str) -> Iterator[Server]:
    with serve(
        code, "--model", str(folder), "--prefill-step-size", str(STEP), "--log-level", "ERROR", *options
    ) as server:
        yield server
        server.kill()


def measure(folder: Path, text: Text, store: Path) -> list[list[Any]]:
    """Give a row per case: tokens, common ones, and what each way finds."""
    rows: list[list[Any]] = [[] for _ in CASES]
    tokenizer = load(str(folder))[1]
    library = Library(folder)
    for case, row in enumerate(rows):
        answer, _ = library.chat(first_chat(case, text))
        second = second_chat(case, text, answer)
        row += [library.chat(second)[1]]
        first, then = (
            tokenizer.apply_chat_template(c, add_generation_prompt=True) for c in (first_chat(case, text), second)
        )
        common = next(
            (i for i, (a, b) in enumerate(zip(first, then, strict=False)) if a != b), min(len(first), len(then))
        )
        row[:0] = [len(then), min(common, len(then) - 1)]
    for code, options in ((THEIRS, ()), (OURS, ("--prompt-store", str(store)))):
        with running(code, folder, *options) as server:
            for case, row in enumerate(rows):
                answer, *_ = by_server(server, first_chat(case, text))
                row.append(by_server(server, second_chat(case, text, answer))[1])
        # A store of its own, in which only the first chats are.
        options = (*options[:1], f"{store}-restarted") if options else ()
        with running(code, folder, *options) as server:
            answers = [by_server(server, first_chat(case, text))[0] for case in range(len(CASES))]
            if options:
                wait_for_writes(Path(options[1]))
        with running(code, folder, *options) as server:
            for case, row in enumerate(rows):
                row.append(by_server(server, second_chat(case, text, answers[case]))[1])
    return rows


def main() -> None:
    names = sys.argv[1:] or [DEFAULT, *TINY]
    info = mlxrs_py.build_info()
    print(f"mlxrs_py {info['version']}, mlx {info['mlx']}, {info['device']}, step {STEP}\n")
    print("| model | case | tokens | in common | mlx-lm, LRU | mlx-lm, server | restarted | ours, server | restarted |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: | --: |")
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            folder, text = default_model_path(), sentences
            if name != DEFAULT:
                folder, text = tiny_folders.save(name, Path(temporary) / name), tiny_folders.words
            for case, row in zip(CASES, measure(folder, text, Path(temporary) / f"{name}-store"), strict=True):
                print(f"| {name} | {case} | {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
