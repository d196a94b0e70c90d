"""``mlxrs-py generate``: answer from a saved cache."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from mlxrs_py.cli import models

__all__ = ["add", "question_ids"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        parents=[common],
        help="answer from a saved cache",
        description="Answer a prompt that continues a saved one. The cache file is not changed.",
    )
    models.add_flags(parser, model_help="folder or hub name (default: the one that the cache was made with)")
    parser.add_argument("--prompt-cache-file", required=True, metavar="FILE", help="the saved cache")
    parser.add_argument("--prompt", required=True, help='the question; "-" reads standard input')
    parser.add_argument("--max-tokens", "-m", type=int, default=100, metavar="N", help="longest answer (default: 100)")
    parser.add_argument(
        "--temp", type=float, default=0.0, metavar="T", help="sampling temperature (default: 0, greedy)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default: 1, off)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the sampling")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlxrs_py.cache import load_prompt_cache, make_prompt_cache

    caches, metadata = load_prompt_cache(arguments.prompt_cache_file, return_metadata=True)
    model_name = _model_name(arguments, metadata)
    tokenizer_config = json.loads(metadata.get("tokenizer_config", "{}"))
    tokenizer_config["trust_remote_code"] = arguments.trust_remote_code
    if arguments.eos_token is not None:
        tokenizer_config["eos_token"] = arguments.eos_token
    model, tokenizer = models.load(model_name, arguments.adapter_path, tokenizer_config)
    _check_model(model, metadata, arguments.prompt_cache_file)
    if len(caches) != (expected := len(make_prompt_cache(model))):
        message = f"expected {expected} caches for {model_name}, got {len(caches)}"
        raise ValueError(f"{arguments.prompt_cache_file}: {message}")
    _answer(arguments, model, tokenizer, caches)
    return 0


def _model_name(arguments: argparse.Namespace, metadata: dict[str, str]) -> str:
    """Give the model to load. Without our fingerprint in the file only its name can be compared, as mlx-lm does."""
    from mlxrs_py.prompt import META_CONFIG_BLAKE3

    recorded = metadata.get("model")
    if arguments.model is None:
        if not recorded:
            raise ValueError(f"{arguments.prompt_cache_file}: the file names no model: give --model")
        return recorded
    if META_CONFIG_BLAKE3 not in metadata and recorded is not None and recorded != arguments.model:
        raise ValueError(f"{arguments.prompt_cache_file}: expected the cache's model {recorded}, got {arguments.model}")
    return arguments.model


def _check_model(model: Any, metadata: dict[str, str], file: str) -> None:
    from mlxrs_py.prompt import META_CONFIG_BLAKE3, model_fingerprint

    recorded, found = metadata.get(META_CONFIG_BLAKE3), model_fingerprint(model)
    if recorded is not None and recorded != found:
        raise ValueError(f"{file}: the cache is of another model: expected configuration {recorded[:16]}…, got {found}")


def question_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Give the part of a templated user message that begins with the user's text: what comes before is cached."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.encode(prompt)

    def templated(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    mark = "<query>"
    start = templated(mark).index(mark)
    return tokenizer.encode(templated(prompt)[start:], add_special_tokens=False)


def _answer(arguments: argparse.Namespace, model: Any, tokenizer: Any, caches: list[Any]) -> None:
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    if arguments.seed is not None:
        mx.random.seed(arguments.seed)
    question = question_ids(tokenizer, models.read_prompt(arguments.prompt))
    sampler = make_sampler(arguments.temp, arguments.top_p)
    text, first, start = "", None, time.perf_counter()
    response = None
    for response in stream_generate(
        model, tokenizer, question, max_tokens=arguments.max_tokens, sampler=sampler, prompt_cache=caches
    ):
        first = first or time.perf_counter() - start
        text += response.text
        if not arguments.json:
            print(response.text, end="", flush=True)
    n_tokens = response.generation_tokens if response else 0
    if arguments.json:
        summary = {
            "text": text,
            "prompt_tokens": len(question),
            "generation_tokens": n_tokens,
            "seconds_to_first_token": first,
            "finish_reason": response.finish_reason if response else None,
            "cache": sorted({type(c).__module__ + "." + type(c).__name__ for c in caches}),
        }
        print(json.dumps(summary, ensure_ascii=False))
        return
    print()
    if sys.stderr.isatty():
        print(
            f"[{len(question)} prompt tokens, first token after {first or 0:.2f} s, {n_tokens} tokens]", file=sys.stderr
        )
