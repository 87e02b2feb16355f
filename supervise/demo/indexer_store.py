"""The index on disk: one SQLite database with a row and a full text per file.

Each change of it is one transaction, so it may be killed at any moment: what was not committed is rolled back
by whoever opens it next.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from supervise.demo.indexer_files import INDEX_DIRECTORY, Content, Stamp

__all__ = ["Change", "Damaged", "IndexLost", "NotInitialised", "Store", "Written", "create", "mend"]

DATABASE = f"{INDEX_DIRECTORY}/index.sqlite"
_GITIGNORE = f"{INDEX_DIRECTORY}/.gitignore"
_VERSION = 1
_PATIENCE = 10.0  # seconds for another process to finish its transaction
# One wait inside SQLite, in seconds. Python runs its signal handlers between two of them, not during one.
_ONE_WAIT = 0.2

_T = TypeVar("_T")

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS files (
        id INTEGER PRIMARY KEY,
        path BLOB NOT NULL UNIQUE,      -- a file's name is bytes
        digest TEXT NOT NULL,           -- SHA-256
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        ctime_ns INTEGER NOT NULL,      -- -1: too young when it was read, so not to be trusted
        inode INTEGER NOT NULL)""",
    "CREATE VIRTUAL TABLE IF NOT EXISTS texts USING fts5(body)",  # rowid = files.id
    f"PRAGMA user_version = {_VERSION}",
)
_PLAN = (
    "CREATE TEMP TABLE seen (path BLOB PRIMARY KEY) WITHOUT ROWID",
    "CREATE TEMP TABLE todo (path BLOB PRIMARY KEY, present INTEGER NOT NULL) WITHOUT ROWID",
)


class NotInitialised(Exception):
    """The workspace has no index."""


class Damaged(Exception):
    """The index is there and cannot be used."""


class IndexLost(Exception):
    """The index was removed, or put in another's place, while it was in use."""


class Change(NamedTuple):
    """The truth about one path: its content, or `None` where there is no file."""

    path: str
    content: Content | None


class Written(NamedTuple):
    """What one transaction did."""

    indexed: int
    removed: int


def create(workspace: Path) -> bool:
    """Create an empty index in `workspace`; `False` if there is one. Safe to repeat after a kill."""
    try:
        Store(workspace).close()
    except NotInitialised:
        (workspace / INDEX_DIRECTORY).mkdir(exist_ok=True)
        (workspace / _GITIGNORE).write_text("*\n")
        database = sqlite3.connect(workspace / DATABASE, timeout=_ONE_WAIT, isolation_level=None)
        try:
            _patiently(lambda: database.execute("PRAGMA journal_mode = WAL"))
            _patiently(lambda: database.execute("BEGIN IMMEDIATE"))
            for statement in _SCHEMA:
                database.execute(statement)
            database.execute("COMMIT")
        finally:
            database.close()
        return True
    return False


