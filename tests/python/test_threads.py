"""Threads and processes: where caches may go, and where MLX cannot follow."""

import multiprocessing
import subprocess
import sys
import threading

import mlx.core as mx
import pytest

import mlxrs_py
from mlxrs_py.cache import KVCache, load_prompt_cache, save_prompt_cache
from tiny import TinyModel, every_class, feed, leaves, noise


def elsewhere(work):
    """Run `work` in a new thread; give its result, or raise its exception."""
    outcome = {}

    def run():
        try:
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def step(cache):
    """One more token, evaluated."""
    rows = mx.ones((1, 2, 1, 32))
    mx.eval(cache.update_and_fetch(rows, rows), cache.state)
    return leaves(cache.state)


@every_class
def test_an_evaluated_cache_may_move_between_threads(make):
    cache, twin = feed(make(), 5, 1), feed(make(), 5, 1)
    mx.eval(cache.state, twin.state)
    for _ in range(4):
        assert elsewhere(lambda: step(cache)) == step(twin)
        assert step(cache) == step(twin)


@every_class
def test_a_lazy_cache_raises_in_another_thread_and_stays_usable_where_it_was_made(make):
    cache, twin = feed(make(), 5), feed(make(), 5)
    with pytest.raises(RuntimeError, match="no Stream"):
        elsewhere(lambda: mx.eval(cache.state))
    assert cache.offset == 5
    assert leaves(cache.state) == leaves(twin.state)
    assert step(cache) == step(twin)


def test_saving_a_lazy_cache_in_another_thread_raises_and_writes_nothing(tmp_path):
    cache = feed(KVCache(), 5)
    with pytest.raises(mlxrs_py.MlxError, match="no Stream"):
        elsewhere(lambda: save_prompt_cache(tmp_path / "p.safetensors", [cache]))
    assert list(tmp_path.iterdir()) == []
    save_prompt_cache(tmp_path / "p.safetensors", [cache])
    loaded = elsewhere(lambda: load_prompt_cache(tmp_path / "p.safetensors"))
    assert leaves(loaded[0].keys_and_values()) == leaves(cache.keys_and_values())


def test_a_prefill_that_cannot_evaluate_in_its_thread_puts_the_caches_back():
    lazy, model, caches = TinyModel(seed=4), TinyModel(), [KVCache(), KVCache()]
    lazy.update({"out": {"bias": mx.zeros((61,)) + 1}, "qkv": [{"bias": noise(1)[0, 0, 0, 0] + mx.zeros((192,))}] * 2})
    tokens = list(range(1, 10))
    mlxrs_py.prefill(model, tokens, caches, step_size=4)
    with pytest.raises(mlxrs_py.MlxError, match="no Stream"):
        elsewhere(lambda: mlxrs_py.prefill(lazy, tokens, caches, step_size=4))
    assert [c.offset for c in caches] == [9, 9]
    undisturbed = [KVCache(), KVCache()]
    mlxrs_py.prefill(model, tokens, undisturbed, step_size=4)
    expected = mlxrs_py.prefill(model, tokens, undisturbed, step_size=4)
    assert leaves([mlxrs_py.prefill(model, tokens, caches, step_size=4)]) == leaves([expected])


def test_prefill_works_in_any_one_thread():
    model, tokens = TinyModel(), list(range(1, 10))
    here = mlxrs_py.prefill(model, tokens, [KVCache(), KVCache()], step_size=4)
    there = elsewhere(lambda: mlxrs_py.prefill(model, tokens, [KVCache(), KVCache()], step_size=4))
    assert leaves([here]) == leaves([there])


def test_threads_with_caches_of_their_own_do_not_disturb_each_other():
    def work(seed):
        cache = KVCache()
        for i in range(60):
            rows = noise(1 + i % 7, seed=seed)
            mx.eval(cache.update_and_fetch(rows, rows))
        return leaves(cache.state)

    expected, found = [work(seed) for seed in range(4)], {}
    threads = [threading.Thread(target=lambda s=seed: found.update({s: work(s)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == expected


FORKED = """
import os, sys, pickle
import mlx.core as mx
import mlxrs_py
from mlxrs_py.cache import KVCache, QuantizedKVCache, load_prompt_cache, save_prompt_cache

target = sys.argv[1]
rows = mx.ones((1, 1, 3, 32)) * 2
evaluated, lazy = KVCache(), KVCache()
for cache in (evaluated, lazy):
    cache.update_and_fetch(rows, rows)
mx.eval(evaluated.state)
save_prompt_cache(target + "/before.safetensors", [evaluated])
model = lambda tokens, cache: mx.zeros((1, tokens.shape[1], 5))
attempts = {
    "prefill": lambda: mlxrs_py.prefill(model, [1, 2, 3], [KVCache()]),
    "save a lazy cache": lambda: save_prompt_cache(target + "/lazy.safetensors", [lazy]),
    "save an evaluated cache": lambda: save_prompt_cache(target + "/evaluated.safetensors", [evaluated]),
    "run a prompt into a file": lambda: mlxrs_py.cache_prompt_ids(model, [1, 2], target + "/prompt.safetensors",
                                                                 config=mlxrs_py.CacheConfig(1)),
}
sys.stdout.flush()
child = os.fork()
if child == 0:
    for name, attempt in attempts.items():
        try:
            attempt()
            print(name, "-> nothing was raised")
        except mlxrs_py.MlxError as error:
            print(name, "->", "spawn" if "`spawn`" in str(error) else error)
    print("offsets", evaluated.offset, lazy.offset, evaluated.trim(1), evaluated.nbytes)
    sys.stdout.flush()
    os._exit(0)
print("child", os.waitpid(child, 0)[1])
mx.eval(lazy.state)
print("parent", evaluated.offset, float(lazy.keys_and_values()[0].sum()))
print(sorted(os.listdir(target)))
"""


def test_in_a_forked_child_whatever_evaluates_raises_at_once(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.splitlines() == [
        "prefill -> spawn",
        "save a lazy cache -> spawn",
        "save an evaluated cache -> spawn",
        "run a prompt into a file -> spawn",
        "offsets 3 3 1 65536",
        "child 0",
        "parent 3 192.0",
        "['before.safetensors']",
    ]
    assert (result.returncode, result.stderr) == (0, "")


def continue_in_child(cache, connection):
    """Runs in a spawned process."""
    connection.send(step(cache))
    connection.close()


@every_class
def test_a_spawned_process_gets_a_cache_and_goes_on(make):
    cache = feed(make(), 5)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=continue_in_child, args=(cache, theirs))
    process.start()
    theirs.close()
    there = ours.recv()
    process.join()
    assert process.exitcode == 0
    assert there == step(cache)
