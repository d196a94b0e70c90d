"""Fetches mlx-lm's own test file, which its wheel leaves out, from the source distribution on PyPI.

``python fetch.py FOLDER`` puts it there and prints where. Nothing of it is ever committed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import time
from pathlib import Path

VERSION = "0.32.2"
SHA256 = "1af8a92f6a141c3e2bf5b0369ac4464203a8e2189c47b9e40d3e921e5b3a1fe9"
MEMBER = f"mlx_lm-{VERSION}/tests/test_prompt_cache.py"
#: Seconds before another try; an index has bad moments.
WAITS = (5, 30)


def download(folder: Path) -> None:
    requirement = folder / "requirement.txt"
    requirement.write_text(f"mlx-lm=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--no-binary", "mlx-lm", "--dest", str(folder), "--requirement", str(requirement)]
    for wait in WAITS:
        if subprocess.run(command, check=False).returncode == 0:
            return
        time.sleep(wait)
    subprocess.run(command, check=True)


def fetch(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"mlx_lm-{VERSION}.tar.gz"
    if not archive.exists():
        download(folder)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        archive.unlink()
        sys.exit(f"{archive}: expected SHA-256 {SHA256}, got {found}; it was removed")
    test = folder / Path(MEMBER).name
    with tarfile.open(archive) as tar:
        test.write_bytes(tar.extractfile(MEMBER).read())
    return test


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]).absolute()))
