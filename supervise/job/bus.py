"""From one job to any number of readers: each has a buffer of its own, and none can hold up the job."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, final

import trio

from supervise.events import Event, EventsDropped, published

#: Events that a reader may be behind, and that are kept for readers who come late.
BUFFER = 1024


@final
class Bus:
    """Publishes the events of one job."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._history: deque[Event] = deque(maxlen=BUFFER)
        self._count = 0
        self._readers: set[Subscription] = set()
        self._tap: Callable[[Event], None] | None = None
        self._closed = False
        self._ended = trio.Event()

    def tap(self, take: Callable[[Event], None]) -> None:
        """Hand each event to `take` at once: what is kept of the past now, the others as they are published."""
        for event in self._history:
            take(event)
        self._tap = take

    def publish(self, event: Event) -> None:
        """Stamp `event` and hand it to every reader. Never waits."""
        stamped = published(event, time=time.time(), job_id=self._job_id)
        self._history.append(stamped)
        self._count += 1
        if self._tap is not None:
            self._tap(stamped)
        for reader in self._readers:
            reader._push(stamped)

    def close(self) -> None:
        """No further event will come."""
        self._closed = True
        self._ended.set()
        for reader in self._readers:
            reader._wake()

    def subscribe(self) -> Subscription:
        """A reader, who first gets what is kept of the past."""
        return Subscription(self)


@final
class Subscription:
    """The events of a job, one by one: `async with job.subscribe() as events: async for event in events: …`

    Begins with the job's past (its last 1,024 events) and ends after `JobFinished`. A reader who falls more than
    1,024 events behind loses the oldest, and gets one `EventsDropped` in their place. Cancelling a wait for the
    next event loses none. One task at a time may wait; a second one gets `trio.BusyResourceError`.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._buffer: deque[Event] = deque()
        self._dropped = 0
        self._news = trio.Event()
        self._busy = False

    async def __aenter__(self) -> Self:
        # No checkpoint: nothing can happen between this and the opening of the job.
        self._buffer.extend(self._bus._history)
        self._dropped = self._bus._count - len(self._buffer)
        self._bus._readers.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bus._readers.discard(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._busy:
            raise trio.BusyResourceError("another task waits for this subscription; let each one subscribe")
        self._busy = True
        try:
            return await self._next()
        finally:
            self._busy = False

    async def _next(self) -> Event:
        await trio.lowlevel.checkpoint()
        while not self._buffer:
            if self._bus._closed:
                raise StopAsyncIteration
            self._news = trio.Event()
            await self._news.wait()
        if self._dropped:
            count, self._dropped = self._dropped, 0
            first = self._buffer[0]
            return EventsDropped(count=count, time=first.time, job_id=first.job_id)
        return self._buffer.popleft()

    async def job_ended(self) -> None:
        """Wait until no further event will come, whatever is still in the buffer. Cancelling ends the wait only."""
        await self._bus._ended.wait()

    def _push(self, event: Event) -> None:
        if len(self._buffer) >= BUFFER:
            self._buffer.popleft()
            self._dropped += 1
        self._buffer.append(event)
        self._news.set()

    def _wake(self) -> None:
        self._news.set()
