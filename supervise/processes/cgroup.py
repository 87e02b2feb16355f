"""Control groups, version 2: the one thing that no descendant can leave without privileges (cgroups(7)).

A supervisor makes one group below the one that it is in itself, and a group in that for each tree. Limits need more:
a controller can be enabled only in a group that no process is in, so the supervisor has to be in a subgroup of what
is delegated to it (systemd: `Delegate=yes` and `DelegateSubgroup=`). `cgroup.kill`
ends all that is in a group at once, also what guardian and zygote have lost.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import final

import trio

from supervise.model import Limits

log = logging.getLogger("supervise.processes")

PREFIX = "supervise-"

#: Files that we must be able to write: to put a process in, and to end them all (since Linux 5.14).
PROCS, KILL = "cgroup.procs", "cgroup.kill"

#: How long an emptied group may be in the way, in seconds: its last process is counted for a moment after its end.
GONE = 1.0


class NoCgroup(Exception):  # no error: a reason to do without
    """Why there is no group for us, in words."""


class NoLimit(Exception):  # likewise; told as a SpawnError
    """Why a limit cannot be set here, in words."""


@final
class Group:
    """A directory of the hierarchy that is ours. Blocking calls, each a few hundred microseconds at most."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def child(self, name: str) -> Group:
        """A group inside of this one, made if it is missing.

        Raises:
            OSError: it cannot be made.
        """
        path = self.path / name
        path.mkdir(exist_ok=True)
        return Group(path)

    def pids(self) -> list[int]:
        """All processes in it, and in what it holds."""
        found: list[int] = []
        for directory in self._inside():
            try:
                found += map(int, (directory / PROCS).read_text().split())
            except OSError:  # removed meanwhile; or not to be read, as in a threaded group
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to all that is in it, whatever it does meanwhile."""
        try:
            (self.path / KILL).write_text("1")
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.warning("the cgroup %s could not be ended: %s", self.path, error.strerror)

    def populated(self) -> bool:
        """Whether a living process is in it."""
        try:
            return "populated 1" in (self.path / "cgroup.events").read_text()
        except OSError:  # it is gone
            return False

    def remove(self) -> bool:
        """Remove it with what it holds. Returns whether it is gone: not while there is a process in it."""
        for directory in [*self._inside()][::-1]:
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True

    async def remove_soon(self) -> bool:
        """Remove it as soon as it is empty. Returns whether it is gone within `GONE` seconds."""
        with trio.move_on_after(GONE):
            while not self.remove():  # noqa: ASYNC110  # nobody tells
                await trio.sleep(0.005)
            return True
        return False

    def limit(self, limits: Limits) -> None:
        """Set limits for all in it together. It must be a group in the supervisor's own.

        Swap is limited to 0 along with the memory. A controller that has to be enabled for it, in the supervisor's
        group and in the one above, stays enabled there.

        Raises:
            NoLimit: the controllers are not there, or not ours to use.
        """
        files: list[tuple[str, int]] = []
        if limits.memory_bytes is not None:
            files += [("memory.max", limits.memory_bytes), ("memory.swap.max", 0)]
        if limits.processes is not None:
            files += [("pids.max", limits.processes)]
        for file, value in files:
            controller = file.partition(".")[0]
            for above in (self.path.parent.parent, self.path.parent):
                _enable(controller, above)
            try:
                if file != "memory.swap.max" or (self.path / file).exists():  # absent without swap accounting
                    (self.path / file).write_text(str(value))
            except OSError as error:
                raise NoLimit(f"{file} cannot be set in {self.path}: {error.strerror}") from None

    def _inside(self) -> Iterator[Path]:
        """This directory and those below it, parents first."""
        for directory, _, _ in os.walk(self.path):
            yield Path(directory)


def _enable(controller: str, directory: Path) -> None:
    """Let the groups in `directory` use a controller."""
    try:
        if controller not in (directory / "cgroup.controllers").read_text().split():
            lacks = f"{directory}/cgroup.controllers lacks it"
            raise NoLimit(f"the {controller} controller is not available here: {lacks}")
        control = directory / "cgroup.subtree_control"
        if controller not in control.read_text().split():
            control.write_text(f"+{controller}")
    except OSError as error:
        why = (
            "there are processes in it (DelegateSubgroup= of systemd helps)"
            if error.errno == errno.EBUSY
            else error.strerror
        )
        text = f"the {controller} controller is not available here: it cannot be enabled in {directory}: {why}"
        raise NoLimit(text) from None


def make(name: str) -> Group:
    """Make a supervisor's group. Whether one can be had is found by trying.

    Raises:
        NoCgroup: it cannot, and why.
    """
    base = _base()
    if not os.access(base / PROCS, os.W_OK):  # who moves a process needs the right in what both places have in common
        raise NoCgroup(f"{base} is not ours to make groups in: no right to write {PROCS}; have it delegated to us")
    path = base / f"{PREFIX}{name}"
    try:
        path.mkdir()
    except OSError as error:
        raise NoCgroup(f"no group can be made in {base}: {error.strerror}") from None
    for file in (PROCS, KILL):
        if not os.access(path / file, os.W_OK):
            path.rmdir()
            raise NoCgroup(f"{path} has no {file} that we may write (Linux 5.14 or newer is needed)")
    return Group(path)


def _base() -> Path:
    """The group to make ours in: our own, or the one above, if systemd has delegated that (DelegateSubgroup=).

    No process is in that one, so that controllers can be enabled in it.
    """
    own = own_directory()
    above = own.parent
    return above if _is_delegated(above) and not _is_delegated(own) and os.access(above / PROCS, os.W_OK) else own


def _is_delegated(group: Path) -> bool:
    try:
        return os.getxattr(group, "user.delegate") == b"1"
    except OSError:  # not said; or no group at all
        return False


def own_directory(proc: Path = Path("/proc/self")) -> Path:
    """The directory of the group that this process is in.

    Raises:
        NoCgroup: no hierarchy of version 2 is mounted where we see it.
    """
    try:
        ours = [line[3:] for line in _lines(proc / "cgroup") if line.startswith("0::")]
        mounts = [line.split(" ") for line in _lines(proc / "mountinfo") if " - cgroup2 " in line]
    except OSError as error:
        raise NoCgroup(f"{proc} cannot be read: {error.strerror}") from None
    for fields in mounts if ours else ():
        root, mount = (_unescaped(field) for field in fields[3:5])  # proc(5), mountinfo
        try:
            relative = PurePosixPath(ours[0]).relative_to(root)
        except ValueError:  # it shows another part of the hierarchy
            continue
        directory = Path(mount, relative)
        if ".." not in relative.parts and directory.is_dir():  # else we are outside of our cgroup namespace
            return directory
    raise NoCgroup("no cgroup v2 hierarchy is mounted that shows the group of this process")


def _lines(path: Path) -> list[str]:
    return os.fsdecode(path.read_bytes()).split("\n")


def _unescaped(field: str) -> str:
    """Blank, tab, newline, backslash and # stand as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
