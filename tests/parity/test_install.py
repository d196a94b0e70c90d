"""``mlxrs_py.install``: whose classes and functions mlx-lm finds, and when. Texts: see test_install_texts.py."""

import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import pytest

import mlxrs_py
import mlxrs_py.cache as ours
from mlxrs_py.install import CLASSES, FUNCTIONS

from .reference import base, generate_step, tiny_llama
from .reference import cache as theirs
from .spy import by_class, calls

SWAPPED = (*CLASSES, *FUNCTIONS)
ORIGINALS = {name: getattr(theirs, name) for name in SWAPPED}
CACHES = [cls for name in CLASSES for cls in (getattr(ours, name), ORIGINALS[name])]


def modules():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mlx_lm"}


def holders(values):
    """Tell which names in mlx-lm's modules mean one of these objects."""
    found = {id(value) for value in values}
    return {
        (name, key) for name, module in modules().items() for key, value in vars(module).items() if id(value) in found
    }


def is_installed():
    return theirs.KVCache is ours.KVCache


@pytest.fixture(autouse=True)
def nothing_installed():
    assert not is_installed()
    yield
    mlxrs_py.uninstall()


def test_the_table_names_all_that_mlx_lm_defines_there():
    defined = {
        name
        for name, value in vars(theirs).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == theirs.__name__
    }
    # dynamic_roll serves mlx-lm's own classes alone.
    assert defined - {"dynamic_roll"} == {*CLASSES, *FUNCTIONS} - {"create_causal_mask"}
    assert theirs.create_causal_mask is base.create_causal_mask


def test_every_class_and_function_is_swapped_and_comes_back():
    before = holders(ORIGINALS.values())
    assert ("mlx_lm.generate", "make_prompt_cache") in before and ("mlx_lm.models.llama", "KVCache") in before
    with mlxrs_py.install():
        for name in SWAPPED:
            assert getattr(theirs, name) is getattr(ours, name), name
        assert holders(ORIGINALS.values()) == set()
        assert holders(getattr(ours, name) for name in SWAPPED) == before
    assert {name: getattr(theirs, name) for name in SWAPPED} == ORIGINALS
    assert holders(ORIGINALS.values()) == before


def test_nothing_but_modules_and_annotations_holds_what_is_swapped():
    run = [sys.executable, str(Path(__file__).with_name("holders.py"))]
    result = subprocess.run(run, capture_output=True, text=True, timeout=280, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_a_module_imported_meanwhile_gets_ours_and_then_its_own():
    name = "mlx_lm.models.olmo3"
    sys.modules.pop(name, None)
    with mlxrs_py.install():
        module = import_module(name)
        assert module.KVCache is ours.KVCache and module.RotatingKVCache is ours.RotatingKVCache
    assert module.KVCache is ORIGINALS["KVCache"] and module.RotatingKVCache is ORIGINALS["RotatingKVCache"]


def test_a_second_call_changes_nothing_and_one_uninstall_ends_all():
    mlxrs_py.install()
    mlxrs_py.install()
    assert is_installed()
    mlxrs_py.uninstall()
    assert not is_installed()
    mlxrs_py.uninstall()
    assert not is_installed()


def test_a_block_inside_another_does_not_end_it():
    with mlxrs_py.install():
        with mlxrs_py.install():
            pass
        assert is_installed()
    assert not is_installed()


def test_a_block_does_not_end_what_was_installed_before():
    mlxrs_py.install()
    with mlxrs_py.install():
        pass
    assert is_installed()


def test_a_block_that_an_uninstall_overtook_ends_nothing():
    with mlxrs_py.install():
        mlxrs_py.uninstall()
        assert not is_installed()
        mlxrs_py.install()
    assert is_installed()


def test_a_block_ends_once():
    block = mlxrs_py.install()
    mlxrs_py.install()
    for _ in range(3):
        with block:
            pass
    assert is_installed()


def test_threads_may_install_at_once():
    faults = []

    def use():
        for _ in range(20):
            with mlxrs_py.install():
                if not is_installed():
                    faults.append("not installed inside of a block")

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and not is_installed()
    assert {name: getattr(theirs, name) for name in SWAPPED} == ORIGINALS


def test_another_version_is_refused_unless_told(monkeypatch):
    monkeypatch.setattr(sys.modules["mlx_lm"], "__version__", "0.33.0")
    with pytest.raises(ImportError, match=r"tested with mlx-lm 0\.32\.2, but mlx-lm 0\.33\.0 is installed"):
        mlxrs_py.install()
    assert not is_installed()
    with mlxrs_py.install(any_version=True):
        assert is_installed()


def test_a_model_runs_on_our_caches():
    model = tiny_llama()
    prompt = mx.array([1, 2, 3, 4, 5])
    expected = [token for token, _ in generate_step(prompt, model, max_tokens=8)]
    with mlxrs_py.install(), calls(CACHES) as counts:
        found = [token for token, _ in generate_step(prompt, model, max_tokens=8)]
        plain = by_class(counts)
        counts.clear()
        quantized = generate_step(prompt, model, max_tokens=8, kv_bits=4, kv_group_size=32, quantized_kv_start=0)
        assert len(list(quantized)) == 8
    assert found == expected
    assert plain.keys() == {"mlxrs_py.cache.KVCache"} and plain["mlxrs_py.cache.KVCache"] >= 4 * 9
    assert by_class(counts).keys() == {"mlxrs_py.cache.KVCache", "mlxrs_py.cache.QuantizedKVCache"}
