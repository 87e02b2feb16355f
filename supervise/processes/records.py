"""What is on the disk of a supervisor's trees while it lives, so that the next one can end what it left.

    STATE_DIR/run/ID/lock         flock(2) as long as the supervisor lives: whoever can take it may sweep
    STATE_DIR/run/ID/owner.json   boot id, pid namespace, pid and start of the supervisor, its cgroup
    STATE_DIR/run/ID/trees.jsonl  a line for each tree that was started, and for each that has ended, in order

The id is also the beginning of the marker that all its processes have in their environment. Nothing is fsynced: a
record has to outlive the supervisor, and after a power cut there is nothing to end. Blocking calls, no Trio.

Containers may share a state directory: a record of another pid namespace is left alone. Two hosts must not, on a
network file system whose flock(2) is local to each of them: one would sweep what the other runs.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from attrs import frozen

from supervise import durable
from supervise.processes import identity
from supervise.processes.cgroup import PREFIX

log = logging.getLogger("supervise.processes")

DIRECTORY = "run"
LOCK = "lock"
OWNER = "owner.json"
NEW = ".new-"

#: What a record is called, and what is in it. All else is somebody else's.
NAME = re.compile(r"(\.new-)?[0-9a-f]{16}")
TREES = "trees.jsonl"
FILES = (LOCK, OWNER, f".{OWNER}.*", TREES, f".{TREES}.*")

#: Past this size, in bytes, the lines of trees that have ended are dropped.
COMPACT_AT = 1 << 20

#: How long a record may take to be made, in seconds; it takes a millisecond.
BEING_MADE = 60.0

BROKEN = (OSError, ValueError, KeyError, TypeError, RecursionError)
DOES_NOT_READ = "the record %s does not read: %s; its processes are looked for by their marker"

PidStart = tuple[int, int]

#: The locks that this process holds. A child that the host forks must not hold them on when we are gone.
_held: set[int] = set()


@final
class Record:
    """That of one supervisor, and its lock."""

    def __init__(self, state_dir: Path) -> None:
        """Make it.

        Raises:
            OSError: it cannot be made.
        """
        self.id = secrets.token_hex(8)
        runs = state_dir / DIRECTORY
        durable.make_private(runs)
        new = runs / f"{NEW}{self.id}"
        self.directory = runs / self.id
        self._complained = False
        self._owner: dict[str, Any] = {
            "boot_id": boot_id(),
            "pid_namespace": pid_namespace(),
            "pid": os.getpid(),
            "start": identity.start_of(os.getpid()),
            "since": identity.now_in_ticks(),
            "cgroup": None,
        }
        self._entries: dict[str, bytes] = {}
        self._lock = self._trees = -1
        new.mkdir(mode=0o700)
        try:
            self._lock = _locked(new / LOCK, os.O_CREAT)
            durable.replace(new / OWNER, json.dumps(self._owner).encode(), durable=False)
            self._open_trees(new)
            # Only now: a sweep never sees a record whose lock is not yet taken.
            new.rename(self.directory)
        except BaseException:
            _discard(new)
            self._unlock()
            raise

    def set_cgroup(self, path: Path) -> None:
        """Where the groups of all trees are. Written before a process is in one."""
        self._owner["cgroup"] = str(path)
        try:
            durable.replace(self.directory / OWNER, json.dumps(self._owner).encode(), durable=False)
        except OSError as error:
            self._complain(error)

    def enter(self, token: str, pids: Iterable[int], keepers: Iterable[PidStart] = ()) -> None:
        """A tree has these processes. Its earlier entry is replaced.

        Args:
            token: of the tree; it begins with our id.
            pids: the leaders.
            keepers: guardian or zygote. They end by themselves, unless somebody has stopped them.
        """
        processes = [(pid, identity.start_of(pid)) for pid in pids]
        line = _line({"token": token, "processes": processes, "keepers": list(keepers)})
        self._entries[token] = line
        self._append(line)

    def strike(self, token: str) -> None:
        """Nothing of this tree is left."""
        if self._entries.pop(token, None) is not None:
            self._append(_line({"struck": token}))

    def has_entries(self) -> bool:
        """Whether some tree was not struck out: something of it could not be ended."""
        return bool(self._entries)

    def close(self, *, keep: bool = False) -> None:
        """Remove it, unless something is left that the next supervisor should look after."""
        if self._lock < 0:
            return
        try:
            if not keep:
                _discard(self.directory)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._trees >= 0:
            os.close(self._trees)
        if self._lock >= 0:
            _unlock(self._lock)
        self._lock = self._trees = -1

    def _append(self, line: bytes) -> None:
        """One write: creating a file for each tree takes as long as the fork of a guardian."""
        try:
            if self._size > COMPACT_AT:  # what is struck out goes
                durable.replace(self.directory / TREES, b"".join(self._entries.values()), durable=False)
                os.close(self._trees)
                self._open_trees(self.directory)
            else:
                self._size += os.write(self._trees, line)
        except OSError as error:
            self._complain(error)

    def _open_trees(self, directory: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._trees = os.open(directory / TREES, flags, 0o600)
        self._size = os.fstat(self._trees).st_size

    def _complain(self, error: OSError) -> None:
        """A full disk must not keep a job from running; the marker is still there."""
        if not self._complained:
            self._complained = True
            log.warning("the record of processes in %s cannot be written: %s", self.directory, error.strerror)


@frozen
class Leftovers:
    """What a supervisor left that is no more. `close` it after the sweep.

    Attributes:
        directory: the record.
        id: the beginning of its marker.
        since: when its first process may have been started, in ticks; `None`: before this boot, nothing can live.
        processes: leaders by pid and start.
        keepers: guardians and zygote, likewise.
        cgroup: the group of all its trees.
        lock: the descriptor that keeps others from sweeping the same.
    """

    directory: Path
    id: str
    since: int | None
    processes: tuple[PidStart, ...]
    keepers: tuple[PidStart, ...]
    cgroup: Path | None
    lock: int

    def close(self, *, keep: bool) -> None:
        """Remove the record, unless something could not be ended."""
        try:
            if not keep:
                _discard(self.directory)
        finally:
            _unlock(self.lock)


def leftovers(state_dir: Path) -> list[Leftovers]:
    """The records whose supervisors are gone. Each is locked for us.

    Left alone are those of living supervisors, and those of another pid namespace: their processes cannot be found
    from here.
    """
    found = []
    for directory in _listed(state_dir / DIRECTORY):
        try:
            lock = _locked(directory / LOCK)
        except OSError as error:
            if error.errno == errno.ENOENT and directory.name.startswith(NEW):  # it came no further
                _discard(directory)
            elif error.errno not in (errno.EWOULDBLOCK, errno.ENOENT):  # who has no lock is no record of ours
                log.warning("the record %s cannot be looked at: %s", directory, error.strerror)
            continue
        entries = [path for path in (directory / OWNER, directory / TREES) if os.path.lexists(path)]
        if not entries:  # another sweep was faster; or nothing was ever started
            _discard(directory)
            _unlock(lock)
            continue
        if (one := _read(directory, entries, lock)) is None:
            _unlock(lock)
        else:
            found.append(one)
    return found


def _listed(runs: Path) -> list[Path]:
    """The records that may be looked at. What somebody else could have written there says nothing."""
    try:
        if _is_strangers(runs):
            return []
        names = sorted(filter(NAME.fullmatch, os.listdir(runs)))
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("the records in %s cannot be looked at: %s", runs, error.strerror)
        return []
    found = []
    for directory in (runs / name for name in names):
        try:
            if not _is_being_made(directory) and not _is_strangers(directory):
                found.append(directory)
        except FileNotFoundError:  # finished, or removed, meanwhile
            continue
    return found


def _is_strangers(directory: Path) -> bool:
    """Whether it is another user's, or no directory at all."""
    status = directory.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
        return False
    log.warning("the record %s is passed over: it is no directory of ours (uid %d)", directory, status.st_uid)
    return True


