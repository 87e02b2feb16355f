"""One instance at a time: a lock file that also says who has it.

The flock(2) is the proof, what the file says is information: the kernel drops the lock with its holder, however that
died. But others may use a file at the same place as a mere PID file and take no lock, so before a free lock is taken
the file is read, and whoever it names must be proved dead (see `may_take`).

The file's first line is the pid. The second is JSON: start of the process in clock ticks since boot, boot id, and pid
namespace. Where shells read the file as a whole (`kill -0 $(cat FILE)`), ask for a `plain` one: it has no second line.

All here is blocking: a dozen system calls on a small local file, which Trio's thread can spare. The directory should
be local: two hosts that share one over a network whose flock(2) is local to each would both run. A PID file that
somebody wrote in another pid namespace, a container's say, cannot be told from one of ours: its number is looked up
here, where it may be nobody's. Two containers must share a lock file only if both take the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import final

import trio
from attrs import frozen

from supervise.errors import AlreadyRunning, SuperviseError
from supervise.processes import identity
from supervise.processes.records import boot_id, pid_namespace

log = logging.getLogger("supervise.dispatch")

#: How often a lock that somebody has is tried again, in seconds: the kernel tells nobody.
TRY_AGAIN = 0.05

#: How long to wait, in seconds, for whoever has just taken the lock to write who it is.
NAMED_WITHIN = 1.0

#: How often the file may be removed or replaced between our open and our lock before we give up.
ATTEMPTS = 100

#: No lock file is longer, in bytes.
MOST = 4096

#: What is left of a file whose content a power cut has taken, beside white space.
BLANK = b"\0 \t\r\n"

#: How long after its first process a machine mounts /proc at most, in seconds; see `Found.clock_is_steady`.
MOUNTED_WITHIN = 30.0

#: Times of day are compared this coarsely, in seconds: a step of the clock up to twice `MOUNTED_WITHIN` goes unseen.
SLACK = 2 * MOUNTED_WITHIN

OTHER = "remove it, or name another (--lock-file)"


@frozen
class Holder:
    """Whom a lock file names. The files of others hold a pid alone; `start` and `boot` are there both or neither."""

    pid: int
    start: int | None = None
    boot: str | None = None
    namespace: str | None = None


@frozen(kw_only=True)
class Found:
    """What is known beside the file.

    Attributes:
        own_pid: ours.
        boot, namespace: ids of this boot and of our pid namespace.
        booted_at: when this boot was, in seconds since the epoch.
        written_at: when the file was written, likewise.
        clock_is_steady: whether the clock was not set since boot, as far as can be told. If it was set forward, a
            process that wrote a file before that seems to be younger than the file, and the file older than the boot.
        alive: whether there is a process with the holder's pid, no zombie.
        start: its start, in ticks; `None` if it is hidden from us.
    """

    own_pid: int
    boot: str
    namespace: str
    booted_at: float
    written_at: float
    clock_is_steady: bool
    alive: bool
    start: int | None


def may_take(holder: Holder, found: Found) -> bool:
    """Whether a lock that nobody holds may be taken: whoever the file names is proved dead. In doubt it is not.

    1. The file is of another boot.
    2. It is of another pid namespace. Only who takes the lock writes that; its pid says nothing here, but its lock is
       gone, and that does.
    3. There is no such process, or it is ourselves.
    4. The pid is another process's by now: its start is another than the file says. Where that says none, and the
       clock was not set: the file is older than this boot, or than the process.
    """
    if holder.boot is not None and holder.boot != found.boot:
        return True
    if holder.namespace is not None and holder.namespace != found.namespace:
        return True
    if not found.alive or holder.pid == found.own_pid:
        return True
    if found.start is None:
        return False
    if holder.start is not None:
        return holder.start != found.start
    started_at = found.booted_at + found.start / identity.ticks()
    is_older = found.written_at < max(found.booted_at, started_at) - SLACK
    return found.clock_is_steady and is_older


def render(holder: Holder) -> bytes:
    """The content of a lock file that names it."""
    first = f"{holder.pid}\n"
    if holder.start is None or holder.boot is None:
        return first.encode()
    more = {"start": holder.start, "boot": holder.boot}
    if holder.namespace is not None:
        more["pid_namespace"] = holder.namespace
    return f"{first}{json.dumps(more)}\n".encode()


def parse(data: bytes) -> Holder | None:
    """Whom the content of a lock file names; `None` if nobody, or if it is no lock file's.

    A second line that breaks off, as a full disk leaves it, says nothing; one that cannot be the beginning of ours
    makes the whole somebody's file for other ends.
    """
    first, _, rest = data.partition(b"\n")
    number = re.fullmatch(rb"[ \t]*([0-9]{1,10})[ \t\r]*", first.rstrip(b"\0"))
    pid = int(number[1]) if number else 0
    second = rest.partition(b"\n")[0].strip(BLANK)
    if not 0 < pid < 1 << 31 or len(data) > MOST or (rest.strip(BLANK) and not second.startswith(b"{")):
        return None
    try:
        more = json.loads(second)
        start, boot, namespace = more["start"], more["boot"], more.get("pid_namespace")
    except (ValueError, KeyError, RecursionError):
        return Holder(pid)
    if type(start) is not int or start < 0 or type(boot) is not str or type(namespace) not in (str, type(None)):
        return Holder(pid)
    return Holder(pid, start, boot, namespace)


#: The files that this process has open here. A child that the host forks must not hold their locks on.
_open_here: set[InstanceLock] = set()


@final
class InstanceLock:
    """A lock file that is held. Made by `take` or `hold`. A forked child does not have it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        _open_here.add(self)

    @property
    def is_intact(self) -> bool:
        """Whether it is held and its file still at its path. If somebody has removed that, another may start."""
        return self._descriptor >= 0 and _is(self.path, self._descriptor)

    def release(self) -> None:
        """Remove the file, under the lock, then give up the lock. Again: nothing.

        A file that somebody else has put in its place is left alone. One that cannot be removed is emptied.
        """
        if self._descriptor < 0:
            return
        try:
            if _is(self.path, self._descriptor):
                self.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the lock file %s cannot be removed: %s", self.path, error.strerror)
            with contextlib.suppress(OSError):  # on a disk that went bad; it names us then, who are about to end
                os.ftruncate(self._descriptor, 0)
        finally:
            self._close()

    def _close(self) -> None:
        _open_here.discard(self)
        descriptor, self._descriptor = self._descriptor, -1
        try:
            # Closing does not unlock while somebody else has a copy: a fork that Python knows nothing of.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _forget(self) -> None:
        """In a forked child: no unlocking, which would be the parent's lock."""
        os.close(self._descriptor)
        self._descriptor = -1

    def _take(self, *, plain: bool) -> bool:
        """Lock the file and write who we are; False if it is no more the one at the path."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(self.path, _whose(self._descriptor)) from None
        if not _is(self.path, self._descriptor):  # whoever had it removed it between our open and our lock
            return False
        data = os.pread(self._descriptor, MOST + 1, 0)
        holder = parse(data)
        if holder is None and (data.strip(BLANK) or len(data) > MOST):
            raise SuperviseError(f"{self.path} is no lock file: it has other content; {OTHER}")
        if holder is not None and not may_take(holder, _found(self._descriptor, holder.pid)):
            raise AlreadyRunning(self.path, holder.pid, locked=False)
        try:
            _write(self._descriptor, render(_ourselves(plain=plain)), over=len(data))
        except BaseException:
            self.release()  # whoever it named is dead: half a file is nobody's
            raise
        return True


def _forget_all() -> None:
    """In a forked child."""
    while _open_here:
        _open_here.pop()._forget()


os.register_at_fork(after_in_child=_forget_all)


def take(path: Path, *, plain: bool = False) -> InstanceLock:
    """Take the lock now.

    Args:
        path: the file; its directory must be there. A symbolic link is not followed. Mode 0600 if it is made.
        plain: write the pid alone, for those who read the whole file as a pid. If we are killed and our pid becomes
            another process's, only the time of the file tells that it is not us, and the lock may be refused.

    Raises:
        AlreadyRunning: somebody has it; the error says who.
        SuperviseError: the file cannot be opened or written, is none, is somebody else's or no lock file.
    """
    path = path.absolute()  # it is removed by this name, wherever we are then
    try:
        for _ in range(ATTEMPTS):
            if (descriptor := _open(path)) is None:
                continue
            lock = InstanceLock(path, descriptor)
            taken = False
            try:
                taken = lock._take(plain=plain)
            finally:
                if not taken and lock._descriptor >= 0:
                    lock._close()
            if taken:
                return lock
    except OSError as error:
        if error.errno == errno.ENOENT and not path.parent.is_dir():
            what = f"the directory of the lock file {path} is not there; make it"
        else:
            what = f"the lock file {path} cannot be used: {error.strerror}; mend that"
        raise SuperviseError(f"{what}, or name another (--lock-file)") from error
    raise SuperviseError(f"the lock file {path} is removed again and again while it is taken; find out by whom")


@asynccontextmanager
@trio.lowlevel.enable_ki_protection  # Ctrl-C comes at the wait, or in the block
async def hold(path: Path, *, timeout: float = 0.0, plain: bool = False) -> AsyncIterator[InstanceLock]:
    """Hold the lock in the block.

    Args:
        path, plain: as in `take`.
        timeout: how long to wait for it, in seconds.

    Raises:
        AlreadyRunning, SuperviseError: as `take`.

    Leaving releases it. Cancelling ends the wait; nothing is held then.
    """
    began = trio.current_time()
    await trio.lowlevel.checkpoint()
    while True:
        try:
            lock = take(path, plain=plain)
            break
        except AlreadyRunning as error:
            # Who has locked it a moment ago has not said yet who it is.
            left = began + (timeout if error.pid else max(NAMED_WITHIN, timeout)) - trio.current_time()
            if not left > 0:
                raise
        await trio.sleep(min(TRY_AGAIN, left))
    try:
        yield lock
    finally:
        lock.release()


def _open(path: Path) -> int | None:
    """A descriptor of the file, made if need be; `None` if it came or went meanwhile.

    In a sticky directory that anybody may write to, fs.protected_regular refuses O_CREAT on the file of another user,
    even to root. So what is there is opened without, and what is not is made with O_EXCL.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        _check(path, os.lstat(path))  # before the open, which already does something to some devices
    except FileNotFoundError:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return None
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    try:
        _check(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(path: Path, status: os.stat_result) -> None:
    """Refuse what somebody may have planted: writing to it, or removing it, would be at another's will."""
    if stat.S_ISLNK(status.st_mode):
        raise SuperviseError(f"the lock file {path} is a symbolic link, which is not followed; {OTHER}")
    if not stat.S_ISREG(status.st_mode):
        raise SuperviseError(f"the lock file {path} is no regular file; {OTHER}")
    if status.st_uid not in (os.geteuid(), 0):
        raise SuperviseError(f"the lock file {path} belongs to another user (uid {status.st_uid}); {OTHER}")
    if status.st_nlink > 1:
        raise SuperviseError(f"the lock file {path} is some other file, too: it has hard links; {OTHER}")


def _is(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file that is open."""
    try:
        named = os.lstat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino)


def _found(descriptor: int, pid: int) -> Found:
    booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    process = identity.read(pid)
    return Found(
        own_pid=os.getpid(),
        boot=boot_id(),
        namespace=pid_namespace(),
        booted_at=booted_at,
        written_at=os.fstat(descriptor).st_mtime,
        clock_is_steady=_clock_is_steady(booted_at),
        alive=_exists(pid) if process is None else process.alive,
        start=None if process is None else process.start,
    )


def _exists(pid: int) -> bool:
    """Also of a process that /proc hides from us."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _clock_is_steady(booted_at: float) -> bool:
    """Whether /proc was mounted, by the time of day of then, when the first process started by that of now.

    The kernel does not tell whether the clock was set: after a boot without a battery, or when a machine that was
    saved goes on, it may be by days.
    """
    first = identity.read(1)
    if first is None:
        return False
    return abs(booted_at + first.start / identity.ticks() - os.stat("/proc").st_mtime) <= MOUNTED_WITHIN


def _ourselves(*, plain: bool) -> Holder:
    pid = os.getpid()
    start = identity.start_of(pid)
    return Holder(pid) if plain or start < 0 else Holder(pid, start, boot_id(), pid_namespace())


def _write(descriptor: int, data: bytes, *, over: int) -> None:
    """Over the bytes that are there: who reads meanwhile finds a pid, and never one that has an old one's end."""
    padded = data.ljust(over, b"\n")
    done = 0
    while done < len(padded):
        done += os.pwrite(descriptor, padded[done:], done)
    os.ftruncate(descriptor, len(data))


def _whose(descriptor: int) -> int | None:
    """The pid of who has the lock: the kernel knows. Where that does not tell, as in containers, the file may."""
    if (pid := _locker(os.fstat(descriptor))) is not None:
        return pid
    holder = parse(os.pread(descriptor, MOST + 1, 0))
    if holder is None:
        return None
    found = _found(descriptor, holder.pid)
    is_elsewhere = holder.namespace is not None and holder.namespace != found.namespace
    # Whoever is dead had it before. The new one has not written yet.
    return holder.pid if is_elsewhere or found.alive else None


def _locker(status: os.stat_result) -> int | None:
    """Whom /proc/locks names for a file."""
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:  # "1: FLOCK  ADVISORY  WRITE 4711 fd:00:42 0 EOF"; who waits has an arrow before FLOCK
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == name and int(fields[4]) > 0:
            return int(fields[4])
    return None
