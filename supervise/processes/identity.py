"""Who a process is: pid and start time, read from `/proc`. A pid alone may be a stranger's by now."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection
from functools import lru_cache

from attrs import frozen

#: How many processes one walk through a tree finds at most.
MOST = 1000

_GONE = (errno.ENOENT, errno.ESRCH)  # a read in /proc fails with either, see proc(5)
_HIDDEN = (errno.EACCES, errno.EPERM)  # somebody else's, where /proc is mounted with hidepid


@frozen
class Process:
    """One process as `/proc/PID/stat` shows it. `start` is in clock ticks since boot: with the pid, an identity.

    `cpu` is in clock ticks, `pages` counts pages of resident memory, `threads` those that have not ended.
    """

    pid: int
    parent: int
    group: int
    session: int
    state: str
    start: int
    cpu: int = 0
    pages: int = 0
    threads: int = 1

    @property
    def cpu_seconds(self) -> float:
        """Processor time, its own."""
        return self.cpu / ticks()

    @property
    def rss_bytes(self) -> int:
        """Resident memory."""
        return self.pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def alive(self) -> bool:
        """Neither a zombie nor dead. A main thread that has ended before the others is shown as a zombie, too."""
        return self.state not in "ZXx" or (self.state == "Z" and self.threads > 1)

    @property
    def start_time(self) -> float:
        """Seconds since the epoch."""
        return boot_time() + self.start / ticks()


def read(pid: int) -> Process | None:
    """The process of this pid, or None if there is none."""
    fields = _stat(str(pid))
    return None if fields is None else _process(pid, fields)


def start_of(pid: int) -> int:
    """When the process of this pid was started; -1 if there is none, or no descriptor is free to look."""
    try:
        process = read(pid)
    except OSError:
        return -1
    return process.start if process else -1


def pidfd_of(pid: int, start: int) -> int | None:
    """A descriptor of this process. None: it is gone, its pid is somebody else's, or no descriptor is free."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    is_it = False
    try:
        now = read(pid)  # after the descriptor was opened: it is of whoever had the pid then
        is_it = now is not None and now.start == start
    except OSError:  # that was the last descriptor
        return None
    finally:
        if not is_it:
            os.close(pidfd)
    return pidfd if is_it else None


def started_since(start: int, *, skip: Collection[int] = ()) -> tuple[list[Process], set[int]]:
    """The processes that were started at `start` (in ticks) or later, and the pids of all that were seen.

    Pids in `skip` are passed over.
    """
    found: list[Process] = []
    seen: set[int] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit() or (pid := int(name)) in skip:
            continue
        seen.add(pid)
        fields = _stat(name)
        if fields is not None and int(fields[19]) >= start:
            found.append(_process(pid, fields))
    return found, seen


def descendants(pid: int, *, without: Collection[int] = (), most: int = MOST) -> list[Process]:
    """The processes below one, itself not among them; whoever is in `without` is passed over, with all below it.

    One walk may miss who forks or ends meanwhile. It ends at `most`: a swarm must not hold up who looks.
    """
    known = None if TELLS_CHILDREN else _children_by_parent()
    found: list[Process] = []
    todo = [pid]
    while todo:
        parent = todo.pop()
        for child in _children(parent) if known is None else known.get(parent, ()):
            if len(found) >= most:
                return found
            if child not in without and (process := read(child)) is not None:
                found.append(process)
                todo.append(child)
    return found


#: Whether the kernel tells the children of a process (CONFIG_PROC_CHILDREN), so that no look at all is needed.
TELLS_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in _listing(f"/proc/{pid}/task"):
        try:
            descriptor = os.open(f"/proc/{pid}/task/{thread}/children", os.O_RDONLY | os.O_CLOEXEC)
            try:
                while text := os.read(descriptor, 1 << 16):
                    found += map(int, text.split())
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in (*_GONE, *_HIDDEN):
                raise
    return found


def _children_by_parent() -> dict[int, list[int]]:
    known: dict[int, list[int]] = {}
    for process in started_since(0)[0]:
        known.setdefault(process.parent, []).append(process.pid)
    return known


def _stat(name: str) -> list[bytes] | None:
    """The fields of /proc/PID/stat after the name of the program; None if it is gone or not ours to read."""
    try:
        descriptor = os.open(f"/proc/{name}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, 4096)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (*_GONE, *_HIDDEN):
            return None
        raise
    # The name in parentheses may hold anything, also spaces and parentheses.
    return text[text.rindex(b")") + 2 :].split()


def _process(pid: int, fields: list[bytes]) -> Process:
    return Process(
        pid,
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        state=fields[0].decode(),
        start=int(fields[19]),
        cpu=int(fields[11]) + int(fields[12]),
        pages=int(fields[21]),
        threads=int(fields[17]),
    )


def environment_of(process: Process) -> bytes:
    """The environment that the process was started with; empty if it is gone or not ours to read."""
    text = _environ(f"/proc/{process.pid}")
    if not text and process.state == "Z":  # a main thread that has ended before the others has none: ask them
        threads = f"/proc/{process.pid}/task"
        text = next(filter(None, (_environ(f"{threads}/{thread}") for thread in _listing(threads))), b"")
    return text


def _environ(directory: str) -> bytes:
    try:
        with open(f"{directory}/environ", "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno in (*_GONE, *_HIDDEN):
            return b""
        raise


def _listing(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        if error.errno in (*_GONE, *_HIDDEN):
            return []
        raise


def command_of(pid: int) -> str:
    """The program of a process, without its arguments: they may hold what is nobody's business."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read(64).decode("utf-8", "replace").strip()
    except OSError:
        return "?"


@lru_cache(1)
def ticks() -> int:
    """Clock ticks a second."""
    return os.sysconf("SC_CLK_TCK")


@lru_cache(1)
def boot_time() -> float:
    """When this machine started, in seconds since the epoch."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def now_in_ticks() -> int:
    """This moment in the unit of `Process.start`, rounded down."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * ticks())
