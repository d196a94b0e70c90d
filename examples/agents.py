"""Agents that share a system prompt, and ask a server at once: ``python examples/agents.py FOLDER [MODEL]``.

The server is mlx-lm's, on a store. Run it twice: the second time nobody computes the system prompt, although the server
is a new process.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from mlxrs_py.default_model import default_model_path

SYSTEM = "You are one of several clerks who sort papers. " + " ".join(
    f"Rule {i}: papers with number {i} go into drawer {i * 7 % 26}." for i in range(1, 30)
)
TASKS = ("Where does paper 3 go?", "Where does paper 11 go?", "Write a note to the other clerks.")


def ask(address: str, task: str) -> tuple[str, int, int]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task}]
    body = json.dumps({"messages": messages, "max_tokens": 20}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/chat/completions", body)) as response:
        answer = json.load(response)
    usage = answer["usage"]
    return (
        answer["choices"][0]["message"]["content"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["prompt_tokens"],
    )


def wait_for(address: str) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)


def main() -> None:
    folder = sys.argv[1]
    path = sys.argv[2] if len(sys.argv) > 2 else str(default_model_path())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlxrs_py", "run", "mlx_lm.server", "--model", path, "--port", str(port)]
    command += ["--prompt-store", folder, "--log-level", "ERROR"]
    with subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}) as server, ThreadPoolExecutor() as agents:
        try:
            wait_for(address)
            # One begins, so that the others find the system prompt.
            answers = [ask(address, TASKS[0]), *agents.map(lambda task: ask(address, task), TASKS[1:])]
        finally:
            server.terminate()
    for task, (answer, n_cached, n_tokens) in zip(TASKS, answers, strict=True):
        print(f"{task} [{n_cached} of {n_tokens} tokens were there]\n{answer}")


if __name__ == "__main__":
    main()