def _is_being_made(directory: Path) -> bool:
    """Its lock may not be taken yet. One that stays so was never finished."""
    return directory.name.startswith(NEW) and time.time() - directory.lstat().st_mtime < BEING_MADE


def _read(directory: Path, entries: Iterable[Path], lock: int) -> Leftovers | None:
    """What is in a record; None if another pid namespace of this boot is its."""
    processes: list[PidStart] = []
    keepers: list[PidStart] = []
    owner: dict[str, Any] = {}
    trees: dict[str, Any] = {}
    for path in entries:
        try:
            if path.name == OWNER:
                owner = dict(json.loads(path.read_bytes()))
            else:
                _replay(path.read_bytes(), trees)
        except BROKEN as error:
            log.warning(DOES_NOT_READ, path, error)
    for tree in trees.values():
        try:
            processes += map(_pid_and_start, tree["processes"])
            keepers += map(_pid_and_start, tree["keepers"])
        except BROKEN as error:
            log.warning(DOES_NOT_READ, directory / TREES, error)
    if owner.get("boot_id", boot_id()) == boot_id():
        if owner.get("pid_namespace", pid_namespace()) != pid_namespace():
            return None
        since = owner.get("since")
        since = since if isinstance(since, int) else 0
    else:
        since, processes, keepers = None, [], []
    identifier = directory.name.removeprefix(NEW)
    cgroup = owner.get("cgroup")
    is_ours = isinstance(cgroup, str) and os.path.basename(cgroup) == f"{PREFIX}{identifier}"
    group = Path(cgroup) if isinstance(cgroup, str) and is_ours and since is not None else None
    return Leftovers(directory, identifier, since, tuple(processes), tuple(keepers), group, lock)


def _replay(data: bytes, trees: dict[str, Any]) -> None:
    """What the lines add up to; a last one that was not finished says nothing."""
    for line in data.split(b"\n")[:-1]:
        value = json.loads(line)
        if "struck" in value:
            trees.pop(value["struck"], None)
        else:
            trees[value["token"]] = value


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _pid_and_start(value: Any) -> PidStart:
    pid, start = value
    if type(pid) is not int or type(start) is not int or not 0 < pid < 1 << 31:
        raise ValueError(f"{value!r} is no process")
    return pid, start


def _discard(directory: Path) -> None:
    """Remove a record and no file of somebody else's, the lock last: without it nobody takes it for a record."""
    try:
        ours = [name for name in os.listdir(directory) if any(fnmatch.fnmatchcase(name, kind) for kind in FILES)]
        for name in sorted(ours, key=LOCK.__eq__):
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("the record %s cannot be removed: %s", directory, error.strerror)


def _locked(path: Path, flags: int = 0) -> int:
    """A descriptor that holds the flock of a file. BlockingIOError: somebody else has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return descriptor


def _unlock(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _forget_locks() -> None:
    """In a forked child."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_locks)


def boot_id() -> str:
    """Which run of the machine this is: a pid and a start time mean nothing in another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> str:
    """Which numbering of processes this is: boot id, pids and start times mean nothing in another."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # a kernel without
        return ""
