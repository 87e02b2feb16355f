"""Blocking calls of jobs: in threads that nobody else can use up.

A host may hold all of Trio's default threads for as long as it likes; a job must end all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

__all__ = ["in_thread"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: One for each Trio loop: a limiter is not safe between two of them.
_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter | None] = trio.lowlevel.RunVar("supervise.job threads", None)


async def in_thread(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """`function(*args)` in a thread. Cancelling waits for it."""
    limiter = _limiter.get()
    if limiter is None:
        limiter = trio.CapacityLimiter(4)
        _limiter.set(limiter)
    return await trio.to_thread.run_sync(function, *args, limiter=limiter)
