"""Hand a task to a worker's directory, and see what became of it. Blocking calls."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from supervise import durable
from supervise.codec import loads, to_line
from supervise.dispatch.spool import MODE, RETRY, Spool
from supervise.dispatch.task import fields_of, of_fields
from supervise.errors import BadInput, SuperviseError
from supervise.model import JOB_ID

__all__ = ["job_id_of", "outcome_of", "submit", "workers_of"]

#: What a file system says that has no hard links.
_NO_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


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
    _require_name(worker)
    of_fields(fields)  # as they are: JSON would make null of what is no number
    data = to_line(fields)
    task = of_fields(fields_of(data))  # as the worker will read it
    spool = Spool(root, worker)
    try:
        return _put(spool, task.task_id, data)
    except OSError as error:
        raise SuperviseError(f"the task cannot be written to {spool.tasks}: {error.strerror}") from None


def _put(spool: Spool, task_id: str, data: bytes) -> Path:
    if not spool.tasks.is_dir():
        raise SuperviseError(
            f"{spool.tasks} is not there: no worker {spool.worker!r} has run under this root; "
            f"start it first: supervise worker {spool.worker} --root {spool.root}"
        )
    path = spool.tasks / f"{task_id}.json"
    known = [path, *spool.tasks.glob(f"{task_id}{RETRY}*.json")]
    known += [place / path.name for place in (spool.running, spool.results, spool.dlq)]
    for taken in known:
        if os.path.lexists(taken):
            raise _taken(spool, task_id, taken)
    whole = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        durable.replace(whole, data, durable=True, mode=MODE)
        try:
            os.link(whole, path)  # a rename would overwrite the task of who was quicker
        except FileExistsError:
            raise _taken(spool, task_id, path) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            whole.rename(path)
    finally:
        whole.unlink(missing_ok=True)
    durable.sync_directory(spool.tasks)
    return path


def _taken(spool: Spool, task_id: str, by: Path) -> SuperviseError:
    mend = "try that again (supervise dlq retry)" if by.parent == spool.dlq else "choose another (--task-id)"
    return SuperviseError(f"the task id {task_id!r} is taken: {by} is there; {mend}")


def outcome_of(root: Path, worker: str, task_id: str) -> dict[str, Any] | None:
    """The result or the dead letter of a task; `None` while it waits or runs, or is not known.

    Raises:
        BadInput: these are no names.
        SuperviseError: the directories may not be read.
    """
    _require_name(worker)
    _require_name(task_id, "a task's id")
    spool = Spool(root, worker)
    for path in (spool.results / f"{task_id}.json", spool.dlq / f"{task_id}.json"):
        try:
            record = loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue
        except OSError as error:
            raise SuperviseError(f"{path} cannot be read: {error.strerror}") from None
        if isinstance(record, dict):
            return record
    return None


def workers_of(root: Path, task_id: str) -> list[str]:
    """The workers that know the task. Raises as `outcome_of`."""
    _require_name(task_id, "a task's id")
    found: list[str] = []
    tasks = root / "tasks"
    try:
        workers = sorted(os.listdir(tasks))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SuperviseError(f"{tasks} cannot be read: {error.strerror}") from None
    for worker in workers:
        spool = Spool(root, worker)
        places = (spool.running, spool.results, spool.dlq, spool.triggers, spool.tasks)
        names = (f"{task_id}.json", f"{task_id}~retry.json", f"{task_id}.trigger")
        if any(os.path.lexists(place / name) for place in places for name in names):
            found.append(worker)
    return found


def _require_name(name: str, what: str = "a worker's name") -> None:
    """A slash or two dots would lead elsewhere."""
    if not isinstance(name, str) or not JOB_ID.fullmatch(name):
        raise BadInput(f"{what} is {name!r}, but must match {JOB_ID.pattern}")


def job_id_of(worker: str, task_id: str, attempt: int, root: Path) -> str:
    """The id of the job for an attempt: its directory is named after it.

    Roots may share a state directory, and both names may hold dots: the digest tells all of them apart.
    """
    whole = json.dumps([os.path.realpath(root), worker, task_id])
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{worker[:40]}.{task_id[:70]}.{digest}.{attempt}"
