"""``mlxrs-py store``, and the commands that fill a store and answer from it."""

import json
import os
import pty
import subprocess
import sys

import mlxrs_py

# isort: split
# Before this, the BLAS that serves MLX was chosen.
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxrs_py.cache import load_prompt_cache
from mlxrs_py.cli import main
from mlxrs_py.store.plot import plot
from tiny import TinyModel

needs_mlx_lm = pytest.mark.real_model

PROMPT = [(7 * i * i + 3 * i) % 61 for i in range(600)]


@pytest.fixture
def folder(tmp_path):
    with mlxrs_py.PromptStore(tmp_path / "store", block_tokens=256) as store:
        model = TinyModel()
        view = store.view(model)
        for prompt in (PROMPT, PROMPT[:300] + PROMPT[:100]):
            view.prefill(model, prompt, step_size=128)
    return tmp_path / "store"


def run(capsys, *arguments):
    """Give the exit code and what was printed."""
    code = main(["store", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def as_json(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


def leaves(cache):
    return [array for _, array in tree_flatten(cache.state)]


def test_records_are_listed_parents_first(folder, capsys):
    records = as_json(capsys, "ls", "--store", folder)
    assert (records[0]["start"], records[0]["end"]) == (0, 256)
    code, out, err = run(capsys, "ls", "--store", folder)
    # In a pipe there is no head.
    assert (code, err, len(out.splitlines())) == (0, "", len(records))
    assert records[0]["id"][:12] in out and "0-256" in out


def test_numbers_are_told(folder, capsys):
    facts = as_json(capsys, "stats", "--store", folder)
    assert facts["disk_records"] == len(as_json(capsys, "ls", "--store", folder))
    _, out, _ = run(capsys, "stats", "--store", folder)
    assert facts["models"] == 1 and facts["pinned"] == 0
    assert "disk records" in out and " kB" in out


def test_verify_finds_a_damaged_byte_and_repairs(folder, capsys):
    assert as_json(capsys, "verify", "--store", folder)["sound"]
    record = max(
        (path for path in folder.rglob("*") if path.is_file() and "index" not in path.name),
        key=lambda p: p.stat().st_size,
    )
    with record.open("r+b") as file:
        file.seek(record.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    code, out, _ = run(capsys, "verify", "--store", folder)
    assert code == 1 and record.name in out
    run(capsys, "verify", "--repair", "--store", folder)
    assert run(capsys, "verify", "--store", folder)[0] == 0


def test_what_is_pinned_stays_when_room_is_made(folder, capsys):
    first = as_json(capsys, "ls", "--store", folder)[0]["id"]
    assert as_json(capsys, "pin", first[:10], "--store", folder) == {"records": 1}
    # For a program that did not ask nothing is printed.
    assert run(capsys, "prune", "--to", "1kB", "--store", folder) == (0, "", "")
    assert [r["id"] for r in as_json(capsys, "ls", "--store", folder)] == [first]
    assert as_json(capsys, "unpin", first[:10], "--store", folder) == {"records": 1}
    assert as_json(capsys, "prune", "--to", "0", "--store", folder)["bytes"] > 0
    assert run(capsys, "ls", "--store", folder) == (0, "", "")
    code, _, err = run(capsys, "pin", "00", "--store", folder)
    assert code == 1 and "00" in err


@pytest.mark.parametrize("action", ["ls", "stats", "verify"])
def test_looking_at_a_store_takes_nothing_out(action, folder, capsys):
    with mlxrs_py.PromptStore(folder, disk_bytes=3 << 20) as store:
        before = [record["id"] for record in store.ls()]
    # A limit that the store is beyond, as one that was put there by hand.
    (folder / "limit").write_text(str(2 << 20))
    facts = as_json(capsys, action, "--store", folder)
    if action == "stats":
        assert facts["disk_limit"] == 2 << 20
    with mlxrs_py.PromptStore(folder, read_only=True) as store:
        assert [record["id"] for record in store.ls()] == before


def test_a_store_keeps_its_limit(folder, capsys):
    assert as_json(capsys, "stats", "--store", folder)["disk_limit"] == 32 << 30
    mlxrs_py.PromptStore(folder, disk_bytes=3 << 20).close()
    assert as_json(capsys, "stats", "--store", folder)["disk_limit"] == 3 << 20
    with mlxrs_py.PromptStore(folder) as store:
        assert store.stats()["disk_limit"] == 3 << 20
    assert as_json(capsys, "prune", "--store", folder) == {"bytes": 0}


def test_clear_asks_first(folder, capsys):
    before = as_json(capsys, "ls", "--store", folder)
    code, _, err = run(capsys, "clear", "--store", folder)
    assert code == 1 and "--yes" in err
    for answer, n_left in ((b"n\n", len(before)), (b"y\n", 0)):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "mlxrs_py", "store", "clear", "--store", str(folder)]
        with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            os.write(ours, answer)
            process.communicate(timeout=100)
        os.close(ours)
        os.close(theirs)
        assert process.returncode == (1 if n_left else 0)
        assert len(as_json(capsys, "ls", "--store", folder)) == n_left


def test_clear_with_yes_does_not_ask(folder, capsys):
    assert run(capsys, "clear", "--yes", "--store", folder) == (0, "", "")
    assert as_json(capsys, "ls", "--store", folder) == []


@pytest.mark.parametrize("action", ["ls", "stats", "verify", "prune", "clear"])
def test_a_missing_store_is_an_error_and_is_not_made(action, tmp_path, capsys):
    code, out, err = run(capsys, action, "--store", tmp_path / "none")
    assert (code, out) == (1, "") and len(err.splitlines()) == 1 and "none" in err
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_one_is_told_with_its_reason(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir(mode=0o700)
    (tmp_path / "notes" / "a.txt").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "format").write_text("")
    (tmp_path / "open").chmod(0o777)
    for name, words in (
        ("file", "Not a directory"),
        ("empty", "No prompt store there"),
        ("notes", "expected an empty folder or a prompt store, got a folder with a.txt"),
        ("open", "expected a folder that only its owner may write to, got one with mode 777"),
    ):
        code, _, err = run(capsys, "ls", "--store", tmp_path / name)
        assert code == 1 and words in err and err.count(str(tmp_path / name)) == 1
    assert list((tmp_path / "empty").iterdir()) == []
    with pytest.raises(NotADirectoryError):
        mlxrs_py.PromptStore(tmp_path / "file")


@pytest.mark.parametrize("action", ["ls", "stats", "verify"])
def test_a_store_that_cannot_be_written_to_can_be_looked_at(action, folder, capsys, monkeypatch):
    def files():
        # Where it can, SQLite makes files beside the index to read it.
        paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("index.sqlite-")]
        return {path: path.stat().st_mtime_ns for path in paths}

    before = files()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert as_json(capsys, action, "--store", folder)
    assert files() == before


def test_the_tree_of_prefixes_is_drawn(folder, capsys, tmp_path):
    # Where matplotlib runs for the first time it may say so.
    code, _, _ = run(capsys, "stats", "--plot", tmp_path / "tree.png", "--store", folder)
    assert code == 0
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("hits", [0, 5])
def test_a_picture_needs_no_hits_and_no_parents(hits, tmp_path):
    facts = {"space": "5e", "bytes": 10, "hits": hits, "used": 0.0, "pinned": True, "tier": "ram"}
    rows = {**facts, "id": "a", "parent": "gone", "kind": "rows", "start": 256, "end": 512}
    state = {**facts, "id": "b", "parent": "a", "kind": "state", "start": 256, "end": 300}
    for records in ([], [rows], [rows, state], [state]):
        plot(records, tmp_path / "tree.svg")
        assert "<svg" in (tmp_path / "tree.svg").read_text()


def test_without_matplotlib_the_extra_is_named(folder, capsys, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, "stats", "--plot", tmp_path / "tree.png", "--store", folder)
    assert code == 1 and "pip install 'mlxrs_py[bench]'" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--prompt", "x"], "--store"),
        (["generate", "--prompt", "x", "--store", "a", "--prompt-cache-file", "b"], "not allowed"),
        (["cache-prompt", "--prompt", "x"], "at least one of --prompt-cache-file and --store"),
        (["cache-prompt", "--prompt", "x", "--store", "a", "--metadata", "k=v"], "need --prompt-cache-file"),
        (["cache-prompt", "--prompt", "x", "--store", "a", "--max-kv-size", "9"], "--max-kv-size does not go with"),
        (["store"], "COMMAND"),
        (["store", "prune", "--to", "much"], "500MB"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err


@needs_mlx_lm
def test_a_prompt_that_was_cached_in_a_store_answers_from_it(tmp_path, capsys):
    text = "Alice has a red bicycle. Bob has a blue car. " * 8
    place = ["--store", str(tmp_path / "store")]
    assert main(["cache-prompt", "--prompt", text, "--no-progress", *place]) == 0
    answers = []
    for _ in range(2):
        assert main(["generate", "--prompt", text + "Who has a car?", "-m", "8", "--json", *place]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    first, again = answers
    assert 80 < first["cached_tokens"] < first["prompt_tokens"]
    assert again["cached_tokens"] == again["prompt_tokens"] - 2
    assert again["text"] == first["text"] and "Bob" in first["text"]


@needs_mlx_lm
@pytest.mark.parametrize("quantized", [[], ["--kv-bits", "8"]], ids=["plain", "quantized"])
def test_a_prompt_goes_into_a_file_and_a_store_in_one_call(quantized, tmp_path, capsys):
    text = "Alice has a red bicycle. Bob has a blue car. " * 8
    command = ["cache-prompt", "--prompt", text, "--store", str(tmp_path / "store"), *quantized]
    outputs = []
    for name in ("first", "again"):
        place = ["--prompt-cache-file", str(tmp_path / name), "--metadata", f"name={name}"]
        assert main([*command, *place]) == 0
        outputs.append(capsys.readouterr().err)
    n_tokens = int(outputs[0].split("tokens in")[0].split()[-1])
    assert ", 0 of them were there" in outputs[0] and f", {n_tokens - 1} of them were there" in outputs[1]
    assert "first.safetensors and in " in outputs[0]
    files = [load_prompt_cache(tmp_path / name, return_metadata=True) for name in ("first", "again")]
    assert [metadata["name"] for _, metadata in files] == ["first", "again"]
    for a, b in zip(*(caches for caches, _ in files), strict=True):
        assert type(a) is type(b) and a.offset == b.offset == n_tokens
        assert (getattr(a, "bits", None) == 8) == bool(quantized)
        for x, y in zip(leaves(a), leaves(b), strict=True):
            assert mx.array_equal(x, y)
    ask = ["generate", "--prompt", " Who has a car?", "-m", "8", "--json"]
    assert main([*ask, "--prompt-cache-file", str(tmp_path / "again")]) == 0
    assert "Bob" in json.loads(capsys.readouterr().out)["text"]


@pytest.mark.parametrize("more", [{"max_kv_size": 64}, {"config": mlxrs_py.CacheConfig(2)}])
def test_a_store_takes_whole_prompts_only(more, tmp_path):
    model = TinyModel()
    with mlxrs_py.PromptStore(disk_bytes=0) as store, pytest.raises(ValueError, match="got both"):
        mlxrs_py.cache_prompt_ids(model, PROMPT, tmp_path / "file", view=store.view(model), **more)
    assert not list(tmp_path.iterdir())
