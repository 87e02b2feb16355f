"""`supervise submit` and `supervise logs`: a task from outside, and what its attempts print."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from supervise.cli import exit_codes
from supervise.cli.signals import Signals
from supervise.cli.stdout import Stdout
from supervise.cli.view import say
from supervise.codec import to_line
from supervise.dispatch.submit import outcome_of, submit, workers_of
from supervise.dispatch.worker import job_id_of
from supervise.errors import SettingsError, SuperviseError
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
    stdout = Stdout(STDOUT, lambda: None)
    if wait is None:
        told = {"type": "submitted", "task_id": task_id, "worker": worker, "file": str(path)}
        await stdout.text(to_line(told) if json else f"{task_id}\n".encode())
        return exit_codes.COMPLETED
    say(console, f"supervise: task {task_id} waits for worker {worker}", "dim")
    signals = Signals()
    record: dict[str, Any] | None = None
    with signals.watch(), signals.preparation, trio.move_on_after(wait):
        while record is None:
            await trio.sleep(LOOK)
            record = await trio.to_thread.run_sync(outcome_of, root, worker, task_id)
    if record is None and signals.ended_by is not None:
        say(console, f"supervise: task {task_id} goes on without us", "yellow")
        return exit_codes.of_signal(signals.ended_by)
    if record is None:
        raise SuperviseError(f"task {task_id} has no result after {wait:g} s; it goes on: supervise logs {task_id}")
    await stdout.text(to_line(record) if json else _text(str(record.get("text", ""))))
    if "dlq_reason" in record:
        say(
            console,
            f"supervise: task {task_id} is a dead letter ({record['dlq_reason']}): {record.get('dlq_detail')}",
            "red",
        )
        return exit_codes.FAILED
    status = record.get("status")
    if status != "completed":
        say(console, f"supervise: task {task_id} {status}: {record.get('error')}", "red")
    return {"completed": exit_codes.COMPLETED, "timed_out": exit_codes.TIMED_OUT}.get(str(status), exit_codes.FAILED)


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
    with signals.watch(), signals.preparation:
        if (jobs / task).is_dir():
            await _job_log(jobs / task, stream, follow, stdout)
        else:
            await _task_log(settings, jobs, task, worker, stream, follow, stdout, console)
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
    known = [worker] if worker else await trio.to_thread.run_sync(workers_of, root, task)
    if len(known) != 1:
        who = f"workers {', '.join(known)} have tasks of this id; say which (--worker)" if known else "nobody knows it"
        raise SuperviseError(f"task {task!r} under {root}: {who}")
    name = known[0]
    shown = 0
    while True:
        over = not follow or await trio.to_thread.run_sync(outcome_of, root, name, task) is not None
        for number, directory in _attempts(jobs, name, task, after=shown):
            shown = number
            say(console, f"supervise: attempt {number} ({directory})", "dim")
            await _job_log(directory, stream, follow, stdout)
        if over:
            break
        await trio.sleep(LOOK)
    if shown == 0:
        why = "no attempt has begun, or its worker keeps its state elsewhere (state_dir)"
        raise SuperviseError(f"task {task} of worker {name} has no log under {jobs}: {why}")


def _attempts(jobs: Path, worker: str, task: str, *, after: int) -> Iterator[tuple[int, Path]]:
    """The directories of the attempts past `after`."""
    number = after + 1
    while (directory := jobs / job_id_of(worker, task, number)).is_dir():
        yield number, directory
        number += 1


async def _job_log(directory: Path, stream: str, follow: bool, stdout: Stdout) -> None:
    """The agent's log of one job, to the end of the job if it is to be followed."""
    path = directory / f"agent.{stream}.log"
    offset = 0
    while not stdout.closed:
        over = not follow or (directory / "result.json").exists()
        while not stdout.closed:
            data = await trio.to_thread.run_sync(_read, path, offset)
            if not data:
                break
            offset += len(data)
            await stdout.write(data)
        if over:
            return
        await trio.sleep(LOOK)


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK)
    except FileNotFoundError:  # nothing was printed yet
        return b""


def _text(text: str) -> bytes:
    if os.isatty(STDOUT):  # an agent shall not steer somebody's terminal
        text = "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in text)
    return (text if not text or text.endswith("\n") else text + "\n").encode("utf-8", "replace")


def seconds_or_none(wait: float | None) -> float | None:
    """A wait that makes sense. Raises SettingsError."""
    if wait is not None and not (math.isfinite(wait) and wait >= 0):
        raise SettingsError(f"--wait is {wait}, but must be a number of seconds, 0 or more")
    return wait
