"""The event log of a job: its whole life as lines of JSON, in `events.jsonl` in the job's directory.

The job hands its events to `take`, which waits for nothing; a child of its nursery writes them down in batches, in a
thread, and `close` writes the rest and the end. Trouble with the disk is told once, and costs the log, not the job;
so does a disk that takes longer than `PATIENCE` for one batch. The thread that waits for it then has the file alone.

The log is bounded. Past three quarters of the bound, what agents say and heartbeats are left out; past all of it,
everything but the end. Where events were left out (also because they came faster than the disk took them), a line
`events_dropped` before the next one says how many.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVarTuple, final

import trio

from supervise.codec import event_to_json, loads, to_line
from supervise.events import (
    TEXT_LIMIT,
    AgentEvent,
    Event,
    EventsDropped,
    Heartbeat,
    JobFinished,
    StateChanged,
    published,
)
from supervise.job.handle import JobState
from supervise.model import JobResult

log = logging.getLogger("supervise.job")

#: The file, in the job's directory.
EVENTS: Final = "events.jsonl"

#: How long events may wait for others, so that one trip to the disk serves many. Seconds.
GATHER: Final = 0.2

#: How long one batch may take; then the log is given up. The job's end waits so long for it, twice at most. A batch is
#: a few megabytes and is not synced: a disk that works has taken it long before. Seconds.
PATIENCE: Final = 10.0

#: Events that may wait for the disk; as many again of those that tell of the job itself.
WAITING: Final = 1024

#: Kept free for the last lines, in bytes. Of an error, so many characters fit in there however they are escaped.
RESERVE: Final = 8 * 1024
ERROR_LIMIT: Final = 500

#: Texts of any length, in events of our own.
FREE_TEXTS: Final = ("reason", "line", "program", "workspace", "agent", "error")

Mask = Callable[[str], str]
Entry = tuple[int, Event]
"""An event, and how many were left out before it."""

Ts = TypeVarTuple("Ts")


@final
class EventLog:
    """Writes the events of one job.

    Args:
        path: the file. It must not be there yet.
        max_bytes: its size at most; 64 KiB or more.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._waiting: list[Entry] = []
        self._left_out = 0
        self._news = trio.Event()
        self._scope = trio.CancelScope(shield=True)
        self._limiter = trio.CapacityLimiter(1)  # no other job's disk holds up this one's log
        self._closed = False
        # Of the thread that writes, for as long as it has the lock.
        self._lock = threading.Lock()
        self._most = max_bytes - RESERVE
        self._most_of_agents = max_bytes * 3 // 4
        self._descriptor: int | None = None
        self._size = 0
        self._missing = 0  # left out since the last line
        self._no_agents = False
        self._full = False
        # Set by either side, never unset.
        self._broken = False
        self._over = False  # whoever has the lock last closes the file

    def take(self, event: Event) -> None:
        """The next event, published. Never waits."""
        if self._closed or self._broken:
            return
        minor = isinstance(event, AgentEvent | Heartbeat)
        if (minor and self._no_agents) or len(self._waiting) >= (WAITING if minor else 2 * WAITING):
            self._left_out += 1
            return
        self._waiting.append((self._left_out, event))
        self._left_out = 0
        self._news.set()

    @trio.lowlevel.enable_ki_protection
    async def keep(self, mask: Mask) -> None:
        """Write what comes, until `stop`; also while the job is being torn down. `mask` hides secrets."""
        with self._scope:
            while True:
                await self._news.wait()
                await trio.sleep(GATHER)
                await self._in_thread(self._write, self._taken(), mask)

    def stop(self) -> None:
        """End `keep`. What waits is left for `close`."""
        self._scope.cancel()

    async def close(self, result: JobResult, mask: Mask) -> None:
        """Write what waits and the end, as of `result`. To be called in any case; nothing comes after.

        Cancelling waits for it; `PATIENCE` seconds at most.
        """
        last: tuple[Event, ...] = (StateChanged(state=JobState.DONE.value), JobFinished(result=result))
        stamped = [published(event, time=time.time(), job_id=result.job_id) for event in last]
        batch = self._taken()
        left_out, self._left_out, self._closed = self._left_out, 0, True
        await self._in_thread(self._end, batch, left_out, stamped, mask)
        self._leave()

    async def _in_thread(self, write: Callable[[*Ts], None], *args: *Ts) -> None:
        if self._broken:
            return
        bound = trio.move_on_after(PATIENCE, shield=True)
        try:
            with bound:
                await trio.to_thread.run_sync(self._locked, write, *args, limiter=self._limiter, abandon_on_cancel=True)
        except Exception as error:  # no thread can be started, say: no reason to lose the job, or its result
            self._give_up(f"{type(error).__name__}: {error}")
        if bound.cancelled_caught:
            self._give_up(f"the disk has not answered for {PATIENCE:g} s")
            self._leave()

    def _taken(self) -> list[Entry]:
        batch, self._waiting = self._waiting, []
        self._news = trio.Event()
        return batch

    # --- in a thread --------------------------------------------------------------------------------------

    def _locked(self, write: Callable[[*Ts], None], *args: *Ts) -> None:
        with self._lock:
            if not self._over:
                write(*args)
        if self._over:
            self._leave()

    def _leave(self) -> None:
        """Nothing more will be written. Who is still at it closes the file when it is done; else it is closed now."""
        self._over = True
        if self._lock.acquire(blocking=False):
            try:
                self._shut()
            finally:
                self._lock.release()

    def _write(self, batch: list[Entry], mask: Mask) -> None:
        self._put(self._lines(batch, mask))

    def _end(self, batch: list[Entry], left_out: int, last: list[Event], mask: Mask) -> None:
        self._put(self._lines(batch, mask))
        self._missing += left_out
        self._put(self._lines([(0, event) for event in last], mask, last=True))
        self._shut()

    def _lines(self, batch: list[Entry], mask: Mask, *, last: bool = False) -> Iterator[bytes]:
        """The lines of a batch that there is room for. What is kept free is for the last batch."""
        for left_out, event in batch:
            self._missing += left_out
            minor = isinstance(event, AgentEvent | Heartbeat)
            full = (self._full and not last) or (minor and self._no_agents)
            line = None if full else _line(event, mask)
            if line is not None:
                line = self._gap(event, mask) + line
                size = self._size + len(line)
                self._no_agents |= size > self._most_of_agents
                self._full |= size > self._most and not minor
                if (self._full and not last) or (minor and self._no_agents):
                    line = None
            if line is None:
                self._missing += 1
            else:
                self._missing = 0
                self._size += len(line)
                yield line

    def _gap(self, event: Event, mask: Mask) -> bytes:
        """What is to be told before `event`."""
        if not self._missing:
            return b""
        gap = EventsDropped(count=self._missing, time=event.time, job_id=event.job_id)
        return _line(gap, mask) or b""

    def _put(self, lines: Iterator[bytes]) -> None:
        if self._broken:
            return
        try:
            view = memoryview(b"".join(lines))
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
                self._descriptor = os.open(self._path, flags, 0o600)
            while view and not self._over:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            self._give_up(error.strerror or "the disk refused")
            self._shut()

    def _shut(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                os.close(descriptor)
            except OSError as error:  # a disk far away tells only now that it is full
                self._give_up(error.strerror or "the disk refused")

    def _give_up(self, why: str) -> None:
        if not self._broken:
            self._broken = True
            log.error("the event log %s ends here: %s; the job goes on without it", self._path, why)


def _line(event: Event, mask: Mask) -> bytes | None:
    """An event as a line without secrets; `None` if it cannot be one."""
    try:
        logged = _as_logged(event, mask)
        line = to_line(logged)
        text = line.decode()
        masked = mask(text)
        if masked == text:
            return line
        # A secret that is also a word of the log's own, such as "state", may have torn the line.
        return masked.encode() if loads(masked)["type"] == event.type else None
    except Exception:  # an agent of the caller's own may put anything into its events
        log.debug("job %s: an event %s cannot be written", event.job_id, event.type, exc_info=True)
        return None


def _as_logged(event: Event, mask: Mask) -> dict[str, Any]:
    """The result without its texts, which are in result.json; and texts that may have any length, cut."""
    fields = event_to_json(event)
    if isinstance(event, JobFinished):
        fields["result"] = _verdict(event.result)
    elif not isinstance(event, AgentEvent):  # masked first: what is left of a secret that was cut is not found
        fields |= {name: mask(fields[name])[:TEXT_LIMIT] for name in FREE_TEXTS if isinstance(fields.get(name), str)}
    return fields


def _verdict(result: JobResult) -> dict[str, Any]:
    error = result.error  # masked, as all of a result
    return {
        "job_id": result.job_id,
        "outcome": result.outcome.value,
        "failure_kind": result.failure_kind,
        "error": error if error is None or len(error) <= ERROR_LIMIT else error[: ERROR_LIMIT - 1] + "…",
        "index": {"status": result.index.status.value},
        "duration_seconds": result.duration_seconds,
    }
