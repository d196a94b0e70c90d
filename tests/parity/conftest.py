"""How hard the twins are driven, by MLXRS_PROFILE: ``fast`` (the default; the same cases every time) or ``slow``."""

import os
import signal
import sys

import mlxrs_py  # noqa: F401

# isort: split
# Before this, the BLAS that serves MLX was chosen.
import mlx.core as mx
import pytest
from hypothesis import settings

from . import twins

# A runner in the background may have handed us an ignored SIGINT; the tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("fast", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("slow", max_examples=1200, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("MLXRS_PROFILE", "fast"))


# It looks at its server through /proc.
collect_ignore = [] if sys.platform == "linux" else ["test_server_life.py"]


@pytest.fixture(scope="module")
def without_compiling():
    """Run what mlx-lm compiles as it stands: on a CPU, MLX's compiler takes longer than tiny models run."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def pytest_terminal_summary(terminalreporter):
    if twins.COUNTS:
        terminalreporter.section("operations that both did alike")
        for name in sorted(twins.COUNTS):
            terminalreporter.write_line(twins.summary(name))
