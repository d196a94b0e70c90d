"""How hard hypothesis tries: MLXRS_PROFILE is ``fast`` (the default; the same cases every time) or ``slow``."""

import os

from hypothesis import settings

settings.register_profile("fast", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("slow", max_examples=1200, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("MLXRS_PROFILE", "fast"))
