"""Ctrl-C and its relatives, for the commands that run a job."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol, final

import trio

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Cancellable(Protocol):
    """A job, or a worker."""

    def cancel(self, reason: str) -> None:
        """Asked to end; asked again, to hurry."""


@final
class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into `cancel()` of a job: the first asks, each further one hurries.

    Attributes:
        ended_by: the first signal that came, or SIGPIPE.
        preparation: for what is done before there is a job; a signal cancels it.
    """

    def __init__(self) -> None:
        self.ended_by: int | None = None
        self.preparation = trio.CancelScope()
        self._job: Cancellable | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Receive signals inside the block; in Trio's main thread. One that is ignored (nohup) stays ignored."""
        token = trio.lowlevel.current_trio_token()

        def handle(number: int, frame: FrameType | None) -> None:
            token.run_sync_soon(self._cancel, number, f"{signal.Signals(number).name} was received")

        before = {number: signal.getsignal(number) for number in ENDING}
        ours = [number for number in ENDING if before[number] is not signal.SIG_IGN]
        for number in ours:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, before[number])

    @contextmanager
    def preparation_again(self) -> Iterator[None]:
        """More of what is done before there is a job: a signal cancels it, also one that came before."""
        with trio.CancelScope() as self.preparation:
            if self.ended_by is not None:
                self.preparation.cancel()
            yield

    def belong_to(self, job: Cancellable) -> None:
        """From here on, signals go to `job`, also one that came before."""
        self._job = job
        if self.ended_by is not None:
            self._job.cancel(f"{signal.Signals(self.ended_by).name} was received")

    def pipe_closed(self) -> None:
        """Whoever read our standard output has gone away: nobody wants the result."""
        self._cancel(signal.SIGPIPE, "standard output was closed")

    def _cancel(self, number: int, reason: str) -> None:
        self.ended_by = self.ended_by or number
        if self._job is None:
            self.preparation.cancel()
        else:
            self._job.cancel(reason)
