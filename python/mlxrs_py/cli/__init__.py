"""The command line ``mlxrs-py``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

_EXIT_ERROR = 1
_EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit code: 0, 1 (an error, told in one line), 2 (usage) or 130 (Ctrl-C)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_ERROR
    except Exception as error:
        if arguments.debug:
            raise
        print(f"mlxrs-py: {_one_line(error)}", file=sys.stderr)
        return _EXIT_ERROR
    return code


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__}: {text}"


def _parser() -> argparse.ArgumentParser:
    from mlxrs_py._core import __version__
    from mlxrs_py.cli import cache_prompt, default_model, generate, inspect

    parser = argparse.ArgumentParser(
        prog="mlxrs-py",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=22),
        description="Cache prompts of language models in files, and answer from them.",
        epilog="Each command has its own help: mlxrs-py COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"mlxrs-py {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (cache_prompt, generate, inspect, default_model):
        command.add(commands, common)
    return parser
