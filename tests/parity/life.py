"""Requests as people and programs send them: few system prompts, conversations that grow, stop, repeat or are left."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from . import tiny_folders, tiny_models

_NAMES = tiny_models.VOCABULARY - len(tiny_folders.SPECIAL)


def text(n_words: int, draw: random.Random) -> str:
    """Give a text of so many tokens."""
    return " ".join(f"w{draw.randrange(_NAMES)}" for _ in range(n_words))


#: System prompts that conversations begin with: below a block of 256 tokens, above one, above two.
SYSTEMS = [text(n_words, random.Random(n_words)) for n_words in (150, 300, 620)]
#: What texts to complete begin with.
BEGINNINGS = [text(n_words, random.Random(-n_words)) for n_words in (60, 280, 281, 500)]
#: A conversation with more words than this is over.
LONGEST = 1000


@dataclass(frozen=True)
class Request:
    """What is sent, and how."""

    kind: str
    messages: list[dict[str, str]] | str
    options: dict[str, Any]
    #: The client goes away when the first part of the answer is there.
    is_left: bool = False


@dataclass
class Life:
    """The requests of one client, the same for the same seed. :meth:`answered` tells it how the last one ended."""

    seed: int
    #: Part of the requests that are served alone, not in a batch.
    alone: float = 0.3
    _conversations: list[list[dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._last: Request | None = None
        self._open: list[dict[str, str]] | None = None

    def next(self) -> Request:
        """Give the next request."""
        draw = self._random
        kinds = {"new": 12, "grown": 50, "repeated": 14, "edited": 8, "left": 8, "text": 8}
        kind = draw.choices(list(kinds), list(kinds.values()))[0]
        options: dict[str, Any] = {"seed": 1} if draw.random() < self.alone else {}
        if kind == "repeated" and self._last is not None:
            return Request(kind, self._last.messages, options)
        if kind == "text":
            # Of a few beginnings, one goes on in many ways.
            return Request(kind, f"{draw.choice(BEGINNINGS)} {self._words(5, 60)}", options)
        if kind == "new" or not self._conversations:
            messages = [{"role": "system", "content": draw.choice(SYSTEMS)}]
            self._conversations = [*self._conversations, messages][-6:]
        self._open = draw.choice(self._conversations[-4:])
        if kind == "edited" and self._open[-1]["role"] == "user":
            # Another end of what was asked last.
            self._open[-1] = {"role": "user", "content": f"{self._open[-1]['content']} {self._words(1, 9)}"}
        elif self._open[-1]["role"] != "user":
            self._open.append({"role": "user", "content": self._words(10, 80)})
        if kind == "left":
            return Request(kind, list(self._open), {**options, "stream": True, "max_tokens": 60}, is_left=True)
        return Request(kind, list(self._open), options)

    def answered(self, request: Request, answer: str) -> None:
        """Tell what came: the conversation goes on with it, or, if it was left, without."""
        if request.is_left:
            return
        self._last = request
        if self._open is None or request.kind in ("repeated", "text"):
            return
        # Some answers are thrown away: the same question then gets another end.
        if self._random.random() < 0.85:
            self._open.append({"role": "assistant", "content": answer})
        if sum(len(message["content"].split()) for message in self._open) > LONGEST:
            self._conversations = [one for one in self._conversations if one is not self._open]
        self._open = None

    def _words(self, least: int, most: int) -> str:
        return text(self._random.randint(least, most), self._random)