def mend(workspace: Path, *, force: bool) -> list[str]:
    """What is wrong with the index's own files; with `force`, put right.

    A database that cannot be used is replaced by an empty one: a reconcile fills it again.

    Raises:
        NotInitialised: there is no index at all.
    """
    if not (workspace / INDEX_DIRECTORY).is_dir():
        raise NotInitialised
    wrong: list[str] = []
    ignore = workspace / _GITIGNORE
    if not ignore.is_file() or ignore.read_text(errors="replace") != "*\n":
        wrong.append(f"{_GITIGNORE} does not keep the index out of git")
        if force:
            ignore.write_text("*\n")
    try:
        store = Store(workspace)
        try:
            store.check()
        finally:
            store.close()
    except (Damaged, NotInitialised, sqlite3.DatabaseError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            raise  # in use, not damaged
        wrong.append(f"{DATABASE} cannot be used ({str(error) or 'empty'})")
        if force:
            for suffix in ("", "-wal", "-shm", "-journal"):
                (workspace / (DATABASE + suffix)).unlink(missing_ok=True)
            create(workspace)
    return wrong


class Store:
    """An open index.

    Two temporary tables hold the plan of what to read next, so that memory does not grow with the workspace.

    Raises:
        NotInitialised: there is no index in `workspace`.
        Damaged: there is one, which is of another version or no database.
    """

    def __init__(self, workspace: Path) -> None:
        self._file = workspace / DATABASE
        try:
            status = self._file.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise NotInitialised from None
        self._identity = (status.st_dev, status.st_ino)
        uri = f"{self._file.absolute().as_uri()}?mode=rw"
        self._database = sqlite3.connect(uri, uri=True, timeout=_ONE_WAIT, isolation_level=None)
        try:
            version = _patiently(lambda: self._value("PRAGMA user_version"))
            tables = self._value("SELECT count(*) FROM sqlite_master")
            for statement in _PLAN:
                self._database.execute(statement)
        except sqlite3.DatabaseError as error:
            self._database.close()
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise
            raise Damaged(str(error)) from error
        if version != _VERSION:
            self._database.close()
            if not tables:  # `init` was killed before its one transaction
                raise NotInitialised
            raise Damaged(f"version {version} instead of {_VERSION}")

    def close(self) -> None:
        """Close the database. Nothing uncommitted is kept."""
        self._database.close()

    def check(self) -> None:
        """Raise `Damaged` if SQLite finds the database inconsistent."""
        verdict = _patiently(lambda: self._value("PRAGMA quick_check(1)"))
        if verdict != "ok":
            raise Damaged(str(verdict))
        # The full text checks itself by a command that is written as an insert.
        with self._transaction("IMMEDIATE"):
            self._database.execute("INSERT INTO texts(texts) VALUES ('integrity-check')")

    def count(self) -> int:
        """How many files are in the index."""
        return int(self._value("SELECT count(*) FROM files"))

    def query(self, text: str, limit: int) -> Iterator[tuple[str, str]]:
        """Path and snippet of the files that hold every word of `text`, best first."""
        words = " ".join('"' + word.replace('"', '""') + '"' for word in text.split())
        if not words:
            return
        rows = self._database.execute(
            "SELECT path, snippet(texts, 0, '', '', '…', 12) FROM texts JOIN files ON files.id = texts.rowid"
            " WHERE texts MATCH ? ORDER BY rank LIMIT ?",
            (words, limit),
        )
        for path, snippet in rows:
            yield os.fsdecode(path), " ".join(snippet.split())

    # The plan: what to read.

    @contextmanager
    def planning(self) -> Iterator[None]:
        """One transaction for many calls of the methods below: thousands of times faster than one each."""
        with self._transaction("DEFERRED"):
            yield

    def see(self, path: str, stamp: Stamp, *, trust_stamp: bool) -> None:
        """Note that the file `path` exists; plan to read it unless its trusted stamp is the one on record."""
        key = os.fsencode(path)
        self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,))
        if trust_stamp:
            row = self._database.execute(
                "SELECT size, mtime_ns, ctime_ns, inode FROM files WHERE path = ?", (key,)
            ).fetchone()
            if row is not None and Stamp(*row) == stamp:
                return
        self._database.execute("INSERT OR REPLACE INTO todo VALUES (?, 1)", (key,))

    def see_unread(self, directory: str) -> None:
        """Keep what is on record below `directory`, which cannot be read."""
        self._database.execute(
            "INSERT OR IGNORE INTO seen SELECT path FROM files WHERE path >= ? AND path < ?",
            _below(directory),
        )

    def plan(self, path: str) -> None:
        """Plan to read `path`, whatever its stamp."""
        self._database.execute("INSERT OR REPLACE INTO todo VALUES (?, 1)", (os.fsencode(path),))

    def plan_unseen(self, top: str) -> None:
        """Plan to look for all that is on record at or below `top` and was not seen since the last call."""
        self._database.execute(
            "INSERT OR IGNORE INTO todo"
            " SELECT path, 0 FROM files"
            " WHERE (path = ? OR path >= ? AND path < ?) AND path NOT IN (SELECT path FROM seen)",
            (os.fsencode(top), *_below(top)),
        )
        self._database.execute("DELETE FROM seen")

    def planned_files(self) -> int:
        """How many files are to be read; those that are on record only do not count."""
        return int(self._value("SELECT count(*) FROM todo WHERE present"))

    def planned(self, limit: int) -> list[tuple[str, bool]]:
        """The next paths of the plan, and whether a file was seen there."""
        rows = self._database.execute("SELECT path, present FROM todo ORDER BY path LIMIT ?", (limit,))
        return [(os.fsdecode(path), bool(present)) for path, present in rows]

    # The index.

    def apply(self, changes: Iterable[Change], done: Iterable[str]) -> Written:
        """Write `changes` and take `done` off the plan, in one transaction.

        Raises:
            IndexLost: the database is no longer the file of that name: what we wrote, nobody would read.
        """
        self.check_place()
        with self._transaction("IMMEDIATE"):
            written = [self._write(change) for change in changes]
            self._database.executemany("DELETE FROM todo WHERE path = ?", ((os.fsencode(path),) for path in done))
        return Written(sum(w.indexed for w in written), sum(w.removed for w in written))

    def check_place(self) -> None:
        """Raise `IndexLost` unless the database is still the file of that name."""
        try:
            status = self._file.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise IndexLost(f"{self._file} is gone") from None
        if (status.st_dev, status.st_ino) != self._identity:
            raise IndexLost(f"{self._file} was replaced")

    def _write(self, change: Change) -> Written:
        key = os.fsencode(change.path)
        row = self._database.execute("SELECT id, digest FROM files WHERE path = ?", (key,)).fetchone()
        content = change.content
        if content is None:
            if row is None:
                return Written(0, 0)
            self._database.execute("DELETE FROM texts WHERE rowid = ?", (row[0],))
            self._database.execute("DELETE FROM files WHERE id = ?", (row[0],))
            return Written(0, 1)
        if row is not None and row[1] == content.digest:
            self._database.execute(
                "UPDATE files SET size = ?, mtime_ns = ?, ctime_ns = ?, inode = ? WHERE id = ?",
                (*content.stamp, row[0]),
            )
            return Written(1, 0)
        new = self._database.execute(
            "INSERT OR REPLACE INTO files (id, path, digest, size, mtime_ns, ctime_ns, inode)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row[0] if row else None, key, content.digest, *content.stamp),
        ).lastrowid
        self._database.execute("INSERT OR REPLACE INTO texts (rowid, body) VALUES (?, ?)", (new, content.text))
        return Written(1, 0)

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        _patiently(lambda: self._database.execute(f"BEGIN {kind}"))
        try:
            yield
        except BaseException:
            if self._database.in_transaction:  # a full disk has rolled it back already
                self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _value(self, statement: str) -> int | str:
        value: int | str = self._database.execute(statement).fetchone()[0]
        return value


def _below(directory: str) -> tuple[bytes, bytes]:
    """The range of paths below `directory`: bytes, the first included, the last not."""
    # All that begins with "directory/" lies before "directory0", for "0" comes right after "/".
    # No name is longer than 255 bytes, so 256 times 255 lies behind every path.
    prefix = os.fsencode(directory)
    return (prefix + b"/", prefix + b"0") if prefix else (b"", b"\xff" * 256)


def _patiently(call: Callable[[], _T]) -> _T:
    """The result of `call`, tried again while another process holds the lock; bounded."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return call()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
