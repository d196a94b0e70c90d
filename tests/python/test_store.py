"""A prompt store, seen from Python: what is found, restored, stored and refused. Any model will do."""

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxrs_py
from mlxrs_py.cache import KVCache, RotatingKVCache
from tiny import MAKERS, TinyModel, feed, leaves

BLOCK, STEP = 16, 32
PROMPT = [(7 * i * i + 3 * i) % 61 for i in range(100)]


def make_store(**options):
    return mlxrs_py.PromptStore(**{"disk_bytes": 0, "block_tokens": BLOCK, **options})


@pytest.fixture(params=["ram", "disk"])
def store(request, tmp_path):
    options = {} if request.param == "ram" else {"path": tmp_path / "store", "disk_bytes": 1 << 30}
    with make_store(**options) as store:
        yield store


def run(view, model, prompt, **options):
    return view.prefill(model, prompt, step_size=STEP, **options)


def test_what_was_prefilled_is_found_and_the_rest_computed(store):
    model = TinyModel()
    view = store.view(model)
    assert view.lookup(PROMPT) == (0, 0, None, False, None)
    logits, caches, n_restored = run(view, model, PROMPT)
    assert (n_restored, model.windows, caches[0].offset) == (0, [32, 32, 32, 3, 1], 100)
    model.windows.clear()
    found = view.lookup(PROMPT, step_size=STEP)
    assert (found.n_tokens, found.exact) == (99, False)
    again, caches, n_restored = run(view, model, PROMPT, policy="restore")
    assert (n_restored, model.windows, caches[0].offset) == (99, [1], 100)
    assert leaves([logits]) == leaves([again])


@pytest.mark.parametrize("kind", [list, np.array, mx.array, tuple, lambda ids: np.array(ids, np.int32)])
def test_tokens_come_in_every_kind(store, kind):
    model = TinyModel()
    view = store.view(model)
    run(view, model, kind(PROMPT))
    assert view.lookup(kind(PROMPT)).n_tokens == view.restore(kind(PROMPT))[1] == 99


def test_a_miss_gives_fresh_caches(store):
    view = store.view(TinyModel())
    caches, n_tokens = view.restore(PROMPT)
    assert n_tokens == 0
    assert [type(c) for c in caches] == [KVCache, KVCache]
    assert all(c.empty() for c in caches)
    assert view.restore([])[1] == view.restore([3])[1] == 0


def test_the_windows_lie_on_the_grid_wherever_a_run_begins(store):
    model = TinyModel()
    view = store.view(model)
    run(view, model, PROMPT[:41])
    model.windows.clear()
    _, _, n_restored = run(view, model, PROMPT, policy="restore")
    assert (n_restored, model.windows) == (41, [23, 32, 3, 1])
    model.windows.clear()
    _, _, n_restored = run(view, model, PROMPT, policy="restore", exact=True)
    assert (n_restored, model.windows) == (32, [32, 32, 3, 1])


def test_records_of_full_windows_replace_those_of_others(store):
    model = TinyModel()
    view = store.view(model)
    run(view, model, PROMPT[:41])
    run(view, model, PROMPT, policy="restore")
    assert view.lookup(PROMPT, step_size=STEP, exact=True).n_tokens == 32
    run(view, model, PROMPT, policy="restore", exact=True)
    assert view.lookup(PROMPT, step_size=STEP, exact=True)[::3] == (96, True)
    assert view.lookup(PROMPT, step_size=16, exact=True).n_tokens == 0
    found = view.lookup(PROMPT[:97], step_size=STEP)
    assert (found.n_tokens, found.exact) == (96, True)


def test_a_put_that_does_not_fit_the_caches_is_refused(store):
    model = TinyModel()
    view = store.view(model)
    _, caches, _ = run(view, model, PROMPT)
    with pytest.raises(ValueError, match="cache 0 at token 99"):
        view.put(PROMPT[:99], caches)
    with pytest.raises(ValueError, match="expected 2 caches, got 1"):
        view.put(PROMPT, caches[:1])
    with pytest.raises(ValueError, match="cache 0 like KVCache, got RotatingKVCache"):
        view.put(PROMPT, [feed(RotatingKVCache(max_size=8), 100), caches[1]])
    with pytest.raises(TypeError, match="expected caches of mlxrs_py or mlx-lm, got object"):
        view.put(PROMPT, [object()])
    with pytest.raises(OverflowError, match="from 0 to 2\\^32 - 1, got -1"):
        view.put([-1], caches)


class Hooked(TinyModel):
    """A model that makes its own caches."""

    def __init__(self, make):
        super().__init__()
        self.make_cache = lambda: [make() for _ in self.layers]


