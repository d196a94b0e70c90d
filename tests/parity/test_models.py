"""Models of every shape of caches, tiny and random: the same logits on our caches as on mlx-lm's, bit for bit."""

import copy

import mlx.core as mx
import pytest

import mlxrs_py.cache as ours

from . import tiny_models
from .reference import cache as theirs
from .tiny_models import leaf_caches
from .twins import leaves

pytestmark = pytest.mark.usefixtures("without_compiling")
every_shape = pytest.mark.parametrize("name", tiny_models.SHAPES)

PROMPT = tiny_models.tokens(50)
CHUNKS = [PROMPT[:16], PROMPT[16:32], PROMPT[32:49], PROMPT[49:]]
N_STEPS = 20


class Watched:
    """A model that keeps its logits and the states of its caches, and sees every cache written at every call."""

    def __init__(self, name):
        self.model = tiny_models.make(name)
        self.logits, self.states, self.classes = [], [], set()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, tokens, cache):
        before = [leaves(c.state) for c in leaf_caches(cache)]
        logits = self.model(tokens, cache=cache)
        after = [leaves(c.state) for c in leaf_caches(cache)]
        assert all(old != new for old, new in zip(before, after, strict=True))
        self.logits.append(leaves([logits]))
        self.states.append([leaves(c.state) for c in cache])
        self.classes.update(map(type, leaf_caches(cache)))
        return logits


def run(model, caches):
    """Run the prompt in chunks, then greedy steps; give all logits ``(n, V)``."""
    windows = [model(mx.array([chunk]), cache=caches) for chunk in CHUNKS]
    for _ in range(N_STEPS):
        windows.append(model(mx.argmax(windows[-1][:, -1:], axis=-1), cache=caches))
    return mx.concatenate(windows, axis=1)[0]


@every_shape
def test_logits_and_states_of_every_window_are_those_with_mlx_lms_caches(name):
    mine, other = Watched(name), Watched(name)
    run(mine, ours.make_prompt_cache(mine))
    run(other, theirs.make_prompt_cache(other))
    assert len(mine.logits) == len(CHUNKS) + N_STEPS
    assert mine.logits == other.logits
    assert mine.states == other.states
    assert mine.classes == {getattr(ours, c.__name__, c) for c in other.classes}


@every_shape
def test_a_tiny_model_says_something_and_depends_on_all_of_its_caches(name):
    model = tiny_models.make(name)
    caches = theirs.make_prompt_cache(model)
    logits = run(model, caches)
    assert mx.isfinite(logits).all().item()
    assert min(logits.std(axis=axis).min().item() for axis in (0, 1)) > 0.1

    def say(caches):
        return leaves([model(mx.array([PROMPT[:1]]), cache=caches)])

    said = say(copy.deepcopy(caches))
    for i in range(len(leaf_caches(caches))):
        disturbed = copy.deepcopy(caches)
        cache = leaf_caches(disturbed)[i]
        cache.state = [negative(entry) for entry in cache.state]
        assert say(disturbed) != said


def negative(entry):
    """Negate arrays, alone and in a list."""
    if isinstance(entry, list):
        return [negative(e) for e in entry]
    return -entry if isinstance(entry, mx.array) else entry
