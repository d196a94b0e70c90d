"""Tokens per second behind a prompt: after a restore, and while a save runs in the background."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import limits
import machine
import workload
from rows import OURS, THEIRS, Report, Row
from sections import models

NEVER_SAVED, NO_SAVE = "never saved", "no save running"


def run(report: Report) -> None:
    model = models.model()
    n_prompt = (1024 if report.quick else 16_384) if machine.on_gpu() else 512
    prompt = workload.random_tokens(n_prompt)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "prompt.safetensors"
        caches = workload.prefill(OURS, model, prompt, 2048)
        workload.save(OURS, file, caches, durable=False)
        limits.settle(file)
        what = f"{models.name()}, behind {n_prompt:,} tokens"
        report.attempt("decode after a restore", lambda: after_restore(report, model, caches, file, what))
        report.attempt("decode during a save", lambda: during_save(report, model, caches, Path(name) / "other", what))


def after_restore(report: Report, model: Any, caches: list[Any], file: Path, what: str) -> None:
    n_tokens = 96 if machine.on_gpu() else 16
    held = {
        OURS: workload.restore(OURS, file),
        NEVER_SAVED: caches,
        THEIRS: workload.restore(THEIRS, file),
    }
    found = {side: workload.decode(model, cache, n_tokens)[1] for side, cache in held.items()}
    same = found[OURS] == found[NEVER_SAVED]
    sides = {side: lambda cache=cache: workload.decode(model, cache, n_tokens)[0] for side, cache in held.items()}
    samples = report.in_turns(sides, 10, 20)
    note = "the same tokens as never saved" if same else "OTHER TOKENS than never saved"
    report.add(Row("decode", f"{what}: after a restore", "tok/s", samples, more_is_better=True, note=note))


def during_save(report: Report, model: Any, caches: list[Any], file: Path, what: str) -> None:
    if not workload.takes(workload.cache_module(OURS).save_prompt_cache, "background"):
        return
    n_tokens = 128 if machine.on_gpu() else 16
    lengths: list[int] = []

    def saving() -> float:
        handle = workload.save(OURS, file, caches, background=True)
        rate, found = workload.decode(model, caches, 4 * n_tokens, stop=handle.done)
        lengths.append(len(found))
        handle.result()
        return rate

    sides = {OURS: saving, NO_SAVE: lambda: workload.decode(model, caches, n_tokens)[0]}
    samples = report.in_turns(sides, 6, 20)
    note = f"{min(lengths)} to {max(lengths)} tokens while it ran"
    report.add(Row("decode", f"{what}: while a save runs", "tok/s", samples, more_is_better=True, note=note))
