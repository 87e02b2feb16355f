"""The directories of jobs that have ended: removed when they are too old, or too much. Beside the jobs, in a thread.

    a job lives           it has locked its directory (see `directory`), which stays
    ended                 judged by the time of its result.json
    killed                no result.json: judged by the newest file, which every heartbeat has written anew
    not a job's           holds anything that jobs do not make, or nothing that tells of one: stays for good

A directory that goes is locked, judged again, and renamed to a hidden name; then its files are unlinked, one by one.
What a killed tidy has left under hidden names goes the next time. A stamp keeps the processes of this state
directory from looking more often than every ten minutes, all together.

All is done relative to one descriptor of the directory; no link is followed, and nothing below a directory is entered.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar, final

import trio
from attrs import frozen

from supervise.job.directory import MADE_BY_JOBS, OPEN, RESULT, SIGNS, is_at, lock
from supervise.model import JOB_ID

log = logging.getLogger("supervise.job")

#: Seconds between two looks.
EVERY: Final = 600.0
#: Who has no result and has written something within this time is let be: without locks, it may live. Seconds.
QUIET: Final = 3600.0

#: Touched by each look; in the directory of the jobs.
STAMP: Final = ".tidied"
#: The beginning of the hidden names.
REMOVED: Final = ".removed-"

T = TypeVar("T")

_HIDDEN: Final = re.compile(re.escape(REMOVED) + "[0-9a-f]{16}")


@final
class Tidy:
    """Keeps the jobs' directory of one supervisor tidy.

    Args:
        jobs: the directory.
        max_age: of what has ended, in seconds.
        max_bytes: of all together.
        is_running: whether a job of ours has this id; asked from another thread.
    """

    def __init__(self, jobs: Path, max_age: float, max_bytes: int, is_running: Callable[[str], bool]) -> None:
        self._jobs = jobs
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._is_running = is_running
        self._scope = trio.CancelScope()
        self._stopped = threading.Event()
        self._trouble = 0

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Look now, and every ten minutes. Trouble is logged. To be ended by `stop`."""
        limiter = trio.CapacityLimiter(1)  # no thread that a job could wait for
        with self._scope:
            while True:
                try:
                    # A thread that is abandoned has only descriptors of its own, and ends after the file that it is
                    # at. A disk that hangs shall hold up nobody who leaves.
                    await trio.to_thread.run_sync(self.look, limiter=limiter, abandon_on_cancel=True)
                except Exception as error:
                    log.warning("the logs of old jobs in %s cannot be removed: %s", self._jobs, _why(error))
                await trio.sleep(EVERY)

    def stop(self) -> None:
        """End `run`; a look under way ends after the file that it is at."""
        self._stopped.set()
        self._scope.cancel()

    def look(self) -> None:
        """Remove what is to go, if nobody has looked of late. Blocks.

        Raises:
            OSError: the directory of the jobs cannot be opened, is a link, or belongs to another user.
        """
        try:
            top = os.open(self._jobs, OPEN)
        except FileNotFoundError:  # no job yet
            return
        try:
            if os.fstat(top).st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it belongs to another user")
            if _is_due(top):
                self._tidy(top, time.time())
        finally:
            os.close(top)

    def _tidy(self, top: int, now: float) -> None:
        self._trouble = 0
        names = sorted(os.listdir(top))  # the oldest first: ids begin with a time, for most
        young: list[Found] = []
        for name in self._until_stopped(name for name in names if JOB_ID.fullmatch(name)):
            with self._one_by_one(name), _opened(top, name) as directory:
                found = _judge(name, directory, now)
                if found is None:
                    continue
                if now - found.since <= self._max_age or not found.is_quiet(now):
                    young.append(found)
                else:
                    self._remove(top, directory, found, now)
        total = sum(found.size for found in young)
        for found in self._until_stopped(sorted(young, key=lambda each: each.since)):
            if total <= self._max_bytes:
                break
            if found.size and found.is_quiet(now):
                with self._one_by_one(found.name), _opened(top, found.name) as directory:
                    if self._remove(top, directory, found, now):
                        total -= found.size
        for name in self._until_stopped(name for name in names if _HIDDEN.fullmatch(name)):
            with self._one_by_one(name), _opened(top, name) as directory:
                if lock(directory) and _files(directory) is not None:
                    self._empty(top, directory, name)

    def _until_stopped(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            if self._stopped.is_set():
                return
            yield item

    @contextlib.contextmanager
    def _one_by_one(self, name: str) -> Iterator[None]:
        """Trouble with one directory is told, once a look, and keeps no other from its end."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):  # another process tidies, too; or it is no directory of ours
            pass
        except Exception as error:
            self._trouble += 1
            if self._trouble == 1:
                log.warning("the logs of job %s in %s cannot be removed: %s", name, self._jobs, _why(error))

    def _remove(self, top: int, directory: int, found: Found, now: float) -> bool:
        """Whether it is gone. Not if its job lives, or one of the same id has begun meanwhile."""
        if self._is_running(found.name) or not lock(directory):
            return False
        if not is_at(found.name, directory, top) or _judge(found.name, directory, now) != found:
            return False
        hidden = f"{REMOVED}{secrets.token_hex(8)}"
        os.rename(found.name, hidden, src_dir_fd=top, dst_dir_fd=top)
        self._empty(top, directory, hidden)
        return True

    def _empty(self, top: int, directory: int, hidden: str) -> None:
        for name in os.listdir(directory):
            if self._stopped.is_set():
                return  # the rest goes the next time
            os.unlink(name, dir_fd=directory)
        os.rmdir(hidden, dir_fd=top)


@frozen
class Found:
    """The directory of a job.

    Attributes:
        name: its id.
        inode: of the directory.
        ended: whether there is a result.
        since: when it ended; without a result, when it last wrote anything. Seconds since the epoch.
        size: of its files, in bytes.
    """

    name: str
    inode: int
    ended: bool
    since: float
    size: int

    def is_quiet(self, now: float) -> bool:
        """Whether it may go, should nobody hold its lock."""
        return self.ended or now - self.since > QUIET


def _judge(name: str, directory: int, now: float) -> Found | None:
    """`None` for what is no directory of ours, or of no job."""
    itself = os.fstat(directory)
    files = _files(directory)
    if files is None or (files and files.keys().isdisjoint(SIGNS)):
        return None
    result = files.get(RESULT)
    times = [_time(result, now)] if result else [_time(each, now) for each in (itself, *files.values())]
    size = sum(each.st_size for each in files.values())
    return Found(name, itself.st_ino, result is not None, max(times), size)


def _files(directory: int) -> dict[str, os.stat_result] | None:
    """The files in it; `None` if anything in it is not as jobs make it."""
    files: dict[str, os.stat_result] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if not MADE_BY_JOBS.fullmatch(entry.name):
                return None
            with contextlib.suppress(FileNotFoundError):  # a heartbeat is replaced
                files[entry.name] = entry.stat(follow_symlinks=False)
    return files if all(stat.S_ISREG(each.st_mode) for each in files.values()) else None


def _time(found: os.stat_result, now: float) -> float:
    """When it was written. A time that is still to come is none; nobody sets that of the last change."""
    return found.st_mtime if found.st_mtime <= now else min(found.st_ctime, now)


@contextlib.contextmanager
def _opened(top: int, name: str) -> Iterator[int]:
    """A descriptor of the directory. Raises NotADirectoryError for what is none, or another user's."""
    found = os.stat(name, dir_fd=top, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise NotADirectoryError(name)
    directory = os.open(name, OPEN, dir_fd=top)
    try:
        yield directory
    finally:
        os.close(directory)  # and so it is unlocked


def _is_due(top: int) -> bool:
    """Whether nobody has looked of late; from now on, somebody has."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with contextlib.suppress(FileNotFoundError):
        if 0 <= time.time() - os.stat(STAMP, dir_fd=top, follow_symlinks=False).st_mtime < EVERY:
            return False
    descriptor = os.open(STAMP, flags, 0o600, dir_fd=top)
    try:
        os.utime(descriptor)
    finally:
        os.close(descriptor)
    return True


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
