"""mlx-lm's server on a store, in this process: what is found again, and that answers stay what they were."""

import importlib
import time

import pytest

import mlxrs_py
from mlxrs_py.serving import StoredPromptCache

from .local_server import local_server
from .reference import server
from .tiny_folders import save, words
from .tiny_models import SHAPES

generate = importlib.import_module("mlx_lm.generate")

pytestmark = pytest.mark.usefixtures("without_compiling")

every_shape = pytest.mark.parametrize("name", SHAPES)
both_paths = pytest.mark.parametrize("alone", [False, True], ids=["batched", "alone"])
#: Layers with states that cannot be cut: they are found where one was kept.
RECURRENT = {"mamba", "mamba2", "qwen3_next", "jamba", "falcon_h1", "lfm2", "recurrent_gemma"}

STEP, BLOCK = 32, 16
OPTIONS = ("--prefill-step-size", str(STEP), "--log-level", "ERROR")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give the folder of a tiny model, made once."""
    made = {}

    def folder(name, seed=7):
        if (name, seed) not in made:
            made[name, seed] = save(name, tmp_path_factory.mktemp("models") / name, seed)
        return made[name, seed]

    return folder


@pytest.fixture
def store():
    with mlxrs_py.PromptStore(disk_bytes=0, block_tokens=BLOCK) as store:
        yield store


def user(text):
    return {"role": "user", "content": text}


def chat(n_words=150, start=0):
    return [{"role": "system", "content": words(70, 5000)}, user(words(n_words, start))]


def n_tokens(*messages):
    # A role and an end around each, and the answer's role.
    return sum(len(m["content"].split()) + 2 for m in messages) + 1


def options_of(alone):
    return {"seed": 1} if alone else {}


def forget(server):
    """Leave the store alone to know anything, as after a restart."""
    server.prompt_cache.trim_to(n_sequences=0)


@every_shape
@both_paths
def test_what_memory_has_lost_comes_from_the_store(name, alone, folder, store):
    model, messages, options = folder(name), chat(), options_of(alone)
    edited = [messages[0], user(messages[1]["content"] + " " + words(9, 300))]
    shared = [messages[0], user(words(30, 900))]
    found = []
    with mlxrs_py.install(store=store), local_server(model, *OPTIONS) as server:
        first = server.ask(messages, **options)
        grown = [*messages, {"role": "assistant", "content": first.text}, user(words(20, 700))]
        for again in (messages, edited, grown, shared):
            forget(server)
            found.append(server.ask(again, **options))
    total, system = n_tokens(*messages), n_tokens(messages[0]) - 1
    n_cached = [answer.n_cached for answer in found]
    assert first.n_cached == 0
    assert n_cached[0] == total - 1
    # A message's end and the answer's role do not follow in the longer message. Chunks of batches begin at segments.
    begin = 0 if alone else system + 1
    last_chunk = begin + (total - 2 - begin) // STEP * STEP
    assert n_cached[1] == (last_chunk if name in RECURRENT else total - 2)
    assert total - 1 < n_cached[2] <= total + len(first.tokens)
    # The end of the system prompt is a boundary in batches only. Its user's role is common too.
    # Of the states at the ends of chunks before it some are thinned out.
    assert n_cached[3] in (((32, 64) if alone else (system + 1,)) if name in RECURRENT else (system + 1,))
    with mlxrs_py.install(), local_server(model, *OPTIONS, "--prompt-cache-size", "0") as server:
        cold = [server.ask(again, **options).tokens for again in (messages, edited, grown, shared)]
    assert [answer.tokens for answer in found] == cold


@every_shape
def test_prompts_of_unequal_lengths_at_once_are_stored_as_they_are(name, folder, store):
    model = folder(name)
    chats = [chat(n_words, 100 * n_words) for n_words in (150, 7, 64)]
    with mlxrs_py.install(store=store), local_server(model, *OPTIONS) as server:
        begun = [server.begin(messages) for messages in chats]
        first = [server.end(one) for one in begun]
        forget(server)
        again = [server.ask(messages) for messages in chats]
    assert [a.n_cached for a in again] == [n_tokens(*messages) - 1 for messages in chats]
    assert [a.tokens for a in again] == [a.tokens for a in first]


@both_paths
def test_an_exact_repeat_of_all_that_was_said_leaves_one_token(alone, folder, store):
    """Of states that cannot be cut, memory has only those after this very prompt; mlx-lm's server dies of it."""
    for name, n_cached in (("qwen3", 55), ("mamba2", 49)):
        text = words(50)
        with mlxrs_py.install(store=store), local_server(folder(name), *OPTIONS) as server:
            first = server.ask(text, **options_of(alone))
            again = server.ask(f"{text} {first.text}", **options_of(alone))
        assert len(first.tokens) == 6 and again.n_cached == n_cached


