"""Running a prompt through a model: by step, by length, beside mlx-lm as it is installed, beside a restore."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

import limits
import machine
import workload
from children import Child
from rows import LIMIT, OURS, THEIRS, Report, Row, Samples
from sections import models

AGAIN = "prefilling again"


def run(report: Report) -> None:
    if not machine.on_gpu():
        report.attempt("prefill as installed", lambda: as_installed(report))
    n_tokens = (1024 if report.quick else 16_384) if machine.on_gpu() else 512
    for step_size in (2048, 512) if machine.on_gpu() else (512, 128):
        report.attempt(f"prefill, step {step_size}", lambda s=step_size: by_step(report, n_tokens, s, s))
    if machine.on_gpu():
        report.attempt("prefill, step 512 beside 2048", lambda: by_step(report, n_tokens, 512, 2048))
    for n in lengths(report):
        report.attempt(f"prefill {n} tokens", lambda n=n: by_length(report, n))
    report.attempt("restore against prefilling again", lambda: against_restore(report, n_tokens))


def lengths(report: Report) -> list[int]:
    if report.quick:
        return [512]
    return [1024, 4096, 16_384, 65_536] if machine.on_gpu() else [1024, 2048]


def prefill_seconds(side: str, tokens: mx.array, step_size: int) -> float:
    model = models.model()
    workload.tidy()
    start = time.perf_counter()
    workload.prefill(side, model, tokens, step_size)
    return time.perf_counter() - start


def as_rates(samples: Samples, n_tokens: int) -> Samples:
    return {side: [n_tokens / value for value in values] for side, values in samples.items()}


def as_installed(report: Report) -> None:
    """Each side in a process of its own; in mlx-lm's, nobody changes the BLAS that MLX came with."""
    n_tokens = 128
    task: dict[str, Any] = {"do": "prefill", "device": "cpu", "folder": str(models.folder())}
    with Child(side=OURS, **task) as ours, Child(side=THEIRS, **task) as theirs:
        children = {OURS: ours, THEIRS: theirs}
        order = {"n_tokens": n_tokens, "step_size": 2048}
        for child in children.values():
            child.ask(n_tokens=32, step_size=2048)
        sides = {side: lambda child=child: child.ask(**order)["seconds"] for side, child in children.items()}
        samples = report.in_turns(sides, 8, 100, times={OURS: 6})
    note = f"ours with {report.machine['blas']}, mlx-lm as installed"
    name = f"{models.name()}, {n_tokens:,} tokens"
    report.add(
        Row("prefill", name, "tok/s", as_rates(samples, n_tokens), more_is_better=True, n_tokens=n_tokens, note=note)
    )


def by_step(report: Report, n_tokens: int, step_size: int, their_step: int) -> None:
    """Beside a loop that never waits: no barrier, no bound of memory. mlx-lm runs at ``their_step``."""
    tokens = workload.random_tokens(n_tokens)
    peaks: Samples = {OURS: [], THEIRS: [], LIMIT: []}

    def sample(side: str) -> float:
        workload.tidy()
        mx.reset_peak_memory()
        if side == LIMIT:
            elapsed = unbounded_seconds(tokens, step_size)
        else:
            elapsed = prefill_seconds(side, tokens, their_step if side == THEIRS else step_size)
        peaks[side].append(mx.get_peak_memory())
        return elapsed

    sides = {side: lambda side=side: sample(side) for side in peaks}
    samples = report.in_turns(sides, 6, 30 if machine.on_gpu() else 60, warm=True)
    name = f"{models.name()}, {n_tokens:,} tokens, step {step_size}"
    if their_step != step_size:
        name += f", mlx-lm {their_step}"
    limit = "a loop that never waits"
    rates = as_rates(samples, n_tokens)
    row = Row("prefill", name, "tok/s", rates, more_is_better=True, limit=limit, n_tokens=n_tokens)
    row.note = "same BLAS on both sides" if not machine.on_gpu() else ""
    report.add(row)
    held = {side: peaks[side][-len(times) :] for side, times in samples.items()}
    report.add(
        Row("prefill", f"{name}: peak memory", "GB", held, scale=1e-9, limit=limit, series="memory", n_tokens=n_tokens)
    )


def unbounded_seconds(tokens: mx.array, step_size: int) -> float:
    """Time a plain loop over the chunks that queues all of them and waits once."""
    model, module = models.model(), workload.cache_module(THEIRS)
    caches = module.make_prompt_cache(model)
    workload.tidy()
    start = time.perf_counter()
    ends = [*range(step_size, len(tokens) - 1, step_size), len(tokens) - 1, len(tokens)]
    logits, at = None, 0
    for end in ends:
        logits = model(tokens[None, at:end], cache=caches)[:, -1]
        mx.async_eval([cache.state for cache in caches])
        at = end
    mx.eval(logits)
    mx.synchronize()
    return time.perf_counter() - start


def by_length(report: Report, n_tokens: int) -> None:
    tokens = workload.random_tokens(n_tokens)
    sides = {side: lambda side=side: prefill_seconds(side, tokens, 2048) for side in (OURS, THEIRS)}
    samples = report.in_turns(sides, 3, 15)
    name = f"{n_tokens:,} tokens of {models.name()}"
    report.add(Row("prefill", name, "s", samples, series="length", n_tokens=n_tokens))


def against_restore(report: Report, n_tokens: int) -> None:
    """What a user chooses between, from the page cache, in turns."""
    tokens = workload.random_tokens(n_tokens)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "prompt.safetensors"
        workload.save(OURS, file, workload.prefill(OURS, models.model(), tokens, 2048), durable=False)
        limits.settle(file)

        def restore(side: str) -> float:
            start = time.perf_counter()
            workload.restore(side, file)
            return time.perf_counter() - start

        sides = {
            OURS: lambda: restore(OURS),
            THEIRS: lambda: restore(THEIRS),
            AGAIN: lambda: prefill_seconds(OURS, tokens, 2048),
        }
        sides[OURS]()
        samples = report.in_turns(sides, 5, 20 if machine.on_gpu() else 40)
    report.add(
        Row("prefill", f"restore of {n_tokens:,} tokens, {models.name()}", "s", samples, series="again",
            n_tokens=n_tokens)
    )  # fmt: skip