@pytest.mark.parametrize("name", [n for n in MAKERS if not n.startswith("Batch")])
def test_every_class_with_rows_comes_back_as_it_was(store, name):
    model = Hooked(MAKERS[name])
    view = store.view(model)
    _, caches, _ = run(view, model, PROMPT)
    restored, n_tokens = view.restore([*PROMPT, 1])
    assert n_tokens == 100
    for _ in range(12):
        logits = [model(mx.array([[5]]), cache=each) for each in (caches, restored)]
        assert leaves([logits[0]]) == leaves([logits[1]])


def test_a_longer_record_without_all_rows_of_a_window_hides_no_shorter_one(store):
    model = Hooked(lambda: RotatingKVCache(max_size=8))
    view = store.view(model)
    _, caches, _ = run(view, model, PROMPT[:10])
    # Token by token a ring holds its window alone: none of these can be cut before its end.
    longer = model.make_cache()
    for n, token in enumerate(PROMPT[:BLOCK], start=1):
        model(mx.array([[token]]), cache=longer)
        if n in (14, BLOCK):
            view.put(PROMPT[:n], longer).result()
            restored, n_tokens = view.restore([*PROMPT[:12], 60, 60])
            assert n_tokens == view.lookup([*PROMPT[:12], 60, 60]).n_tokens == 10
            # One token less than there is.
            assert view.restore(PROMPT[:n])[1] == (10 if n == 14 else 14)
            assert view.restore(PROMPT[: n + 1])[1] == n
    for _ in range(12):
        logits = [model(mx.array([[5]]), cache=each) for each in (caches, restored)]
        assert leaves([logits[0]]) == leaves([logits[1]])


def test_records_that_were_made_smaller_come_back_as_they_were(tmp_path):
    model = TinyModel()
    sizes = []
    for compression in (None, "zstd"):
        folder = tmp_path / str(compression)
        with make_store(path=folder, disk_bytes=1 << 30, block_tokens=64, compression=compression) as store:
            _, caches, _ = run(store.view(model), model, PROMPT)
        # Whoever opens it need not know.
        with make_store(path=folder, disk_bytes=1 << 30, block_tokens=64) as store:
            restored, n_tokens = store.view(model).restore([*PROMPT, 1])
            assert n_tokens == 100 and store.verify()["sound"]
        assert [leaves(c.state) for c in restored] == [leaves(c.state) for c in caches]
        sizes.append(sum(file.stat().st_size for file in folder.glob("records/*")))
    assert sizes[1] < sizes[0]
    with pytest.raises(ValueError, match="compression 'zstd', or none, got 'gzip'"):
        make_store(compression="gzip")


@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_damaged_ends_a_restore_there(tmp_path, read_only):
    model = TinyModel()
    with make_store(path=tmp_path, disk_bytes=1 << 30) as store:
        run(store.view(model), model, PROMPT)
        second = store.ls()[1]["id"]
    (file,) = tmp_path.glob(f"records/{second}-*")
    with file.open("r+b") as bytes_of_it:
        bytes_of_it.seek(-40, os.SEEK_END)
        bytes_of_it.write(b"damaged!")
    with make_store(path=tmp_path, disk_bytes=1 << 30, read_only=read_only) as store:
        for _ in range(2):
            assert store.view(model).restore(PROMPT)[1] == BLOCK


@pytest.mark.parametrize("name", [n for n in MAKERS if n.startswith("Batch")])
def test_a_batch_is_refused(store, name):
    with pytest.raises(ValueError, match="expected caches of one sequence, got Batch"):
        store.view(Hooked(MAKERS[name]))


def test_quantized_prompts_are_kept_apart(store):
    model = TinyModel()
    plain, quantized = store.view(model), store.view(model, kv_bits=4, kv_group_size=32)
    run(plain, model, PROMPT)
    assert quantized.lookup(PROMPT).n_tokens == 0
    _, caches, _ = run(quantized, model, PROMPT)
    restored, n_tokens = quantized.restore([*PROMPT, 1])
    assert (n_tokens, restored[0].bits) == (100, 4)
    logits = [model(mx.array([[5]]), cache=each) for each in (caches, restored)]
    assert leaves([logits[0]]) == leaves([logits[1]])


def test_models_and_namespaces_are_kept_apart(store, tmp_path):
    model, other = TinyModel(), TinyModel(seed=4)
    run(store.view(model), model, PROMPT)
    assert store.view(TinyModel()).lookup(PROMPT).n_tokens == 99
    assert store.view(other).lookup(PROMPT).n_tokens == 0
    assert store.view(model, namespace="b").lookup(PROMPT).n_tokens == 0
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    by_file = store.view(model, source=tmp_path)
    run(by_file, model, PROMPT)
    assert store.view(model, source=weights).lookup(PROMPT).n_tokens == 99
    weights.write_bytes(b"two")
    assert store.view(model, source=tmp_path).lookup(PROMPT).n_tokens == 0


