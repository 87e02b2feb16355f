"""A worker in a process of its own, for benchmarks/worker.py: `python -m benchmarks.worker_process MODE ROOT SETTINGS`.

`serve` runs until its standard input ends, and says in a line what becomes of each task: `claimed ID NANOSECONDS` (of
CLOCK_MONOTONIC, which all processes share) and `finished ID`. `drain` ends when `count` tasks have ended, and says how
many seconds that took since the worker was opened. Jobs are made up; nothing is run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import trio

from supervise.dispatch import directory
from supervise.dispatch.worker import open_worker
from supervise.events import Event, TaskClaimed, TaskFinished
from supervise.executors.mock import MockExecutor
from supervise.settings import Settings, WorkerSettings

WORKER = "w1"


def settings_of(root: Path, changes: dict[str, Any]) -> Settings:
    """Those of the worker; the defaults where `changes` says nothing."""
    worker = WorkerSettings(root=root, workspace=root, **changes)
    return Settings(worker=worker, state_dir=root / "state")


def _tell(event: Event) -> None:
    """What happened, for whoever has dropped the task."""
    if isinstance(event, TaskClaimed):
        os.write(1, f"claimed {event.task_id} {time.monotonic_ns()}\n".encode())
    elif isinstance(event, TaskFinished):
        os.write(1, f"finished {event.task_id}\n".encode())


async def serve(root: Path, changes: dict[str, Any]) -> None:
    """Take what is dropped, until nobody drops any more."""
    if changes.pop("poll", False):  # as on a network file system, where nobody tells of changes
        directory.sees_nothing = lambda *args: "nfs"  # type: ignore[attr-defined]  # imported there, for itself
    settings = settings_of(root, changes)
    async with open_worker(WORKER, settings=settings, executor=MockExecutor(), emit=_tell) as worker:
        while worker.status != "healthy":
            await trio.sleep(0.01)
        os.write(1, b"ready\n")
        await trio.lowlevel.wait_readable(0)
        worker.cancel()


async def drain(root: Path, changes: dict[str, Any]) -> None:
    """End what lies there."""
    count = changes.pop("count")
    ended = 0
    over = trio.Event()

    def note(event: Event) -> None:
        nonlocal ended
        if isinstance(event, TaskFinished):
            ended += 1
            if ended == count:
                over.set()

    settings = settings_of(root, changes)
    began = time.perf_counter()
    async with open_worker(WORKER, settings=settings, executor=MockExecutor(), emit=note):
        await over.wait()
        seconds = time.perf_counter() - began
    os.write(1, f"{seconds}\n".encode())


def main() -> None:
    """See the module."""
    mode, root, changes = sys.argv[1:]
    trio.run({"serve": serve, "drain": drain}[mode], Path(root), json.loads(changes))


if __name__ == "__main__":
    main()
