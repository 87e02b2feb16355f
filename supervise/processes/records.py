"""What is on the disk of a supervisor's trees while it lives, so that the next one can end what it left.

    STATE_DIR/run/ID/lock         flock(2) as long as the supervisor lives: whoever can take it may sweep
    STATE_DIR/run/ID/owner.json   boot id, pid and start of the supervisor, its cgroup
    STATE_DIR/run/ID/*.json       one for each tree that may have processes, and one for the zygote

The id is also the beginning of the marker that all its processes have in their environment. Nothing is fsynced: a
record has to outlive the supervisor, and after a power cut there is nothing to end. Blocking calls, no Trio.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from attrs import frozen

from supervise import durable
from supervise.processes import identity

log = logging.getLogger("supervise.processes")

DIRECTORY = "run"
LOCK = "lock"
OWNER = "owner.json"
NEW = ".new-"

#: How long a record may take to be made, in seconds; it takes a millisecond.
BEING_MADE = 60.0

PidStart = tuple[int, int]


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
        new.mkdir(mode=0o700)
        self.directory = runs / self.id
        self._complained = False
        self._lock = _locked(new / LOCK)
        self._owner: dict[str, Any] = {
            "boot_id": boot_id(),
            "pid": os.getpid(),
            "start": _start_of(os.getpid()),
            "since": identity.now_in_ticks(),
            "cgroup": None,
        }
        durable.replace(new / OWNER, json.dumps(self._owner).encode(), durable=False)
        # Only now: a sweep never sees a record whose lock is not yet taken.
        new.rename(self.directory)

    def set_cgroup(self, path: Path) -> None:
        """Where the groups of all trees are. Written before there is one."""
        self._owner["cgroup"] = str(path)
        self._write(OWNER, self._owner)

    def enter(self, token: str, pids: Iterable[int], keepers: Iterable[PidStart] = ()) -> None:
        """A tree has these processes. Its earlier entry is replaced.

        Args:
            token: of the tree; it begins with our id.
            pids: the leaders.
            keepers: guardian or zygote. They end by themselves, unless somebody has stopped them.
        """
        processes = [(pid, _start_of(pid)) for pid in pids]
        self._write(_name(token), {"token": token, "processes": processes, "keepers": list(keepers)})

    def strike(self, token: str) -> None:
        """Nothing of this tree is left."""
        (self.directory / _name(token)).unlink(missing_ok=True)

    def has_entries(self) -> bool:
        """Whether some tree was not struck out: something of it could not be ended."""
        return any(path.name != OWNER for path in self.directory.glob("*.json"))

    def close(self, *, keep: bool = False) -> None:
        """Remove it, unless something is left that the next supervisor should look after."""
        if self._lock < 0:
            return
        try:
            if not keep:
                shutil.rmtree(self.directory, ignore_errors=True)
        finally:
            os.close(self._lock)
            self._lock = -1

    def _write(self, name: str, value: dict[str, Any]) -> None:
        try:
            durable.replace(self.directory / name, json.dumps(value).encode(), durable=False)
        except OSError as error:  # a full disk must not keep a job from running; the marker is still there
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
                shutil.rmtree(self.directory, ignore_errors=True)
        finally:
            os.close(self.lock)


def leftovers(state_dir: Path) -> list[Leftovers]:
    """The records whose supervisors are gone. Each is locked for us; living supervisors' are left alone."""
    found = []
    for directory in _listed(state_dir / DIRECTORY):
        try:
            lock = _locked(directory / LOCK)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.ENOENT):
                log.warning("the record %s cannot be looked at: %s", directory, error.strerror)
            continue
        if os.fstat(lock).st_nlink == 0:  # another sweep was faster
            os.close(lock)
            continue
        found.append(_read(directory, lock))
    return found


def _listed(runs: Path) -> list[Path]:
    try:
        return sorted(each for each in runs.iterdir() if each.is_dir() and not _is_being_made(each))
    except FileNotFoundError:
        return []


def _is_being_made(directory: Path) -> bool:
    """Its lock may not be taken yet. One that stays so was never finished."""
    return directory.name.startswith(NEW) and time.time() - directory.stat().st_mtime < BEING_MADE


def _read(directory: Path, lock: int) -> Leftovers:
    processes: list[PidStart] = []
    keepers: list[PidStart] = []
    owner: dict[str, Any] = {}
    for path in directory.glob("*.json"):
        try:
            value = json.loads(path.read_bytes())
            if path.name == OWNER:
                owner = value
            else:
                processes += [(int(pid), int(start)) for pid, start in value["processes"]]
                keepers += [(int(pid), int(start)) for pid, start in value["keepers"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the record %s does not read: %s; its processes are looked for by their marker", path, error)
    if owner.get("boot_id", boot_id()) == boot_id():
        since = owner.get("since")
        since = since if isinstance(since, int) else 0
    else:
        since, processes, keepers = None, [], []
    cgroup = owner.get("cgroup")
    identifier = directory.name.removeprefix(NEW)
    group = Path(cgroup) if isinstance(cgroup, str) and cgroup.endswith(identifier) and since is not None else None
    return Leftovers(directory, identifier, since, tuple(processes), tuple(keepers), group, lock)


def _locked(path: Path) -> int:
    """A descriptor that holds the flock of a file. BlockingIOError: somebody else has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def boot_id() -> str:
    """Which run of the machine this is: a pid and a start time mean nothing in another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_of(pid: int) -> int:
    process = identity.read(pid)
    return process.start if process else -1


def _name(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()[:16] + ".json"
