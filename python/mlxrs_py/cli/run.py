"""``mlxrs-py run``: a program on mlx-lm, with the caches of this package."""

from __future__ import annotations

import argparse
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxrs_py.cli import models

if TYPE_CHECKING:
    from mlxrs_py.store import PromptStore

__all__ = ["add"]


def add(commands: Any, _common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="run a Python module with our caches in mlx-lm",
        description=(
            "Run a module as python -m does, with the caches of this package in mlx-lm: "
            "mlxrs-py run mlx_lm.server --model MODEL --prompt-store FOLDER"
        ),
    )
    _add_store(parser)
    parser.add_argument("module", metavar="MODULE", help="its name, as for python -m")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="what follows is the module's")
    # Its warnings and tracebacks are the module's own.
    parser.set_defaults(run=_run, debug=True)


def _add_store(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("store of prompts (before MODULE; for mlx_lm.server also after it)")
    group.add_argument("--prompt-store", metavar="FOLDER", help="where mlx-lm's server keeps prompts over restarts")
    group.add_argument(
        "--prompt-store-bytes",
        type=models.size,
        default=None,
        metavar="N",
        help="the folder stays below, from now on; 500MB and 20GB are understood (default: as before, or 32 GiB)",
    )


def _taken(arguments: argparse.Namespace) -> argparse.Namespace:
    """Take what is ours out of the server's arguments, which do not know it."""
    if [arguments.module, *arguments.arguments[:1]] != ["mlx_lm", "server"] and arguments.module != "mlx_lm.server":
        return arguments
    parser = argparse.ArgumentParser(prog="mlxrs-py run", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    _add_store(parser)
    ours, arguments.arguments = parser.parse_known_args(arguments.arguments)
    for name, value in vars(ours).items():
        if value is not None:
            setattr(arguments, name, value)
    if {"-h", "--help"} & set(arguments.arguments):  # whoever only reads wants no folder made
        arguments.prompt_store = arguments.prompt_store_bytes = None
    return arguments


def _store(arguments: argparse.Namespace) -> PromptStore | None:
    from mlxrs_py.store import PromptStore

    if arguments.prompt_store is None:
        if arguments.prompt_store_bytes is not None:
            raise ValueError("--prompt-store-bytes needs --prompt-store")
        return None
    sizes = {} if arguments.prompt_store_bytes is None else {"disk_bytes": arguments.prompt_store_bytes}
    return PromptStore(arguments.prompt_store, **sizes)


def _run(arguments: argparse.Namespace) -> int:
    from mlxrs_py.install import install

    arguments = _taken(arguments)
    try:
        install(store=_store(arguments))
    except (ImportError, OSError, ValueError) as error:
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
