"""``mlx_lm.server`` as a process, with our caches or mlx-lm's, and a count of whose ran."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import mlxrs_py

#: Counts calls while the command line runs, and prints them when Ctrl-C has ended it. Then no destructor runs: those of
#: MLX's threads may abort the process, mlx-lm's too.
OURS = """
import json, os, sys
from mlxrs_py import cache as ours
from mlx_lm.models import cache as theirs
from mlxrs_py.cli import main
from mlxrs_py.install import CLASSES
from parity.spy import calls

classes = [getattr(module, name) for module in (ours, theirs) for name in CLASSES] + [ours.BatchQuantizedKVCache]
with calls(classes) as counts:
    code = main(["run", "mlx_lm.server", *sys.argv[1:]])
print(json.dumps({f"{cls.__module__}.{cls.__name__}.{name}": n for (cls, name), n in counts.items()}), flush=True)
os._exit(code)
"""
#: Ours is imported for its BLAS, so that both sides have the same one.
THEIRS = """
import os, sys
import mlxrs_py
from mlx_lm.server import main

main()
print("{}", flush=True)
os._exit(0)
"""


class Server:
    """Requests to a server that runs; ``counts``, by full name of the method, is there when it has ended."""

    def __init__(self, port: int, process: subprocess.Popen[str]) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.process = process
        self.counts: dict[str, int] = {}

    def kill(self) -> None:
        """End it as a power cut would, with no chance to write anything."""
        self.process.kill()
        self.process.wait()

    def is_up(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5):
            return True
        return False

    def complete(self, prompt: str, on_line: Any = None, **options: Any) -> tuple[str, int]:
        """Give the text, streamed or not, and how many tokens of the prompt were cached."""
        parts = self._parts("completions", {"prompt": prompt, **options}, on_line)
        text = "".join(choice["text"] for part in parts for choice in part["choices"])
        return text, parts[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]

    def chat(self, messages: list[dict[str, str]], **options: Any) -> tuple[str, int, int]:
        """Give the answer, how many tokens of the prompt were cached, and how many it has."""
        part = self._parts("chat/completions", {"messages": messages, **options}, None)[0]
        usage = part["usage"]
        text = part["choices"][0]["message"].get("content") or ""
        return text, usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

    def _parts(self, path: str, options: dict[str, Any], on_line: Any) -> list[dict[str, Any]]:
        body = {"max_tokens": 6, "stream_options": {"include_usage": True}, **options}
        request = urllib.request.Request(f"{self.address}/v1/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=280) as response:
            lines = []
            for line in response:
                lines.append(line.decode())
                if on_line is not None:
                    on_line()
        if options.get("stream"):
            lines = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
            assert len(lines) > 2
        return [json.loads(line) for line in lines]


def wait_for_writes(folder: Path, seconds: float = 1.5) -> None:
    """Wait until nothing new has come into a store for so long: servers write behind their answers."""
    with mlxrs_py.PromptStore(folder, read_only=True) as store:
        seen, since = store.ls(), time.monotonic()
        while time.monotonic() - since < seconds or not seen:
            time.sleep(0.1)
            if len(now := store.ls()) != len(seen):
                seen, since = now, time.monotonic()


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


@contextlib.contextmanager
def serve(code: str, *arguments: str) -> Iterator[Server]:
    """Run the server on a free port until the end of the block, unless it was killed by then."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", code, *arguments, "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    pipe = subprocess.PIPE
    # A pipe would be full after some hundreds of requests, each of which is logged.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process,
    ):
        server = Server(port, process)
        try:
            while not server.is_up():
                assert process.poll() is None, _text(errors)
                time.sleep(0.1)
            yield server
            if process.poll() == -signal.SIGKILL:
                return
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, _text(errors)
        finally:
            process.kill()
    server.counts = json.loads(output.splitlines()[-1])
