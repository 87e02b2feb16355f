"""The directories of jobs that have ended: removed when they are too old, or too much. Beside the jobs, in a thread.

    running, or killed    no result.json: judged by the newest file, which every heartbeat writes anew
    ended                 judged by the time of its result.json

A directory that goes is first renamed to a hidden name, looked at again, and given back if it was used meanwhile.
What a killed tidy has left under hidden names goes the next time. A stamp keeps the processes of this state
directory from looking more often than every ten minutes, all together.

All is done relative to one descriptor of the directory, and no link is followed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, final

import trio
from attrs import frozen

from supervise import durable
from supervise.model import JOB_ID

log = logging.getLogger("supervise.job")

#: Seconds between two looks.
EVERY: Final = 600.0
#: Who has written nothing for so long is no job under way. Seconds.
QUIET: Final = 3600.0

#: Touched by each look; in the directory of the jobs.
STAMP: Final = ".tidied"
#: The beginning of the hidden names.
REMOVED: Final = ".removed-"

RESULT: Final = "result.json"


def prepare(directory: Path, old: Iterable[str]) -> None:
    """Make the directory of a job that is about to begin, without the files named `old`, so that no tidy takes it.

    Raises:
        OSError: it cannot be made.
    """
    for _ in range(10):
        durable.make_private(directory)
        for name in old:
            (directory / name).unlink(missing_ok=True)
        try:
            os.utime(directory)  # a tidy that has judged it by now sees that it is in use
            return
        except FileNotFoundError:  # taken away at this very moment: once more
            continue
    os.utime(directory)


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

    async def run(self) -> None:
        """Look now, and every ten minutes. Trouble is logged. To be ended by `stop`."""
        limiter = trio.CapacityLimiter(1)  # no thread that a job could wait for
        with self._scope:
            while True:
                try:
                    await trio.to_thread.run_sync(self.look, limiter=limiter)
                except Exception as error:
                    log.warning("the logs of old jobs in %s cannot be removed: %s", self._jobs, error)
                await trio.sleep(EVERY)

    def stop(self) -> None:
        """End `run`; a look under way ends after the directory that it is at."""
        self._stopped.set()
        self._scope.cancel()

    def look(self) -> None:
        """Remove what is to go, if nobody has looked of late. Blocks."""
        try:
            top = os.open(self._jobs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # no job yet
            return
        self._trouble = 0
        try:
            if _is_due(top):
                self._tidy(top, time.time())
        finally:
            os.close(top)

    def _tidy(self, top: int, now: float) -> None:
        young: list[Found] = []
        for name in self._names(top):
            with self._told(name):
                if name.startswith(REMOVED):
                    _drop_left(top, name, now)
                elif (found := _judge(top, name)) is not None:
                    if now - found.since <= self._max_age:
                        young.append(found)
                    elif not self._is_running(name):
                        self._remove(top, found)
        sizes: dict[str, int] = {}
        for found in young:
            if self._stopped.is_set():
                return
            with self._told(found.name):
                sizes[found.name] = _size(top, found.name)
        total = sum(sizes.values())
        for found in sorted(young, key=lambda each: each.since):
            if total <= self._max_bytes or self._stopped.is_set():
                return
            quiet = found.ended or now - found.since > QUIET
            if not sizes.get(found.name) or not quiet or self._is_running(found.name):
                continue
            with self._told(found.name):
                if self._remove(top, found):
                    total -= sizes[found.name]

    def _names(self, top: int) -> Iterator[str]:
        """The oldest first: ids begin with a time, for most."""
        for name in sorted(os.listdir(top)):
            if self._stopped.is_set():
                return
            if name.startswith(REMOVED) or JOB_ID.fullmatch(name):
                yield name

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Trouble with one directory is told, once a look, and keeps no other from its end."""
        try:
            yield
        except FileNotFoundError:  # another process tidies, too
            pass
        except OSError as error:
            self._trouble += 1
            if self._trouble == 1:
                log.warning("the logs of job %s in %s cannot be removed: %s", name, self._jobs, error.strerror)

    def _remove(self, top: int, found: Found) -> bool:
        hidden = f"{REMOVED}{secrets.token_hex(8)}"
        os.rename(found.name, hidden, src_dir_fd=top, dst_dir_fd=top)
        again = _judge(top, hidden)
        if again is None or again.state != found.state:  # a job of this id has begun meanwhile
            with contextlib.suppress(FileExistsError):  # and made itself another one
                durable.rename_new(Path(f"/proc/self/fd/{top}/{hidden}"), Path(f"/proc/self/fd/{top}/{found.name}"))
                return False
        shutil.rmtree(hidden, dir_fd=top)
        return True


@frozen
class Found:
    """The directory of a job.

    Attributes:
        name: its id.
        ended: whether there is a result.
        since: when it ended; without a result, when it last wrote anything. Seconds since the epoch.
        state: changes with each change of what was looked at.
    """

    name: str
    ended: bool
    since: float
    state: tuple[int, ...]


def _judge(top: int, name: str) -> Found | None:
    """`None` for what is no directory of ours."""
    itself = os.stat(name, dir_fd=top, follow_symlinks=False)
    if not stat.S_ISDIR(itself.st_mode) or itself.st_uid != os.geteuid():
        return None
    directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=top)
    try:
        with contextlib.suppress(FileNotFoundError):
            result = os.stat(RESULT, dir_fd=directory, follow_symlinks=False)
            state = (itself.st_ino, itself.st_mtime_ns, result.st_ino, result.st_mtime_ns)
            return Found(name, True, result.st_mtime, state)
        newest = itself.st_mtime_ns
        for entry in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):  # a heartbeat is replaced
                newest = max(newest, os.stat(entry, dir_fd=directory, follow_symlinks=False).st_mtime_ns)
        return Found(name, False, newest / 1e9, (itself.st_ino, itself.st_mtime_ns, newest))
    finally:
        os.close(directory)


def _size(top: int, name: str) -> int:
    """Of the files in it, in bytes."""
    total = 0
    for _, _, files, directory in os.fwalk(name, dir_fd=top, follow_symlinks=False):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(file, dir_fd=directory, follow_symlinks=False).st_size
    return total


def _drop_left(top: int, name: str, now: float) -> None:
    """What a tidy has left that was killed. Not what another one is just at, which may give it back."""
    found = os.stat(name, dir_fd=top, follow_symlinks=False)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and now - found.st_ctime > EVERY:
        shutil.rmtree(name, dir_fd=top)


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
