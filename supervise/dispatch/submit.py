"""Hand a task to a worker's directory, and see what became of it. Blocking calls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supervise import durable
from supervise.codec import loads, to_line
from supervise.dispatch.spool import MODE, Spool
from supervise.dispatch.task import fields_of, of_fields
from supervise.errors import SuperviseError

__all__ = ["outcome_of", "submit", "workers_of"]


def submit(root: Path, worker: str, fields: Mapping[str, Any]) -> Path:
    """Put a task into the worker's directory, durably and in one piece.

    Args:
        root: the directory that holds tasks/.
        worker: whose.
        fields: as in a task's file.

    Returns:
        The task's file.

    Raises:
        BadInput: the fields make no task.
        SuperviseError: there is no such worker, the id is taken, or the disk refuses.
    """
    data = to_line(fields)
    task = of_fields(fields_of(data))  # as the worker will read it
    spool = Spool(root, worker)
    if not spool.tasks.is_dir():
        raise SuperviseError(
            f"{spool.tasks} is not there: no worker {worker!r} has run under this root; "
            f"start it first: supervise worker {worker} --root {root}"
        )
    path = spool.tasks / f"{task.task_id}.json"
    for taken in (path, spool.running / path.name, spool.results / path.name, spool.dlq / path.name):
        if os.path.lexists(taken):
            mend = "try that again (supervise dlq retry)" if taken.parent == spool.dlq else "choose another (--task-id)"
            raise SuperviseError(f"the task id {task.task_id!r} is taken: {taken} is there; {mend}")
    try:
        durable.replace(path, data, durable=True, mode=MODE)
    except OSError as error:
        raise SuperviseError(f"the task cannot be written to {spool.tasks}: {error.strerror}") from None
    return path


def outcome_of(root: Path, worker: str, task_id: str) -> dict[str, Any] | None:
    """The result or the dead letter of a task; `None` while it waits or runs, or is not known."""
    spool = Spool(root, worker)
    for path in (spool.results / f"{task_id}.json", spool.dlq / f"{task_id}.json"):
        try:
            record = loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            continue
        if isinstance(record, dict):
            return record
    return None


def workers_of(root: Path, task_id: str) -> list[str]:
    """The workers that know the task."""
    found: list[str] = []
    tasks = root / "tasks"
    for worker in sorted(os.listdir(tasks)) if tasks.is_dir() else ():
        spool = Spool(root, worker)
        places = (spool.running, spool.results, spool.dlq, spool.triggers, spool.tasks)
        names = (f"{task_id}.json", f"{task_id}~retry.json", f"{task_id}.trigger")
        if any(os.path.lexists(place / name) for place in places for name in names):
            found.append(worker)
    return found
