"""The stale mark: what is known on disk of an index, across jobs, crashes and power cuts.

    <state_dir>/workspaces/<hash of the path>/stale.json   there: the index may be behind its workspace
    <state_dir>/workspaces/<hash of the path>/clean.json   the workspace as it was when it was last level

The mark is on the disk before an agent starts, and goes only after a proof. So whatever dies in between leaves
it. A workspace that was never seen, or that has changed since its last clean stamp, is stale as well.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, final

import trio

from supervise import durable
from supervise.codec import loads, rfc3339, to_line
from supervise.errors import SpawnError
from supervise.index.cidx import INDEX_DIRECTORY
from supervise.model import StopPolicy
from supervise.processes.child import TreeOpener
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry

#: Larger answers of git, and larger trees, are not read on: the workspace is then taken for changed.
STATUS_LIMIT = 16 * 1024 * 1024
ENTRIES_LIMIT = 500_000

NOT_THE_WORKSPACE = frozenset({".git", INDEX_DIRECTORY})


class StaleMark(Protocol):
    """The mark of one workspace, and its stamp."""

    async def set(self, job_id: str) -> str:
        """Put the mark on the disk. Returns why the index was stale before: empty if it was not marked."""

    async def stamp(self) -> str | None:
        """The state of the workspace in a few bytes; `None` where it cannot be told."""

    async def changed(self, stamp: str | None, *, assume_fresh: bool) -> str:
        """Why a workspace with this stamp is stale; empty if it is as it was when last clean."""

    async def clear(self, stamp: str | None, reconcile_seconds: float | None) -> None:
        """Record that the index is level with the workspace of that stamp, and remove the mark."""

    @property
    def last_reconcile_seconds(self) -> float | None:
        """How long the last reconcile on record took."""


@final
class DiskMark:
    """A `StaleMark` under a state directory.

    Args:
        state_dir: where state is kept.
        workspace: the directory whose index is meant.
        read_stamp: tells the state of the workspace.

    Its methods raise `OSError` where the disk does; cancelling waits for the write under way.
    """

    def __init__(self, state_dir: Path, workspace: Path, read_stamp: Callable[[], Any]) -> None:
        real = os.path.realpath(workspace)
        self.directory = state_dir / "workspaces" / hashlib.sha256(os.fsencode(real)).hexdigest()[:32]
        self.last_reconcile_seconds: float | None = None
        self._workspace = real
        self._stale = self.directory / "stale.json"
        self._clean = self.directory / "clean.json"
        self._read_stamp = read_stamp

    async def set(self, job_id: str) -> str:
        """See `StaleMark.set`."""
        return await trio.to_thread.run_sync(self._set, job_id)

    async def stamp(self) -> str | None:
        """See `StaleMark.stamp`."""
        stamp: str | None = await self._read_stamp()
        return stamp

    async def changed(self, stamp: str | None, *, assume_fresh: bool) -> str:
        """See `StaleMark.changed`."""
        record = await trio.to_thread.run_sync(_read, self._clean)
        if record is None:
            return "" if assume_fresh else "this workspace was never seen before"
        seconds = record.get("reconcile_seconds")
        self.last_reconcile_seconds = float(seconds) if isinstance(seconds, int | float) else None
        if not record:
            return "the record of its last clean end cannot be read"
        if stamp is None:
            return "the state of the workspace cannot be told"
        if stamp != record.get("stamp"):
            return f"the workspace has changed since {record.get('time', 'its last clean end')}"
        return ""

    async def clear(self, stamp: str | None, reconcile_seconds: float | None) -> None:
        """See `StaleMark.clear`."""
        await trio.to_thread.run_sync(self._clear, stamp, reconcile_seconds or self.last_reconcile_seconds)

    def _set(self, job_id: str) -> str:
        durable.make_private(self.directory)
        old = _read(self._stale)
        why = "" if old is None else f"job {old.get('job_id', '?')} left it behind at {old.get('time', '?')}"
        record = {"workspace": self._workspace, "job_id": job_id, "time": rfc3339(time.time())}
        try:
            durable.replace(self._stale, to_line(record), durable=True)
        except OSError:
            self._forget_clean()
            raise
        return why

    def _forget_clean(self) -> None:
        """Without a mark, the workspace must at least not pass for clean, nor for never seen.

        To empty a file needs no space on the disk, and no right to write in the directory.
        """
        try:
            os.truncate(self._clean, 0)
        except FileNotFoundError:
            return

    def _clear(self, stamp: str | None, reconcile_seconds: float | None) -> None:
        record = {
            "workspace": self._workspace,
            "stamp": stamp,
            "time": rfc3339(time.time()),
            "reconcile_seconds": reconcile_seconds,
        }
        durable.replace(self._clean, to_line(record), durable=True)
        self._stale.unlink(missing_ok=True)
        durable.sync_directory(self.directory)


def _read(path: Path) -> dict[str, Any] | None:
    """The record in a file; empty for a file that makes no sense, `None` for none."""
    try:
        record = loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


@final
class Stamper:
    """Reads a cheap stamp of a workspace: git's HEAD, index and status, else the newest time of change.

    Args:
        workspace: the directory.
        open_tree: starts git.
        env: git's environment.
        user: whom git runs as; `None` for us.
        timeout: seconds.
    """

    def __init__(
        self, workspace: Path, open_tree: TreeOpener, env: dict[str, str], user: str | None, timeout: float
    ) -> None:
        self._workspace = workspace
        self._open_tree = open_tree
        self._env = env
        self._user = user
        self._timeout = timeout

    async def __call__(self) -> str | None:
        """The stamp; `None` where the workspace is too large to tell or cannot be read."""
        if any((parent / ".git").exists() for parent in (self._workspace, *self._workspace.parents)):
            stamp = await self._by_git()
            if stamp is not None:
                return stamp
        return await self._look(_by_times, self._workspace)

    async def _look(self, look: Callable[..., str | None], *args: object) -> str | None:
        """Ask the disk, which may be a network's: a look that takes too long is abandoned."""
        with trio.move_on_after(self._timeout):
            return await trio.to_thread.run_sync(look, *args, abandon_on_cancel=True)
        return None

    async def _by_git(self) -> str | None:
        # Nothing that the workspace configures may run or write: no optional locks, no file system monitor.
        git = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
        status = ("status", "--porcelain=v2", "--branch", "--untracked-files=all", "-z")
        paths = ("--", ".", f":(exclude){INDEX_DIRECTORY}")
        command = Command(argv=git + status + paths, cwd=str(self._workspace), env=self._env, user=self._user)
        answer = bytearray()

        def collect(chunk: bytes) -> None:
            if len(answer) <= STATUS_LIMIT:
                answer.extend(chunk)

        try:
            async with self._open_tree("stamp", StopPolicy(((15, 1.0),)), Hurry()) as tree:
                child = await tree.spawn(command, stdout=collect)
                with trio.move_on_after(self._timeout):
                    await child.wait()
        except SpawnError:
            return None  # no git here: the times of the files tell as well
        if child.status is None or not child.status.ok or len(answer) > STATUS_LIMIT:
            return None
        return await self._look(_git_stamp, self._workspace, bytes(answer))


