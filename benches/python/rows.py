"""Samples of several sides, taken in turns; the rows that are printed and written."""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS, THEIRS, LIMIT = "mlxrs_py", "mlx-lm", "limit"
Samples = dict[str, list[float]]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = function()
    elapsed = time.perf_counter() - start
    del kept  # what was made is freed outside of the time
    return elapsed


@dataclass
class Row:
    """One comparison. ``limit`` says what the side of that name is: a plain program of the same run."""

    section: str
    name: str
    unit: str
    samples: Samples
    scale: float = 1
    more_is_better: bool = False
    limit: str = ""
    series: str = ""
    n_tokens: int = 0
    n_bytes: int = 0
    note: str = ""

    def best(self, side: str) -> float:
        values = self.samples[side]
        return (max(values) if self.more_is_better else min(values)) * self.scale

    def ratio(self, side: str) -> float:
        """Give how many times as good as ``side`` ours is, of the best samples."""
        ours, other = self.best(OURS), self.best(side)
        return ours / other if self.more_is_better else other / ours

    def as_json(self) -> dict[str, Any]:
        sides = {
            side: {
                "best": _rounded(self.best(side)),
                "median": _rounded(statistics.median(values) * self.scale),
                "samples": [_rounded(value * self.scale) for value in values],
            }
            for side, values in self.samples.items()
        }
        rest = ("section", "name", "unit", "more_is_better", "limit", "series", "n_tokens", "n_bytes", "note")
        ratios = {side: _rounded(self.ratio(side)) for side in self.samples if side != OURS and OURS in self.samples}
        return {key: getattr(self, key) for key in rest if getattr(self, key)} | {"sides": sides, "ratios": ratios}

    def __str__(self) -> str:
        lines = [f"{self.name}" + (f"  [{self.note}]" if self.note else "")]
        for side, values in self.samples.items():
            median = statistics.median(values) * self.scale
            name = f"limit: {self.limit}" if side == LIMIT and self.limit else side
            ratio = f"{self.ratio(side):9.2f} x" if side != OURS and OURS in self.samples else " " * 11
            lines.append(f"    {self.best(side):11.4f} {median:11.4f} {self.unit:6}{ratio}  {name} ({len(values)})")
        return "\n".join(lines)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


@dataclass
class Report:
    """Takes samples, prints each row as it comes, and keeps the file up to date."""

    machine: dict[str, Any]
    command: str
    file: Path | None
    quick: bool
    #: When no further row is begun.
    deadline: float
    #: Rows of an earlier run that stay in the file.
    earlier: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def attempt(self, what: str, function: Callable[[], object]) -> None:
        """Run a part. One that fails is told, and the rest goes on."""
        if time.perf_counter() > self.deadline:
            self.failures.append(f"{what}: no time left")
            print(f"\n{what}: no time left", flush=True)
            return
        try:
            function()
        except Exception as error:
            self.failed(what, error)
        gc.collect()

    def failed(self, what: str, error: Exception) -> None:
        self.failures.append(f"{what}: {type(error).__name__}: {error}")
        print(f"\n{what} FAILED", flush=True)
        traceback.print_exception(error)

    def in_turns(
        self,
        sides: dict[str, Callable[[], float]],
        runs: int,
        limit_s: float = 20,
        times: dict[str, int] | None = None,
        *,
        warm: bool = False,
    ) -> Samples:
        """Sample all sides alternately, so that what else the machine does hits all of them.

        No new turn after ``limit_s`` seconds, half of that on a GPU, which is quieter; but two, unless one took longer.
        A side that fails is left out from there on. ``times``: how often a side is sampled in each of its turns.
        ``warm``: each side runs once before, since a GPU's kernels are compiled when they are first needed.
        """
        samples: Samples = {side: [] for side in sides}
        left = dict(sides)
        if warm and self.machine["device"] == "gpu":
            left = {side: sample for side, sample in sides.items() if self._warmed(side, sample)}
        patience = 0.5 if self.machine["device"] == "gpu" else 1.0
        start = time.perf_counter()
        end = min(start + limit_s * patience, self.deadline)
        for turn in range(2 if self.quick else runs):
            order = list(left.items())
            for side, sample in reversed(order) if turn % 2 else order:
                try:
                    for _ in range((times or {}).get(side, 1)):
                        samples[side].append(sample())
                except Exception as error:
                    self.failed(side, error)
                    del left[side]
            now = time.perf_counter()
            if now > end and (turn or now - start > limit_s):
                break
        return {side: values for side, values in samples.items() if values}

    def _warmed(self, side: str, sample: Callable[[], float]) -> bool:
        try:
            sample()
        except Exception as error:
            self.failed(side, error)
            return False
        return True

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(row, flush=True)
        self.write()

    def write(self) -> None:
        if self.file is None:
            return
        content = {
            "command": self.command,
            "machine": self.machine,
            "quick": self.quick,
            "failures": self.failures,
            "rows": self.earlier + [row.as_json() for row in self.rows],
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(_json(content), encoding="utf-8")


def _json(content: dict[str, Any]) -> str:
    """Write one row per line, so that a change of the file can be read."""
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'
