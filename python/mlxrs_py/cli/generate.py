"""``mlxrs-py generate``: answer from a saved cache or from a store."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from mlxrs_py.cli import models

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        parents=[common],
        help="answer from a saved cache or from a store",
        description="Answer a prompt. With a cache file it continues the saved one; the file is not changed. With a "
        "store it is a whole prompt: what the store knows of its beginning is not computed, and the rest is put there.",
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--prompt-cache-file", metavar="FILE", help="the saved cache")
    place.add_argument("--store", metavar="FOLDER", help="the store")
    models.add_store_bytes(parser)
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help=r'the question; "-" reads standard input, \n starts a line'
    )
    parser.add_argument(
        "--max-tokens", "-m", type=int, default=100, metavar="N", help="longest answer; -1 is no limit (default: 100)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    models.add_flags(
        parser,
        model_help="folder or hub name (default: the one that the cache was made with; with --store the embedded one)",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temp", type=float, default=0.0, metavar="T", help="temperature (default: 0, greedy)")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus (default: 1, off)")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="likeliest tokens (default: 0, off)")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="least probability (default: 0, off)")
    sampling.add_argument("--seed", type=int, metavar="N", help="makes a sampled answer repeatable")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    return _from_file(arguments) if arguments.store is None else _from_store(arguments)


def _from_file(arguments: argparse.Namespace) -> int:
    from mlxrs_py.cache import load_prompt_cache, make_prompt_cache
    from mlxrs_py.prompt import question_prompt

    file = arguments.prompt_cache_file
    caches, metadata = load_prompt_cache(file, return_metadata=True)
    model_name = _model_name(arguments, metadata)
    model, tokenizer = models.load(model_name, arguments.adapter_path, _tokenizer_config(arguments, metadata))
    _check_model(model, metadata, file)
    if len(caches) != (expected := len(make_prompt_cache(model))):
        raise ValueError(f"{file}: expected {expected} caches for {model_name}, got {len(caches)}")
    question = question_prompt(tokenizer, _prompt(arguments))
    _answer(arguments, model, tokenizer, question, caches, {"prompt_tokens": len(question)})
    return 0


def _from_store(arguments: argparse.Namespace) -> int:
    from mlxrs_py.store import PromptStore

    text = _prompt(arguments)
    with PromptStore(arguments.store, disk_bytes=arguments.store_bytes) as store:
        model_path, model, tokenizer = models.load_named(arguments)
        view = store.view(model, source=model_path, adapter=arguments.adapter_path)
        tokens = _whole_prompt(tokenizer, text)
        # The last token is left, since it gives the first one of the answer.
        if len(tokens) > 1:
            _, caches, n_cached = view.prefill(model, tokens[:-1])
        else:
            caches, n_cached = view.restore(tokens)
        counts = {"prompt_tokens": len(tokens), "cached_tokens": n_cached}
        answer = _answer(arguments, model, tokenizer, tokens[-1:], caches, counts)
        view.put(tokens + answer, caches, keep=True).result()
    return 0


def _prompt(arguments: argparse.Namespace) -> str:
    """Give the text. As in mlx_lm.generate: a backslash with an n or a t are a line's end and a tab."""
    return models.read_prompt(arguments.prompt.replace("\\n", "\n").replace("\\t", "\t"))


def _whole_prompt(tokenizer: Any, text: str) -> list[int]:
    if not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)


def _tokenizer_config(arguments: argparse.Namespace, metadata: dict[str, Any]) -> dict[str, Any]:
    """Give what the cache was made with, but let only the user trust remote code."""
    recorded = metadata.get("tokenizer_config", "{}")
    try:
        config = dict(json.loads(recorded))
    except (TypeError, ValueError) as error:
        message = f"{arguments.prompt_cache_file}: expected tokenizer_config to be a JSON object, got {recorded!r}"
        raise ValueError(message) from error
    config["trust_remote_code"] = arguments.trust_remote_code
    if arguments.eos_token is not None:
        config["eos_token"] = arguments.eos_token
    return config


def _model_name(arguments: argparse.Namespace, metadata: dict[str, Any]) -> str:
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


def _check_model(model: Any, metadata: dict[str, Any], file: str) -> None:
    from mlxrs_py.prompt import META_CONFIG_BLAKE3, model_fingerprint

    recorded, found = metadata.get(META_CONFIG_BLAKE3), model_fingerprint(model)
    if recorded is not None and recorded != found:
        raise ValueError(f"{file}: the cache is of another model: expected fingerprint {recorded}, got {found}")


def _answer(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, question: list[int], caches: list[Any], counts: Any
) -> list[int]:
    """Print the answer, and give those of its tokens that the caches hold."""
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    if arguments.seed is not None:
        mx.random.seed(arguments.seed)
    sampler = make_sampler(arguments.temp, arguments.top_p, arguments.min_p, top_k=arguments.top_k)
    text, first, start = "", None, time.perf_counter()
    response, tokens = None, []
    for response in stream_generate(
        model, tokenizer, question, max_tokens=arguments.max_tokens, sampler=sampler, prompt_cache=caches
    ):
        first = first or time.perf_counter() - start
        text += response.text
        tokens.append(response.token)
        if not arguments.json:
            print(response.text, end="", flush=True)
    n_tokens = response.generation_tokens if response else 0
    if arguments.json:
        summary = {
            "text": text,
            **counts,
            "generation_tokens": n_tokens,
            "seconds_to_first_token": first,
            "finish_reason": response.finish_reason if response else None,
            "cache": sorted({type(c).__module__ + "." + type(c).__name__ for c in caches}),
        }
        print(json.dumps(summary, ensure_ascii=False))
        return tokens
    print()
    if sys.stderr.isatty():
        said = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items())
        print(f"[{said}, first token after {first or 0:.2f} s, {n_tokens} tokens]", file=sys.stderr)
    return tokens