def _git_stamp(workspace: Path, answer: bytes) -> str | None:
    digest = hashlib.sha256()
    root = _git_root(workspace)
    records = iter(answer.split(b"\0"))
    for record in records:
        if record.startswith((b"# branch.upstream", b"# branch.ab")):
            continue  # how far ahead of its upstream a branch is says nothing of the workspace
        digest.update(record + b"\0")
        kind = record[:1]
        if kind in (b"1", b"2", b"u", b"?"):
            # Where git stops telling: that a file differs, but not how. Its times and size do.
            path = os.path.join(os.fsencode(root), record.split(b" ", {b"1": 8, b"2": 9, b"u": 10, b"?": 1}[kind])[-1])
            if os.path.isdir(path) and not os.path.islink(path):
                return None  # a repository within: of what differs in there, git does not tell
            digest.update(_file_stamp(path))
        if kind == b"2":  # a rename: its old path is the next record
            digest.update(next(records, b"") + b"\0")
    return "git:" + digest.hexdigest()


def _git_root(workspace: Path) -> Path:
    """Paths in git's answer begin at the top of the work tree."""
    return next((parent for parent in (workspace, *workspace.parents) if (parent / ".git").exists()), workspace)


def _file_stamp(path: bytes) -> bytes:
    try:
        info = os.lstat(path)
    except OSError:
        return b"-"
    return f"{info.st_mtime_ns}.{info.st_ctime_ns}.{info.st_size}.{info.st_mode}".encode()


def _by_times(workspace: Path) -> str | None:
    newest = count = 0
    todo = [os.fspath(workspace)]
    while todo:
        directory = todo.pop()
        try:
            newest = max(newest, os.lstat(directory).st_mtime_ns)
            with os.scandir(directory) as entries:
                for entry in entries:
                    count += 1
                    if count > ENTRIES_LIMIT:
                        return None
                    if entry.is_dir(follow_symlinks=False):
                        if directory != os.fspath(workspace) or entry.name not in NOT_THE_WORKSPACE:
                            todo.append(entry.path)
                    else:
                        info = entry.stat(follow_symlinks=False)
                        newest = max(newest, info.st_mtime_ns, info.st_ctime_ns)
        except OSError:
            return None
    return f"times:{newest}:{count}"
