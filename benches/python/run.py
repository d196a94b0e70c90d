"""All benchmarks against mlx-lm and against the machine's limit: ``python benches/python/run.py --help``.

All sides run in turns within one run. Each row shows the best and the median sample of every side, and how many times
as good as that side ours is, by the best ones. The limit is a plain program of the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no model comes from a hub

import mlxrs_py  # noqa: F401

# isort: split
# Before this, the BLAS that serves MLX was chosen.
import mlx.core as mx

import machine
from rows import Report
from sections import models

#: The sections that need the model stand together; it is made once.
SECTIONS = ["update", "restore", "save", "prefill", "decode", "lookup"]
#: What no device has a part in; on a GPU only if it is asked for.
HOST_ONLY = ["lookup"]


def main() -> int:
    options = arguments()
    if options.device:
        mx.set_default_device(mx.gpu if options.device == "gpu" else mx.cpu)
    device = machine.describe()
    print(machine.header(device))
    print("each line: best, median, unit, ours against it, side (samples)")
    command = " ".join(["python", "benches/python/run.py", *sys.argv[1:]])
    deadline = time.perf_counter() + options.seconds
    sections = options.only or [name for name in SECTIONS if name not in HOST_ONLY or not machine.on_gpu()]
    earlier = []
    if options.add and options.json and options.json.exists():
        content = json.loads(options.json.read_text(encoding="utf-8"))
        earlier = [row for row in content["rows"] if row["section"] not in sections]
        command = f"{content['command']}; {command}"
    report = Report(device, command, options.json, options.quick, deadline, earlier)
    for name in (name for name in SECTIONS if name in sections):
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        report.attempt(name, lambda name=name: importlib.import_module(f"sections.{name}").run(report))
        if name == "decode":
            models.forget()
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    report.write()
    if options.plots and options.json:
        report.attempt("plots", lambda: importlib.import_module("plots").draw(options.json, options.plots))
    for failure in report.failures:
        print(f"FAILED: {failure}")
    return 1 if report.failures else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks against mlx-lm and against the machine's limit.")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section; may be given several times")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="MLX's default device")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--add", action="store_true", help="keep the rows of other sections that are there")
    parser.add_argument("--plots", type=Path, help="the folder for plots of these results (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="small sizes, two turns: does it run?")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further row after so long")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
