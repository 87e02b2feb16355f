"""The lock of a workspace: of all supervisors on this machine, one at a time has a watch or a reconcile there.

The lock is on the workspace's own directory. So it needs no file, holds between users and between state directories,
and is free when the process that holds it dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, final

import trio

from supervise import durable

#: Where the directory itself cannot be locked: we may not read it, or its file system has no such locks (NFS).
NO_SUCH_LOCK = frozenset(
    {errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
)


class Lock(Protocol):
    """The lock of one workspace."""

    @property
    def held(self) -> bool:
        """Whether it is ours."""

    async def take(self) -> bool:
        """Take it if it is free, and say whether it is ours now. Cancelling waits for an attempt under way.

        Raises:
            OSError: it cannot be taken, for another reason than that somebody holds it.
        """

    def release(self) -> None:
        """Give it back, if it is ours."""


@final
class WorkspaceLock:
    """A `Lock` by flock(2).

    Args:
        workspace: the directory.
        instead: a file that is locked where the directory cannot be. It holds only between supervisors of one state
            directory, and is never removed: else two could hold a lock of the same name.
    """

    def __init__(self, workspace: str, instead: Path) -> None:
        self._workspace = workspace
        self._instead = instead
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """See `Lock.held`."""
        return self._descriptor is not None

    async def take(self) -> bool:
        """See `Lock.take`."""
        if self._descriptor is None:
            self._descriptor = await trio.to_thread.run_sync(self._take)
        return self._descriptor is not None

    def release(self) -> None:
        """See `Lock.release`."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            unlock(descriptor)

    def _take(self) -> int | None:
        try:
            return _locked(self._open_workspace)
        except OSError as error:
            if error.errno not in NO_SUCH_LOCK:
                raise
        return _locked(self._open_instead)

    def _open_workspace(self) -> int:
        return os.open(self._workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _open_instead(self) -> int:
        durable.make_private(self._instead.parent)
        return open_lock(self._instead)


def _locked(open_it: Callable[[], int]) -> int | None:
    """A descriptor that holds the lock; `None` if somebody else has it."""
    descriptor = open_it()
    try:
        if lock(descriptor, fcntl.LOCK_EX):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def open_lock(path: Path) -> int:
    """A file to be locked. It is never removed: else two could hold a lock of the same name."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def lock(descriptor: int, kind: int) -> bool:
    """Take a lock, if it is free."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Closing would do, were there not a child between its fork and its exec."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