def test_a_model_that_is_loaded_on_request_has_prompts_of_its_own(folder, store):
    one, other = folder("qwen3"), folder("qwen3", seed=8)
    with mlxrs_py.install(store=store), local_server(one, *OPTIONS) as server:
        found = [server.ask(words(50), model=str(model)) for model in (one, other, one, other)]
        forget(server)
        assert server.ask(words(50), model=str(one)).n_cached == 49
    assert [answer.n_cached for answer in found] == [0, 0, 49, 49]
    assert found[0].tokens == found[2].tokens != found[1].tokens == found[3].tokens


@both_paths
def test_whatever_fails_in_the_store_is_logged_and_the_request_is_answered(alone, folder, store, monkeypatch, caplog):
    model, options = folder("qwen3"), options_of(alone)
    with mlxrs_py.install(), local_server(model, *OPTIONS) as server:
        expected = server.ask(words(50), **options).tokens

    def fail(*_, **__):
        raise OSError("no such luck")

    with mlxrs_py.install(store=store), local_server(model, *OPTIONS) as server:
        for name in ("lookup", "restore", "recorder"):
            monkeypatch.setattr(mlxrs_py.store.View, name, fail)
            forget(server)
            assert server.ask(words(50), **options).tokens == expected
            assert "no such luck" in caplog.text
            caplog.clear()
            monkeypatch.undo()
            server.ask(words(50), **options)
    monkeypatch.setattr(mlxrs_py.PromptStore, "view", fail)
    with mlxrs_py.install(store=store), local_server(model, *OPTIONS) as server:
        assert server.ask(words(50), **options).tokens == expected
        assert "are not stored" in caplog.text


def test_a_store_that_was_closed_meanwhile_fails_no_request(folder):
    with (
        mlxrs_py.PromptStore(disk_bytes=0) as store,
        mlxrs_py.install(store=store),
        local_server(folder("qwen3"), *OPTIONS) as server,
    ):
        first = server.ask(words(50))
        store.close()
        forget(server)
        assert server.ask(words(50)).tokens == first.tokens


@both_paths
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "mamba2"])
def test_damaged_records_are_computed_again(name, alone, folder, tmp_path):
    model, options = folder(name), options_of(alone)
    with (
        mlxrs_py.PromptStore(tmp_path / "store", block_tokens=BLOCK) as store,
        mlxrs_py.install(store=store),
        local_server(model, *OPTIONS) as server,
    ):
        first = server.ask(chat(), **options)
    records = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.stat().st_size > 600]
    records = [path for path in records if "index" not in path.name]
    for path in records:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert len(records) > 9
    with (
        mlxrs_py.PromptStore(tmp_path / "store", block_tokens=BLOCK) as store,
        mlxrs_py.install(store=store),
        local_server(model, *OPTIONS) as server,
    ):
        again = server.ask(chat(), **options)
        forget(server)
        last = server.ask(chat(), **options)
    assert again.tokens == first.tokens == last.tokens
    assert again.n_cached == 0 and last.n_cached == n_tokens(*chat()) - 1


@both_paths
def test_the_limit_of_the_store_holds(alone, folder, tmp_path):
    limit = 8_000_000
    with (
        mlxrs_py.PromptStore(tmp_path / "store", disk_bytes=limit) as store,
        mlxrs_py.install(store=store),
        local_server(folder("qwen3"), *OPTIONS) as server,
    ):
        for start in range(60):
            server.ask(words(300, 1000 * start), **options_of(alone))
            assert store.stats()["disk_bytes"] <= limit
        while store.stats()["queued_bytes"]:
            time.sleep(0.01)
            assert store.stats()["disk_bytes"] <= limit
        assert store.stats()["disk_records"] > 20
        # More than fits beside the index: some had to go.
        assert store.stats()["written_today"] > limit


@both_paths
def test_what_is_computed_faster_than_restored_is_computed(alone, folder, store):
    """The server measures what a prompt takes; how fast restores are is set here."""
    messages, options = chat(), options_of(alone)
    n_all = n_tokens(*messages) - 1

    def decided(restores_per_second):
        forget(server)
        for _ in range(200):
            store._core.note_rate("restore", restores_per_second)
        return server.ask(messages, **options).n_cached, store.stats()["decisions"]

    with mlxrs_py.install(store=store), local_server(folder("qwen3"), "--prefill-step-size", "512") as server:
        server.ask(messages, **options)
        assert store.stats()["decisions"] == {"restored": 0, "recomputed": 0, "missed": 1}
        assert decided(1e-3) == (0, {"restored": 0, "recomputed": 1, "missed": 1})
        # What memory has needs no decision.
        assert server.ask(messages, **options).n_cached == n_all
        assert decided(1e15) == (n_all, {"restored": 1, "recomputed": 1, "missed": 1})
        # One restore in 16 is tried all the same: what was slow once may be so no longer.
        found = [decided(1e-3)[0] for _ in range(16)]
        assert sorted(found) == [0] * 15 + [n_all]


