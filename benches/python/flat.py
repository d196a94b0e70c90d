"""Many requests to mlx-lm's server on a store: ``flat.py [--requests N] [--json FILE] [--plot FILE]``; 1 if not flat.

Tiny models with random weights; clients with conversations that grow, repeat, are edited or left, alone or in batches.
Both tiers are so small that they let go of prompts all the time. Flat is what holds no more in the last fifth of the
run than in the second one; limits hold in every sample. ``--without`` runs mlx-lm's server as it is, ``--draw FILE``
only draws an earlier run's JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlxrs_py  # noqa: F401  first: on Linux CPUs it brings MLX a fast BLAS

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from parity.soaked import Soak, soak
from parity.tiny_folders import save
from parity.watched import Caps

from machine import describe, header

#: Layers with full attention and with windows; with states and with full attention.
MODELS = ("llama", "qwen3_next")
N_SAMPLES = 200
#: Panels from top to bottom: a text, its unit, and the names of a sample's numbers with those of their limits.
PANELS: tuple[tuple[str, float, dict[str, str | None]], ...] = (
    ("memory of the process (MB)", 1e6, {"rss": None}),
    ("of it, arrays of MLX (MB)", 1e6, {"active": None}),
    ("prompts in memory (MB)", 1e6, {"cache_bytes": "cache_bytes"}),
    ("waiting for the disk (MB)", 1e6, {"ram": "ram_bytes"}),
    ("du of the folder (MB)", 1e6, {"disk": "disk_bytes"}),
    ("records so far", 1, {"written": None, "evicted": None}),
    ("open files", 1, {"files": None}),
    ("threads", 1, {"threads": None}),
)
#: What only grows.
SUMS = ("written", "evicted")
KINDS = ("grown", "new", "repeated", "edited", "left", "text")
COLOURS, LIMIT = ("#d9622b", "#3f86d8"), "#858d97"


def told(name: str, run: Soak) -> list[str]:
    """Give a run in lines."""
    counts, last = run.counts, run.samples[-1]
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    store = ""
    if "disk" in last:
        store = (
            f", {last['written']} records written, {last['evicted']} evicted; of the store {last['restored']} prompts "
            f"restored, {last['recomputed']} computed instead, {last['missed']} missed"
        )
    lines = [
        f"{name}: {counts['n']} requests in {last['seconds']:.0f} s ({kinds}; {counts['alone']} served alone), "
        f"{counts['cached_tokens'] / counts['prompt_tokens']:.1%} of {counts['prompt_tokens']} tokens cached; "
        f"{last['n_kept']} prompts kept{store}",
        f"  {'':12}"
        + "".join(f"{head:>14}" for head in ("first fifth", "second fifth", "last fifth", "most", "limit")),
    ]
    for number, limit in {number: limit for *_, names in PANELS for number, limit in names.items()}.items():
        if number in last and number not in SUMS:
            figures = [*(f"{run.fifth(number, n):,.0f}" for n in (0, 1, 4)), f"{run.most(number):,}"]
            figures.append(f"{getattr(run.caps, limit):,}" if limit else "-")
            lines.append(f"  {number:12}" + "".join(f"{figure:>14}" for figure in figures))
    return [*lines, *(f"  not flat: {fault}" for fault in run.faults())]


def draw(content: dict[str, Any], file: Path) -> None:
    """Draw all runs of a file: a column each."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from plots import INK, STYLE

    runs = content["runs"]
    machine = content["machine"]
    with mpl.rc_context(STYLE):
        size = (4.6 * len(runs), 1.35 * len(PANELS))
        figure, grid = plt.subplots(
            len(PANELS), len(runs), figsize=size, layout="constrained", sharex="col", squeeze=False
        )
        for column, (name, run) in zip(grid.T, runs.items(), strict=True):
            n = [sample["n"] for sample in run["samples"]]
            for axes, (text, unit, names) in zip(column, PANELS, strict=True):
                for colour, (number, limit) in zip(COLOURS, names.items(), strict=False):
                    line = [sample.get(number, 0) / unit for sample in run["samples"]]
                    axes.plot(n, line, color=colour, linewidth=1)
                    place = {"transform": axes.get_yaxis_transform(), "va": "center"}
                    if len(names) > 1:
                        axes.text(1.01, line[-1], number, color=colour, **place)
                    if limit is not None:
                        at = run["caps"][limit] / unit
                        axes.axhline(at, color=LIMIT, linestyle=(0, (4, 2)), linewidth=1)
                        axes.text(1.01, at, "limit", color=LIMIT, **place)
                axes.set_ylim(0)
                axes.set_title(text)
                axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
            column[0].set_title(f"{name}: {PANELS[0][0]}")
            column[-1].set_xlabel("requests")
        figure.suptitle(f"mlx-lm {machine['mlx_lm']}'s server on a store", color=INK, fontsize=10, x=0.01, ha="left")
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether mlx-lm's server on a store stays flat.")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="of each model (default: 10000)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="tiny models of tests/parity/tiny_models.py")
    parser.add_argument("--without", action="store_true", help="mlx-lm's server as it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the samples go")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where a picture goes; needs the extra bench")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw this earlier run's samples, and run nothing")
    arguments = parser.parse_args()
    if arguments.draw is not None:
        draw(json.loads(arguments.draw.read_text(encoding="utf-8")), arguments.plot)
        return 0
    content: dict[str, Any] = {"machine": describe(), "runs": {}}
    print(header(content["machine"]), flush=True)
    is_flat = True
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            model = save(name, Path(folder) / "model")
            store = None if arguments.without else Path(folder) / "store"
            every = max(1, arguments.requests // N_SAMPLES)
            run = soak(model, store, Caps(), arguments.requests, every=every)
        print("\n".join(told(name, run)), flush=True)
        is_flat &= not run.faults()
        content["runs"][name] = {"caps": vars(run.caps), "counts": dict(run.counts), "samples": run.samples}
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        # A sample a line.
        arguments.json.write_text(json.dumps(content).replace('{"active"', '\n{"active"') + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw(content, arguments.plot)
    print("flat" if is_flat else "not flat")
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
