"""What the scripts say to a person: one-line errors, option values, exit codes."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import errno
import io
import itertools
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from recipes.lab import failures

DONE, BUG, USER_ERROR, NON_FINITE, DATA_BUDGET, INTERRUPTED = 0, 1, 2, 3, 4, 75
_FIRST_WORD_SECONDS = 5.0  # that processes may differ by in starting
STOPPED_BY_HAND, PIPE_CLOSED = 130, 141  # as a shell reports SIGINT and SIGPIPE


class _Streams(logging.Handler):
    """Lines as they are: on what stdout is now, or stderr for warnings.

    A stream that cannot be written raises, and is not reported as a fault of logging.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        print(self.format(record), file=stream, flush=True)


# What the recipes say on the way; who calls them from a program of their own may give it other
# handlers or another level.
log = logging.getLogger("recipes")
log.addHandler(_Streams())
log.setLevel(logging.INFO)
log.propagate = False


class UserError(ValueError):
    """Something the caller can put right; the message is one line that says how.

    Attributes:
        is_shared: Whether every process raises it, so that one has to say it.
    """

    is_shared = False


def run_script(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs ``main`` on the command line and ends the process.

    A mistake of the caller (``UserError``, or a ``UsageError`` of attnzoo) becomes one line and
    exit status 2, Ctrl-C one line and 130; a reader that closes the pipe (``| head``) ends the
    script quietly. A name that is too long for the system, or lies where it lets the caller not
    go, was given, whatever was about to be done with it, and is one line too. Everything else is a
    bug and shows its traceback. Of several processes the first one to fail speaks, and the others
    end with its exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no locale may stop a script
    try:
        status = main(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError as error:
        abandon(sys.stdout)
        status = PIPE_CLOSED
        failures.note(error, status)
    except (Exception, KeyboardInterrupt) as error:
        status, line = _verdict(error)
        if not failures.note(error, status):
            # The first one has spoken, and a launcher ends this one.
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(_FIRST_WORD_SECONDS)
            status, line = (heard[0], "") if (heard := failures.first()) else (status, line)
        elif line is None:
            raise
        elif not failures.are_noted():
            _let_the_first_speak()
        if line:
            _tell(line)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed before the start
                stream.flush()
        except OSError:
            abandon(stream)
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        # gloo's threads can abort the interpreter while it shuts down, after all work is done.
        os._exit(status)
    sys.exit(status)


def _verdict(error: BaseException) -> tuple[int, str | None]:
    """The exit status, and what to say; None of a bug."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED_BY_HAND, "interrupted; the same command goes on where it can"
    if failures.is_echo(error):
        return BUG, f"error: {failures.UNHEARD}"
    if is_users_mistake(error):
        text = str(error)
    elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        text = f"{error.filename!r} is too long a name; choose a shorter one"
    elif isinstance(error, PermissionError) and error.filename is not None:
        text = f"{error.filename!r} cannot be reached ({error.strerror}); choose another place"
    else:
        return BUG, None
    is_everyones = _rank() == "0" or getattr(error, "is_shared", False)
    where = "" if is_everyones else f" in process {_rank()}"
    return USER_ERROR, f"error{where}: {printable(text)}"


def _rank() -> str:
    # A rank without a launcher's world is a leftover: nobody else says what all know.
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return "0" if is_alone else os.environ.get("RANK", "0")


def _let_the_first_speak() -> None:
    """Waits where the first process may say the same, whereupon the launcher ends this one."""
    if _rank() != "0":
        time.sleep(_FIRST_WORD_SECONDS)


def _tell(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        abandon(sys.stderr)


def abandon(stream: TextIO | None) -> None:
    """Sends what is still to be written nowhere: the interpreter would fail again at its end."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a test's stream has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def is_users_mistake(error: BaseException) -> bool:
    """Whether an error is one the caller can put right, of this package or of attnzoo."""
    errors = sys.modules.get("attnzoo.errors")  # --help must not import torch
    return isinstance(error, UserError) or (
        errors is not None and isinstance(error, errors.UsageError)
    )


def printable(text: str) -> str:
    """The text with control characters escaped: a name must not drive the terminal."""
    return "".join(
        c if c in "\n\t" or (c.isprintable() and not "\ud800" <= c <= "\udfff")
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )  # fmt: skip


def one_line(text: str) -> str:
    """``printable`` without line breaks and tabs; names whose bytes the locale hid are shown."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def argument(value: object) -> str:
    """A path as a command that is shown has to spell it: with spaces, or like a flag."""
    text = str(value)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def progress_bar(*arguments: Any, shown: bool = True, **options: Any) -> Any:
    """tqdm's bar: ``TQDM_DISABLE=1`` turns it off, and a log gets a line every ten seconds.

    Args:
        arguments: Of tqdm.
        shown: Whether to show it at all.
        options: Of tqdm.
    """
    from tqdm import tqdm  # --help must not wait for it

    class Lines(tqdm):
        """A log has no cursor to send back."""

        @staticmethod
        def status_printer(file: Any) -> Callable[[str], None]:
            return lambda text: print(text, file=file, flush=True)

        def clear(self, *arguments: Any, **options: Any) -> None:
            pass

    is_off = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    if is_off or not shown or sys.stderr is None:
        return tqdm(*arguments, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(*arguments, **options)
    return Lines(*arguments, mininterval=10, miniters=1, **options)


class Progress:
    """What a run says while it trains: lines in ``log``, and a ``progress_bar`` on stderr.

    An output that can no longer be written is given up, so that training never dies of it.

    Args:
        name: Of the run.
        steps: Where it ends.
        is_main: Whether this process speaks.

    Attributes:
        is_deserted: Whether a reader has closed the pipe, as ``| head`` does.
    """

    def __init__(self, name: str, steps: int, is_main: bool) -> None:
        self.name, self.steps, self.is_main = name, steps, is_main
        self.is_deserted = False
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Logs lines, which go to stdout unless ``log`` was given another handler."""
        if not self.is_main:
            return
        with self._guarded(sys.stderr):
            if self._bar is not None:
                self._bar.clear()
        with self._guarded(sys.stdout):
            log.info(text)

    def start(self, done: int) -> None:
        """Begins to show how far the run is, ``done`` steps."""
        with self._guarded(sys.stderr):
            self._bar = progress_bar(
                total=self.steps, initial=done, desc=self.name, unit="step", shown=self.is_main
            )

    def advance(self, note: str) -> None:
        """Shows that a step is done, and how it went."""
        with self._guarded(sys.stderr):
            if self._bar is not None:
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update()

    def close(self) -> None:
        """Ends the bar."""
        with self._guarded(sys.stderr):
            if self._bar is not None:
                self._bar.close()
        self._bar = None

    @contextlib.contextmanager
    def _guarded(self, stream: TextIO) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.is_deserted = self.is_deserted or isinstance(error, BrokenPipeError)
            abandon(stream)


class Parser(argparse.ArgumentParser):
    """Flags of a script: a mistake is one line and exit status 2, ``--help`` shows defaults.

    Args:
        script: Name of the file in recipes/.
        about: Its docstring, with examples, which ``--help`` begins with.
        **options: Of argparse.
    """

    def __init__(self, script: str, about: str | None, **options: Any) -> None:
        prog = f"python recipes/{script}.py"
        super().__init__(prog=prog, description=about, formatter_class=_Help, **options)
        # Else -1e39 and -inf are flags to argparse, and no check of a value sees them.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what is empty, as of a shell's variable that is not set, for all flags alike.

        Raises:
            UserError: An argument is empty, or holds what no path can.
        """
        given = sys.argv[1:] if args is None else [*args]
        for before, text in zip(["", *given], given, strict=False):
            flag, equals, value = text.partition("=")
            if not text or (flag.startswith("--") and equals and not value):
                name = flag or (before if before.startswith("-") else "argument")
                raise UserError(f"{name} '' is empty: give a value, or drop it")
            if "\0" in text:
                raise UserError(f"argument {text!r} has a null character in it: leave it out")
            path = value if flag.startswith("--") else text
            if path.startswith("~") and os.path.expanduser(path) == path:
                raise UserError(f"{path!r} is in the home of no user here: write the whole path")
        return super().parse_known_args(args, namespace)

    def format_usage(self) -> str:
        names = [str(a.metavar or a.dest) for a in self._actions if not a.option_strings]
        return " ".join(["usage:", self.prog, *names, "[FLAGS]"]) + "\n"

    def format_help(self) -> str:
        self.usage = self.format_usage().removeprefix("usage: ").strip()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        _, is_unknown, words = message.partition("unrecognized arguments: ")
        if is_unknown:
            word = words.split()[0].partition("=")[0]
            # Without the dashes, which all have in common.
            flags = [flag[2:] for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(word.lstrip("-"), flags, n=1)
            hint = f"; did you mean --{near[0]}?" if near and word.startswith("-") else ""
            message = f"{printable(words)!r} is not known here{hint}"
        where = f"{' ' if message.endswith('?') else '; '}{self.prog} --help lists the flags"
        _let_the_first_speak()
        self.exit(USER_ERROR, f"error: {message}{where}\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, and every default that says something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action: argparse.Action) -> str:
        # BooleanOptionalAction adds the default of its own, which cannot be told when suppressed.
        text = (action.help or "").replace(" (default: %(default)s)", "")
        shown = action.default
        says_nothing = shown is None or shown is False or shown in (argparse.SUPPRESS, [])
        if says_nothing or "(default" in text or not action.option_strings:
            return text
        shown = ",".join(map(str, shown)) if isinstance(shown, list) else shown
        return f"{text} (default: {shown})".lstrip()


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Parses ``option=value`` pairs; values are Python literals, or else plain strings.

    Raises:
        UserError: A pair has no ``=``.
    """
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set takes option=value, got {pair!r}")
        # "none" stays a word: it is a value of many options; None is Python's.
        lowered = {"true": True, "false": False}
        try:
            value = lowered[text.lower()] if text.lower() in lowered else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        options[name] = value
    return options


def whole(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return parse


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: a comma-separated list."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",") if part.strip()]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list like 1,2,3") from None

    return parse


def add_import_flag(parser: argparse._ActionsContainer) -> None:
    """Adds ``--import FILE|MODULE``, whose values become ``imports``."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE|MODULE",
        help="file or module that registers mechanisms of your own; repeat",
    )


COMPILE_MODES = ("auto", "on", "off")
COMPILE_HELP = (
    "compile the model's blocks: auto (on a GPU for a run long enough to win back the minute that "
    "it takes, where it works), on (the bare flag) or off"
)
COMPILE_FLAG: dict[str, Any] = {"nargs": "?", "const": "on"}


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """A bare --compile with its value, which argparse would take from the RUN behind it."""
    return [
        "--compile=on" if one == "--compile" and other not in COMPILE_MODES else one
        for one, other in itertools.zip_longest(arguments, arguments[1:])
    ]


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how a run's images are computed, in two groups."""
    flag = parser.add_argument_group("sampling").add_argument
    flag("--cfg-channels", type=whole(1), help="guide only the first channels, as DiT does (3)")
    flag("--steps", type=whole(1), default=20, help="model evaluations per image")
    flag("--sampler", help="dpm++ (default), ddim, ddpm, or euler-flow for runs of flow")
    flag("--seed", type=whole(0), default=0, help="of the start noise, and of drawn labels")
    flag("--batch-size", type=whole(1), default=64, help="images per model call")
    flag("--weights", choices=["ema", "model"], default="ema",
         help="the average over the steps, or the last")  # fmt: skip
    flag("--vae", help="folder or hub id of what decodes latents (default: the run's own)")
    computing = parser.add_argument_group("computing")
    flag = computing.add_argument
    flag("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    flag("--precision", choices=["fp32", "bf16"], default="fp32", help="of the matrix products")
    flag("--cuda-graph", choices=["auto", "on", "off"], default="auto",
         help="record each step as one CUDA graph: auto (where possible, or says why not), on or "
         "off")  # fmt: skip
    flag("--compile", default="auto", choices=COMPILE_MODES, help=COMPILE_HELP, **COMPILE_FLAG)
    add_import_flag(computing)


def warn(line: str) -> None:
    """A line to a person, beside the results."""
    log.warning(printable(line))
