"""Prefill of the default model on a CPU: this package with its BLAS, beside mlx-lm as installed.

Both sides run in one run, in turns, each in a process of its own: the BLAS that serves MLX is chosen once per process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOKENS, RUNS = 512, 3
#: Runs of ours for each of mlx-lm's, which takes many times as long.
PER_TURN = 3


def child(side: str, folder: str, tokens: int) -> None:
    """Run one prefill for each line on standard input, and print what it took."""
    if side == "ours":
        import mlxrs_py
        from mlxrs_py.cache import make_prompt_cache

        blas = mlxrs_py.build_info()["blas"]
    else:
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache

        blas = None
    import mlx.core as mx
    import mlx_lm

    model, _ = mlx_lm.load(folder)
    prompt = mx.random.randint(0, 40_000, (tokens,), key=mx.random.key(1))
    mx.eval(prompt)
    info = mx.device_info().get("device_name", "?")
    print(json.dumps({"mlx": mx.__version__, "blas": blas, "device": f"{mx.default_device()} {info}"}), flush=True)
    for _ in sys.stdin:
        caches = make_prompt_cache(model)
        start = time.perf_counter()
        if side == "ours":
            mlxrs_py.prefill(model, prompt, caches)
        else:
            for _ in generate_step(prompt, model, max_tokens=0, prompt_cache=caches):
                pass
        mx.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


class Side:
    """One side's process."""

    def __init__(self, name: str, folder: str, tokens: int):
        command = [sys.executable, __file__, "--child", name, folder, "--tokens", str(tokens)]
        self.name, self.seconds = name, list[float]()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.info = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def run(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self.seconds.append(self.answer()["seconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=RUNS, help="measured runs of each side (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    options = parser.parse_args()
    if options.child:
        child(*options.child, options.tokens)
        return
    from mlxrs_py.default_model import default_model_path

    folder = str(default_model_path())
    sides = [Side(name, folder, options.tokens) for name in ("ours", "mlx-lm")]
    for side in sides:
        print(
            f"{side.name:7} mlx {side.info['mlx']}, BLAS {side.info['blas'] or 'as MLX has it'}, {side.info['device']}"
        )
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"python {platform.python_version()}, {machine}, default model, float32, {options.tokens} tokens", flush=True)
    # The first run of ours pages the weights in; mlx-lm's is too long for that to matter.
    sides[0].run()
    sides[0].seconds.clear()
    for _ in range(options.runs):
        for side, runs in zip(sides, (PER_TURN, 1), strict=True):
            for _ in range(runs):
                side.run()
    for side in sides:
        side.close()
    rates = {}
    for side in sides:
        best, median = options.tokens / min(side.seconds), options.tokens / statistics.median(side.seconds)
        rates[side.name] = {"best": best, "median": median, "seconds": side.seconds, **side.info}
        print(
            f"{side.name:7} min {min(side.seconds):7.3f} median {statistics.median(side.seconds):7.3f} s   "
            f"best {best:7.1f} median {median:7.1f} tok/s"
        )
    ratio = {key: rates["ours"][key] / rates["mlx-lm"][key] for key in ("best", "median")}
    print(f"ratio of minima {ratio['best']:.2f}, of medians {ratio['median']:.2f}")
    if options.json:
        figures = {
            "tokens": options.tokens,
            "python": platform.python_version(),
            "machine": machine,
            "sides": rates,
            "ratio": ratio,
        }
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
