"""What a store gives back continues as the run that stored it, bit for bit, for every shape of caches."""

import mlx.core as mx
import pytest

import mlxrs_py

from . import tiny_models
from .tiny_models import tokens
from .twins import leaves

every_shape = pytest.mark.parametrize("name", tiny_models.SHAPES)
#: Layers with states that cannot be cut: a prompt that goes another way can only go back to where one was kept.
RECURRENT = {"mamba", "mamba2", "qwen3_next", "jamba", "falcon_h1", "lfm2", "recurrent_gemma"}

STEP, BLOCK, N_STEPS = 32, 16, 20
PROMPT = tokens(150)


@pytest.fixture(params=["ram", "disk"])
def store(request, tmp_path):
    on_disk = {"path": tmp_path / "store", "disk_bytes": 1 << 30} if request.param == "disk" else {"disk_bytes": 0}
    with mlxrs_py.PromptStore(**on_disk, block_tokens=BLOCK) as store:
        yield store


def steps(model, logits, caches, n=N_STEPS):
    """Give the bytes of the logits of greedy steps, and the tokens."""
    seen, ids = [leaves([logits])], []
    for _ in range(n):
        ids.append(mx.argmax(logits, axis=-1).item())
        logits = model(mx.array([ids[-1:]]), cache=caches)[:, -1, :]
        seen.append(leaves([logits]))
    return seen, ids


def cold(view, model, prompt, **options):
    logits, caches, n_restored = view.prefill(model, prompt, step_size=STEP, policy="recompute", **options)
    assert n_restored == 0
    return logits, caches


@every_shape
def test_an_exact_repeat_computes_one_token_and_continues_as_before(name, store):
    model = tiny_models.make(name)
    view = store.view(model)
    expected = steps(model, *cold(view, model, PROMPT))
    logits, caches, n_restored = view.prefill(model, PROMPT, step_size=STEP, policy="restore")
    assert n_restored == len(PROMPT) - 1
    assert steps(model, logits, caches) == expected


@every_shape
@pytest.mark.parametrize("exact", [False, True])
def test_a_longer_prompt_goes_on_where_the_stored_one_ends(name, store, exact):
    model = tiny_models.make(name)
    view = store.view(model)
    cold(view, model, PROMPT)
    longer = PROMPT + tokens(60)[1:]
    _, _, n_restored = view.prefill(model, longer, step_size=STEP, policy="restore", exact=exact)
    # On the grid the last full window ends at 128; else all but what the last block's records say.
    assert n_restored == (128 if exact else len(PROMPT))
    logits, caches, n_restored = view.prefill(model, longer, step_size=STEP, policy="restore", exact=exact)
    other = mlxrs_py.PromptStore(disk_bytes=0, block_tokens=BLOCK).view(model)
    if exact:
        assert n_restored == (len(longer) - 1) // STEP * STEP
        assert steps(model, logits, caches) == steps(model, *cold(other, model, longer))


@every_shape
def test_a_prompt_that_goes_another_way_keeps_what_is_common(name, store):
    model = tiny_models.make(name)
    view = store.view(model)
    cold(view, model, PROMPT)
    edited = PROMPT[:110] + [(t + 1) % tiny_models.VOCABULARY for t in PROMPT[110:]]
    found = view.lookup(edited, step_size=STEP)
    logits, caches, n_restored = view.prefill(model, edited, step_size=STEP, policy="restore")
    assert n_restored == found.n_tokens == (96 if name in RECURRENT else 110)
    if n_restored % STEP == 0:
        other = mlxrs_py.PromptStore(disk_bytes=0, block_tokens=BLOCK).view(model)
        assert steps(model, logits, caches) == steps(model, *cold(other, model, edited))


@every_shape
def test_a_conversation_that_was_put_goes_on_as_it_would_have(name, store):
    model = tiny_models.make(name)
    view = store.view(model)
    logits, caches = cold(view, model, PROMPT)
    _, answer = steps(model, logits, caches)
    view.put(PROMPT + answer, caches).result()
    prompt = PROMPT + answer + tokens(9)
    expected = model(mx.array([prompt[len(PROMPT) + len(answer) :]]), cache=caches)[:, -1, :]
    restored, n_tokens = view.restore(prompt)
    assert n_tokens == len(PROMPT) + len(answer)
    logits = model(mx.array([prompt[n_tokens:]]), cache=restored)[:, -1, :]
    assert steps(model, logits, restored) == steps(model, expected, caches)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "gpt_oss"])
def test_off_the_grid_the_bits_are_those_of_other_windows(name, store):
    assert mlxrs_py.build_info()["blas"], "reference BLAS gives equal bits for any windows and shows nothing"
    model = tiny_models.make(name)
    view = store.view(model)
    view.prefill(model, PROMPT[:41], step_size=STEP)
    assert not view.lookup(PROMPT, step_size=STEP).exact
    off_grid, _, n_restored = view.prefill(model, PROMPT, step_size=STEP, policy="restore")
    assert n_restored == 41
    on_grid, _, n_restored = view.prefill(model, PROMPT, step_size=STEP, policy="restore", exact=True)
    assert n_restored == STEP
    logits, _ = cold(mlxrs_py.PromptStore(disk_bytes=0, block_tokens=BLOCK).view(model), model, PROMPT)
    assert leaves([on_grid]) == leaves([logits])
    assert leaves([off_grid]) != leaves([logits])
