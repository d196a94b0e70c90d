"""Counts the calls into cache classes, ours or mlx-lm's: whose caches ran?"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

CLASS_METHODS = (classmethod, types.ClassMethodDescriptorType)
METHODS = (types.FunctionType, types.MethodDescriptorType)


def counting(method: Any, count: Any) -> Any:
    """Give a method, or method of the class, that counts and then does the same."""
    if isinstance(method, CLASS_METHODS):
        return classmethod(lambda cls, *args, **options: count() or method.__get__(None, cls)(*args, **options))
    return functools.wraps(method)(lambda *args, **options: count() or method(*args, **options))


@contextlib.contextmanager
def calls(classes: Iterable[type]) -> Iterator[Counter[tuple[type, str]]]:
    """Count the calls of public methods, by class and name."""
    counts: Counter[tuple[type, str]] = Counter()
    undo = []
    try:
        for cls in classes:
            for name in dir(cls):
                method = inspect.getattr_static(cls, name)
                if name.startswith("_") or not isinstance(method, (*METHODS, *CLASS_METHODS)):
                    continue
                undo.append((cls, name, vars(cls).get(name)))
                setattr(cls, name, counting(method, functools.partial(counts.update, [(cls, name)])))
        yield counts
    finally:
        for cls, name, method in reversed(undo):
            delattr(cls, name) if method is None else setattr(cls, name, method)


def by_class(counts: Counter[tuple[type, str]]) -> dict[str, int]:
    """Sum up all methods, by the class's name; with its module, for mlx-lm's are named alike."""
    sums: Counter[str] = Counter()
    for (cls, _), n in counts.items():
        sums[f"{cls.__module__}.{cls.__name__}"] += n
    return dict(sums)
