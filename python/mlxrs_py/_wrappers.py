"""Functions that stand in place of others, and give the place back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["Wrappers"]

_Function = Callable[..., Any]


class Wrappers:
    """Wrappers of functions of modules and classes. Each calls what it wraps; nothing of it is copied."""

    def __init__(self) -> None:
        #: Owner, name and what stood there.
        self._originals: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, wrap: Callable[[_Function], _Function]) -> None:
        """Set the owner's function of that name to ``wrap(function)``."""
        original = vars(owner)[name]
        self._originals.append((owner, name, original))
        setattr(owner, name, functools.wraps(original)(wrap(original)))

    def undo(self) -> None:
        """Put back what stood there, the last first."""
        while self._originals:
            setattr(*self._originals.pop())
