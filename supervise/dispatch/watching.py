"""Hints that a directory has changed. The directory is the truth: whoever gets a hint looks."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final, Protocol, final

import trio
from attrs import frozen

from supervise.errors import MissingExtra

__all__ = ["Hints", "Inotify", "Polling", "Watching", "sees_nothing"]

#: File systems on which the kernel sees only what is done on this machine.
REMOTE: Final = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "drvfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs"}
    | {"nfs4", "ocfs2", "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs", "wslfs"}
)


@frozen(kw_only=True)
class Hints:
    """What may have changed.

    Attributes:
        names: in the watched directory: closed after writing, or renamed in.
        gone: in the watched directory: removed, or renamed away.
        born: in the watched directory: made; a regular file's writer may still be at it.
        others: paths in the other directories.
        everything: hints were lost.
        over: the watched directory itself has gone: watch anew.
    """

    names: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    born: frozenset[str] = frozenset()
    others: frozenset[Path] = frozenset()
    everything: bool = False
    over: bool = False


class Watching(Protocol):
    """A source of hints."""

    async def wait(self) -> None:
        """Wait until there may be hints. Cancelling loses none."""

    def read(self) -> Hints:
        """The hints since this was called last."""

    def also(self, directory: Path) -> None:
        """Give hints of another directory, too. Raises OSError."""

    def close(self) -> None:
        """Watch no more."""


@final
class Polling:
    """No hints: whoever waits has to look by himself, from time to time."""

    async def wait(self) -> None:
        """See `Watching.wait`."""
        await trio.sleep_forever()

    def read(self) -> Hints:
        """See `Watching.read`."""
        return Hints(everything=True)

    def also(self, directory: Path) -> None:
        """See `Watching.also`."""

    def close(self) -> None:
        """See `Watching.close`."""


@final
class Inotify:
    """Hints from the kernel, inotify(7): one descriptor, no wakeup while nothing happens.

    Args:
        directory: to be watched.

    Raises:
        OSError: too many instances (EMFILE) or watches (ENOSPC), or no such directory.
        MissingExtra: inotify_simple is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import inotify_simple
        except ImportError:
            raise MissingExtra("watching a directory", "worker", "inotify-simple") from None
        flags = inotify_simple.flags
        self._flags = flags
        # IN_CREATE for what is complete as soon as it is there: a hard link, and what is no file at all.
        self._mask = flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.CREATE | flags.DELETE | flags.ONLYDIR
        self._others: dict[int, Path] = {}
        self._open = threading.Lock()
        self._inotify = inotify_simple.INotify(nonblocking=True)
        try:
            gone = flags.DELETE_SELF | flags.MOVE_SELF
            self._main = self._inotify.add_watch(os.fspath(directory), self._mask | gone)
        except BaseException:
            self._inotify.close()
            raise

    async def wait(self) -> None:
        """See `Watching.wait`."""
        await trio.lowlevel.wait_readable(self._inotify.fileno())

    def read(self) -> Hints:
        """See `Watching.read`."""
        names: set[str] = set()
        born: set[str] = set()
        gone: set[str] = set()
        others: set[Path] = set()
        everything = over = False
        flags = self._flags
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.Q_OVERFLOW:
                everything = True
            elif event.wd == self._main:
                over = over or bool(event.mask & (flags.IGNORED | flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT))
                away = event.mask & (flags.DELETE | flags.MOVED_FROM)
                (gone if away else born if event.mask & flags.CREATE else names).add(event.name)
            elif event.wd in self._others:
                others.add(self._others[event.wd] / event.name)
        names.discard("")
        return Hints(
            names=frozenset(names),
            gone=frozenset(gone),
            born=frozenset(born),
            others=frozenset(others),
            everything=everything,
            over=over,
        )

    def also(self, directory: Path) -> None:
        """See `Watching.also`. May be called in a thread; once closed, it does nothing."""
        with self._open:
            if not self._inotify.closed:
                self._others[self._inotify.add_watch(os.fspath(directory), self._mask)] = directory

    def close(self) -> None:
        """See `Watching.close`."""
        trio.lowlevel.notify_closing(self._inotify.fileno())
        with self._open:  # a thread must not meet the next file of this number
            self._inotify.close()


def sees_nothing(directory: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """Why inotify does not see what others do in a directory: the name of its file system; empty where it does."""
    try:
        lines = Path(mounts).read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    real = os.path.realpath(directory)
    best, found = -1, ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = _plain(before.split(" ")[4])
        if len(point) >= best and (real == point or real.startswith(point.rstrip("/") + "/")):
            best, found = len(point), after.split(" ")[0]
    return found if found in REMOTE or found.partition(".")[0] == "fuse" else ""


def _plain(point: str) -> str:
    for code, letter in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        point = point.replace(code, letter)
    return point
