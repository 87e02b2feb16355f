"""The watch: inotify on every directory, edits gathered for a while, then indexed in one go.

Order is everything here. A directory is watched before it is listed, and a path is read after its event, so a
change falls either into what is read or into an event that comes later. Events are hints only: what is read
is what the file is by then.
"""

from __future__ import annotations

import errno
import math
import os
import select
import time
from collections.abc import Callable, Iterator

from inotify_simple import INotify, flags

from supervise.demo.indexer_files import IGNORED, INDEX_DIRECTORY, is_absent, join, list_directory, open_below
from supervise.demo.indexer_interrupt import Interrupt
from supervise.demo.indexer_store import Store
from supervise.demo.indexer_sync import Cancelled, Sync

__all__ = ["watch"]

_MOST_PENDING = 10_000  # paths; beyond, the whole workspace is one
_LONGEST_DEBOUNCE = 5  # in debounce times, for edits that never pause
_FLUSH_ROUNDS = 20  # for files that never stop changing


def watch(
    root: int,
    store: Store,
    say: Callable[[str], None],
    interrupt: Interrupt | None,
    *,
    debounce: float,
    on_edit: Callable[[], None] | None = None,
) -> int:
    """Keep the index equal to the files until SIGINT, then flush. Returns the exit code.

    Args:
        root: descriptor of the workspace, which is the current directory.
        say: takes a line of output.
        interrupt: ends the watch; `None` for one that nothing but SIGKILL ends.
        debounce: seconds without an edit before the pending ones are indexed.
        on_edit: called when an edit was seen.
    """
    tree = _Tree(root)
    pending = _Pending(debounce)
    try:
        first = Sync(root, store, say, stop=lambda: interrupt is not None and interrupt.noted)
        first.plan("")
        first.carry_out()
    except Cancelled:
        say("cancelled")
        return 0
    say(f"Watchdog observer started monitoring: {os.getcwd()}")

    sync = Sync(root, store, say, changing=pending.add)
    while interrupt is None or not interrupt.noted:
        _wait(tree, interrupt, pending.due)
        if _gather(tree, store, pending) and on_edit is not None:
            on_edit()
        if pending.due is not None and time.monotonic() >= pending.due:
            _index(sync, pending, say)

    say("Stopping: flushing pending edits")
    _gather(tree, store, pending)
    for _ in range(_FLUSH_ROUNDS):
        if pending.due is None:
            break
        _index(sync, pending, say)
        _gather(tree, store, pending)
    if pending.due is not None:
        say("ERROR files go on changing: pending edits are lost")
    store.check_place()
    return 0


def _wait(tree: _Tree, interrupt: Interrupt | None, due: float | None) -> None:
    """Until an event, SIGINT, or the time when pending edits are due; without any, for ever."""
    poll = select.poll()
    poll.register(tree.fileno(), select.POLLIN)
    if interrupt is not None:
        poll.register(interrupt.fileno(), select.POLLIN)
    poll.poll(None if due is None else max(0, math.ceil((due - time.monotonic()) * 1000)))


def _gather(tree: _Tree, store: Store, pending: _Pending) -> bool:
    """Take what the kernel has queued; whether there was an edit."""
    edits = False
    for path in tree.changed():
        if path == INDEX_DIRECTORY:
            store.check_place()
        else:
            edits = True
            pending.add(path)
    return edits


def _index(sync: Sync, pending: _Pending, say: Callable[[str], None]) -> None:
    started = time.monotonic()
    sync.plan(*pending.take())
    tally = sync.carry_out()
    say(f"Indexed {tally.indexed} files, removed {tally.removed} in {time.monotonic() - started:.3f} s")


