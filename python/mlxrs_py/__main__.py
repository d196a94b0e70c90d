"""``python -m mlxrs_py``: the command line."""

import sys

from mlxrs_py.cli import main

sys.exit(main())
