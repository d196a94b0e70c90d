"""``mlxrs-py verify`` and ``mlxrs-py convert``: what they print, write and refuse."""

import json

import pytest

from mlxrs_py import _core
from mlxrs_py.cache import KVCache, RotatingKVCache, load_prompt_cache, save_prompt_cache
from mlxrs_py.cli import main
from raw_files import Raw, Tensor, good, write
from tiny import MAKERS, ONLY_032, feed, leaves


@pytest.fixture
def saved(tmp_path):
    save_prompt_cache(tmp_path / "p", [feed(KVCache(), 3), feed(RotatingKVCache(8), 12)], {"model": "m"})
    return tmp_path / "p.safetensors"


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(good("0.32", "KVCache").content()[:-1])
    return path


def test_verify_prints_one_line_a_file_and_says_by_its_exit_whether_all_are_good(saved, bad, tmp_path, capsys):
    assert main(["verify", str(saved), str(saved.with_suffix(""))]) == 0
    assert capsys.readouterr().out.splitlines() == [f"ok   {saved}: mlx-lm 0.32, 2 caches, 0.0 MB"] * 2
    assert main(["verify", str(bad), str(saved), str(tmp_path / "missing")]) == 1
    captured = capsys.readouterr()
    first, second, third = captured.out.splitlines()
    assert first.startswith(f"bad  {bad}: 0.") and ": expected data_offsets within" in first
    assert second.startswith(f"ok   {saved}: ")
    assert third.startswith("bad  ") and str(tmp_path / "missing") in third and captured.err == ""


def test_verify_gives_json(saved, bad, capsys):
    assert main(["verify", "--json", str(saved), str(bad)]) == 1
    first, second = json.loads(capsys.readouterr().out)
    n_bytes = 2 * 2 * 32 * 4 * (3 + 12)
    assert first == {"file": str(saved), "ok": True, "format": "0.32", "caches": 2, "n_bytes": n_bytes}
    assert second["file"] == str(bad) and second["ok"] is False and second["error"].startswith(f"{bad}: ")


def test_verify_writes_out_what_would_steer_a_terminal(tmp_path, capsys):
    file = good("0.32", "KVCache")
    file.meta["1.0"] = "\x1b[2J\nok"
    assert main(["verify", str(write(tmp_path, file.content()))]) == 1
    assert r"\x1b[2J\nok" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "p.safetensors")]) == 1
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("first", ["0.31", "0.32"])
@pytest.mark.parametrize("name", sorted(set(MAKERS) - ONLY_032))
def test_a_cache_that_was_converted_there_and_back_is_the_same(name, first, tmp_path):
    make = MAKERS[name]
    for cache in (make(), feed(make(), 5, 1, 300, 1)):
        save_prompt_cache(tmp_path / "p", [cache, KVCache()], {"model": "m"}, format=first)
        for file, layout in (("q", "0.31"), ("r", "0.32"), ("s", "0.31")):
            source = {"q": "p", "r": "q", "s": "r"}[file]
            assert main(["convert", str(tmp_path / source), str(tmp_path / file), "--format", layout]) == 0
            assert _core.inspect_file(tmp_path / file)["format"] == layout
            (loaded, empty), metadata = load_prompt_cache(tmp_path / file, return_metadata=True)
            assert type(loaded) is type(cache) and metadata == {"model": "m"} and empty.empty()
            assert leaves(loaded.state[2:]) == leaves(cache.state[2:]) and loaded.empty() == cache.empty()
            if not cache.empty():
                assert leaves(loaded.keys_and_values()) == leaves(cache.keys_and_values())


def test_convert_says_what_it_wrote(saved, tmp_path, capsys):
    assert main(["convert", str(saved), str(tmp_path / "q"), "--format", "0.31"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'q.safetensors'}: mlx-lm 0.31, 0.0 MB\n"
    file, n_bytes = _core.convert_file(saved, saved, "0.31", durable=False)
    assert file == saved and n_bytes == saved.stat().st_size
    assert saved.read_bytes() == (tmp_path / "q.safetensors").read_bytes()


def test_nested_metadata_is_kept(tmp_path):
    file = good("0.32", "KVCache")
    file.meta |= {"0.a.b": "c", "0.a.d.0": "x", "0.a.d.1": "y"}
    path = write(tmp_path, file.content())
    for layout in ("0.31", "0.32"):
        path, _ = _core.convert_file(path, tmp_path / layout, layout)
        _, metadata = load_prompt_cache(path, return_metadata=True)
        assert metadata == {"model": "m", "a": {"b": "c", "d": ["x", "y"]}}


def test_what_format_031_cannot_say_is_told_in_one_line(tmp_path, capsys):
    ring = Raw("0.32")
    ring.meta |= {"1.0": "QuantizedRotatingKVCache", "2.0": ""}
    ring.put("0", (None, None, 0, 0, 8, 0, 32, 4))
    padded = Raw("0.32")
    padded.meta |= {"1.0": "ArraysCache", "2.0": ""}
    padded.put("0", ((Tensor("F32", [1, 2]),), Tensor("I32", [1]), None))
    for file, words in ((ring, "a class that format 0.31 has"), (padded, "no left_padding and no lengths")):
        path = write(tmp_path, file.content())
        assert main(["convert", str(path), str(tmp_path / "q"), "--format", "0.31"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("mlxrs-py: convert: expected layer 0: ") and words in error and error.count("\n") == 1
        assert not (tmp_path / "q.safetensors").exists()
        assert main(["convert", str(path), str(tmp_path / "r"), "--format", "0.32"]) == 0


def test_convert_needs_a_format(saved):
    for flags in ([], ["--format", "0.30"]):
        with pytest.raises(SystemExit) as stopped:
            main(["convert", str(saved), "q", *flags])
        assert stopped.value.code == 2
    with pytest.raises(ValueError, match=r"format: expected '0.32' or '0.31'"):
        _core.convert_file(saved, "q", "0.30")