class _Pending:
    """The paths that were edited and not yet indexed, and when they are due."""

    def __init__(self, debounce: float) -> None:
        self._debounce = debounce
        self._paths: set[str] = set()
        self._latest = 0.0
        self.due: float | None = None

    def add(self, path: str) -> None:
        now = time.monotonic()
        if not self._paths:
            self._latest = now + self._debounce * _LONGEST_DEBOUNCE
        self.due = min(now + self._debounce, self._latest)
        if path == "" or len(self._paths) >= _MOST_PENDING:
            self._paths = {""}
        elif "" not in self._paths:
            self._paths.add(path)

    def take(self) -> list[str]:
        paths, self._paths, self.due = sorted(self._paths), set(), None
        return paths


def _open_inotify() -> INotify:
    try:
        return INotify()
    except OSError as error:
        if error.errno == errno.EMFILE:
            error.strerror = "too many inotify instances of this user; raise fs.inotify.max_user_instances"
        raise


class _Tree:
    """A watch on each directory of the workspace, and the path that each stands for.

    A watch belongs to an inode and moves with it, so a directory that moves loses the watches of its whole
    subtree and gets new ones under its new name.
    """

    _MASK = (
        flags.CREATE
        | flags.MODIFY
        | flags.CLOSE_WRITE
        | flags.ATTRIB
        | flags.DELETE
        | flags.MOVED_FROM
        | flags.MOVED_TO
        | flags.ONLYDIR
        | flags.EXCL_UNLINK
    )

    def __init__(self, root: int) -> None:
        self._root = root
        self._paths: dict[int, str] = {}
        self._inotify = _open_inotify()
        self._follow("")

    def fileno(self) -> int:
        number: int = self._inotify.fileno()
        return number

    def changed(self) -> Iterator[str]:
        """Paths that may have changed, files or directories; `""` for anything.

        The index's own directory is named only when it goes away.
        """
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.Q_OVERFLOW:
                # Events are lost, directories may have moved unseen: start again from nothing.
                self._inotify.close()
                self._inotify = _open_inotify()
                self._paths = {}
                self._follow("")
                yield ""
                return
            if event.mask & flags.IGNORED:  # the directory is gone
                self._paths.pop(event.wd, None)
                continue
            directory = self._paths.get(event.wd)
            if directory is None:
                # From before a move that was handled meanwhile; the new name is pending as a whole.
                continue
            if event.name in IGNORED:
                if join(directory, event.name) == INDEX_DIRECTORY and event.mask & (flags.DELETE | flags.MOVED_FROM):
                    yield INDEX_DIRECTORY
                continue
            path = join(directory, event.name) if event.name else directory
            if event.mask & flags.ISDIR and event.name:
                if event.mask & flags.MOVED_FROM:
                    self._leave(path)
                elif event.mask & (flags.CREATE | flags.MOVED_TO | flags.ATTRIB):
                    self._follow(path)
            yield path

    def _follow(self, top: str) -> None:
        """Watch `top` and every directory below it."""
        waiting = [top]
        while waiting:
            path = waiting.pop()
            try:
                fd = open_below(self._root, path, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                if not is_absent(error) and error.errno != errno.EACCES:
                    raise
                continue  # gone, which an event will say; or unreadable, which the sync of this path says
            try:
                # By descriptor: what is watched is what is listed, whatever the name means by now.
                self._paths[self._add(fd)] = path
                waiting.extend(join(path, name) for name in list_directory(fd)[0])
            finally:
                os.close(fd)

    def _add(self, fd: int) -> int:
        try:
            number: int = self._inotify.add_watch(f"/proc/self/fd/{fd}", self._MASK)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # "no space left on device" would lead astray
                error.strerror = "too many directories to watch; raise fs.inotify.max_user_watches"
            raise
        return number

    def _leave(self, top: str) -> None:
        """Stop to watch `top` and every directory below it."""
        below = top + "/"
        for number in [n for n, path in self._paths.items() if path == top or path.startswith(below)]:
            del self._paths[number]
            try:
                self._inotify.rm_watch(number)
            except OSError as error:
                if error.errno != errno.EINVAL:  # the directory was removed meanwhile, and the watch with it
                    raise