@both_paths
@pytest.mark.parametrize("start", [0, 100])
def test_quantized_caches_are_stored_as_they_are(alone, start, folder, store):
    quantized = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", str(start))
    with mlxrs_py.install(store=store), local_server(folder("qwen3"), *OPTIONS, *quantized) as server:
        first = [server.ask(words(n), **options_of(alone)) for n in (60, 150)]
        forget(server)
        again = [server.ask(words(n), **options_of(alone)) for n in (60, 150)]
    assert [a.tokens for a in again] == [a.tokens for a in first]
    assert [a.n_cached for a in again] == [59, 149]
    # Another way to quantize, and none, are other caches.
    for options in ((*quantized[:-1], "40"), ()):
        with mlxrs_py.install(store=store), local_server(folder("qwen3"), *OPTIONS, *options) as server:
            assert server.ask(words(150), **options_of(alone)).n_cached < 149


def test_requests_with_a_draft_model_go_past_the_store(folder, store, caplog):
    model = folder("qwen3")
    with mlxrs_py.install(store=store), local_server(model, *OPTIONS, "--draft-model", str(model)) as server:
        first = server.ask(words(50))
        assert server.ask(words(50)).n_cached == 49
        forget(server)
        assert server.ask(words(50)) == first
    assert "draft model" in caplog.text


@both_paths
def test_the_limits_of_memory_hold(alone, folder, store):
    """mlx-lm looks at its limit of bytes only when a request joins a batch."""
    model = folder("qwen3")
    with mlxrs_py.install(store=store):
        with local_server(model, *OPTIONS) as server:
            server.ask(words(100), **options_of(alone))
            n_bytes = server.prompt_cache.nbytes
        limits = ("--prompt-cache-bytes", str(2 * n_bytes), "--prompt-cache-size", "3")
        with local_server(model, *OPTIONS, *limits) as server:
            for start in range(5):
                server.ask(words(100, 1000 * start), **options_of(alone))
                assert server.prompt_cache.nbytes <= 2 * n_bytes and len(server.prompt_cache) <= 3


def test_images_go_past_the_store(store):
    """mlx-lm's server marks them by numbers below 0."""

    class Memory(mlxrs_py.cache.LRUPromptCache):
        pass

    cache = StoredPromptCache(Memory(), lambda _: pytest.fail("asked the store"))
    cache.insert_cache("model", [1, 2, -70], [mlxrs_py.cache.KVCache()])
    assert cache.fetch_nearest_cache("model", [5, -71]) == (None, [5, -71])


def test_the_end_of_install_leaves_mlx_lm_as_it_was(store):
    owners = (server, server.ModelProvider, server.ResponseGenerator, generate.PromptProcessingBatch)
    before = [dict(vars(owner)) for owner in owners]
    with mlxrs_py.install(store=store):
        assert [dict(vars(owner)) for owner in owners] != before
    assert [dict(vars(owner)) for owner in owners] == before


def test_one_store_at_a_time_is_installed(store, tmp_path):
    with (
        mlxrs_py.install(store=store),
        mlxrs_py.install(store=store),
        mlxrs_py.install(),
        pytest.raises(ValueError, match="installed already"),
    ):
        mlxrs_py.install(store=tmp_path)
    with mlxrs_py.install(store=tmp_path / "a"), mlxrs_py.install(store=tmp_path / "a"):
        pass


def test_a_store_is_for_the_tested_mlx_lm_only(store, monkeypatch):
    monkeypatch.setattr("mlx_lm.__version__", "0.33.0")
    with pytest.raises(ValueError, match=r"0\.33\.0"):
        mlxrs_py.install(store=store, any_version=True)


def test_mlx_lms_server_ends_with_an_exact_repeat_of_all_that_was_said(folder, caplog):
    with pytest.raises(RuntimeError, match="generation thread died"), local_server(folder("qwen3"), *OPTIONS) as server:
        first = server.ask(words(50))
        server.ask(f"{words(50)} {first.text}")
    assert "empty prompt" in caplog.text
