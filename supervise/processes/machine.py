"""What the kernel tells of this machine: inotify's limits and their use, and its clocks. Blocking, and without Trio."""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attrs import frozen

__all__ = ["InotifyLimits", "InotifyUse", "clock_error", "clock_skew", "inotify_limits", "inotify_use"]

#: adjtimex(2) returns it while the clock is not synchronised.
TIME_ERROR: Final = 5
#: `maxerror` of struct timex lies behind an int and two longs, with the padding that makes longs lie even.
_MAXERROR: Final = 3 * ctypes.sizeof(ctypes.c_long)
#: More than any struct timex has.
_TIMEX: Final = 1024


@frozen
class InotifyLimits:
    """Of one user. `None` where the kernel does not say.

    Attributes:
        instances: inotify(7) descriptors.
        watches: watched files and directories.
        events: that wait in one instance; more are lost.
    """

    instances: int | None
    watches: int | None
    events: int | None


@frozen
class InotifyUse:
    """How much of the limits is used.

    Attributes:
        instances: of this user.
        watches: in them.
        whole: whether there was time to look at all processes.
    """

    instances: int
    watches: int
    whole: bool


def inotify_limits(directory: Path = Path("/proc/sys/fs/inotify")) -> InotifyLimits:
    """The limits."""

    def limit(name: str) -> int | None:
        try:
            return int((directory / name).read_text())
        except (OSError, ValueError):
            return None

    return InotifyLimits(limit("max_user_instances"), limit("max_user_watches"), limit("max_queued_events"))


def inotify_use(seconds: float, proc: Path = Path("/proc")) -> InotifyUse:
    """What the processes of this user have, as far as they can be looked into. Looks for at most `seconds`."""
    deadline = time.monotonic() + seconds
    instances = watches = 0
    user = os.geteuid()
    with os.scandir(proc) as processes:
        for process in processes:
            if time.monotonic() > deadline:
                return InotifyUse(instances, watches, False)
            try:
                if not process.name.isdigit() or process.stat().st_uid != user:
                    continue
                own = Path(process.path)
                for number in os.listdir(own / "fd"):
                    if time.monotonic() > deadline:
                        return InotifyUse(instances, watches, False)
                    if os.readlink(own / "fd" / number) == "anon_inode:inotify":
                        watches += (own / "fdinfo" / number).read_bytes().count(b"inotify wd:")
                        instances += 1
            except OSError:  # it has ended, or is closed to us
                continue
    return InotifyUse(instances, watches, True)


def clock_error() -> float | None:
    """By how many seconds the kernel's clock may be wrong: infinite where nobody sets it; `None` if it will not say.

    In a container, it is the host's clock, and a filter of system calls may keep the answer from us.
    """
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    timex = ctypes.create_string_buffer(_TIMEX)  # modes 0: nothing is changed
    state = adjtimex(timex)
    if state < 0:
        return None
    return math.inf if state == TIME_ERROR else ctypes.c_long.from_buffer(timex, _MAXERROR).value / 1e6


def clock_skew(directory: Path, clock: Callable[[], float] = time.time) -> float:
    """By how many seconds the clock of the file system of `directory` is ahead of `clock`; one of NFS is the server's.

    Raises:
        OSError: no file can be made there.
    """
    before = clock()
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".clock-") as file:
        file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())  # NFS tells the server's time once the server has it
        changed = os.stat(file.name).st_mtime
    after = clock()
    return changed - after if changed > after else min(0.0, changed - before)
