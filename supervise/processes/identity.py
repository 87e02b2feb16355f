"""Who a process is: pid and start time, read from `/proc`. A pid alone may be a stranger's by now."""

from __future__ import annotations

import errno
import os
import time
from functools import lru_cache

from attrs import frozen

_GONE = (errno.ENOENT, errno.ESRCH)  # a read in /proc fails with either, see proc(5)


@frozen
class Process:
    """One process as `/proc/PID/stat` shows it. `start` is in clock ticks since boot: with the pid, an identity.

    `cpu` is in clock ticks, `pages` counts pages of resident memory.
    """

    pid: int
    parent: int
    group: int
    session: int
    state: str
    start: int
    cpu: int = 0
    pages: int = 0

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
        """Neither a zombie nor dead."""
        return self.state not in "ZXx"

    @property
    def start_time(self) -> float:
        """Seconds since the epoch."""
        return boot_time() + self.start / ticks()


def read(pid: int) -> Process | None:
    """The process of this pid, or None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(4096)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    # The name in parentheses may hold anything, also spaces and parentheses.
    rest = text[text.rindex(b")") + 2 :].split()
    return Process(
        pid,
        parent=int(rest[1]),
        group=int(rest[2]),
        session=int(rest[3]),
        state=rest[0].decode(),
        start=int(rest[19]),
        cpu=int(rest[11]) + int(rest[12]),
        pages=int(rest[21]),
    )


def everyone() -> list[Process]:
    """All processes that can be seen."""
    found = (read(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [process for process in found if process is not None]


def environment_of(pid: int) -> bytes:
    """The environment that the process was started with; empty if it is gone or not ours to read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno in (*_GONE, errno.EACCES, errno.EPERM):
            return b""
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
