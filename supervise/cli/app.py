"""The command line: which commands there are, and how errors are told. The commands themselves are in `commands`."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Group
from rich.console import Console

from supervise.cli import exit_codes
from supervise.cli.commands.completion import completion
from supervise.cli.commands.config import config
from supervise.cli.commands.demo import demo
from supervise.cli.commands.dlq import app as dlq
from supervise.cli.commands.doctor import doctor
from supervise.cli.commands.run import run
from supervise.cli.commands.scripts import app as scripts
from supervise.cli.commands.tasks import logs, submit
from supervise.cli.commands.timeline import timeline
from supervise.cli.commands.worker import worker
from supervise.cli.common import secrets, told_as
from supervise.cli.mistakes import DASH, of_spec, told
from supervise.cli.options import paragraphs
from supervise.errors import BadInput, SettingsError, SpecError, SuperviseError, UnsupportedPlatform
from supervise.secrets import Masker, secret_values

#: What writing fails with that is nobody's mistake and no bug.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

EPILOGUE = (
    "Exit codes: 0 completed, 1 failed, 2 wrong use, 124 timed out, 130, 143 and 129 cancelled by SIGINT, SIGTERM "
    "and SIGHUP, 141 standard output was closed."
)

app = App(
    name="supervise",
    help="Run coding agents unattended, next to a code-index watch, and leave nothing behind.\n\n"
    "To see what it does, with nothing else installed: supervise demo\n\n"
    "To see what this machine lacks for it: supervise doctor\n\n"
    'Example: supervise run --workspace . "Add tests for the parser."',
    help_epilogue=EPILOGUE,
    help_format="plaintext",
    version_flags=["--version"],
    result_action="return_value",
)

_options = Group("Options", sort_key=9)
for _flag in ("--help", "--version"):
    app[_flag].group = (_options,)
_panels: dict[str, tuple[App | Callable[..., int], ...]] = {
    "Jobs": (demo, run, timeline, scripts),
    "Tasks from a directory": (worker, submit, logs, dlq),
    "This machine": (doctor, config, completion),
}
for _place, (_group, _commands) in enumerate(_panels.items()):
    _panel = Group(_group, sort_key=_place)
    for _order, _command in enumerate(_commands):
        if isinstance(_command, App):
            _command.group, _command.sort_key = (_panel,), _order
            app.command(_command)
        else:
            app.command(_command, group=_panel, sort_key=_order, help=paragraphs(_command.__doc__ or ""))


def main(argv: list[str]) -> int:
    """Run the command line. Returns the exit code; a user never sees a traceback for a mistake of theirs."""
    secrets.update(secret_values(os.environ))
    told_as.clear()
    for name in ("COLUMNS", "LINES"):  # 0: a terminal that does not know its size
        if not os.environ.get(name, "1").isdecimal() or not int(os.environ.get(name, "1")):
            del os.environ[name]
    try:
        code = _answer(argv)
        sys.stdout.flush()
    except CycloptsError as error:
        return _complain(told(error, app), exit_codes.USAGE)
    except SpecError as error:
        return _complain(of_spec(str(error)), exit_codes.USAGE)
    except (SettingsError, BadInput, UnsupportedPlatform) as error:
        return _complain(str(error), exit_codes.USAGE)
    except SuperviseError as error:
        return _complain(str(error), exit_codes.USAGE if isinstance(error, ImportError) else exit_codes.FAILED)
    except KeyboardInterrupt:
        return exit_codes.of_signal(2)
    except BrokenPipeError:
        _give_up_stdout()
        return exit_codes.BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL and _stdout_fails():
            return _complain(f"standard output cannot be written to: {error.strerror}", exit_codes.FAILED)
        return _bug()
    return code


def _answer(argv: list[str]) -> int:
    words = [*argv[1:], "--help"] if argv[:1] == ["help"] else argv
    # cyclopts would take "-" for an option, or, told to allow it, every mistyped option. Behind "--" there are none.
    end = words.index("--") if "--" in words else len(words)
    words = [DASH if word == "-" else word for word in words[:end]] + words[end:]
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False, console=_Help())
    code = command(*map(_undashed, bound.args), **{name: _undashed(value) for name, value in bound.kwargs.items()})
    return code if isinstance(code, int) else exit_codes.COMPLETED


def _undashed(value: Any) -> Any:
    match value:
        case str():
            return value.replace(DASH, "-")
        case Path():
            return Path(str(value).replace(DASH, "-"))
        case list() | tuple():
            return type(value)(map(_undashed, value))
    return value


class _Help(Console):
    """For the help. A reader who has gone away is no end of the process on the spot, as it would be for rich."""

    def on_broken_pipe(self) -> None:
        """See `Console.on_broken_pipe`."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _stdout_fails() -> bool:
    """Whether it cannot be written to, not even an empty line: then it was its disk, and no bug."""
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")
    except OSError:
        _give_up_stdout()
        return True
    return False


def _give_up_stdout() -> None:
    """What is still in its buffer would be an error at the end of the process."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _complain(message: str, code: int) -> int:
    line = " ".join(Masker(secrets).text(message).splitlines())
    line = "".join(letter if letter.isprintable() else " " for letter in line)
    if not _log(line):
        print(f"supervise: {line}", file=sys.stderr)
    return code


def _bug() -> int:
    """A bug of ours: the traceback helps whoever mends it. Secrets are masked in it."""
    message = "this is a bug in supervise; please report"
    if not _log(f"{message} this traceback", bug=True):
        print(Masker(secrets).text(traceback.format_exc()), file=sys.stderr)
        _complain(f"{message} the lines above", exit_codes.FAILED)
    return exit_codes.FAILED


def _log(line: str, *, bug: bool = False) -> bool:
    """As a line of the log, if those are JSON: then nothing else is to be on standard error."""
    if not told_as or told_as[0].format != "json":
        return False
    from supervise.observe.logs import formatter

    error = sys.exc_info() if bug else None
    record = logging.LogRecord("supervise.cli", logging.ERROR, "", 0, line, None, error)
    print(formatter(told_as[0], masker=Masker(secrets)).format(record), file=sys.stderr)
    return True
