"""Checks the wheels in a folder: platform tag, no libmlx inside, no path of the machine that built them."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def faults(wheel: Path) -> list[str]:
    found = []
    if sys.platform == "linux" and "manylinux_2_35" not in wheel.name:
        found.append("expected the platform tag manylinux_2_35")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        found += [f"{name} must not be inside" for name in names if "libmlx" in name or name.endswith(".metallib")]
        cores = [name for name in names if "_core" in name and name.endswith(".so")]
        if len(cores) != 1:
            found.append(f"expected one _core, got {cores}")
        if sys.platform == "linux" and cores and b"$ORIGIN/../mlx/lib" not in archive.read(cores[0]):
            found.append("expected the run path $ORIGIN/../mlx/lib")
        for name in ("mlxrs_py/py.typed", "mlxrs_py/_core.pyi", "mlxrs_py/cli/__init__.py"):
            if name not in names:
                found.append(f"{name} is missing")
    return found


def main() -> int:
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    found = [f"{wheel.name}: {fault}" for wheel in wheels for fault in faults(wheel)]
    for fault in found or ([] if wheels else ["no wheel"]):
        print(fault, file=sys.stderr)
    if wheels and not found:
        print(*(wheel.name for wheel in wheels), sep="\n")
    return 1 if found or not wheels else 0


if __name__ == "__main__":
    sys.exit(main())
