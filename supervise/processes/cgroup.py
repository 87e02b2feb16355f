"""Control groups, version 2: the one thing that no descendant can leave without privileges (cgroups(7)).

A supervisor makes one group below the one that it is in itself, and a group in that for each tree. `cgroup.kill`
ends all that is in a group at once, also what guardian and zygote have lost.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import final

from supervise.model import Limits

log = logging.getLogger("supervise.processes")

PREFIX = "supervise-"

#: Files that we must be able to write: to put a process in, and to end them all (since Linux 5.14).
NEEDED = ("cgroup.procs", "cgroup.kill")


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
                found += map(int, (directory / "cgroup.procs").read_text().split())
            except OSError:  # removed meanwhile; or not to be read, as in a threaded group
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to all that is in it, whatever it does meanwhile."""
        try:
            (self.path / "cgroup.kill").write_text("1")
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

    def limit(self, limits: Limits) -> None:
        """Set limits for all in it together.

        Raises:
            NoLimit: the controllers are not there, or not ours to use.
        """
        values = {
            "memory": {} if limits.memory_bytes is None else {"memory.max": limits.memory_bytes, "memory.swap.max": 0},
            "pids": {} if limits.processes is None else {"pids.max": limits.processes},
        }
        for controller in (name for name, files in values.items() if files):
            try:
                self._enable(controller)
                for name, value in values[controller].items():
                    if name != "memory.swap.max" or (self.path / name).exists():  # absent without swap accounting
                        (self.path / name).write_text(str(value))
            except OSError as error:
                raise NoLimit(f"the {controller} controller cannot be used below {self._base()}: {error}") from None

    def _base(self) -> Path:
        """The group that ours were made in."""
        return next(parent.parent for parent in (self.path, *self.path.parents) if parent.name.startswith(PREFIX))

    def _enable(self, controller: str) -> None:
        base = self._base()
        if controller not in (base / "cgroup.controllers").read_text().split():
            raise NoLimit(f"the {controller} controller is not available here: {base}/cgroup.controllers lacks it")
        above = [base, *(each for each in self.path.parents if base in each.parents)][::1]
        for directory in sorted(above, key=lambda each: len(each.parts)):
            control = directory / "cgroup.subtree_control"
            if controller not in control.read_text().split():
                control.write_text(f"+{controller}")

    def _inside(self) -> Iterator[Path]:
        """This directory and those below it, parents first."""
        for directory, _, _ in os.walk(self.path):
            yield Path(directory)


def make(name: str) -> Group:
    """Make a supervisor's group. Whether one can be had is found by trying.

    Raises:
        NoCgroup: it cannot, and why.
    """
    base = own_directory()
    for file in NEEDED[:1]:  # who moves a process needs the right in the group that both places have in common
        if not os.access(base / file, os.W_OK):
            raise NoCgroup(f"{base} is not ours to make groups in: no right to write {file}; have it delegated to us")
    path = base / f"{PREFIX}{name}"
    try:
        path.mkdir()
    except OSError as error:
        raise NoCgroup(f"no group can be made in {base}: {error.strerror}") from None
    missing = [file for file in NEEDED if not os.access(path / file, os.W_OK)]
    if missing:
        path.rmdir()
        raise NoCgroup(f"{path} has no {missing[0]} that we may write (Linux 5.14 or newer is needed)")
    return Group(path)


def own_directory(proc: Path = Path("/proc/self")) -> Path:
    """The directory of the group that this process is in.

    Raises:
        NoCgroup: no hierarchy of version 2 is mounted where we see it.
    """
    try:
        ours = [line.rstrip("\n")[3:] for line in (proc / "cgroup").open() if line.startswith("0::")]
        mounts = [line.split() for line in (proc / "mountinfo").open() if " - cgroup2 " in line]
    except OSError as error:
        raise NoCgroup(f"{proc} cannot be read: {error.strerror}") from None
    for fields in mounts if ours else ():
        root, mount = (_unescaped(field) for field in fields[3:5])  # proc(5), mountinfo
        relative = os.path.relpath(ours[0], root)
        directory = Path(mount, relative)
        if not relative.startswith("..") and directory.is_dir():
            return directory
    raise NoCgroup("no cgroup v2 hierarchy is mounted")


def _unescaped(field: str) -> str:
    for code, text in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        field = field.replace(code, text)
    return field
