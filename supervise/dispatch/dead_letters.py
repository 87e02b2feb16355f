"""The dead letters under a root: to be listed, shown, tried again, dropped. Blocking calls, beside a running worker."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

from attrs import frozen

from supervise import durable
from supervise.codec import loads
from supervise.errors import SuperviseError

__all__ = ["DeadLetter", "DeadLetters"]


@frozen(kw_only=True)
class DeadLetter:
    """One.

    Attributes:
        worker: whose.
        name: of its record, without `.json`: unique for the worker.
        record: what is told of it; empty if it cannot be read.
        raw: the file itself, for what was no task.
    """

    worker: str
    name: str
    path: Path
    record: Mapping[str, Any]
    raw: Path | None

    @property
    def task_id(self) -> str:
        """The task's id, as far as it is known."""
        return str(self.record.get("task_id", self.name))


@final
class DeadLetters:
    """Of one worker, or of all.

    Args:
        root: the directory that holds dlq/.
        worker: whose; `None` for all.

    Raises:
        SuperviseError: there is no such directory.
    """

    def __init__(self, root: Path, worker: str | None = None) -> None:
        self._root = root
        directory = root / "dlq"
        if not directory.is_dir():
            raise SuperviseError(f"{directory} is not there: no worker has run under this root; name another (--root)")
        if worker is not None and not (directory / worker).is_dir():
            there = ", ".join(sorted(os.listdir(directory))) or "none"
            raise SuperviseError(f"no worker {worker!r} has run under {root}; there are: {there}")
        self._directories = [directory / worker] if worker else [d for d in sorted(directory.iterdir()) if d.is_dir()]

    def all(self) -> list[DeadLetter]:
        """All, the oldest first."""
        found: list[DeadLetter] = []
        for directory in self._directories:
            for path in directory.glob("*.json"):
                raw = path.with_suffix(".raw")
                there = raw if os.path.lexists(raw) else None
                letter = DeadLetter(worker=directory.name, name=path.stem, path=path, record=_record(path), raw=there)
                found.append(letter)
        return sorted(found, key=lambda letter: (str(letter.record.get("dlq_timestamp", "")), letter.name))

    def named(self, names: Iterable[str]) -> list[DeadLetter]:
        """Those of these names or task ids. Raises SuperviseError for one that is not there."""
        letters, found = self.all(), list[DeadLetter]()
        for name in names:
            of_name = [letter for letter in letters if name == letter.name]
            of_name = of_name or [letter for letter in letters if name == letter.task_id]
            if not of_name:
                raise SuperviseError(f"there is no dead letter {name!r}; supervise dlq list tells which there are")
            found += [letter for letter in of_name if letter not in found]
        return found

    def retry(self, letter: DeadLetter) -> Path:
        """Put it back into tasks/: one rename. What was no task goes back as it came. Returns where it is now.

        Raises:
            SuperviseError: the name is taken there, or it is no dead letter any more.
        """
        tasks = self._root / "tasks" / letter.worker
        new = tasks / f"{letter.name}.json"
        if os.path.lexists(new):
            raise SuperviseError(f"{new} is there already; wait until it is done, or remove it")
        try:
            if letter.raw is not None:
                # First the record: bytes without one are put back by the worker's next start in any case.
                letter.path.unlink()
                letter.raw.rename(new)
            else:
                letter.path.rename(new)
        except FileNotFoundError as error:
            raise SuperviseError(f"{error.filename} is gone: somebody else has seen to the dead letter") from None
        durable.sync_directory(tasks)
        return new

    def drop(self, letter: DeadLetter) -> None:
        """Remove it for good, its bytes first."""
        if letter.raw is not None:
            if letter.raw.is_dir() and not letter.raw.is_symlink():
                raise SuperviseError(f"{letter.raw} is a directory; look what is in it, and remove it by hand")
            letter.raw.unlink(missing_ok=True)
        letter.path.unlink(missing_ok=True)


def _record(path: Path) -> dict[str, Any]:
    try:
        record = loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
