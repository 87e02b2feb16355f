"""Ctrl-C and its relatives, for the commands that run a job."""

from __future__ import annotations

import signal
from typing import final

import trio

from supervise.job.handle import Job


@final
class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into `job.cancel()`: the first asks, each further one hurries.

    Attributes:
        ended_by: the first signal that came, or SIGPIPE.
    """

    def __init__(self, job: Job) -> None:
        self.ended_by: int | None = None
        self._job = job

    def pipe_closed(self) -> None:
        """Whoever read our standard output has gone away: nobody wants the result."""
        self._cancel(signal.SIGPIPE, "standard output was closed")

    async def watch(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive signals until cancelled."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as received:
            task_status.started()
            async for number in received:
                self._cancel(number, f"{signal.Signals(number).name} was received")

    def _cancel(self, number: int, reason: str) -> None:
        self.ended_by = self.ended_by or number
        self._job.cancel(reason)
