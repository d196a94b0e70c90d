"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["size_text"]


def size_text(n_bytes: int) -> str:
    """Give bytes with a unit."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if n_bytes >= 1000**power:
            return f"{n_bytes / 1000**power:.1f} {unit}"
    return f"{n_bytes} B"
