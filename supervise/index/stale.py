"""The stale mark: what is known on disk of an index, across jobs, crashes and power cuts.

    <state_dir>/workspaces/<hash of the path>/stale.json   there: the index may be behind its workspace
    <state_dir>/workspaces/<hash of the path>/clean.json   the workspace as it was when it was last level
    <state_dir>/workspaces/<hash of the path>/lock         locked while one of them is changed
    <state_dir>/workspaces/<hash of the path>/alive        locked, shared, by whoever is at work there

The mark is on the disk before an agent starts, and goes only after a proof. So whatever dies in between leaves
it. A workspace that was never seen, or that has changed since its last clean stamp, is stale as well.

The mark names the jobs that it stands for. Jobs that share a watch share one `DiskMark`, and one hold on `alive`.
Whoever proves the index level takes the names of these jobs off, and those that dead jobs had left before the first
of them began, for the index was levelled after them; never the name of another job that may live.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, final

import trio

from supervise import durable
from supervise.codec import loads, rfc3339, to_line
from supervise.errors import SpawnError
from supervise.index.cidx import INDEX_DIRECTORY
from supervise.index.lock import lock, open_lock, unlock
from supervise.model import StopPolicy, Survivor
from supervise.processes.child import Tree, TreeOpener
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry

#: Larger answers of git, and larger trees, are not read on: the workspace is then taken for changed.
STATUS_LIMIT = 16 * 1024 * 1024
ENTRIES_LIMIT = 500_000

#: How many jobs a mark names at most: an index that fails for months leaves one more each time. The newest stay.
MOST_JOBS = 200

#: How long another job's hold on the lock is waited for, in seconds.
LOCK_PATIENCE = 5.0

NOT_THE_WORKSPACE = frozenset({".git", INDEX_DIRECTORY})


class StaleMark(Protocol):
    """The mark of one workspace, and its stamp."""

    async def set(self, job_id: str) -> str:
        """Put the mark on the disk. Returns why the index was stale before: empty if it was not marked.

        Again, before `clear`, for a job that joins: its name is added, and is one of those that `clear` takes off. One
        at a time.
        """

    async def stamp(self) -> str | None:
        """The state of the workspace in a few bytes; `None` where it cannot be told."""

    async def changed(self, stamp: str | None, *, assume_fresh: bool) -> str:
        """Why a workspace with this stamp is stale; empty if it is as it was when last clean."""

    async def clear(self, stamp: str | None, reconcile_seconds: float | None) -> None:
        """Record that the index is level with the workspace of that stamp, and remove the mark of our jobs.

        A mark that stands for another job, too, stays for that, and nothing is recorded.
        """

    def release(self) -> None:
        """Our jobs are over: what they leave of their mark is for the next one to settle. May be called again."""

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
        self._settles: frozenset[str] = frozenset()  # the jobs whose names a clean end takes off the mark
        self._alive: weakref.finalize[[int], DiskMark] | None = None
        self._cleared = False

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

    def release(self) -> None:
        """See `StaleMark.release`."""
        if self._alive is not None:
            self._alive()
            self._alive = None

    def _set(self, job_id: str) -> str:
        if self._alive is not None and not self._cleared:
            return self._add(job_id)
        self.release()
        durable.make_private(self.directory)
        try:
            with self._locked():
                alone = self._live()
                before = self._jobs()
                self._settles = frozenset({job_id, *(before if alone else ())})
                self._cleared = False
                self._write(self._with(before, job_id))
        except OSError:
            self.release()
            self._forget_clean()
            raise
        return _told(before, alone=alone)

    def _add(self, job_id: str) -> str:
        """One more job. Should the disk refuse its name, the others' names stand for the index all the same."""
        with self._locked():
            before = self._jobs()
            self._settles |= {job_id}
            self._write(self._with(before, job_id))
        return ""

    def _with(self, jobs: dict[str, str], job_id: str) -> dict[str, str]:
        """`jobs` and one more, at most `MOST_JOBS`: names of ours go first, for one of them is enough."""
        others = [name for name in jobs if name != job_id]
        others.sort(key=lambda name: name not in self._settles)  # stable: the oldest of each kind first
        kept = set(others[max(0, len(others) + 1 - MOST_JOBS) :])
        return {**{name: at for name, at in jobs.items() if name in kept}, job_id: rfc3339(time.time())}

    def _jobs(self) -> dict[str, str]:
        """The jobs that the mark stands for, the oldest first, and when they set it."""
        record = _read(self._stale)
        if record is None:
            return {}
        jobs = record.get("jobs")
        if isinstance(jobs, dict) and jobs:
            return {str(job_id): str(at) for job_id, at in jobs.items()}
        return {str(record.get("job_id", "?")): str(record.get("time", "?"))}  # of an older version, or torn

    def _write(self, jobs: dict[str, str]) -> None:
        durable.replace(self._stale, to_line({"workspace": self._workspace, "jobs": jobs}), durable=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One job at a time reads and changes the mark. The lock of a process that dies is free."""
        descriptor = open_lock(self.directory / "lock")
        try:
            give_up = time.monotonic() + LOCK_PATIENCE
            while not lock(descriptor, fcntl.LOCK_EX):
                if time.monotonic() >= give_up:
                    raise OSError(errno.ETIMEDOUT, f"another job held its lock for {LOCK_PATIENCE:g} s")
                time.sleep(0.02)
            yield
        finally:
            unlock(descriptor)

    def _live(self) -> bool:
        """Be at work in this workspace until `release`, or until death. Returns whether nobody else is."""
        descriptor = open_lock(self.directory / "alive")
        self._alive = weakref.finalize(self, unlock, descriptor)
        self._alive.atexit = False  # else a forked child of ours would give it back at its own exit
        alone = lock(descriptor, fcntl.LOCK_EX)
        if not lock(descriptor, fcntl.LOCK_SH):  # nobody else asks for it alone: we hold the other lock
            raise OSError(errno.EWOULDBLOCK, "somebody keeps all jobs out of the workspace")
        return alone

    def _forget_clean(self) -> None:
        """Without a mark, the workspace must at least not pass for clean, nor for never seen.

        To empty a file needs no space on the disk, and no right to write in the directory.
        """
        try:
            os.truncate(self._clean, 0)
        except FileNotFoundError:
            return

    def _clear(self, stamp: str | None, reconcile_seconds: float | None) -> None:
        with self._locked():
            left = {job_id: at for job_id, at in self._jobs().items() if job_id not in self._settles}
            if left:
                self._write(left)
            else:
                self._write_clean(stamp, reconcile_seconds)
            self._cleared = True

    def _write_clean(self, stamp: str | None, reconcile_seconds: float | None) -> None:
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


def _told(jobs: dict[str, str], *, alone: bool) -> str:
    if not jobs:
        return ""
    *older, last = jobs
    more = f" (and {len(older)} more before it)" if older else ""
    return f"job {last} {'left it behind at' if alone else 'may be at work here since'} {jobs[last]}{more}"


@final
class Stamper:
    """Reads a cheap stamp of a workspace: git's HEAD, index and status, else the newest time of change.

    Args:
        workspace: the directory.
        open_tree: starts git.
        env: git's environment.
        user: whom git runs as; `None` for us.
        timeout: seconds, for git, and again for a look at the files.
        hurry: ends the stamp early; it is `None` then.
        outlived: gets the processes of git's tree that could not be ended.
    """

    def __init__(
        self,
        workspace: Path,
        open_tree: TreeOpener,
        env: dict[str, str],
        user: str | None,
        timeout: float,
        hurry: Hurry,
        outlived: Callable[[tuple[Survivor, ...]], None] = lambda survivors: None,
    ) -> None:
        self._workspace = workspace
        self._open_tree = open_tree
        self._env = env
        self._user = user
        self._timeout = timeout
        self._hurry = hurry
        self._outlived = outlived

    async def __call__(self) -> str | None:
        """The stamp; `None` where the workspace is too large to tell or cannot be read, or nobody waits for it."""
        with self._hurry.step(math.inf) as wait:  # who cannot wait for git cannot wait for the look in its place
            stamp = await self._by_any()
        return None if wait.cancelled_caught else stamp

    async def _by_any(self) -> str | None:
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
        # git writes nothing (no optional locks), and runs neither hooks nor a file system monitor. It still runs a
        # clean filter that the workspace's own git configuration names (`filter.*.clean`, `.process`): no option of
        # git 2.39 turns that off. It runs in this tree, as the job's user, without keys, and is ended with the tree.
        git = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
        status = ("status", "--porcelain=v2", "--branch", "--untracked-files=all", "-z")
        paths = ("--", ".", f":(exclude){INDEX_DIRECTORY}")
        command = Command(argv=git + status + paths, cwd=str(self._workspace), env=self._env, user=self._user)
        answer = bytearray()

        def collect(chunk: bytes) -> None:
            if len(answer) <= STATUS_LIMIT:
                answer.extend(chunk)

        tree: Tree | None = None
        try:
            async with self._open_tree("stamp", StopPolicy(((15, 1.0),)), self._hurry) as tree:
                child = await tree.spawn(command, stdout=collect)
                with trio.move_on_after(self._timeout):
                    await child.wait()
        except SpawnError:
            return None  # no git here: the times of the files tell as well
        finally:
            if tree is not None:
                self._outlived(tree.survivors)
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
