"""``mlxrs-py run``: a program on mlx-lm, with the caches of this package."""

from __future__ import annotations

import argparse
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["add"]


def add(commands: Any, _common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="run a Python module with our caches in mlx-lm",
        description=(
            "Run a module as python -m does, with the caches of this package in mlx-lm: "
            "mlxrs-py run mlx_lm.server --model MODEL"
        ),
    )
    parser.add_argument("module", metavar="MODULE", help="its name, as for python -m")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="what follows is the module's")
    # Its warnings and tracebacks are the module's own.
    parser.set_defaults(run=_run, debug=True)


def _run(arguments: argparse.Namespace) -> int:
    from mlxrs_py.install import install

    try:
        install()
    except ImportError as error:
        sys.exit(f"mlxrs-py: {error}")
    sys.argv = [arguments.module, *arguments.arguments]
    if not sys.flags.safe_path:
        sys.path.insert(0, str(Path.cwd()))
    if arguments.module.startswith("mlx_lm."):
        # As mlx-lm's own command does it: run as __main__ it would be a second copy of a module that is in use.
        import_module(arguments.module).main()
    else:
        runpy.run_module(arguments.module, run_name="__main__", alter_sys=True)
    return 0
