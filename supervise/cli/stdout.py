"""Standard output that may block or go away without holding up anything."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any, final

import trio

from supervise.codec import event_to_json, to_json, to_line
from supervise.events import JobFinished
from supervise.job.bus import Subscription
from supervise.model import JobResult

#: How long a reader who takes nothing is waited for at the end, in seconds.
PATIENCE = 5.0


@final
class Stdout:
    """Writes lines to a descriptor, in a thread that is left behind where it blocks for ever.

    Args:
        descriptor: where to.
        on_closed: called once when the reader has gone away.
    """

    def __init__(self, descriptor: int, on_closed: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._on_closed = on_closed
        self._written = 0
        self.closed = False

    async def write(self, data: bytes) -> None:
        """Write all of `data`. Cancelling leaves it half written, and the thread behind."""
        if self.closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            await trio.to_thread.run_sync(self._write, data, abandon_on_cancel=True)
        except OSError:
            self.closed = True
            self._on_closed()

    async def json_lines(self, events: Subscription, last: Callable[[JobResult], Awaitable[Any]] | None = None) -> bool:
        """Write each event as a line of JSON, the result last. Returns whether it could be written.

        `last` makes one more object, which goes before the result. A reader who is too slow loses the oldest
        events. Once the job has ended, a reader who takes nothing for `PATIENCE` seconds is given up.
        """
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_patience, events, scope)
                async for event in events:
                    if isinstance(event, JobFinished):
                        if last is not None:
                            await self.write(to_line(await last(event.result)))
                        await self.write(to_line({"type": "result", **to_json(event.result)}))
                    else:
                        await self.write(to_line(event_to_json(event)))
                nursery.cancel_scope.cancel()
        return not scope.cancelled_caught and not self.closed

    async def _watch_patience(self, events: Subscription, scope: trio.CancelScope) -> None:
        await events.job_ended()
        written = -1
        while written != self._written:
            written = self._written
            await trio.sleep(PATIENCE)
        scope.cancel()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.write(self._descriptor, view[: 64 * 1024])
            self._written += count
            view = view[count:]
