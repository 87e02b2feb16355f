"""Standard output that may block or go away without holding up anything."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, final

import trio

from supervise.cli import exit_codes
from supervise.cli.streams import PATIENCE, write_all
from supervise.codec import event_to_json, rfc3339, to_json, to_line
from supervise.errors import SuperviseError
from supervise.events import JobFinished
from supervise.job.bus import Subscription
from supervise.model import JobResult


async def put_out(data: bytes) -> int:
    """Write `data` to standard output; the exit code, which tells of a reader who has gone away.

    Raises:
        SuperviseError: it cannot be written to for another reason; the disk is full, for instance.
    """
    stdout = Stdout(1, lambda: None)
    await stdout.text(data)
    if stdout.trouble:
        raise SuperviseError(f"standard output cannot be written to: {stdout.trouble}")
    return exit_codes.BROKEN_PIPE if stdout.closed else exit_codes.COMPLETED


@final
class Stdout:
    """Writes lines to a descriptor, in a thread that is left behind where it blocks for ever.

    Args:
        descriptor: where to.
        on_closed: called once when the reader has gone away.

    Attributes:
        closed: nothing more can be written.
        trouble: why, in words, if it is for another reason than a reader who has gone away.
    """

    def __init__(self, descriptor: int, on_closed: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._on_closed = on_closed
        self._written = 0
        self._writing = False
        self.closed = False
        self.trouble = ""

    def exit_code(self, code: int) -> int:
        """Of a command that would end with `code`, had it been able to write."""
        if self.trouble:
            return exit_codes.FAILED
        return exit_codes.BROKEN_PIPE if self.closed and code == exit_codes.COMPLETED else code

    async def write(self, data: bytes) -> None:
        """Write all of `data`. Cancelling leaves it half written, and the thread behind."""
        if self.closed:
            await trio.lowlevel.checkpoint()
            return
        self._writing = True
        try:
            await trio.to_thread.run_sync(write_all, self._descriptor, data, self._count, abandon_on_cancel=True)
        except OSError as error:
            self.closed = True
            self.trouble = "" if isinstance(error, BrokenPipeError) else str(error.strerror)
            self._on_closed()
        self._writing = False

    async def text(self, data: bytes) -> bool:
        """Write all of `data`. A reader who takes nothing for `PATIENCE` seconds is given up.

        Returns whether nothing was given up.
        """
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_patience, scope)
                await self.write(data)
                nursery.cancel_scope.cancel()
        return not scope.cancelled_caught

    async def json_lines(self, events: Subscription, last: Callable[[JobResult], Awaitable[Any]] | None = None) -> bool:
        """Write each event as a line of JSON, the result last. Returns whether nothing was given up.

        `last` makes one more object, which goes before the result. A reader who is too slow loses the oldest
        events. Once the job has ended, a reader who takes nothing for `PATIENCE` seconds is given up.
        """
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_patience, scope, events)
                async for event in events:
                    if isinstance(event, JobFinished):
                        if last is not None:
                            await self.write(to_line(await last(event.result)))
                        time = rfc3339(event.result.ended_at)
                        await self.write(to_line({"type": "result", "time": time, **to_json(event.result)}))
                    else:
                        await self.write(to_line(event_to_json(event)))
                nursery.cancel_scope.cancel()
        return not scope.cancelled_caught

    async def _watch_patience(self, scope: trio.CancelScope, events: Subscription | None = None) -> None:
        if events is not None:
            await events.job_ended()
        written = -1
        while not self._writing or written != self._written:
            written = self._written
            await trio.sleep(PATIENCE)
        scope.cancel()

    def _count(self, count: int) -> None:
        self._written += count
