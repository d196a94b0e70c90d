"""How hard hypothesis tries: MLXRS_PROFILE is ``fast`` (the default; the same cases every time) or ``slow``."""

import os
import signal
import sys

from hypothesis import settings

import mlxrs_py  # noqa: F401  before mlx.core, so that the BLAS is chosen

# A runner in the background may have handed us an ignored SIGINT; the tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("fast", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("slow", max_examples=1200, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("MLXRS_PROFILE", "fast"))

# Elsewhere MLX has a fast BLAS of its own.
collect_ignore = [] if sys.platform == "linux" else ["test_blas.py"]