def test_a_model_that_nothing_tells_from_another_is_refused(store):
    class Opaque:
        layers = (1, 2)

    with pytest.raises(ValueError, match="pass source="):
        store.view(Opaque())
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        store.view(TinyModel(), source="no-such-model")


def test_an_interrupted_prefill_goes_on_at_its_last_window(store):
    model = TinyModel()
    view = store.view(model)

    def interrupt(done, total):
        if done == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(view, model, PROMPT, progress=interrupt)
    model.windows.clear()
    _, _, n_restored = run(view, model, PROMPT, policy="restore")
    assert (n_restored, model.windows) == (64, [32, 3, 1])


def test_the_policy_is_kept_to(store):
    model = TinyModel()
    view = store.view(model)
    run(view, model, PROMPT)
    assert run(view, model, PROMPT, policy="recompute")[2] == 0
    assert run(view, model, PROMPT, policy="restore")[2] == 99
    with pytest.raises(ValueError, match="expected a policy among auto, restore, recompute, got 'x'"):
        run(view, model, PROMPT, policy="x")
    with pytest.raises(ValueError, match="step_size of at least 1, got 0"):
        view.prefill(model, PROMPT, step_size=0)
    with pytest.raises(ValueError, match="at least one"):
        view.prefill(model, [])


def test_progress_counts_from_what_was_restored(store):
    model = TinyModel()
    view = store.view(model)
    run(view, model, PROMPT[:50])
    seen = []
    run(view, model, PROMPT, policy="restore", progress=lambda *at: seen.append(at))
    assert seen == [(50, 100), (64, 100), (96, 100), (99, 100), (100, 100)]


def test_threads_share_a_store(store):
    def work(seed):
        model = TinyModel()
        view = store.view(model)
        prompt = PROMPT[:40] + [seed] * 30
        with mx.stream(mx.new_stream(mx.default_device())):
            return leaves([run(view, model, prompt, policy="restore", exact=True)[0]])

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, [1, 2, 3, 1, 2, 3]))
    assert results[:3] == results[3:]
    assert threading.active_count() < 20


def test_what_is_stored_is_not_what_the_caches_become(store):
    model = TinyModel()
    view = store.view(model)
    _, caches, _ = run(view, model, PROMPT)
    expected = leaves([c.state for c in view.restore([*PROMPT, 1])[0]])
    model(mx.array([[1, 2, 3]]), cache=caches)
    mx.eval([c.state for c in caches])
    assert leaves([c.state for c in view.restore([*PROMPT, 1])[0]]) == expected


def test_a_forked_child_is_told(store):
    view = store.view(TinyModel())
    run(view, TinyModel(), PROMPT)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            view.restore(PROMPT)
        except mlxrs_py.MlxError:
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


#: Files may grow to 200 kB, which the index needs, and records do not fit.
FULL = """
import resource
import sys

import mlxrs_py
from tiny import TinyModel

resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
model, prompt = TinyModel(), [(7 * i * i + 3 * i) % 61 for i in range(600)]
with mlxrs_py.PromptStore(sys.argv[1]) as store:
    view = store.view(model)
    _, caches, _ = view.prefill(model, prompt, step_size=128)
    for _ in range(2):
        try:
            view.put(prompt, caches).result()
        except OSError as error:
            print(error.filename is not None and sys.argv[1] in error.filename)
    print(view.lookup(prompt).n_tokens)
"""


def test_a_put_tells_of_what_an_earlier_one_could_not_write(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    # It is in memory all the same.
    assert result.stdout.splitlines() == ["True", "True", "599"], result.stderr


def test_a_handle_waits_for_what_an_earlier_put_has_in_hand(tmp_path):
    model = TinyModel()
    with mlxrs_py.PromptStore(tmp_path / "store", block_tokens=16) as store:
        view = store.view(model)
        _, caches, _ = run(view, model, PROMPT)
        view.put(PROMPT, caches).result()
        stats = store.stats()
        assert (stats["ram_records"], stats["disk_records"]) == (0, 7)


def test_a_store_without_room_says_so_to_whoever_asks_for_its_prompt(tmp_path):
    model = TinyModel()
    with mlxrs_py.PromptStore(tmp_path / "store", block_tokens=16, write_bytes_per_day=10_000) as store:
        view = store.view(model)
        _, caches, _ = run(view, model, PROMPT)
        assert view.put(PROMPT, caches).result().n_in_memory > 0
        with pytest.raises(OSError, match="expected room under the store's limits") as raised:
            mlxrs_py.cache_prompt_ids(model, PROMPT, tmp_path / "file", view=view)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "store")
    assert (tmp_path / "file.safetensors").exists()
