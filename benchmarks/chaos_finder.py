"""Who of a trial is alive, found without anything that the library itself relies on: neither marker, nor parents, nor
sessions, nor cgroups.

Four witnesses, because each alone has a hole:

* **announcements**: each child appends its pid and start time to a file before it misbehaves, and after each fork.
  Both stay the same whatever it does. Hole: the moment between a fork and the line.
* **arguments**: a token in /proc/PID/cmdline, which forks and our own execs hand on. It finds hoppers, whose pids are
  never twice the same. Holes: a program that was executed without the token (it is announced); a hopper that hops
  while /proc is read.
* **a lock**: all share a flock(2), so that the kernel itself says, with no race, whether anybody is left who
  has the descriptor. It finds the hopper that each look misses. Hole: who has closed its descriptors.
* **helpers**: zygote and guardians hand on LD_LIBRARY_PATH from the supervising process, and nothing else of its
  environment. It names a directory that does not exist, with the token in it. They are also looked up below the
  supervising process before the kill: the environment of others is only root's to read.

The trial is empty when no witness tells of anybody, twice in a row, and the file of announcements has not grown.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

#: Seconds between two looks at those that are known, and between two readings of /proc that find nobody.
LOOK, AGAIN = 0.005, 0.02


@dataclass(frozen=True)
class Sight:
    """A process, as /proc shows it."""

    pid: int
    start: int
    parent: int
    state: str
    threads: int
    name: str

    @property
    def alive(self) -> bool:
        """Not dead; one whose main thread alone has ended is shown as a zombie, too."""
        return self.state not in "ZXx" or self.threads > 1

    def told(self) -> str:
        """For the table of survivors."""
        words = read(f"{self.pid}/cmdline").replace(b"\0", b" ").decode("utf-8", "replace").strip()
        return f"pid {self.pid} ({self.name}), state {self.state}, parent {self.parent}: {words[:50]} … {words[-50:]}"


def read(path: str) -> bytes:
    """A file in /proc; empty if the process has gone, or hides it from us."""
    try:
        with open(f"/proc/{path}", "rb", buffering=0) as file:
            return file.read(1 << 16)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM):
            return b""
        raise


def sight(pid: int) -> Sight | None:
    """The process of this pid."""
    head, _, tail = read(f"{pid}/stat").rpartition(b") ")
    if not tail:
        return None
    fields = tail.split()
    name = head.partition(b"(")[2].decode("utf-8", "replace")
    return Sight(pid, int(fields[19]), int(fields[1]), fields[0].decode(), int(fields[17]), name)


def now_in_ticks() -> int:
    """This moment, in the unit of `Sight.start`."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def children_of(pid: int) -> list[Sight]:
    """Its living children."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []
    pids = [int(word) for thread in threads for word in read(f"{pid}/task/{thread}/children").split()]
    return [found for found in map(sight, pids) if found is not None and found.alive]


def send(pid: int, start: int, number: int) -> bool:
    """Signal exactly this process. Returns whether it was there."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        found = sight(pid)
        if found is None or found.start != start or not found.alive:
            return False
        signal.pidfd_send_signal(pidfd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)


class Finder:
    """All processes of one trial.

    Args:
        directory: that of the trial, where its processes announce themselves.
        token: in the arguments of its children, and in the environment of its helpers.
        since: when it began, in ticks.
    """

    def __init__(self, directory: Path, token: str, since: int) -> None:
        self._log = directory / "announced"
        self._lock = directory / "lock"
        self._enough = directory / "enough"
        self._token = token.encode()
        self._since = since
        self._read = 0
        self._known: set[tuple[int, int]] = set()
        self.helpers: set[tuple[int, int]] = set()
        self.roles: dict[str, list[tuple[int, int]]] = {}

    def listen(self) -> bool:
        """Take in new announcements. Returns whether there were any."""
        try:
            with open(self._log, "rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return False
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        for line in text.decode().splitlines():
            pid, start, role = line.split()
            identity = (int(pid), int(start))
            self._known.add(identity)
            if role != "child":
                self.roles.setdefault(role, []).append(identity)
        return bool(text)

    def note_helpers(self, supervisor: int) -> tuple[list[Sight], list[Sight]]:
        """Zygotes and guardians below a supervising process."""
        zygotes = [each for each in children_of(supervisor) if each.name == "sv-zygote"]
        guardians = [each for zygote in zygotes for each in children_of(zygote.pid) if each.name == "sv-guardian"]
        found = {(each.pid, each.start) for each in (*zygotes, *guardians)}
        self.helpers |= found
        self._known |= found
        return zygotes, guardians

    def locked(self) -> bool:
        """Whether anybody has the lock."""
        try:
            lock = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(lock)

    def known(self) -> list[Sight]:
        """Of those that are known: who is alive."""
        self.listen()
        found = []
        for pid, start in list(self._known):
            now = sight(pid)
            if now is None or now.start != start or not now.alive:
                self._known.discard((pid, start))
            else:
                found.append(now)
        return found

    def scan(self) -> list[Sight]:
        """Read all of /proc."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            now = sight(int(name))
            if now is None or now.start < self._since or not now.alive:
                continue
            helper = self._token in read(f"{name}/environ")
            if helper or self._token in read(f"{name}/cmdline"):
                found.append(now)
                self._known.add((now.pid, now.start))
                if helper:
                    self.helpers.add((now.pid, now.start))
        return found

    def alive(self, *, helpers: bool = True) -> list[Sight]:
        """Everybody who is alive now, by all witnesses but the lock."""
        found = {(each.pid, each.start): each for each in (*self.scan(), *self.known())}
        return [each for identity, each in found.items() if helpers or identity not in self.helpers]

    def empty_after(self, began: float, bound: float) -> float | None:
        """Wait until nobody is left. Returns how long it took since `began`, or None past the bound."""
        while True:
            now = time.monotonic()
            if not self.known() and not self.locked() and not self.scan():
                time.sleep(AGAIN)
                if not (self.listen() or self.known() or self.locked() or self.scan()):
                    return now - began
            if now - began > bound:
                return None
            time.sleep(LOOK)

    def end_all(self, bound: float = 30.0) -> None:
        """End whoever is left. Hoppers are asked to: they are gone before /proc is read."""
        self._enough.touch()
        end = time.monotonic() + bound
        while self.empty_after(time.monotonic(), 0.0) is None:
            found = self.alive()
            for each in found:
                send(each.pid, each.start, signal.SIGKILL)
            if time.monotonic() > end:
                raise TimeoutError(f"cannot be ended: {'; '.join(each.told() for each in found)}")
            time.sleep(LOOK)
