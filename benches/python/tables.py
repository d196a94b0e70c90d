"""Tables of results in a page: ``python benches/python/tables.py RESULTS.json … --in PAGE.md``.

Whatever stands between ``<!-- figures: NAME -->`` and ``<!-- end -->`` becomes what NAME.json holds, so that no figure
is ever typed.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

OURS, THEIRS, LIMIT = "mlxrs_py", "mlx-lm", "limit"
HEAD = "| what | mlxrs_py, best (median) | mlx-lm | ours against it | beside | ours against it |\n" + "| --- " * 6 + "|"


def table(results: dict[str, Any], plots: dict[str, str]) -> str:
    """Give a file's rows in Markdown; ``plots`` are the images that belong to sections."""
    machine = results["machine"]
    blas = f"BLAS {machine['blas'] or 'as MLX has it'}, " if machine["device"] == "cpu" else ""
    lines = [
        f"{machine['device_name']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB, {machine['system']}; "
        f"MLX {machine['mlx']}, mlx-lm {machine['mlx_lm']}, mlxrs_py {machine['mlxrs_py']}, {blas}"
        f"CPython {machine['python']}. `{results['command']}`"
    ]
    notes: list[str] = []
    for section in dict.fromkeys(row["section"] for row in results["rows"]):
        lines += ["", f"### {section}", ""]
        lines += [f"![{section}]({plots[section]})", ""] if section in plots else []
        lines.append(HEAD)
        lines += [_line(row, notes) for row in results["rows"] if row["section"] == section]
    lines += [""] + [f"{i}. {note}" for i, note in enumerate(notes, 1)] if notes else []
    return "\n".join(lines)


def _line(row: dict[str, Any], notes: list[str]) -> str:
    sides, ratios = row["sides"], row["ratios"]
    name = row["name"] + (f" {_number(row['note'], notes)}" if row.get("note") else "")
    others = [side for side in sides if side not in (OURS, THEIRS)]
    beside, against = [], []
    for side in others:
        what = f"limit {_number(row['limit'], notes)}" if side == LIMIT and row.get("limit") else side
        beside.append(f"{what}: {_figure(sides[side], row['unit'])}")
        against.append(_ratio(ratios.get(side)))
    theirs = (_figure(sides[THEIRS], row["unit"]), _ratio(ratios.get(THEIRS))) if THEIRS in sides else ("", "")
    ours = _figure(sides[OURS], row["unit"]) if OURS in sides else ""
    return "| " + " | ".join([name, ours, *theirs, "<br>".join(beside), "<br>".join(against)]) + " |"


def _number(note: str, notes: list[str]) -> str:
    if note not in notes:
        notes.append(note)
    return f"({notes.index(note) + 1})"


def _figure(side: dict[str, Any], unit: str) -> str:
    return f"{short(side['best'])} ({short(side['median'])}) {unit}"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} ×" if value >= 100 else f"{value:.2f} ×" if value < 10 else f"{value:.1f} ×"  # noqa: RUF001


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of the results of run.py, in a page.")
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of run.py")
    parser.add_argument("--in", dest="page", type=Path, required=True, help="the page that has places for them")
    options = parser.parse_args()
    text = options.page.read_text(encoding="utf-8")
    for file in options.results:
        drawn = (options.page.parent / "plots").glob(f"{file.stem}-*.svg")
        plots = {plot.stem.removeprefix(f"{file.stem}-"): f"plots/{plot.name}" for plot in drawn}
        made = table(json.loads(file.read_text(encoding="utf-8")), plots)
        place = re.compile(rf"(<!-- figures: {re.escape(file.stem)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = place.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
    options.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
