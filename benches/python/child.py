"""A fresh process for what only such a one shows: ``python child.py TASK``, a JSON object; it answers in JSON lines.

The first line comes once all is ready. Then each line of the input that is a JSON object is answered by one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    task = json.loads(sys.argv[1])
    side, device = task["side"], task["device"]
    if side == "mlxrs_py":
        import mlxrs_py  # noqa: F401  (before MLX: the BLAS that serves it is chosen)
    import mlx.core as mx

    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    mx.eval(mx.zeros((8, 8), mx.bfloat16) + 1)  # the device is awake, as it is once a model is loaded
    mx.synchronize()
    answer = {"files": files, "prefill": prompts}[task["do"]](side, task)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def files(side: str, task: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Save and restore, timed."""
    import workload

    workload.cache_module(side)
    shape = workload.Shape(**task["shape"])
    caches = workload.filled(side, shape, task["n_tokens"]) if task["filled"] else []

    def answer(order: dict[str, Any]) -> dict[str, float]:
        file = Path(order["file"])
        start = time.perf_counter()
        kept = workload.save(side, file, caches) if order["do"] == "save" else workload.restore(side, file)
        elapsed = time.perf_counter() - start
        del kept  # what was made is freed outside of the time
        return {"seconds": elapsed}

    return answer


def prompts(side: str, task: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Prefill with the default model, timed."""
    import workload

    model = workload.small_model(Path(task["folder"]))

    def answer(order: dict[str, Any]) -> dict[str, float]:
        tokens = workload.random_tokens(order["n_tokens"])
        start = time.perf_counter()
        workload.prefill(side, model, tokens, order["step_size"])
        return {"seconds": time.perf_counter() - start}

    return answer


if __name__ == "__main__":
    main()
