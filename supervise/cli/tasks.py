"""`supervise submit` and `supervise logs`: a task from outside, and what its attempts print."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import trio
from rich.console import Console

from supervise.cli import exit_codes
from supervise.cli.signals import Signals
from supervise.cli.stdout import Stdout, put_out
from supervise.cli.view import say
from supervise.codec import to_line
from supervise.dispatch.submit import job_id_of, outcome_of, submit, workers_of
from supervise.errors import SettingsError, SuperviseError
from supervise.model import JOB_ID
from supervise.settings import Settings

STDOUT = 1

#: How often a directory is looked at by who waits for a result or a log, in seconds.
LOOK = 0.1
CHUNK = 256 * 1024


def root_of(settings: Settings) -> Path:
    """The root that was named. Raises SettingsError."""
    if settings.worker.root is None:
        raise SettingsError("no root was named: give --root, or set worker.root (SUPERVISE_WORKER__ROOT)")
    return Path(os.path.abspath(settings.worker.root))


async def hand_in(
    settings: Settings, worker: str, fields: dict[str, Any], wait: float | None, json: bool, *, console: Console
) -> int:
    """Submit a task, and wait for what becomes of it if that is wished; the exit code.

    Args:
        settings: name the root.
        worker: whose task it is.
        fields: the task's.
        wait: seconds to wait for its end at most; `None` not to wait.
        json: tell by one JSON object.
        console: where people look.
    """
    root = root_of(settings)
    path = await trio.to_thread.run_sync(submit, root, worker, fields)
    task_id = str(fields["task_id"])
    submitted = to_line({"type": "submitted", "task_id": task_id, "worker": worker, "file": str(path)})
    if wait is None:
        return await put_out(submitted if json else f"{task_id}\n".encode())
    say(console, f"supervise: task {task_id} waits for worker {worker}", "dim")
    signals = Signals()
    record: dict[str, Any] | None = None
    with signals.watch(), signals.preparation, trio.move_on_after(wait):
        while True:
            record = await trio.to_thread.run_sync(outcome_of, root, worker, task_id)
            if record is not None:
                break
            await trio.sleep(LOOK)
    if record is None:
        put = await put_out(submitted) if json else exit_codes.COMPLETED
        if signals.ended_by is not None:
            say(console, f"supervise: task {task_id} goes on without us", "yellow")
            return exit_codes.of_signal(signals.ended_by)
        told = f"task {task_id} has no result after {wait:g} s; it goes on: supervise logs {task_id}"
        say(console, f"supervise: {told}", "red")
        return put or exit_codes.TIMED_OUT
    put = await put_out(to_line(record) if json else _text(str(record.get("text", ""))))
    if "dlq_reason" in record:
        say(
            console,
            f"supervise: task {task_id} is a dead letter ({record['dlq_reason']}): {_line(record.get('dlq_detail'))}",
            "red",
        )
        return exit_codes.FAILED
    status = record.get("status")
    if status != "completed":
        say(console, f"supervise: task {task_id} {status}: {_line(record.get('error'))}", "red")
    return {"completed": put, "timed_out": exit_codes.TIMED_OUT}.get(str(status), exit_codes.FAILED)


async def logs(
    settings: Settings, task: str, worker: str | None, stream: str, follow: bool, *, console: Console
) -> int:
    """Print what the attempts at a task have printed; the exit code.

    Args:
        settings: name root and state directory.
        task: its id, or the id of a job.
        worker: whose task it is; `None` if that is not known.
        stream: `stdout` or `stderr`.
        follow: go on until the task has come to its end.
        console: where people look.
    """
    jobs = settings.state_dir / "jobs"
    signals = Signals()
    stdout = Stdout(STDOUT, signals.pipe_closed)
    try:
        with signals.watch(), signals.preparation:
            if JOB_ID.fullmatch(task) and (jobs / task).is_dir():
                job = Log(jobs / task, stream, stdout)
                await job.print(job.has_ended if follow else _at_once)
            else:
                await _task_log(settings, jobs, task, worker, stream, follow, stdout, console)
    except OSError as error:
        raise SuperviseError(f"the log cannot be read: {error.filename or jobs}: {error.strerror}") from None
    if stdout.trouble:
        raise SuperviseError(f"standard output cannot be written to: {stdout.trouble}")
    if signals.ended_by is not None and not (stdout.closed and not follow):
        return exit_codes.of_signal(signals.ended_by)
    return exit_codes.BROKEN_PIPE if stdout.closed else exit_codes.COMPLETED


async def _task_log(
    settings: Settings,
    jobs: Path,
    task: str,
    worker: str | None,
    stream: str,
    follow: bool,
    stdout: Stdout,
    console: Console,
) -> None:
    root = root_of(settings)
    known = await trio.to_thread.run_sync(workers_of, root, task)
    known = [name for name in known if worker in (None, name)]
    if len(known) != 1:
        who = f"workers {', '.join(known)} have tasks of this id; say which (--worker)" if known else "nobody knows it"
        raise SuperviseError(f"task {task!r} under {root}: {who}")
    name = known[0]

    def has_ended() -> bool:
        return outcome_of(root, name, task) is not None

    shown: list[Log] = []

    def next_log() -> Log | None:
        """Of the next attempt; or of one that has begun again: it was put back, or a dead letter was."""
        for number, log in enumerate(shown):
            if log.has_begun_again():
                del shown[number + 1 :]
                return log
        log = Log(jobs / job_id_of(name, task, len(shown) + 1, root), stream, stdout)
        if not log.is_there() or (shown and log.is_older_than(shown[-1])):
            return None
        shown.append(log)
        return log

    while True:
        over = not follow or await trio.to_thread.run_sync(has_ended)
        while (log := next_log()) is not None:
            say(console, f"supervise: attempt {len(shown)} ({log.directory})", "dim")
            after = Log(jobs / job_id_of(name, task, len(shown) + 1, root), stream, stdout)

            def is_over(log: Log = log, after: Log = after) -> bool:
                # A worker that was killed has left no end of its attempt.
                went_on = after.is_there() and not after.is_older_than(log)
                return log.has_ended() or went_on or has_ended()

            await log.print(is_over if follow else _at_once)
        if over or stdout.closed:
            break
        await trio.sleep(LOOK)
    if not shown:
        why = "no attempt has begun, or its worker keeps its state elsewhere (state_dir)"
        raise SuperviseError(f"task {task} of worker {name} has no log under {jobs}: {why}")


def _at_once() -> bool:
    return True


@final
class Log:
    """What the agent of one job prints."""

    def __init__(self, directory: Path, stream: str, stdout: Stdout) -> None:
        self.directory = directory
        self._path = directory / f"agent.{stream}.log"
        self._stdout = stdout
        self._end: Stamp | None = None  # as it was when it was printed to the end
        self._old: Stamp | None = None  # the log of then
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace") if os.isatty(STDOUT) else None

    def is_there(self) -> bool:
        """Whether there is such a job."""
        return self.directory.is_dir()

    def is_older_than(self, other: Log) -> bool:
        """Whether it is of an earlier life of the task: a dead letter that was tried again begins at 1 anew."""
        return self.directory.stat().st_mtime_ns < other.directory.stat().st_mtime_ns

    def has_ended(self) -> bool:
        """Whether the job has."""
        return (self.directory / "result.json").exists()

    def has_begun_again(self) -> bool:
        """Whether the job was begun again since it was printed."""
        return self._end is not None and _stamp(self.directory / "result.json") != self._end

    async def print(self, is_over: Callable[[], bool]) -> None:
        """Print it, until it is over."""
        offset = 0
        over = False
        while not over and not self._stdout.closed:
            over = await trio.to_thread.run_sync(is_over)
            while not self._stdout.closed and (data := await trio.to_thread.run_sync(self._read, offset)):
                offset += len(data)
                await self._stdout.write(self._shown(data))
            if not over:
                await trio.sleep(LOOK)
        self._end, self._old = _stamp(self.directory / "result.json"), _stamp(self._path)

    def _read(self, offset: int) -> bytes:
        if self._old is not None and _stamp(self._path) == self._old:
            return b""  # the job has begun again, its agent has not
        try:
            with self._path.open("rb") as file:
                file.seek(offset)
                return file.read(CHUNK)
        except FileNotFoundError:  # nothing was printed yet
            return b""

    def _shown(self, data: bytes) -> bytes:
        if self._decoder is None:
            return data
        return printable(self._decoder.decode(data)).encode()


Stamp = tuple[int, int]


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def printable(text: str) -> str:
    """For a terminal: an agent shall not steer somebody's."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in text)


def _line(text: object) -> str:
    return " ".join(printable(str(text)).split())


def _text(text: str) -> bytes:
    if os.isatty(STDOUT):
        text = printable(text)
    return (text if not text or text.endswith("\n") else text + "\n").encode("utf-8", "replace")


def seconds_or_none(wait: float | None) -> float | None:
    """A wait that makes sense. Raises SettingsError."""
    if wait is not None and not (math.isfinite(wait) and wait >= 0):
        raise SettingsError(f"--wait is {wait}, but must be a number of seconds, 0 or more")
    return wait
