"""The directory of a job: whose it is while the job lives, and which files a job makes.

A job holds flock(2) on its directory from before its first write until its result is there. So another process that
is given the same job id leaves the files alone, and no tidy takes the directory, whatever the clocks say. The kernel
drops the lock with its holder. Where a file system has no such locks, one goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from pathlib import Path
from typing import Final, final

from supervise import durable
from supervise.errors import SettingsError, SpecError
from supervise.job.event_log import EVENTS
from supervise.job.heartbeat import HEARTBEAT

__all__ = ["MADE_BY_JOBS", "OPEN", "RESULT", "SIGNS", "JobDirectory", "is_at", "lives", "lock", "occupy"]

#: The file, in the job's directory.
RESULT: Final = "result.json"

#: Of these, each job's directory holds one soon after the job has begun.
SIGNS: Final = (RESULT, HEARTBEAT, EVENTS)

#: All that jobs put there: those, what is to become one of them, and what processes print.
MADE_BY_JOBS: Final = re.compile(
    r"result\.json|heartbeat\.json|events\.jsonl|\.(result|heartbeat)\.json\.[0-9a-f]{8}"
    r"|[a-z][a-z-]*\.(stdout|stderr)\.log(\.tail[01])?"
)

#: To open a directory.
OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: A tidy has the lock of an old directory for a moment, until it has renamed it. Tries, and seconds between them.
TRIES: Final = 10
BETWEEN: Final = 0.005

_NO_LOCKS: Final = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF)


@final
class JobDirectory:
    """The directory of a job that lives. Made by `occupy`.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """The job has ended. To be called once."""
        with contextlib.suppress(OSError):  # where there are no locks
            # Closing does not unlock while a process that the host has forked has a copy.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def occupy(path: Path) -> JobDirectory:
    """Make the directory of a job that is about to begin, or take the one of an earlier job of this id.

    What tells of an earlier job (`SIGNS`) is removed; its other logs are replaced when there are new ones.

    Args:
        path: the directory; its name is the job's id.

    Raises:
        SpecError: a job of this id is running, here or in another process.
        SettingsError: something is in the way.
        OSError: it cannot be made.

    Blocks for some system calls; and, before it says that a job is running, for `TRIES` times `BETWEEN` seconds.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            durable.make_private(path)
            descriptor = os.open(path, OPEN)
        except (FileNotFoundError, FileExistsError) as error:  # as when a tidy takes it away between two steps
            if tries_left:
                continue
            if isinstance(error, FileExistsError):
                raise SettingsError(f"{path} is no directory, but a job's is to be there; remove it") from None
            raise
        try:
            taken = lock(descriptor)
            if taken and is_at(path, descriptor):
                _clear(path, descriptor)
                return JobDirectory(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not taken and tries_left:
            time.sleep(BETWEEN)
    raise SpecError(
        f"JobSpec.job_id is {path.name!r}, but a job of this id is running (in another process); choose another"
    )


def lock(descriptor: int) -> bool:
    """Lock a directory; `False` if somebody else has it. Where there are no locks, anybody may have it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def lives(path: Path) -> bool:
    """Whether a job holds the lock of its directory. `False` where there are no locks, and if there is none."""
    try:
        descriptor = os.open(path, OPEN)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def is_at(path: Path | str, descriptor: int, top: int | None = None) -> bool:
    """Whether the open directory is the one at `path`, which may be relative to the descriptor `top`."""
    try:
        return os.path.samestat(os.stat(path, dir_fd=top, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _clear(path: Path, descriptor: int) -> None:
    for name in SIGNS:
        try:
            os.unlink(name, dir_fd=descriptor)
        except FileNotFoundError:
            continue
        except IsADirectoryError:
            raise SettingsError(f"{path / name} is a directory, but a job makes a file there; remove it") from None
    os.utime(descriptor)  # where there are no locks, a tidy sees that it is in use
