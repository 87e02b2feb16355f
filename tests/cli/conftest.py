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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from supervise.dispatch.submit import job_id_of

FAKE = Path(__file__).with_name("fake_claude.py")
LIMIT = 40.0  # seconds, for anything
MARK = "SUPERVISE_MARK"
#: Root, but bound to the modes of files as everybody.
WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()


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

    def start(
        self, *words: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = (), **options: Any
    ) -> Running:
        """Start a command. Its standard input is empty, unless `options` (of `Popen`) say otherwise.

        `prefix` is a program that becomes the command.
        """
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "cwd": self.workspace,
            **options,
        }
        argv = [*prefix, sys.executable, "-m", "supervise", *words]
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


#: Commands one after the other in one process: its start is what takes long.
MANY = """
import json, os, sys
from supervise.cli.app import main
from supervise.cli.streams import mend_standard_streams

mend_standard_streams()
told, files = os.dup(1), [open(sys.argv[2], "w+b"), open(sys.argv[3], "w+b")]
for argv in json.load(open(sys.argv[1])):
    for number, file in enumerate(files, 1):
        file.seek(0)
        file.truncate()
        os.dup2(file.fileno(), number)
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    texts = [open(path, "rb").read().decode() for path in sys.argv[2:4]]
    os.write(told, json.dumps([code, *texts]).encode() + b"\\n")
"""


TASK_AGENT = Path(__file__).with_name("task_agent.py")


