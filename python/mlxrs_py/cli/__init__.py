"""The command line ``mlxrs-py``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

__all__ = ["HelpFormatter", "main", "plain"]

_EXIT_ERROR = 1
_EXIT_INTERRUPTED = 130

_EXAMPLES = """\
example:
  mlxrs-py cache-prompt --prompt - --prompt-cache-file book < book.txt
  mlxrs-py generate --prompt-cache-file book.safetensors --prompt "Who is Alice?"

Each command has its own help: mlxrs-py COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit code: 0, 1 (an error, told in one line) or 130 (Ctrl-C).

    Wrong usage leaves as argparse does it, with ``SystemExit(2)``.
    """
    debug = False
    try:
        try:
            arguments = _parser().parse_args(argv)
            debug = arguments.debug
            with warnings.catch_warnings():
                if not debug:
                    warnings.showwarning = _show_warning
                return arguments.run(arguments)
        finally:
            # Here a reader that has gone raises what is handled below; at the interpreter's exit it would be noise.
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("mlxrs-py: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_ERROR
    except Exception as error:
        if debug:
            raise
        print(f"mlxrs-py: {_one_line(error)}", file=sys.stderr)
        return _EXIT_ERROR


def plain(text: object) -> str:
    """Write out what would steer a terminal: a file may come from anywhere."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _one_line(error: Exception) -> str:
    text = plain(" ".join(str(error).split()))
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: pip install 'mlxrs_py[lm]'"
    if not text:
        return type(error).__name__
    # A KeyError's text is the bare key.
    return f"KeyError: {text}" if isinstance(error, KeyError) else text


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mlxrs-py: warning: {message}", file=sys.stderr)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Lists commands without the line that only says COMMAND."""

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)


def _parser() -> argparse.ArgumentParser:
    from mlxrs_py._core import __version__
    from mlxrs_py.cli import cache_prompt, convert, default_model, generate, inspect, run, store, verify

    parser = argparse.ArgumentParser(
        prog="mlxrs-py",
        formatter_class=HelpFormatter,
        description="Cache prompts of language models in files, and answer from them.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"mlxrs-py {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (cache_prompt, generate, inspect, verify, convert, store, run, default_model):
        command.add(commands, common)
    return parser
