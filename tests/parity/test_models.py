"""Models of every shape of caches, tiny and random: the same logits on our caches as on mlx-lm's, bit for bit."""

import copy
import random
from contextlib import nullcontext
from functools import partial

import mlx.core as mx
import pytest

import mlxrs_py
import mlxrs_py.cache as ours

from . import tiny_models
from .reference import BatchGenerator, cache, model_module
from .spy import calls
from .stops import Stop, lines_until
from .tiny_models import leaf_caches, tokens
from .twins import leaves

pytestmark = pytest.mark.usefixtures("without_compiling")
every_shape = pytest.mark.parametrize("name", tiny_models.SHAPES)

PROMPT = tokens(50)
CHUNKS = [PROMPT[:16], PROMPT[16:32], PROMPT[32:49], PROMPT[49:]]
N_STEPS = 20


class Watched:
    """A model that keeps its logits and the states of its caches, and sees every cache written at every call."""

    def __init__(self, name):
        self.model = tiny_models.make(name)
        self.logits, self.states, self.classes = [], [], set()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, inputs, cache):
        before = [leaves(c.state) for c in leaf_caches(cache)]
        logits = self.model(inputs, cache=cache)
        after = [leaves(c.state) for c in leaf_caches(cache)]
        assert all(old != new for old, new in zip(before, after, strict=True))
        self.logits.append(leaves([logits]))
        self.states.append([leaves(c.state) for c in cache])
        self.classes.update(map(type, [*cache, *leaf_caches(cache)]))
        return logits


def run(model, caches):
    """Run the prompt in chunks, then greedy steps; give all logits ``(n, V)``."""
    windows = [model(mx.array([chunk]), cache=caches) for chunk in CHUNKS]
    for _ in range(N_STEPS):
        windows.append(model(mx.argmax(windows[-1][:, -1:], axis=-1), cache=caches))
    return mx.concatenate(windows, axis=1)[0]


def same(mine, other):
    assert mine.classes == {getattr(ours, c.__name__) for c in other.classes}
    assert len(mine.logits) == len(mine.states) == len(other.states) > N_STEPS
    assert mine.logits == other.logits
    assert mine.states == other.states


def on_both(name, use):
    """Use a model on mlx-lm's caches, and its twin while ours are installed: logits and caches must be the same."""
    other = Watched(name)
    result = use(other)
    with mlxrs_py.install(), calls(other.classes) as of_theirs:
        mine = Watched(name)
        assert use(mine) == result
    assert not of_theirs
    same(mine, other)


@every_shape
def test_logits_and_states_of_every_window_are_those_with_mlx_lms_caches(name):
    on_both(name, lambda model: leaves([run(model, cache.make_prompt_cache(model))]))


@every_shape
def test_logits_and_states_on_adopted_caches_are_those_with_mlx_lms(name):
    mine, other = Watched(name), Watched(name)
    run(mine, ours.make_prompt_cache(mine))
    run(other, cache.make_prompt_cache(other))
    same(mine, other)


@every_shape
def test_logits_and_states_of_every_batch_are_those_with_mlx_lms_caches(name):
    """Prompts of unequal lengths, one of them added while the others generate, and each ends at its own time."""

    def use(model):
        generator, said = BatchGenerator(model, prefill_step_size=16), []
        generator.insert([tokens(50), tokens(5, 50), tokens(33, 60)], max_tokens=[N_STEPS, 9, 14])
        while any(responses := generator.next()):
            for answer in responses[1]:
                held = answer.prompt_cache or []
                said.append((answer.uid, answer.token, leaves([c.state for c in held])))
                model.classes.update(map(type, [*held, *leaf_caches(held)]))
            if len(said) == 9:
                generator.insert([tokens(20, 100)], max_tokens=[12])
        generator.close()
        return said

    if name == "llama4":
        for context in (nullcontext(), mlxrs_py.install()):
            with context, pytest.raises(ValueError, match="ChunkedKVCache'> does not yet support batching"):
                use(tiny_models.make(name))
    else:
        on_both(name, use)


@every_shape
def test_a_tiny_model_says_something_and_depends_on_all_of_its_caches(name):
    model = tiny_models.make(name)
    caches = cache.make_prompt_cache(model)
    logits = run(model, caches)
    assert mx.isfinite(logits).all().item()
    assert min(logits.std(axis=axis).min().item() for axis in (0, 1)) > 0.1

    def say(caches):
        return leaves([model(mx.array([PROMPT[:1]]), cache=caches)])

    said = say(copy.deepcopy(caches))
    for i in range(len(leaf_caches(caches))):
        disturbed = copy.deepcopy(caches)
        leaf = leaf_caches(disturbed)[i]
        leaf.state = [negative(entry) for entry in leaf.state]
        assert say(disturbed) != said


def negative(entry):
    """Negate arrays, alone and in a list."""
    if isinstance(entry, list):
        return [negative(e) for e in entry]
    return -entry if isinstance(entry, mx.array) else entry


@pytest.mark.parametrize("whose", ["ours", "mlx-lm's"])
@every_shape
def test_a_prefill_stopped_inside_a_model_goes_on_from_the_end_of_a_window(name, whose):
    model, rng, done = tiny_models.make(name), random.Random(name), [0]
    file = model_module(name).__file__

    def go_on(caches, rest):
        """Run the rest of the prompt, and then once more all of it; give the logits and what is held."""
        logits = [mlxrs_py.prefill(model, part, caches, step_size=16) for part in (rest, PROMPT) if part]
        return leaves(logits), [leaves(c.state) for c in caches]

    def lines(limit, caches):
        run = partial(mlxrs_py.prefill, model, PROMPT, caches, step_size=16, progress=lambda n, _: done.append(n))
        return lines_until(limit, file, run)

    expected = go_on(cache.make_prompt_cache(model), PROMPT)
    with mlxrs_py.install() if whose == "ours" else nullcontext():
        n_lines = lines(0, cache.make_prompt_cache(model))
        for _ in range(4):
            caches = cache.make_prompt_cache(model)
            with pytest.raises(Stop):
                lines(rng.randint(1, n_lines), caches)
            assert go_on(caches, PROMPT[done[-1] :]) == expected