class Root:
    """The root of a worker, and the commands that have to do with it. Its agent is task_agent.py."""

    def __init__(self, cli: Cli) -> None:
        self.cli = cli
        self.path = cli.root / "root"
        self.env = {
            "SUPERVISE_WORKER__ROOT": str(self.path),
            "SUPERVISE_WORKER__WORKSPACE": str(cli.workspace),
            "SUPERVISE_WORKER__BACKOFF_BASE": "0.02",
            "SUPERVISE_HEARTBEAT_INTERVAL": "0.2",
            "SUPERVISE_ORPHAN_GRACE": "0.3",
            "SUPERVISE_INDEX__MODE": "none",
            "SUPERVISE_AGENT__COMMAND": json.dumps([sys.executable, "-I", "-S", str(TASK_AGENT)]),
            "SUPERVISE_AGENT__TERMINATION_TIMEOUT": "2",
            "COLUMNS": "80",
        }

    def start(self, *words: str, env: dict[str, str] | None = None, **options: Any) -> Running:
        """Start a command."""
        return self.cli.start(*words, env={**self.env, **(env or {})}, **options)

    def do(self, *words: str, env: dict[str, str] | None = None, **options: Any) -> Done:
        """Run a command to its end."""
        return self.start(*words, env=env, **options).end()

    def many(self, commands: list[list[str]]) -> list[Done]:
        """Run commands to their ends, all of them in one process."""
        given = self.cli.root / "commands.json"
        given.write_text(json.dumps(commands))
        argv = [sys.executable, "-c", MANY, *(str(self.cli.root / name) for name in ("commands.json", "out", "err"))]
        env = {**self.cli.env, **self.env}
        done = subprocess.run(
            argv, env=env, cwd=self.cli.workspace, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, b"")
        told = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(told) == len(commands)
        return [Done(code, out.encode(), err.encode()) for code, out, err in told]

    def worker(self, name: str = "w1", *words: str, env: dict[str, str] | None = None, **options: Any) -> Running:
        """A worker that is ready: it tells events as JSON."""
        return self.ready(self.start("worker", name, "--json", *words, env=env, **options), name)

    def ready(self, running: Running, name: str = "w1") -> Running:
        """Wait until this worker has said that it is well."""
        pid = running.process.pid
        self.until(
            lambda: self.beat(name).get("pid") == pid and self.beat(name).get("status") == "healthy",
            f"a worker {name} that is well",
        )
        return running

    def make(self, name: str = "w1") -> None:
        """The directories, as if a worker had run there."""
        for kind in ("tasks", "running", "results", "dlq", "triggers"):
            (self.path / kind / name).mkdir(parents=True)

    def drop(self, task_id: str, *steps: str, worker: str = "w1", **fields: Any) -> Path:
        """Put a task there, whole as soon as it is seen."""
        path = self.path / "tasks" / worker / f"{task_id}.json"
        new = path.with_name(f".{path.name}")
        new.write_text(json.dumps({"task_id": task_id, "description": "\n".join(steps), **fields}))
        new.rename(path)
        return path

    def bury(
        self, task_id: str, *, worker: str = "w1", name: str = "", raw: bytes | None = None, **fields: Any
    ) -> Path:
        """Put a dead letter there, as a worker does."""
        path = self.path / "dlq" / worker / f"{name or task_id}.json"
        record = {
            "task_id": task_id,
            "description": "done again",
            "dlq_worker": worker,
            "dlq_reason": "auth",
            "dlq_detail": "no key",
            "dlq_timestamp": "2026-11-21T12:00:00.000000Z",
            "retry_count": 0,
            "attempts": [{"attempt": 1}],
            **fields,
        }
        if raw is not None:
            path.with_suffix(".raw").write_bytes(raw)
        path.write_text(json.dumps(record))
        return path

    def read(self, kind: str, task_id: str, worker: str = "w1") -> dict[str, Any] | None:
        """A record, if it is there."""
        try:
            record = json.loads((self.path / kind / worker / f"{task_id}.json").read_bytes())
        except FileNotFoundError:
            return None
        assert isinstance(record, dict)
        return record

    def result(self, task_id: str, worker: str = "w1") -> dict[str, Any]:
        """Its result; waited for."""
        self.until(lambda: self.read("results", task_id, worker), f"a result of {task_id}")
        return self.read("results", task_id, worker) or {}

    def letter(self, task_id: str, worker: str = "w1") -> dict[str, Any]:
        """Its dead letter; waited for."""
        self.until(lambda: self.read("dlq", task_id, worker), f"a dead letter {task_id}")
        return self.read("dlq", task_id, worker) or {}

    def beat(self, worker: str = "w1") -> dict[str, Any]:
        """The heartbeat, if there is one."""
        try:
            beat = json.loads((self.path / "heartbeats" / f"{worker}.json").read_bytes())
        except FileNotFoundError:
            return {}
        assert isinstance(beat, dict)
        return beat

    def is_at_work(self, task_id: str, words: str = "", attempt: int = 1, worker: str = "w1") -> bool:
        """Whether an attempt's agent has printed these words."""
        log = self.cli.state / "jobs" / job_id_of(worker, task_id, attempt, self.path) / "agent.stdout.log"
        return log.exists() and words in log.read_text()

    def go(self, name: str) -> None:
        """Let an agent that waits for this file go on."""
        (self.cli.workspace / name).touch()

    def names(self, kind: str, worker: str = "w1") -> list[str]:
        """The files there."""
        return sorted(os.listdir(self.path / kind / worker))

    def files(self) -> dict[str, bytes]:
        """All files below, but heartbeats: to see that nothing was lost."""
        found = [path for path in self.path.rglob("*") if path.is_file() and path.parent.name != "heartbeats"]
        return {str(path.relative_to(self.path)): path.read_bytes() for path in found}

    @staticmethod
    def until(check: Callable[[], object], what: str = "", seconds: float = LIMIT / 2) -> None:
        """Look again and again: a file tells nobody."""
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what or check}"
            time.sleep(0.01)


@pytest.fixture
def root(cli: Cli) -> Root:
    return Root(cli)


def refused(done: Done, words: list[str], code: int, text: str) -> None:
    """The command was refused, in one line."""
    assert (words, done.code, done.out) == (words, code, ""), done.err[-1000:]
    assert done.err.startswith("supervise: "), (words, done.err[:200])
    assert done.err.count("\n") == 1, (words, done.err[-1000:])
    assert text in done.err, (words, text)
