"""mlx-lm's server in this process, without HTTP: its model loading, its prompt cache and its generation thread."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from . import reference


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: list[int]
    n_cached: int


class LocalServer:
    """Requests to a server that runs."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self.prompt_cache = generator.prompt_cache
        self._kept: set[tuple[int, ...]] = set()
        insert = self.prompt_cache.insert_cache

        def insert_cache(model: Any, tokens: list[int], caches: list[Any], **options: Any) -> None:
            insert(model, tokens, caches, **options)
            self._kept.add(tuple(tokens))

        self.prompt_cache.insert_cache = insert_cache
        self.provider = generator.model_provider

    def begin(self, messages: list[dict[str, str]] | str, *, model: str = "default_model", **options: Any) -> Any:
        """Send a request: a chat, or a text to complete. Options: ``max_tokens``, ``seed`` (which serves it alone)."""
        server = reference.server
        is_text = isinstance(messages, str)
        request = server.CompletionRequest(
            "text" if is_text else "chat", messages if is_text else "", [] if is_text else messages, None, None
        )
        arguments = server.GenerationArguments(
            model=server.ModelDescription(model, "default_model", None),
            sampling=server.SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.0),
            logits=server.LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20),
            stop_words=[],
            max_tokens=options.get("max_tokens", 6),
            num_draft_tokens=2,
            logprobs=False,
            top_logprobs=0,
            seed=options.get("seed"),
            chat_template_kwargs=None,
        )
        return self._generator.generate(request, arguments)

    def end(self, begun: Any) -> Answer:
        """Wait for an answer, and until its caches are kept, which is later."""
        context, responses = begun
        parts = list(responses)
        tokens = [part.token for part in parts]
        deadline = time.monotonic() + 60
        while (*context.prompt, *tokens) not in self._kept:
            assert self._generator.is_healthy and time.monotonic() < deadline
            time.sleep(0.001)
        self._kept.remove((*context.prompt, *tokens))
        return Answer("".join(part.text for part in parts), tokens, context.prompt_cache_count)

    def ask(self, messages: list[dict[str, str]] | str, **options: Any) -> Answer:
        """Send a request and wait for the answer."""
        return self.end(self.begin(messages, **options))


@contextlib.contextmanager
def local_server(model: Path, *arguments: str) -> Iterator[LocalServer]:
    """Run the server as its command line would, until the end of the block."""
    server = reference.server
    with (
        mock.patch.object(sys, "argv", ["server", "--model", str(model), *map(str, arguments)]),
        mock.patch.object(server, "run") as run,
    ):
        server.main()
    provider = run.call_args.args[2]
    generator = server.ResponseGenerator(provider, server.LRUPromptCache(provider.cli_args.prompt_cache_size))
    try:
        yield LocalServer(generator)
        assert generator.is_healthy
    finally:
        generator.stop_and_join()
