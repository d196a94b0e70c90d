"""What a server asks for caches and gives them to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlxrs_py.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache
from mlxrs_py.serving.stored_model import StoredModel

__all__ = ["StoredPromptCache"]


class StoredPromptCache:
    """Caches of prompts in memory, in front of a store. It has the methods of ``LRUPromptCache`` that a server calls.

    At least one token of a prompt is always left to compute, since that is what gives the first token of an answer.

    Args:
        memory: Caches that are at hand.
        stored_model: Gives what the store has of the model under a key; None for a model that is not stored.

    """

    def __init__(self, memory: LRUPromptCache, stored_model: Callable[[Any], StoredModel | None]) -> None:
        self._memory = memory
        self._stored_model = stored_model

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """Give caches for as many of the tokens as memory or store have, not all, and the tokens that are left."""
        caches, n_tokens = self._fetch(model, tokens)
        if (stored := self._stored(model, tokens)) is not None:
            stored.prompt = list(tokens)
            caches, n_tokens = stored.restore(tokens, beyond=n_tokens) or (caches, n_tokens)
        return caches, tokens[n_tokens:]

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant"
    ) -> None:
        """Keep caches that hold exactly the tokens, in memory and in the store."""
        self._memory.insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
        if (stored := self._stored(model, tokens)) is not None:
            stored.put(tokens, prompt_cache)

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Take caches out of memory until at most so many, and so many bytes, are left."""
        self._memory.trim_to(n_sequences=n_sequences, n_bytes=n_bytes)

    def __len__(self) -> int:
        return len(self._memory)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches in memory."""
        return self._memory.nbytes

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Give the number and bytes of the caches in memory, of each kind."""
        return self._memory.stats_by_type()

    def _stored(self, model: Any, tokens: list[int]) -> StoredModel | None:
        # A server marks images by numbers below 0, which say nothing of the image that a store could keep.
        return None if not tokens or min(tokens) < 0 else self._stored_model(model)

    def _fetch(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """Look into memory."""
        caches, rest = self._memory.fetch_nearest_cache(model, tokens)
        if caches is None or rest:
            return caches, len(tokens) - len(rest)
        if can_trim_prompt_cache(caches) and trim_prompt_cache(caches, 1) == 1:
            return caches, len(tokens) - 1
        caches, rest = self._memory.fetch_nearest_cache(model, tokens[:-1])
        return caches, len(tokens) - 1 - len(rest)
