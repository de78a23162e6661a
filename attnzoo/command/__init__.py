"""The console command ``attnzoo``, which ``python -m attnzoo`` is too.

A mistake of the caller is one line and exit status 2, everything else that is raised a bug.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NoReturn

from attnzoo.console import printing
from attnzoo.contract import nearest
from attnzoo.errors import Unavailable, UsageError

# What each does, and the module whose ``main`` takes its arguments, imported when it is asked
# for. The backbone stands on attnzoo: the command that needs it is found by name.
COMMANDS = {
    "list": ("every mechanism with its source and cost", "attnzoo.command.listing"),
    "show": ("one mechanism: equations, options, cost, what runs here", "attnzoo.command.show"),
    "count": ("multiply-accumulates of a whole model", "backbones.count"),
    "recommend": ("which mechanism to take, by what was measured", "attnzoo.command.recommend"),
    "doctor": ("what runs on this machine, and why the rest does not", "attnzoo.command.doctor"),
}
EXAMPLES = """examples:
  attnzoo show dydila
  attnzoo count --attn 'sana*3+softmax' --size L --resolution 1024
  attnzoo recommend --resolution 1024 --memory 8GiB"""
DONE, USER_ERROR, STOPPED_BY_HAND = 0, 2, 130


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists what it takes")


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--import``, whose values are ``imports``."""
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="FILE|MODULE",
        help="file or module that registers mechanisms of your own; repeat",
    )  # fmt: skip


def main(arguments: list[str]) -> int:
    """Runs one command, by default ``list``; returns the exit status."""
    try:
        _run(arguments)
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return STOPPED_BY_HAND
    return DONE


def _run(arguments: list[str]) -> None:
    name, *rest = arguments or ["list"]
    if name in ("-h", "--help"):
        print(_help())
        return
    if name == "--version":
        import attnzoo

        print(f"attnzoo {attnzoo.__version__}")
        return
    if name.startswith("-"):  # flags of the command that is the default
        name, rest = "list", arguments
    if name not in COMMANDS:
        raise UsageError(
            f"there is no command {name!r}{nearest(name, COMMANDS)} "
            f"There are {', '.join(COMMANDS)}; see attnzoo --help"
        )
    module = COMMANDS[name][1]
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("backbones", "diffusers"):
            raise
        raise Unavailable(
            f"attnzoo {name} needs the backbone, but there is no module {error.name!r}; "
            f"pip install attnzoo brings it"
        ) from error
    command.main(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, (what, _) in COMMANDS.items()]
    return (
        "usage: attnzoo [--version] COMMAND ...\n\n"
        "Which attention should a diffusion transformer use?\n\n"
        "commands (attnzoo COMMAND --help says more):\n" + "\n".join(lines) + f"\n\n{EXAMPLES}"
    )


def run() -> NoReturn:
    """The command line of this process."""
    sys.exit(printing(lambda: main(sys.argv[1:])))
