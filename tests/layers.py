"""Checks the layers of the Rust core: each uses only those before it, PyO3 ends at one folder, files stay small.

Run by ``make lint``. With a folder as argument that folder is checked in place of ``src``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

#: In order; a layer may use those before it. ``error`` is free for all.
LAYERS = ["ffi", "array", "cache", "prefill", "persist", "prompt", "store", "python"]
#: What a layer must not use although it comes before.
FORBIDDEN = {("persist", "prefill")}
MAX_LINES = 450


def layer_of(file: Path, root: Path) -> str:
    return file.relative_to(root).parts[0].removesuffix(".rs")


def faults(root: Path) -> list[str]:
    found = []
    for file in sorted(root.rglob("*.rs")):
        layer = layer_of(file, root)
        text = file.read_text(encoding="utf-8")
        name = file.relative_to(root.parent)
        if len(text.splitlines()) > MAX_LINES:
            found.append(f"{name}: more than {MAX_LINES} lines")
        if layer not in LAYERS:
            continue
        code = re.sub(r"//.*", "", text)
        # `crate::a::b` and `crate::{a::b, c}`.
        used = set(re.findall(r"crate::(\w+)", code))
        for group in re.findall(r"crate::\{([^}]*)\}", code):
            used |= set(re.findall(r"(?:^|,)\s*(\w+)", group))
        later = {other for other in used & set(LAYERS) if LAYERS.index(other) > LAYERS.index(layer)}
        forbidden = {other for other in used if (layer, other) in FORBIDDEN}
        found += [f"{name}: layer {layer} uses {other}" for other in sorted(later | forbidden)]
        if layer != "python" and re.search(r"\bpyo3::|#\[py(?:class|function|methods|module)", code):
            found.append(f"{name}: PyO3 outside src/python")
    return found


def core_tree_has_pyo3() -> bool:
    command = ["cargo", "tree", "--no-default-features", "--edges", "normal"]
    return "pyo3" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "src"
    found = faults(root)
    if len(sys.argv) == 1 and core_tree_has_pyo3():
        found.append("cargo tree --no-default-features: pyo3 is in it")
    for fault in found:
        print(fault, file=sys.stderr)
    if not found:
        print("layers: in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
