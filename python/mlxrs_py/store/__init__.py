"""Prompt prefixes that are shared, found at once and still there after a restart, for every model."""

from mlxrs_py.store.prompt_store import Handle, PromptStore
from mlxrs_py.store.view import Lookup, View

__all__ = ["Handle", "Lookup", "PromptStore", "View"]
