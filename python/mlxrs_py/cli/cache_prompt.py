"""``mlxrs-py cache-prompt``: run a prompt through a model and save the caches."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlxrs_py.cli import models

if TYPE_CHECKING:
    from mlxrs_py.store import PromptStore

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "cache-prompt",
        parents=[common],
        help="run a prompt through a model and save the caches",
        description="Run a prompt through a model and save the caches, in a file, in a store or in both. A later "
        "question continues the prompt; in a store it is found by its beginning.",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help='the text; "-" reads standard input')
    parser.add_argument("--prompt-cache-file", metavar="FILE", help="the file to write; ends in .safetensors")
    parser.add_argument(
        "--store", metavar="FOLDER", help="the store to put the prompt into; what it has is not computed"
    )
    models.add_store_bytes(parser)
    parser.add_argument(
        "--metadata",
        action="append",
        default=[],
        type=_pair,
        metavar="K=V",
        help="a string for the file; may be repeated",
    )
    parser.add_argument(
        "--format", choices=["0.32", "0.31"], default="0.32", help="the mlx-lm that shall read the file (default: 0.32)"
    )
    parser.add_argument("--no-progress", action="store_true", help="print nothing but errors")
    models.add_flags(parser, model_help="folder or hub name (default: the embedded SmolLM2-135M-Instruct)")
    caches = parser.add_argument_group("caches")
    caches.add_argument(
        "--max-kv-size",
        type=models.positive,
        metavar="N",
        help="keep the first 4 and the newest tokens, N in all; models that make their own caches ignore it; not with "
        "--store",
    )
    caches.add_argument("--kv-bits", type=models.positive, metavar="BITS", help="quantize the caches (default: off)")
    caches.add_argument(
        "--kv-group-size",
        type=models.positive,
        default=64,
        metavar="N",
        help="numbers that share a scale (default: 64)",
    )
    caches.add_argument(
        "--quantized-kv-start",
        type=int,
        default=5000,
        metavar="N",
        help="quantize from token N on (default: 5000); in a store always from the first",
    )
    caches.add_argument(
        "--prefill-step-size", type=models.positive, default=2048, metavar="N", help="tokens per chunk (default: 2048)"
    )
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected K=V, got {text!r}")
    return key, value


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.prompt_cache_file is None:
        if arguments.store is None:
            parser.error("at least one of --prompt-cache-file and --store is required")
        if arguments.metadata or arguments.format != "0.32":
            parser.error("--metadata and --format need --prompt-cache-file")
    if arguments.store is not None and arguments.max_kv_size is not None:
        parser.error("--max-kv-size does not go with --store, which takes whole prompts")
    model = models.make_default(silent=arguments.no_progress) if arguments.model is None else arguments.model
    models.quiet()
    if arguments.store is None:
        return _save(arguments, model, None)
    from mlxrs_py.store import PromptStore

    with PromptStore(arguments.store, disk_bytes=arguments.store_bytes) as store:
        return (_put if arguments.prompt_cache_file is None else _save)(arguments, model, store)


def _save(arguments: argparse.Namespace, model_path: str, store: PromptStore | None) -> int:
    """Write a file, and put the prompt into a store if there is one."""
    from mlxrs_py.prompt import cache_prompt

    info = cache_prompt(
        model_path,
        models.read_prompt(arguments.prompt),
        arguments.prompt_cache_file,
        adapter_path=arguments.adapter_path,
        trust_remote_code=arguments.trust_remote_code,
        eos_token=arguments.eos_token,
        max_kv_size=arguments.max_kv_size,
        step_size=arguments.prefill_step_size,
        kv_bits=arguments.kv_bits,
        kv_group_size=arguments.kv_group_size,
        quantized_kv_start=arguments.quantized_kv_start,
        metadata=dict(arguments.metadata),
        format=arguments.format,
        progress=None if arguments.no_progress else _progress(),
        store=store,
    )
    if not arguments.no_progress:
        how, where = f" at {info.tokens_per_second:.1f} tok/s", ""
        if store is not None:
            how = f" in {info.seconds:.1f} s, {info.tokens_restored} of them were there"
            where = f" and in {store.path or 'memory'}"
        print(
            f"{info.tokens_processed} tokens{how}, peak memory {info.peak_memory / 1e9:.3f} GB, "
            f"{info.n_bytes / 1e6:.1f} MB in {info.file}{where}",
            file=sys.stderr,
        )
    return 0


def _put(arguments: argparse.Namespace, model_path: str, store: PromptStore) -> int:
    """Put the prompt into a store."""
    from mlxrs_py.prompt import chat_prompt, wait_stored

    text = models.read_prompt(arguments.prompt)
    if not text:
        raise ValueError("cache-prompt: expected a text, got an empty prompt")
    model, tokenizer = models.load(model_path, arguments.adapter_path, models.tokenizer_config(arguments))
    view = store.view(
        model,
        source=model_path,
        adapter=arguments.adapter_path,
        kv_bits=arguments.kv_bits,
        kv_group_size=arguments.kv_group_size,
    )
    tokens = chat_prompt(tokenizer, text)
    progress = None if arguments.no_progress else _progress()
    start = time.perf_counter()
    _, caches, n_restored = view.prefill(model, tokens, step_size=arguments.prefill_step_size, progress=progress)
    wait_stored(view, view.put(tokens, caches, keep=True))
    if not arguments.no_progress:
        print(
            f"{len(tokens)} tokens in {time.perf_counter() - start:.1f} s, {n_restored} of them were there, in "
            f"{store.path or 'memory'}",
            file=sys.stderr,
        )
    return 0


def _progress() -> Callable[[int, int], object] | bool:
    """Give a bar on a terminal, plain lines in a pipe."""
    if sys.stderr.isatty():
        return True
    start: float | None = None

    def line(done: int, total: int) -> None:
        nonlocal start
        now = time.perf_counter()
        # The first call comes before the first token: loading the model does not count.
        start = now if start is None else start
        speed = f", {done / (now - start):.1f} tok/s" if now > start else ""
        print(f"{done}/{total} tokens{speed}", file=sys.stderr, flush=True)

    return line
