"""mlx-lm's server over many requests: what it holds stays below its limits. The long form is benches/python/flat.py."""

import pytest

from .soaked import soak
from .tiny_folders import save
from .watched import Caps

#: Full in a few requests.
CAPS = Caps(cache_bytes=2_000_000, cache_size=8, ram_bytes=2_000_000, disk_bytes=10_000_000)


@pytest.mark.parametrize(
    ("name", "alone"), [("llama", 0.0), ("llama", 1.0), ("qwen3_next", 0.3)], ids=["batched", "alone", "both, states"]
)
def test_both_tiers_let_go_of_prompts_and_nothing_grows(name, alone, tmp_path):
    run = soak(save(name, tmp_path / "model"), tmp_path / "store", CAPS, 300, every=5, alone=alone)
    # In so few requests the process still warms up, and which prompts are there at an end is chance.
    assert run.faults(growth=1.5) == []
    last = run.samples[-1]
    assert last["evicted"] > 20 and last["quarantined"] == 0
    assert last["n_kept"] > 20 * CAPS.cache_size
    # Which of both is faster depends on the machine.
    assert last["restored"] + last["recomputed"] > 10
    assert run.counts["cached_tokens"] > 0
