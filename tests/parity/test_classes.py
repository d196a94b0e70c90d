"""Each class and mlx-lm's twin, through the same random operations."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from .twins import COUNTS, ConcatenateTwins, KVTwins, QuantizedTwins, RotatingTwins
from .twins_batch import BatchKVTwins, BatchRotatingTwins
from .twins_batch_quantized import BatchQuantizedTwins
from .twins_layers import ArraysTwins, ChunkedTwins
from .twins_list import ListTwins
from .twins_quantized import QuantizedRotatingTwins

#: Sequences of operations in the fast profile: at least 2,000 operations each, and every kind among them.
SEQUENCES = {
    KVTwins: 200,
    RotatingTwins: 400,
    QuantizedTwins: 200,
    ConcatenateTwins: 100,
    ChunkedTwins: 100,
    ArraysTwins: 100,
    ListTwins: 160,
    QuantizedRotatingTwins: 150,
    BatchKVTwins: 180,
    BatchRotatingTwins: 180,
    BatchQuantizedTwins: 180,
}

#: Operations of each class, by profile.
LEAST = {"fast": 0, "slow": 100_000}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("machine", SEQUENCES, ids=lambda machine: machine.name)
def test_a_cache_and_its_twin_agree_bit_for_bit(machine):
    run = settings(max_examples=SEQUENCES[machine], stateful_step_count=30)
    run_state_machine_as_test(machine, settings=run)
    counts = COUNTS[machine.name]
    while counts["operations"] < LEAST[settings.get_current_profile_name()]:
        run_state_machine_as_test(machine, settings=settings(run, max_examples=1000))
    for what in machine.counted:
        assert counts[what] >= 0.01 * counts["operations"], what
