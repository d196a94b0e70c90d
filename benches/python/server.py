"""Time to the first token of mlx-lm's server after it was killed, beside a cold one: ``server.py [--tokens N]``.

Each run, in turns: a server with an empty store answers a prompt and is killed with SIGKILL; it is started again and
gets the same prompt; killed and started again, the prompt with 40 tokens more. A short prompt of its own warms each
server up first, so that loading the model counts for none.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import mlxrs_py
from mlxrs_py.default_model import default_model_path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from parity.reference import load
from parity.served import OURS, THEIRS, Server, serve, wait_for_writes

N_MORE = 40


def first_token(server: Server, prompt: str) -> tuple[float, int]:
    """Give the seconds until the first part of the answer is here, and the tokens that were cached."""
    body = {"prompt": prompt, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=600)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    first, usage = 0.0, None
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            part = json.loads(line[6:])
            if not first and any(choice.get("text") for choice in part["choices"]):
                first = time.perf_counter() - start
            usage = part.get("usage") or usage
    assert first and usage
    return first, usage["prompt_tokens_details"]["cached_tokens"]


def run(code: str, options: list[str], store: str, prompt: str, n_run: int) -> tuple[float, int]:
    with serve(code, *options) as server:
        first_token(server, f"Hello number {n_run}")
        found = first_token(server, prompt)
        if code == OURS:
            wait_for_writes(Path(store))
        server.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    info = mlxrs_py.build_info()
    model = default_model_path()
    _, tokenizer = load(str(model))
    text = " ".join(f"Paper {i} is sorted by colour." for i in range(arguments.tokens))
    ids = tokenizer.encode(text)
    prompt, longer = (tokenizer.decode(ids[:n]) for n in (arguments.tokens, arguments.tokens + N_MORE))
    print(
        f"mlxrs_py {info['version']}, mlx {info['mlx']}, {info['device']}, BLAS {info['blas']}; default model, "
        f"{len(tokenizer.encode(prompt))} tokens, {arguments.runs} runs"
    )
    told = ["--model", str(model), "--log-level", "ERROR"]
    times: dict[str, list[float]] = {}
    cached: dict[str, int] = {}
    for n_run in range(arguments.runs):
        with tempfile.TemporaryDirectory() as store:
            ours = [*told, "--prompt-store", store]
            for what, code, options, asked in (
                ("mlx-lm, cold", THEIRS, told, prompt),
                ("ours, cold", OURS, ours, prompt),
                ("ours, restarted, same prompt", OURS, ours, prompt),
                (f"ours, restarted, {N_MORE} tokens more", OURS, ours, longer),
            ):
                seconds, cached[what] = run(code, options, store, asked, n_run)
                times.setdefault(what, []).append(seconds)
    cold = min(times["ours, cold"])
    for what, seconds in times.items():
        figures = f"min {min(seconds):7.3f} s  median {statistics.median(seconds):7.3f} s"
        print(f"{what:34} {figures}  {cached[what]:5} tokens cached  {cold / min(seconds):5.1f} times as fast as cold")


if __name__ == "__main__":
    main()
