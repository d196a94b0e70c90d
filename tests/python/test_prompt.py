"""The driver: a prompt into a file."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

import mlxrs_py
from mlxrs_py.cache import KVCache, QuantizedKVCache, RotatingKVCache, load_prompt_cache
from mlxrs_py.prompt import META_CONFIG_BLAKE3, META_TOKENS, META_TOKENS_BLAKE3, model_fingerprint
from tiny import TinyModel

TOKENS = list(range(1, 24))


def test_the_prompt_is_in_the_file_and_the_info_tells_what_it_cost(tmp_path):
    info = mlxrs_py.cache_prompt_ids(
        TinyModel(), TOKENS, tmp_path / "p", model_id="m", tokenizer_config='{"a": 1}', step_size=5
    )
    assert info.tokens_processed == len(TOKENS)
    assert info.file == tmp_path / "p.safetensors"
    assert info.n_bytes == info.file.stat().st_size
    assert info.seconds > 0 and info.tokens_per_second > 0 and info.peak_memory > 0
    assert dataclasses.is_dataclass(info)
    caches, metadata = load_prompt_cache(info.file, return_metadata=True)
    assert [type(c) for c in caches] == [KVCache, KVCache]
    assert [c.offset for c in caches] == [len(TOKENS)] * 2
    assert metadata["model"] == "m"
    assert metadata["tokenizer_config"] == '{"a": 1}'
    assert metadata[META_TOKENS] == str(len(TOKENS))


def test_a_later_question_gets_the_logits_of_an_undisturbed_run(tmp_path):
    model, question = TinyModel(), [30, 31, 32]
    mlxrs_py.cache_prompt_ids(model, TOKENS, tmp_path / "p", step_size=8)
    warm = mlxrs_py.prefill(model, question, load_prompt_cache(tmp_path / "p"))
    caches = mlxrs_py.cache.make_prompt_cache(model)
    mlxrs_py.prefill(model, TOKENS, caches, step_size=8)
    assert mx.array_equal(warm, mlxrs_py.prefill(model, question, caches))


def test_tokens_may_be_a_list_or_an_array_and_hash_alike(tmp_path):
    hashes = set()
    for i, tokens in enumerate([TOKENS, np.array(TOKENS), np.array(TOKENS, np.uint16), mx.array(TOKENS)]):
        info = mlxrs_py.cache_prompt_ids(TinyModel(), tokens, tmp_path / str(i))
        hashes.add(load_prompt_cache(info.file, return_metadata=True)[1][META_TOKENS_BLAKE3])
    assert len(hashes) == 1
    other = mlxrs_py.cache_prompt_ids(TinyModel(), TOKENS[:-1], tmp_path / "other")
    assert load_prompt_cache(other.file, return_metadata=True)[1][META_TOKENS_BLAKE3] not in hashes


@pytest.mark.parametrize("tokens", [[], np.array([], np.int32), [[1, 2]], [1.5, 2.0]])
def test_a_prompt_that_is_none_is_refused_before_any_work(tmp_path, tokens):
    model = TinyModel()
    with pytest.raises(ValueError, match="cache_prompt_ids"):
        mlxrs_py.cache_prompt_ids(model, tokens, tmp_path / "p")
    assert model.windows == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata", [{"": "x"}, {"a.b": "x"}, {"7": "x"}, {1: "x"}, {"a": 1}])
def test_metadata_that_the_format_would_change_is_refused_before_any_work(tmp_path, metadata):
    model = TinyModel()
    with pytest.raises((ValueError, TypeError), match="metadata"):
        mlxrs_py.cache_prompt_ids(model, TOKENS, tmp_path / "p", metadata=metadata)
    assert model.windows == []
    assert list(tmp_path.iterdir()) == []


def test_the_drivers_metadata_wins(tmp_path):
    metadata = {"model": "a lie", "tokenizer_config": "a lie", META_TOKENS: "0", "mine": "kept"}
    info = mlxrs_py.cache_prompt_ids(TinyModel(), TOKENS, tmp_path / "p", model_id="m", metadata=metadata)
    found = load_prompt_cache(info.file, return_metadata=True)[1]
    assert (found["model"], found["tokenizer_config"], found[META_TOKENS], found["mine"]) == ("m", "{}", "23", "kept")
    assert metadata["model"] == "a lie"


def test_a_config_says_how_the_caches_are_made(tmp_path):
    config = mlxrs_py.CacheConfig(2, sliding_window=16)
    info = mlxrs_py.cache_prompt_ids(TinyModel(), TOKENS, tmp_path / "p", config=config, step_size=4)
    caches = load_prompt_cache(info.file)
    assert [(type(c), c.max_size, c.keep, c.offset) for c in caches] == [(RotatingKVCache, 16, 0, 23)] * 2


def test_max_kv_size_keeps_the_first_four_tokens(tmp_path):
    info = mlxrs_py.cache_prompt_ids(TinyModel(), TOKENS, tmp_path / "p", max_kv_size=16)
    assert [(c.max_size, c.keep) for c in load_prompt_cache(info.file)] == [(16, 4)] * 2


def test_caches_are_quantized_on_the_way(tmp_path):
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 10, "step_size": 8}
    info = mlxrs_py.cache_prompt_ids(TinyModel(), TOKENS, tmp_path / "p", **options)
    caches = load_prompt_cache(info.file)
    assert [(type(c), c.bits, c.group_size, c.offset) for c in caches] == [(QuantizedKVCache, 8, 32, 23)] * 2


def test_caches_are_fresh_for_every_prompt(tmp_path):
    model = TinyModel()
    for name, n in [("four", 4), ("two", 2)]:
        mlxrs_py.cache_prompt_ids(model, TOKENS[:n], tmp_path / name)
        assert [c.offset for c in load_prompt_cache(tmp_path / name)] == [n, n]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_what_stops_the_prefill_leaves_the_old_file(tmp_path, stop):
    info = mlxrs_py.cache_prompt_ids(TinyModel(), TOKENS, tmp_path / "p")
    before = info.file.read_bytes()

    def progress(done, total):
        if done > 8:
            raise stop

    with pytest.raises(stop):
        mlxrs_py.cache_prompt_ids(TinyModel(), TOKENS[:20], tmp_path / "p", step_size=4, progress=progress)
    assert info.file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_folder_as_target_is_refused_and_untouched(tmp_path):
    target = tmp_path / "t.safetensors"
    target.mkdir()
    with pytest.raises(IsADirectoryError):
        mlxrs_py.cache_prompt_ids(TinyModel(), TOKENS, target)
    assert list(target.iterdir()) == []
    assert list(tmp_path.iterdir()) == [target]


def test_both_formats_are_written(tmp_path):
    for layout in ("0.31", "0.32"):
        info = mlxrs_py.cache_prompt_ids(TinyModel(), TOKENS, tmp_path / layout, format=layout)
        assert mlxrs_py._core.inspect_file(info.file)["format"] == layout
    with pytest.raises(ValueError, match="format"):
        mlxrs_py.cache_prompt_ids(TinyModel(), TOKENS, tmp_path / "x", format="0.30")


def test_the_tokens_hash_is_blake3_of_64_bit_integers(tmp_path):
    info = mlxrs_py.cache_prompt_ids(TinyModel(), [1, 2, 60], tmp_path / "p")
    expected = mlxrs_py._core.blake3_hex(np.array([1, 2, 60], "<i8").tobytes())
    assert load_prompt_cache(info.file, return_metadata=True)[1][META_TOKENS_BLAKE3] == expected
    # The known hash of nothing at all.
    assert mlxrs_py._core.blake3_hex(b"").startswith("af1349b9f5f9a1a6a0404dea36dcc949")


def test_the_fingerprint_tells_models_apart_by_layers_dtype_and_weights():
    plain = model_fingerprint(TinyModel())
    assert plain == model_fingerprint(TinyModel())
    half, tuned = TinyModel(), TinyModel()
    half.set_dtype(mx.bfloat16)
    tuned.out.weight = tuned.out.weight + 1e-3
    others = [half, tuned, TinyModel(n_layers=3), TinyModel(seed=4)]
    assert len({plain, *map(model_fingerprint, others)}) == 5


def test_a_plain_callable_has_no_fingerprint_and_none_is_invented(tmp_path):
    model = TinyModel()

    def call(tokens, cache):
        return model(tokens, cache)

    assert model_fingerprint(call) is None
    info = mlxrs_py.cache_prompt_ids(
        call,
        TOKENS,
        tmp_path / "p",
        config=mlxrs_py.CacheConfig(2),
        metadata={META_CONFIG_BLAKE3: "a lie"},
    )
    assert META_CONFIG_BLAKE3 not in load_prompt_cache(info.file, return_metadata=True)[1]


def test_a_missing_folder_is_told_before_any_work(tmp_path):
    model = TinyModel()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        mlxrs_py.cache_prompt_ids(model, TOKENS, tmp_path / "none" / "p")
    assert model.windows == []


def test_an_empty_text_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="empty prompt"):
        mlxrs_py.cache_prompt(tmp_path / "no-model", "", tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real_model
def test_a_text_goes_through_the_chat_template_of_a_model_folder(tmp_path):
    import tiny_llama
    from mlxrs_py.prompt import chat_prompt, load_model, question_prompt

    folder = tiny_llama.make(tmp_path / "model")
    seen = []
    info = mlxrs_py.cache_prompt(
        folder,
        "Hello",
        tmp_path / "p",
        eos_token="!",
        metadata={"model": "a lie", "mine": "kept"},
        step_size=8,
        progress=lambda done, total: seen.append((done, total)),
    )
    model, tokenizer = load_model(folder)
    ids = chat_prompt(tokenizer, "Hello")
    assert tokenizer.decode(ids) == "<|im_start|>user\nHello"
    assert tokenizer.decode(question_prompt(tokenizer, "?")) == "?<|im_end|>\n<|im_start|>assistant\n"
    assert info.tokens_processed == len(ids) == 11
    assert seen == [(0, 11), (8, 11), (10, 11), (11, 11)]
    caches, metadata = load_prompt_cache(info.file, return_metadata=True)
    assert metadata["model"] == str(folder) and metadata["mine"] == "kept"
    assert metadata["tokenizer_config"] == '{"trust_remote_code": false, "eos_token": "!"}'
    assert metadata[META_CONFIG_BLAKE3] == model_fingerprint(model)
    fresh = mlxrs_py.cache.make_prompt_cache(model)
    mlxrs_py.prefill(model, ids, fresh, step_size=8)
    for ours, direct in zip(caches, fresh, strict=True):
        assert mx.array_equal(ours.state[0], direct.state[0])


@pytest.mark.real_model
def test_remote_code_is_trusted_only_if_asked(tmp_path, monkeypatch):
    import mlx_lm

    class LoadedError(Exception):
        pass

    def load(path, *, adapter_path, tokenizer_config, trust_remote_code):
        seen.append((path, adapter_path, tokenizer_config["trust_remote_code"], trust_remote_code))
        raise LoadedError

    seen = []
    monkeypatch.setattr(mlx_lm, "load", load)
    for options in ({}, {"trust_remote_code": True, "adapter_path": "a"}):
        with pytest.raises(LoadedError):
            mlxrs_py.cache_prompt("m", "Hello", tmp_path / "p", **options)
    assert seen == [("m", None, False, False), ("m", "a", True, True)]
