"""Plots of results: ``python benches/python/plots.py RESULTS.json … --to FOLDER``. Needs the extra ``bench``.

Draws what the files hold, so that results of another machine are drawn here. Colours are read on light and dark pages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import itertools

import matplotlib.pyplot as plt

from tables import short

OURS, THEIRS, LIMIT, AGAIN = "mlxrs_py", "mlx-lm", "limit", "prefilling again"
#: Of middle lightness: about as far from white as from GitHub's dark page.
COLOURS = {OURS: "#d9622b", THEIRS: "#3f86d8", LIMIT: "#858d97", AGAIN: "#2f9e6e"}
INK = "#7d8590"
STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mlxrs_py",  # the same results, the same file
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "savefig.transparent": True,
}
Rows = list[dict[str, Any]]


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw all plots that a file has rows for, and give their files."""
    content = json.loads(results.read_text(encoding="utf-8"))
    machine = content["machine"]
    where = f"{machine['device_name']}, MLX {machine['mlx']}, mlx-lm {machine['mlx_lm']}"
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with mpl.rc_context(STYLE):
        for name, plot in PLOTS.items():
            figure = plot(content["rows"], where)
            if figure is None:
                continue
            made.append(folder / f"{results.stem}-{name}.svg")
            figure.savefig(made[-1], metadata={"Date": None, "Title": f"{name}: {where}"})
            plt.close(figure)
    return made


def restore(rows: Rows, where: str) -> Any:
    """Time against prompt length, both axes logarithmic."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get("series") != "length":
            continue
        for side, of in row["sides"].items():
            is_prefill = row["section"] == "prefill"
            if not (is_prefill and side != OURS):
                lines.setdefault(AGAIN if is_prefill else side, {})[row["n_tokens"]] = of["best"]
    if len(lines.get(OURS, {})) < 2:
        return None
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    axes.set(xscale="log", yscale="log", xlabel="prompt length (tokens)", ylabel="until ready to decode (s)")
    labels = {LIMIT: "limit: a plain read", THEIRS: "mlx-lm", AGAIN: "prefilling again (ours)", OURS: "mlxrs_py"}
    ends = []
    for side, line in lines.items():
        points = sorted(line.items())
        style = {"linestyle": (0, (4, 2)), "linewidth": 1.2} if side == LIMIT else {"marker": "o", "markersize": 4}
        axes.plot(*zip(*points, strict=True), color=COLOURS[side], **style)
        ends.append([*points[-1], labels[side], COLOURS[side]])
    lengths = sorted({n for line in lines.values() for n in line})
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 4.5)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.5)
    axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    axes.set_title(f"Restoring a prompt, page cache. {where}")
    for x, y, text, colour in _apart(ends, axes):
        place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(text, (x, y), color=colour, **place)
    return figure


def _apart(ends: list[list[Any]], axes: Any) -> list[list[Any]]:
    """Move labels that would lie on each other; only those at the same x can."""
    low, high = axes.get_ylim()
    least = (high / low) ** 0.055
    ends = sorted(ends, key=lambda end: end[1])
    for below, end in itertools.pairwise(ends):
        if end[0] == below[0] and end[1] < below[1] * least:
            end[1] = below[1] * least
    return ends


def bars(section: str, title: str, label: str, keep: Callable[[dict[str, Any]], bool]) -> Callable[[Rows, str], Any]:
    """Give a plot of horizontal bars, a group per row, the figure behind each bar."""

    def plot(rows: Rows, where: str) -> Any:
        rows = [row for row in rows if row["section"] == section and OURS in row["sides"] and keep(row)]
        if not rows:
            return None
        n_bars = sum(len(_sides(row)) for row in rows)
        figure, axes = plt.subplots(figsize=(7.2, 1.1 + 0.24 * n_bars + 0.3 * len(rows)), layout="constrained")
        y, most = 0.0, max(of["best"] for row in rows for side, of in row["sides"].items() if side in COLOURS)
        ticks: dict[float, str] = {}
        for row in rows:
            first = y
            for side, of in _sides(row).items():
                axes.barh(y, of["best"], height=0.82, color=COLOURS[side], alpha=0.55 if side == LIMIT else 1)
                text = f"{short(of['best'])}  {'mlxrs_py' if side == OURS else side}"
                axes.text(of["best"] + most * 0.012, y, text, va="center", color=COLOURS[side], fontsize=9)
                y += 1
            ticks[(first + y - 1) / 2] = _wrapped(row["name"])
            y += 0.9
        axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, most * 1.22)
        axes.set_xlabel(label)
        axes.set_title(f"{title}. {where}", x=0, ha="left")
        axes.spines["left"].set_visible(False)
        figure.align_labels()
        return figure

    return plot


def _sides(row: dict[str, Any]) -> dict[str, Any]:
    return {side: row["sides"][side] for side in COLOURS if side in row["sides"]}


def _wrapped(name: str, width: int = 30) -> str:
    lines = [""]
    for word in name.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def _is_plain(row: dict[str, Any]) -> bool:
    return not row.get("series") and " alone" not in row["name"]


PLOTS: dict[str, Callable[[Rows, str], Any]] = {
    "restore": restore,
    "save": bars("save", "Saving", "seconds, best of several", _is_plain),
    "update": bars("update", "update_and_fetch, one token", "host time (µs), best of several", _is_plain),
    "prefill": bars("prefill", "Prefill", "tokens per second, best of several", _is_plain),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Plots of the results of run.py.")
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of run.py")
    parser.add_argument("--to", type=Path, required=True, help="folder for the plots")
    options = parser.parse_args()
    for results in options.results:
        for file in draw(results, options.to):
            print(file)


if __name__ == "__main__":
    main()
