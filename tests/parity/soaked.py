"""Many requests to one server, and whether what it holds stays flat under its limits."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .life import Life, Request
from .watched import Caps, Watched, watched

#: Clients at once: some requests share a batch, others wait.
N_CLIENTS = 3


@dataclass
class Soak:
    """What was asked and what was held meanwhile."""

    caps: Caps
    #: In order; ``n`` is how many requests had been answered.
    samples: list[dict[str, Any]] = field(default_factory=list)
    #: Requests of each kind, and tokens of prompts and how many of them were cached.
    counts: Counter[str] = field(default_factory=Counter)

    def fifth(self, name: str, number: int) -> float:
        """Give the median of what was held in a fifth of the run, 0 to 4."""
        n = len(self.samples)
        return statistics.median(sample[name] for sample in self.samples[number * n // 5 : (number + 1) * n // 5])

    def most(self, name: str) -> int:
        """Give the most that was ever held."""
        return max(sample[name] for sample in self.samples)

    def faults(self, growth: float = 1.05) -> list[str]:
        """Tell what held more in the last fifth of the run than in the second one, or was above its limit ever.

        Args:
            growth: How much more bytes may be, as a factor; of files and threads two more may be open.

        """
        found = []
        for name in ("rss", "active", "threads", "files"):
            before, after = self.fifth(name, 1), self.fifth(name, 4)
            most = before + 2 if name in ("threads", "files") else before * growth
            if after > most:
                found.append(f"{name}: expected at most {most:.0f} in the last fifth, got {after:.0f}")
        limits = {"cache_bytes": self.caps.cache_bytes, "cache_size": self.caps.cache_size}
        if "disk" in self.samples[0]:
            limits |= {"disk": self.caps.disk_bytes, "ram": self.caps.ram_bytes}
        for name, limit in limits.items():
            if self.most(name) > limit:
                found.append(f"{name}: expected at most {limit} in every sample, got {self.most(name)}")
        return found


def soak(
    model: Path, folder: Path | None, caps: Caps, n_requests: int, *, every: int, alone: float = 0.3, seed: int = 1
) -> Soak:
    """Send requests, and look at the server after each ``every`` of them; without a folder mlx-lm's as it is."""
    run = Soak(caps)
    lock = threading.Lock()
    n_begun = 0

    def client(number: int) -> None:
        nonlocal n_begun
        life = Life(seed=1000 * seed + number, alone=alone)
        while True:
            with lock:
                if n_begun == n_requests:
                    return
                n_begun += 1
            request = life.next()
            answer, usage = ask(server.server.address, request)
            life.answered(request, answer)
            with lock:
                run.counts.update({request.kind: 1, "alone": "seed" in request.options, **usage})
                run.counts["n"] += 1
                if run.counts["n"] % every == 0:
                    run.samples.append({**looked_at(server), "n": run.counts["n"], "seconds": time.monotonic() - start})
                    run.samples[-1]["cached_tokens"] = run.counts["cached_tokens"]

    options = ("--prefill-step-size", "128")
    with watched(model, folder, caps, *options) as server, ThreadPoolExecutor(N_CLIENTS) as clients:
        start = time.monotonic()
        for done in [clients.submit(client, number) for number in range(N_CLIENTS)]:
            done.result()
    return run


def looked_at(server: Watched) -> dict[str, Any]:
    """Give a sample as flat numbers."""
    sample = server.sample()
    store = sample.pop("store")
    if store is not None:
        sample["ram"] = store["ram_bytes"]
        for name in ("evicted", "written", "written_bytes", "hits", "misses", "disk_records", "quarantined"):
            sample[name] = store[name]
        sample |= store["decisions"]
        assert store["disk"] == "on", store["disk"]
    return sample


def ask(address: str, request: Request) -> tuple[str, dict[str, int]]:
    """Send a request; give the answer and its tokens. A client that leaves hears only how it begins."""
    is_text = isinstance(request.messages, str)
    body = {"prompt" if is_text else "messages": request.messages, "max_tokens": 6, **request.options}
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    try:
        path = "/v1/completions" if is_text else "/v1/chat/completions"
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{request.kind}: expected status 200, got {response.status}: {response.read()[:300]!r}")
        if request.is_left:
            next(line for line in response if line.startswith(b"data"))
            return "", {}
        answer = json.loads(response.read())
    finally:
        connection.close()
    usage = answer["usage"]
    choice = answer["choices"][0]
    text = choice["text"] if is_text else choice["message"].get("content") or ""
    return text, {
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
    }
