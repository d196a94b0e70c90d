"""A picture of a store: the tree of prefixes, from left to right."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

from mlxrs_py._units import size_text

__all__ = ["plot"]

_Record = dict[str, Any]


def plot(records: list[_Record], file: str | os.PathLike[str]) -> None:
    """Draw the records that :meth:`PromptStore.ls` gives: a panel per model, tokens from left to right.

    A box is a block, as wide as its tokens; blocks that go on others stand right of them. Colour tells how often a
    block was found, its text how many bytes it has; a dot is the state of a recurrent layer.

    Raises:
        ImportError: Without matplotlib.
        OSError: If the file cannot be written.
        ValueError: If the file's ending is no format of pictures.

    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a store needs matplotlib: pip install 'mlxrs_py[bench]'") from error
    spaces: dict[str, list[_Record]] = defaultdict(list)
    for record in records:
        spaces[record["space"]].append(record)
    places = {space: _places(found) for space, found in spaces.items()}
    n_lines = [max((top for top, _ in place.values()), default=0) + 1 for place in places.values()]
    figure = Figure(figsize=(10, min(1.5 + 0.3 * sum(n_lines) + 0.7 * len(n_lines), 40)), layout="constrained")
    if not spaces:
        figure.text(0.5, 0.5, "nothing is stored", ha="center")
        figure.savefig(file)
        return
    colours = ScalarMappable(LogNorm(1, max(2, *(1 + record["hits"] for record in records))), "viridis_r")
    panels = figure.subplots(len(spaces), 1, squeeze=False, height_ratios=n_lines)[:, 0]
    for panel, (space, found) in zip(panels, spaces.items(), strict=True):
        _draw(panel, found, places[space], colours)
        size = sum(record["bytes"] for record in found)
        panel.set_title(f"model {space[:8]}: {len(found)} records, {size_text(size)}", fontsize=9, loc="left")
    panels[-1].set_xlabel("tokens")
    figure.colorbar(colours, ax=list(panels), label="1 + hits")
    figure.savefig(file, dpi=120)


def _places(records: list[_Record]) -> dict[str, tuple[int, int]]:
    """Give the first line and the number of lines of each block: each leaf has one, a block all of those under it."""
    rows = [record for record in records if record["kind"] == "rows"]
    known = {record["id"] for record in rows}
    children: dict[str, list[str]] = defaultdict(list)
    for record in rows:
        children[record["parent"] if record["parent"] in known else ""].append(record["id"])
    # Trees are as deep as prompts are long: no recursion.
    heights: dict[str, int] = {}
    for record in sorted(rows, key=lambda record: record["start"], reverse=True):
        heights[record["id"]] = sum(heights[child] for child in children[record["id"]]) or 1
    places: dict[str, tuple[int, int]] = {}
    begun = [(0, "")]
    while begun:
        line, parent = begun.pop()
        for child in children[parent]:
            places[child] = (line, heights[child])
            begun.append((line, child))
            line += heights[child]
    return places


def _draw(panel: Any, records: list[_Record], places: dict[str, tuple[int, int]], colours: Any) -> None:
    from matplotlib.patches import Rectangle

    parents = {record["id"]: record["parent"] for record in records}
    ends = {}
    for record in records:
        colour = colours.to_rgba(1 + record["hits"])
        if record["id"] in places:
            line, height = places[record["id"]]
            width = record["end"] - record["start"]
            edge = "red" if record["pinned"] else "white"
            panel.add_patch(Rectangle((record["start"], line), width, height - 0.06, facecolor=colour, edgecolor=edge))
            ends[record["id"]] = line
            if width * 12 >= max(other["end"] for other in records):
                middle = (record["start"] + width / 2, line + height / 2)
                ink = "black" if sum(colour[:3]) > 1.5 else "white"
                panel.text(*middle, size_text(record["bytes"]), ha="center", va="center", fontsize=6, color=ink)
        else:
            line = ends.get(parents[record["id"]], 0)
            panel.plot(record["end"], line + 0.5, "o", color=colour, markeredgecolor="black", markersize=4)
    panel.set_xlim(0, max(record["end"] for record in records))
    panel.set_ylim(max((line + height for line, height in places.values()), default=1), 0)
    panel.set_yticks([])
