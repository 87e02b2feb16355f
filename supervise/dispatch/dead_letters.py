"""The dead letters under a root: to be listed, shown, tried again, dropped. Blocking calls, beside a running worker."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from attrs import frozen

from supervise import durable
from supervise.codec import loads
from supervise.dispatch.spool import Spool
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
        SuperviseError: there is no such directory, or it may not be read.
    """

    def __init__(self, root: Path, worker: str | None = None) -> None:
        self._root = root
        directory = root / "dlq"
        with _told():
            if not directory.is_dir():
                raise SuperviseError(
                    f"{directory} is not there: no worker has run under this root; name another (--root)"
                )
            self._directories = [path for path in sorted(directory.iterdir()) if path.is_dir()]
        if worker is not None:
            there = ", ".join(path.name for path in self._directories) or "none"
            self._directories = [path for path in self._directories if path.name == worker]
            if not self._directories:
                raise SuperviseError(f"no worker {worker!r} has run under {root}; there are: {there}")

    def all(self) -> list[DeadLetter]:
        """All, the oldest first. Raises SuperviseError where they may not be read."""
        found: list[DeadLetter] = []
        for directory in self._directories:
            with _told():
                names = [name for name in os.listdir(directory) if name.endswith(".json") and not name.startswith(".")]
            for path in (directory / name for name in names):
                raw = path.with_suffix(".raw")
                record, there = _record(path), raw if os.path.lexists(raw) else None
                if record is not None:
                    found.append(DeadLetter(worker=directory.name, name=path.stem, path=path, record=record, raw=there))
        return sorted(found, key=lambda letter: (str(letter.record.get("dlq_timestamp", "")), letter.name))

    def named(self, names: Iterable[str]) -> list[DeadLetter]:
        """Those of these names or task ids.

        Raises:
            SuperviseError: one is not there, or several workers have one.
        """
        letters, found = self.all(), list[DeadLetter]()
        for name in names:
            of_name = [letter for letter in letters if name == letter.name]
            of_name = of_name or [letter for letter in letters if name == letter.task_id]
            if not of_name:
                raise SuperviseError(f"there is no dead letter {name!r}; supervise dlq list tells which there are")
            workers = sorted({letter.worker for letter in of_name})
            if len(workers) > 1:
                raise SuperviseError(
                    f"workers {', '.join(workers)} have dead letters {name!r}; say which one is meant (--worker)"
                )
            found += [letter for letter in of_name if letter not in found]
        return found

    def retry(self, letter: DeadLetter) -> Path:
        """Put it back into tasks/: one rename. What was no task goes back as it came. Returns where it is now.

        Raises:
            SuperviseError: the name is taken there, it is no dead letter any more, or the disk refuses.
        """
        tasks = self._root / "tasks" / letter.worker
        new = tasks / f"{letter.name}.json"
        if not tasks.is_dir():
            raise SuperviseError(f"{tasks} is not there: start the worker {letter.worker} first, which makes it")
        if os.path.lexists(new):
            raise _there(new)
        if letter.raw is None and "file" in letter.record:
            raise SuperviseError(f"the bytes of {letter.name} are gone, or not there yet; look again in a moment")
        try:
            with _told():
                self._see_off(letter)
                if letter.raw is not None:
                    # First the record: bytes without one are put back by the worker's next start in any case.
                    letter.path.unlink()
                    durable.rename_new(letter.raw, new)
                else:
                    durable.rename_new(letter.path, new)
                durable.sync_directory(tasks)
        except FileExistsError:
            raise _there(new) from None
        except FileNotFoundError as error:
            raise SuperviseError(f"{error.filename} is gone: somebody else has seen to the dead letter") from None
        return new

    def drop(self, letter: DeadLetter) -> None:
        """Remove it for good, its bytes first. Raises SuperviseError where the disk refuses."""
        with _told():
            self._see_off(letter)
            if letter.raw is not None:
                if letter.raw.is_dir() and not letter.raw.is_symlink():
                    raise SuperviseError(f"{letter.raw} is a directory; look what is in it, and remove it by hand")
                letter.raw.unlink(missing_ok=True)
            letter.path.unlink(missing_ok=True)

    def _see_off(self, letter: DeadLetter) -> None:
        """A worker that was killed may have left the claim behind; the dead letter is the proof that it has ended."""
        Spool(self._root, letter.worker).drop_ended(letter.task_id, str(letter.record.get("dlq_claim", "")))


def _there(path: Path) -> SuperviseError:
    return SuperviseError(f"{path} is there already; wait until it is done, or remove it")


@contextmanager
def _told() -> Iterator[None]:
    """What the disk refuses, as an error of ours; but not that a file is gone."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise SuperviseError(f"{error.filename or 'a dead letter'}: {error.strerror}") from None


def _record(path: Path) -> dict[str, Any] | None:
    """None if it is gone since it was listed."""
    try:
        record = loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
