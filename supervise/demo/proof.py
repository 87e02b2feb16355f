"""The proof that an index equals its workspace, made from scratch.

It shares no code with the indexer but two names: a mistake that both made would hide itself.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from supervise.demo.indexer_files import IGNORED, LARGEST_TEXT
from supervise.demo.indexer_store import DATABASE

__all__ = ["Proof", "proof"]

_MOST_DIFFERENCES = 100
_BUSY_TIMEOUT = 10.0  # seconds


@frozen
class Proof:
    """What a comparison of index and files found.

    Attributes:
        equal: every file is in the index with its digest and its text, and nothing else is.
        files: how many files there are in the workspace.
        differences: what differs, one line each; at most 100, then one line with the number of the others.
    """

    equal: bool
    files: int
    differences: tuple[str, ...]


def proof(workspace: Path) -> Proof:
    """Compare the index in `workspace` with its files by reading each file; no time stamp is trusted.

    Runs for as long as reading all files takes. An index that cannot be read is a difference, not an error.
    """
    found: list[str] = []
    files = more = 0
    for path, difference in _compare(workspace):
        files += path is not None
        if difference is None:
            continue
        if len(found) < _MOST_DIFFERENCES:
            found.append(difference)
        else:
            more += 1
    if more:
        found.append(f"and {more} more")
    return Proof(equal=not found, files=files, differences=tuple(found))


def _compare(workspace: Path) -> Iterator[tuple[bytes | None, str | None]]:
    """For each file, its path and how it differs; then `None` and a difference for what is no file."""
    try:
        database = sqlite3.connect(
            # Writable: after a kill, SQLite must roll back what was left before it can read.
            f"{(workspace / DATABASE).absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=_BUSY_TIMEOUT,
            isolation_level=None,
        )
        try:
            rows = {path: (key, digest) for key, path, digest in _rows(database)}
            for path in _files(workspace):
                yield path, _difference(database, workspace, path, rows.pop(path, None))
            for (key,) in database.execute("SELECT rowid FROM texts WHERE rowid NOT IN (SELECT id FROM files)"):
                yield None, f"the full text holds an entry {key} that belongs to no file"
        finally:
            database.close()
    except sqlite3.Error as error:
        yield None, f"the index cannot be read: {error}"
        return
    except OSError as error:
        yield None, f"the workspace cannot be read: {error}"
        return
    for path in sorted(rows):
        yield None, f"{_name(path)}: in the index, but no such file"


def _rows(database: sqlite3.Connection) -> sqlite3.Cursor:
    return database.execute("SELECT id, path, digest FROM files")


def _difference(database: sqlite3.Connection, workspace: Path, path: bytes, row: tuple[int, str] | None) -> str | None:
    if row is None:
        return f"{_name(path)}: not in the index"
    key, recorded = row
    try:
        with open(os.path.join(os.fsencode(workspace), path), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            file.seek(0)
            data = file.read() if size <= LARGEST_TEXT else b""
    except OSError as error:
        return f"{_name(path)}: cannot be read: {error.strerror}"
    if digest != recorded:
        return f"{_name(path)}: the index has an older content"
    text = database.execute("SELECT body FROM texts WHERE rowid = ?", (key,)).fetchone()
    if text is None or text[0] != data.decode("utf-8", "replace").replace("\0", "\ufffd"):
        return f"{_name(path)}: the full text is not that of the file"
    return None


def _files(workspace: Path) -> Iterator[bytes]:
    """Paths of all regular files, relative to the workspace."""
    top = os.fsencode(workspace)
    ignored = {name.encode() for name in IGNORED}

    def fail(error: OSError) -> None:
        raise error

    for directory, directories, names in os.walk(top, onerror=fail):
        directories[:] = [name for name in directories if name not in ignored]
        for name in names:
            path = os.path.join(directory, name)
            if name not in ignored and stat.S_ISREG(os.lstat(path).st_mode):
                yield os.path.relpath(path, top)


def _name(path: bytes) -> str:
    return ascii(path.decode("utf-8", "surrogateescape"))[1:-1]
