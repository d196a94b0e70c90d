"""Instructions of one ``update_and_fetch``, ours and mlx-lm's, counted by callgrind: no busy machine moves them.

Needs ``valgrind``. Each figure is the difference of two runs, divided by the updates that one has more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

FEW, MANY = 20, 220
CLASSES: dict[str, tuple[int, ...]] = {"KVCache": (), "RotatingKVCache": (4096,), "QuantizedKVCache": ()}
SIDES = {"ours": "mlxrs_py.cache", "mlx-lm": "mlx_lm.models.cache"}


def child(side: str, name: str, updates: int) -> None:
    import gc
    import importlib
    import importlib.util
    import types

    if side == "mlx-lm":
        # The package imports transformers, which valgrind cannot run; the caches need nothing of it.
        package = types.ModuleType("mlx_lm")
        spec = importlib.util.find_spec("mlx_lm")
        assert spec is not None and spec.submodule_search_locations is not None
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["mlx_lm"] = package
    module = importlib.import_module(SIDES[side])
    import mlx.core as mx

    rows = mx.zeros((1, 8, 1, 128), mx.bfloat16)
    mx.eval(rows)
    cache = getattr(module, name)(*CLASSES[name])
    cache.update_and_fetch(rows, rows)
    gc.disable()
    for _ in range(updates):
        cache.update_and_fetch(rows, rows)
    # What is left is not ours to count.
    os._exit(0)


def counted(side: str, name: str, updates: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, __file__]
    environment = {**os.environ, "MLXRS_PY_BLAS": "0", "PYTHONHASHSEED": "0"}
    run = subprocess.run(
        [*command, "--child", side, name, str(updates)], env=environment, capture_output=True, text=True, check=False
    )
    found = re.search(r"Collected : (\d+)", run.stderr)
    if run.returncode != 0 or found is None:
        raise RuntimeError(f"callgrind on {side}, {name}: status {run.returncode}\n{run.stderr}")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1], int(options.child[2]))
    figures = {}
    for name in CLASSES:
        each = {side: (counted(side, name, MANY) - counted(side, name, FEW)) / (MANY - FEW) for side in SIDES}
        figures[name] = each
        ratio = each["mlx-lm"] / each["ours"]
        print(f"{name:20} ours {each['ours']:9,.0f}   mlx-lm {each['mlx-lm']:9,.0f}   ratio {ratio:.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
