"""The command line as a user has it: a real process with a home of its own. Nothing of it may outlive a test."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FAKE = Path(__file__).with_name("fake_claude.py")
LIMIT = 40.0  # seconds, for anything
MARK = "SUPERVISE_MARK"


class Running:
    """One command under way."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._buffer = b""

    def line_with(self, word: str) -> bytes:
        """Read standard output up to the first line that holds `word`, and return that line."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + LIMIT
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                if word.encode() in line:
                    return line
                continue
            assert select.select([self.process.stdout], [], [], deadline - time.monotonic())[0], f"no {word!r}"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, f"the output ended without {word!r}"
            self._buffer += data

    def end(self, seconds: float = LIMIT) -> Done:
        """Read what there is to read and wait for the end."""
        out, err = self.process.communicate(timeout=seconds)
        return Done(self.process.returncode, self._buffer + (out or b""), err or b"")


class Done:
    """What a command left."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code = code
        self.out = out.decode()
        self.err = err.decode()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Standard output as JSON: every line of it an object with a type and a time."""
        lines = [json.loads(line) for line in self.out.splitlines()]
        for line in lines:
            assert isinstance(line["type"], str)
            assert line["time"].endswith("Z")
            assert line["time"][10] == "T"
        return lines

    @property
    def result(self) -> dict[str, Any]:
        """The last line."""
        assert self.lines[-1]["type"] == "result"
        return self.lines[-1]


class Cli:
    """Starts `python -m supervise` with a home, a state directory and a temporary directory below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mark = secrets.token_hex(16)
        self.scratch = root / "tmp"
        self.workspace = root / "workspace"
        self.state = root / "state" / "supervise"
        programs = root / "bin"
        for directory in (self.scratch, self.workspace, programs):
            directory.mkdir(parents=True)
        program = programs / "claude"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {FAKE} "$@"\n')
        program.chmod(0o755)
        self.env = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "HOME": str(root / "home"),
            "XDG_STATE_HOME": str(root / "state"),
            "XDG_CONFIG_HOME": str(root / "config"),
            "TMPDIR": str(self.scratch),
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            MARK: self.mark,  # every descendant inherits it
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str, env: dict[str, str] | None = None, **options: Any) -> Running:
        """Start a command. Its standard input is empty, unless `options` (of `Popen`) say otherwise."""
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "cwd": self.workspace,
            **options,
        }
        argv = [sys.executable, "-m", "supervise", *words]
        process = subprocess.Popen(argv, env={**self.env, **(env or {})}, **options)
        self._started.append(process)
        return Running(process)

    def do(self, *words: str, env: dict[str, str] | None = None, **options: Any) -> Done:
        """Run a command to its end."""
        return self.start(*words, env=env, **options).end()

    def run(self, prompt: str, *words: str, **options: Any) -> Done:
        """`supervise run` to its end."""
        return self.do("run", *words, prompt, **options)

    def alive(self) -> list[int]:
        """Processes that descend from a command of ours and live."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    environ = Path(f"/proc/{name}/environ").read_bytes()
                    if f"{MARK}={self.mark}".encode() in environ:
                        found.append(int(name))
        return found

    def close(self) -> None:
        """End what is left, and complain of it."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait(LIMIT)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        left = self.alive()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left, f"left behind: {left}"


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_works() -> Iterator[None]:
    """A test run in the background of a shell is started with SIGINT ignored, and so would be its commands."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path)
    yield cli
    cli.close()
