"""Terminals of our own: commands run on them, keys are typed, and what a person would see is read."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyte
from rich.cells import cell_len

from tests.cli.conftest import LIMIT, Cli, Running

ROWS = 30
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
SGR = re.compile(r"\x1b\[([0-9;:]*)m")
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


# --- what was written ----------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Without escapes, with the ends of lines of a file."""
    return ESCAPE.sub("", text).replace("\r\n", "\n")


def colours(text: str) -> set[int]:
    """The codes in it that set a colour."""
    codes = {int(code) for match in SGR.finditer(text) for code in re.split("[;:]", match[1]) if code}
    return {code for code in codes if 30 <= code <= 49 or code == 58 or 90 <= code <= 107}


def styled(text: str) -> bool:
    """Whether any of it is bold, dim or in colour."""
    return any(match[1].strip("0;") for match in SGR.finditer(text))


def wide(text: str, columns: int) -> list[str]:
    """Its lines that a terminal of so many columns would wrap or cut."""
    return [line for line in plain(text).replace("\r", "\n").split("\n") if cell_len(line) > columns]


# --- commands one after the other ----------------------------------------------------------------------------

#: In one process, whose start is what takes long. Each on a terminal so wide, or with its output elsewhere.
MANY = """
import fcntl, json, os, struct, sys, termios
from supervise.cli.app import main
from supervise.cli.streams import mend_standard_streams

mend_standard_streams()
terminal, told = os.dup(1), []
given, out, err = sys.argv[1:]
os.environ.pop("COLUMNS", None)
environment = dict(os.environ)
for each in json.load(open(given)):
    os.environ.update(each["env"])
    for path in (out, err):
        open(path, "wb").close()
    if each["stdout"] == "terminal":
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, each["columns"], 0, 0))
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
    else:
        if each["stdout"] == "gone":
            reading, standard_output = os.pipe()
            os.close(reading)
        else:
            standard_output = os.open(out if each["stdout"] == "file" else "/dev/full", os.O_WRONLY)
        standard_error = os.open(err, os.O_WRONLY)
        os.dup2(standard_output, 1)
        os.dup2(standard_error, 2)
        os.close(standard_output)
        os.close(standard_error)
    code = main(each["words"])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = "not flushed"
    os.write(terminal, b"\\0")
    told.append([code, *(open(path, "rb").read().decode() for path in (out, err))])
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
json.dump(told, open(given, "w"))
"""


class Seen:
    """What a command has told: on the terminal, or else on standard output and standard error."""

    def __init__(self, shown: str, code: Any, out: str, err: str) -> None:
        self.shown = shown
        self.code = code
        self.out = out
        self.err = err


def one_after_the_other(cli: Cli, commands: Sequence[dict[str, Any]], env: dict[str, str]) -> list[Seen]:
    """Run commands: each has `words`, and may have `columns`, `env`, and `stdout`: terminal, file, gone or full."""
    given = cli.root / "commands.json"
    usual = {"columns": 100, "env": {}, "stdout": "terminal"}
    given.write_text(json.dumps([{**usual, **command} for command in commands]))
    argv = [sys.executable, "-c", MANY, str(given), str(cli.root / "out"), str(cli.root / "err")]
    terminal = Terminal(drawn=False)
    try:
        process = terminal.popen(argv, env={**cli.env, **env}, cwd=cli.workspace)
        terminal.read_to_the_end(seconds=120)
        assert process.wait(LIMIT) == 0, terminal.raw[-2000:].decode()
    finally:
        terminal.close()
    parts = terminal.raw.decode().split("\0")
    assert len(parts) == len(commands) + 1
    return [Seen(shown, *told) for shown, told in zip(parts, json.loads(given.read_text()), strict=False)]


# --- one command, live ---------------------------------------------------------------------------------------


class Terminal:
    """A terminal and who looks at it. It has to be closed. If it is not `drawn`, which takes long, there is `raw` only.

    Attributes:
        raw: all that was written to it.
        screen: what is on it now, as an xterm would draw it.
    """

    def __init__(self, columns: int = 100, rows: int = ROWS, *, drawn: bool = True) -> None:
        self._rows = rows
        self._drawn = drawn
        self._ours, self._theirs = pty.openpty()
        self.raw = b""
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self.screen)
        self._open = True
        self.resize(columns)
        self.modes_before = termios.tcgetattr(self._ours)

    def popen(self, argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program on it, in a session of its own: what is typed as Ctrl-C is a signal to it."""
        try:
            return subprocess.Popen(argv, **{**options, **self.streams()})
        finally:
            self.leave()

    def streams(self) -> dict[str, Any]:
        """Of `Popen`: the terminal as all three streams, and as the one that controls."""

        def take() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        streams = dict.fromkeys(("stdin", "stdout", "stderr"), self._theirs)
        return {**streams, "start_new_session": True, "preexec_fn": take}

    def start(self, cli: Cli, *words: str, env: dict[str, str] | None = None) -> Running:
        """Start a command on it."""
        try:
            return cli.start(*words, env={"TERM": "xterm-256color", **(env or {})}, **self.streams())
        finally:
            self.leave()

    def leave(self) -> None:
        """Its other end belongs to who was started: when that one ends, so does what is read."""
        os.close(self._theirs)

    def resize(self, columns: int) -> None:
        """Make it so wide; who runs on it is told by SIGWINCH."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", self._rows, columns, 0, 0))
        self.screen.resize(self._rows, columns)

    def type(self, keys: bytes) -> None:
        """What a person types."""
        os.write(self._ours, keys)

    @property
    def modes(self) -> list[Any]:
        """Of the terminal, as its other end has left them."""
        return termios.tcgetattr(self._ours)

    @property
    def text(self) -> str:
        """What can be read on it, with what has moved out at its top."""
        columns = range(self.screen.columns)
        above = ["".join(line[x].data for x in columns) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in (*above, *self.screen.display)).rstrip()

    def until(self, check: Callable[[str], object], what: str, seconds: float = LIMIT / 2) -> str:
        """Look until the text is as wished, and return it."""
        deadline = time.monotonic() + seconds
        while not check(self.text):
            assert self._read(deadline), f"it ended without {what}:\n{self.text}"
        return self.text

    def read_to_the_end(self, seconds: float = LIMIT) -> str:
        """Until nobody has it open but us."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self.text

    def _read(self, deadline: float) -> bool:
        left = max(0.0, deadline - time.monotonic())
        assert select.select([self._ours], [], [], left)[0], f"no more for long:\n{self.text}"
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # the other end was closed
            return False
        self.raw += data
        if self._drawn:
            self._stream.feed(data)
        return bool(data)

    def close(self) -> None:
        """Hang up."""
        os.close(self._ours)


def by_a_shell(cli: Cli, script: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which `supervise` is the command."""
    bound = f'supervise() {{ "{sys.executable}" -m supervise "$@"; }}\n{script}'
    options: dict[str, Any] = {"cwd": cli.workspace, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(["bash", "-c", bound], env={**cli.env, **(env or {})}, timeout=LIMIT, check=False, **options)
