import pytest

from mlxrs_py.cache import KVCache, RotatingKVCache, load_prompt_cache, save_prompt_cache
from tiny import feed, leaves


@pytest.fixture
def file(tmp_path):
    save_prompt_cache(tmp_path / "p", [feed(KVCache(), 300), feed(RotatingKVCache(8), 11)])
    return tmp_path / "p"


def test_the_number_of_threads_changes_nothing(file, monkeypatch):
    alone = [leaves(cache.state) for cache in load_prompt_cache(file, threads=1)]
    assert [leaves(cache.state) for cache in load_prompt_cache(file, threads=5)] == alone
    monkeypatch.setenv("MLXRS_PY_THREADS", "3")
    assert [leaves(cache.state) for cache in load_prompt_cache(file)] == alone


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_cannot_read(file, threads):
    with pytest.raises(ValueError, match=f"threads of at least 1, got {threads}"):
        load_prompt_cache(file, threads=threads)


@pytest.mark.parametrize("text", ["0", "many", ""])
def test_a_variable_that_is_no_number_of_threads_is_refused(file, monkeypatch, text):
    monkeypatch.setenv("MLXRS_PY_THREADS", text)
    with pytest.raises(ValueError, match="MLXRS_PY_THREADS of at least 1"):
        load_prompt_cache(file)
    assert load_prompt_cache(file, threads=2)[0].offset == 300
