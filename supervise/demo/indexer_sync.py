"""Making the index equal to the files: first a plan of what to read, then the reading, in bounded batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from supervise.demo.indexer_files import Changed, Content, is_directory, read_file, shown, walk
from supervise.demo.indexer_store import Change, Store

__all__ = ["Cancelled", "Sync", "Tally"]

_BATCH_FILES = 200
_BATCH_TEXT = 16 * 1024 * 1024  # characters held before they are written
_TRIES = 3  # for a file that changes while it is read


class Cancelled(Exception):
    """`stop` said so. What was written stays."""


class Tally(NamedTuple):
    """What came of a plan.

    Attributes:
        processed: how many of the files that were planned are dealt with.
        indexed, removed: what changed in the index.
    """

    processed: int = 0
    indexed: int = 0
    removed: int = 0


class Sync:
    """One workspace and its index.

    Args:
        root: descriptor of the workspace.
        say: takes a line of output.
        stop: asked before each piece of work; `True` raises `Cancelled`.
        changing: takes the path of a file that changed each time it was read; without it, that is an error.
    """

    def __init__(
        self,
        root: int,
        store: Store,
        say: Callable[[str], None],
        *,
        stop: Callable[[], bool] = lambda: False,
        changing: Callable[[str], None] | None = None,
    ) -> None:
        self._root = root
        self._store = store
        self._say = say
        self._stop = stop
        self._changing = changing

    def plan(self, *paths: str, trust_stamps: bool = True) -> int:
        """Plan to make the index equal to the files at and below `paths`; how many files are to be read.

        A path that is a file is read in any case; of a directory, the files whose stamp is not on record.
        """
        with self._store.planning():
            for path in paths:
                try:
                    directory = is_directory(self._root, path)
                except OSError as error:
                    self._unreadable(path, error)
                    continue
                if directory:
                    for file, stamp in walk(self._root, path, self._unreadable):
                        self._check()
                        self._store.see(file, stamp, trust_stamp=trust_stamps)
                else:
                    self._store.plan(path)
                self._store.plan_unseen(path)
            return self._store.planned_files()

    def carry_out(self) -> Tally:
        """Read what is planned and write it down, batch by batch."""
        tally = Tally()
        while paths := self._store.planned(_BATCH_FILES):
            changes: list[Change] = []
            done: list[str] = []
            characters = processed = 0
            for path, present in paths:
                done.append(path)
                try:
                    content = self._read(path)
                except Changed:
                    if self._changing is None:
                        self._error(path, "changes all the time")
                    else:
                        self._changing(path)
                    continue
                except OSError as error:
                    self._error(path, error.strerror)
                    continue
                changes.append(Change(path, content))
                processed += present
                characters += len(content.text) if content else 0
                if characters > _BATCH_TEXT:
                    break
            written = self._store.apply(changes, done)
            tally = Tally(tally.processed + processed, tally.indexed + written.indexed, tally.removed + written.removed)
        return tally

    def _read(self, path: str) -> Content | None:
        for _ in range(_TRIES - 1):
            try:
                return read_file(self._root, path, self._check)
            except Changed:
                continue
        return read_file(self._root, path, self._check)

    def _check(self) -> None:
        if self._stop():
            raise Cancelled

    def _unreadable(self, directory: str, error: OSError) -> None:
        self._store.see_unread(directory)
        self._error(directory or ".", error.strerror)

    def _error(self, path: str, reason: str | None) -> None:
        self._say(f"ERROR {shown(path)}: {reason}")
