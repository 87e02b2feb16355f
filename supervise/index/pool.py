"""One watch for each workspace: the jobs of one supervisor share it, counted, and the last one out stops it.

    lease = pool.join(wish, guest)    a job's share of a watch; to the job's nursery, it is the job's `Index`

A `SharedWatch` is one task of the supervisor's nursery, behind a shield. Nothing but its leases ends it: a job takes
one when it is put together and gives it back on every road out, so a supervisor that has no more jobs has no watch.
The watch belongs to no job: one that ends, or is cancelled, changes nothing for the others.

Who can share: jobs in the same directory (by its real path) with the same settings and the same user. Another job
there gets a `SharedWatch` of its own, which does not get the lock of the workspace (lock.py) and so does nothing until
its end.
"""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final

import trio
from attrs import evolve, frozen

from supervise.events import Event, IndexChanged
from supervise.index.lifecycle import State
from supervise.index.watch import IndexDriver, first_of
from supervise.log_context import telling_only_of
from supervise.model import IndexReport, IndexStatus, Survivor
from supervise.processes.child import ProcessTree
from supervise.processes.hurry import Hurry
from supervise.secrets import Masker
from supervise.settings import IndexSettings

log = logging.getLogger("supervise.index")

#: The free texts of events, which may hold a secret of one job that another one does not know.
FREE_TEXTS = ("reason", "line", "program")


@frozen(kw_only=True)
class Wish:
    """What a watch is to be like; jobs with equal wishes share one.

    Attributes:
        workspace: the directory, as a real path.
        settings: bounds and choices.
        user: whom the indexer runs as; `None` for us.
    """

    workspace: str
    settings: IndexSettings
    user: str | None


@frozen(kw_only=True, eq=False)
class Guest:
    """A job, as the pool sees it.

    Attributes:
        directory: where the logs go, if it is this job that opens the watch.
        env: the indexer's environment, if it is this job that opens the watch.
        masker: hides the job's secrets.
        emit: gets the events.
        hurry: skips waits of the end, while this job is the one who waits for it.
    """

    directory: Path
    env: Mapping[str, str]
    masker: Masker
    emit: Callable[[Event], None]
    hurry: Hurry


class Outfit(Protocol):
    """What one shared watch is made of."""

    @property
    def driver(self) -> IndexDriver:
        """Fresh."""

    @property
    def trees(self) -> Sequence[ProcessTree]:
        """Its trees of processes that are open now, for heartbeats."""

    async def close(self) -> None:
        """The driver has ended: give back what it had. Not cancelled."""


#: Makes an outfit for a wish. The guest is who opens the watch; the rest is where events go, and who skips waits.
Outfitter = Callable[[Wish, Guest, Callable[[Event], None], Hurry], Outfit]


@final
class WatchPool:
    """The shared watches of one supervisor.

    Args:
        nursery: the supervisor's. It ends after its watches.
        outfitter: makes what a watch is made of.
        freed: called when a watch is over, and a job may wait for that.
    """

    def __init__(self, nursery: trio.Nursery, outfitter: Outfitter, freed: Callable[[], None]) -> None:
        self._nursery = nursery
        self._outfitter = outfitter
        self._freed = freed
        self._watches: dict[str, list[SharedWatch]] = {}

    def join(self, wish: Wish, guest: Guest) -> Lease:
        """A lease on the watch for this wish, which is opened if there is none. To be given back in any case."""
        for watch in self._watches.get(wish.workspace, ()):
            if not watch.closing and watch.wish == wish:
                return watch.lease(guest)
        watch = SharedWatch(wish, self._outfitter, guest, self._nursery, self._over)
        self._watches.setdefault(wish.workspace, []).append(watch)
        return watch.lease(guest)

    def is_closing(self, workspace: str) -> bool:
        """Whether the watch of a workspace is being ended. Who joins now would not get the lock."""
        watches = self._watches.get(workspace, ())
        return bool(watches) and all(watch.closing for watch in watches)

    @property
    def empty(self) -> bool:
        """Whether there is no watch."""
        return not self._watches

    def _over(self, watch: SharedWatch) -> None:
        watches = self._watches[watch.wish.workspace]
        watches.remove(watch)
        if not watches:
            del self._watches[watch.wish.workspace]
        self._freed()


@final
class SharedWatch:
    """One driver and those who hold a lease on it.

    Attributes:
        closing: the last one has left, or a bug has ended it. Nobody joins any more.
        ended: set when nothing of it runs, and its report is there.
        bug: what ended it before anybody had asked for that; empty if nothing did.
    """

    def __init__(
        self,
        wish: Wish,
        outfitter: Outfitter,
        opener: Guest,
        nursery: trio.Nursery,
        over: Callable[[SharedWatch], None],
    ) -> None:
        self.wish = wish
        self.hurry = Hurry()
        self.closing = False
        self.ended = trio.Event()
        self.bug = ""
        self._opener = opener
        self._outfit = outfitter(wish, opener, self._tell, self.hurry)
        self.driver = self._outfit.driver
        self._nursery = nursery
        self._over = over
        self._holders: list[Lease] = []
        self._hearers: list[Lease] = []
        self._marking = trio.Lock()
        self._started = False
        self._report: IndexReport | None = None

    @property
    def trees(self) -> Sequence[ProcessTree]:
        """See `Outfit.trees`."""
        return self._outfit.trees

    @property
    def holders(self) -> int:
        """How many hold a lease."""
        return len(self._holders)

    @property
    def report(self) -> IndexReport:
        """What became of the index; once it has ended."""
        if self._report is not None:
            return self._report
        return IndexReport(status=IndexStatus.FAILED, reason=self.bug, stale=True, metrics=self.driver.so_far())

    def lease(self, guest: Guest) -> Lease:
        """One more."""
        lease = Lease(self, guest, opens=guest is self._opener)
        self._holders.append(lease)
        self._hearers.append(lease)
        return lease

    async def mark(self, job_id: str) -> None:
        """Put a job's name on the mark, and begin if this is the first. Not cancellable."""
        with trio.CancelScope(shield=True):
            async with self._marking:
                await self.driver.mark(job_id)
            self._start()

    def leave(self, lease: Lease, *, cancelled: bool) -> bool:
        """Give a lease back. Returns whether it was the last one: then the end begins, and `cancelled` counts."""
        self._holders.remove(lease)
        if self._holders:
            self.forget(lease)
            return False
        self.closing = True
        if cancelled:
            self.driver.cancel()
        else:
            self.driver.finish()
        if self.ended.is_set():
            self.driver.release_mark()
        self._start()
        return True

    def forget(self, lease: Lease) -> None:
        """It is told nothing any more."""
        if lease in self._hearers:
            self._hearers.remove(lease)

    def _start(self) -> None:
        if not self._started:
            self._started = True
            # A task inherits what its log lines tell of; the job that happens to open the watch may be gone before it.
            with telling_only_of(index=self.wish.workspace, job_id=self._jobs):
                self._nursery.start_soon(self._live, name=f"index of {self.wish.workspace}")

    def _jobs(self) -> str:
        """Ids of those that share it now."""
        return ",".join(sorted({lease.job_id for lease in tuple(self._hearers)}))

    @trio.lowlevel.enable_ki_protection
    async def _live(self) -> None:
        """The whole life. Even a bug in it fails the index only, and is told; nobody waits for ever."""
        with trio.CancelScope(shield=True):
            try:
                await self.driver.run()
                with trio.move_on_after(1):  # it is there by now
                    self._report = await self.driver.report()
            except Exception as error:
                self._raised(error)
            finally:
                self.closing = True
                try:
                    await self._outfit.close()
                except Exception as error:
                    self._raised(error)
                finally:
                    self._end()

    def _end(self) -> None:
        self.bug = "" if self._report else self.bug or "a bug in supervise: the index made no report"
        if not self._holders:
            self.driver.release_mark()
        self._hearers.clear()
        self.ended.set()
        self._over(self)

    def _raised(self, error: Exception) -> None:
        mask = self._opener.masker.text
        log.error("a bug in supervise\n%s", mask("".join(traceback.format_exception(error))))
        self.bug = " ".join(mask(f"a bug in supervise: {type(error).__name__}: {error}").splitlines())
        self._report = None
        state = self.driver.state.value
        self._tell(IndexChanged(state=state, cause="bug", status=IndexStatus.FAILED, reason=self.bug))

    def _tell(self, event: Event) -> None:
        """To each job; what is wrong with one of them is not the others' affair."""
        for lease in tuple(self._hearers):
            try:
                lease.hear(event)
            except Exception as error:
                log.error("an event of the index could not be told to a job: %s", type(error).__name__)


@final
class Lease:
    """One job's share of a watch: the job's `Index`."""

    def __init__(self, watch: SharedWatch, guest: Guest, *, opens: bool) -> None:
        self._watch = watch
        self._guest = guest
        self._opens = opens
        self._left = trio.Event()
        self._is_last = False
        self._report: IndexReport | None = None

    @property
    def job_id(self) -> str:
        """Whose it is."""
        return self._guest.directory.name

    @property
    def status(self) -> IndexStatus:
        """See `Index.status`."""
        return self._watch.driver.status if self._report is None else self._report.status

    @property
    def state(self) -> State:
        """See `Index.state`."""
        return self._watch.driver.state

    @property
    def survivors(self) -> tuple[Survivor, ...]:
        """See `Index.survivors`: the last one out tells of them."""
        return self._watch.driver.survivors if self._is_last else ()

    @property
    def trees(self) -> Sequence[ProcessTree]:
        """The shared trees, as long as this job shares them."""
        return () if self._left.is_set() and not self._is_last else self._watch.trees

    async def mark(self, job_id: str) -> None:
        """See `Index.mark`. The shared mark names this job, too."""
        if not self._opens:
            reason = f"shared with {_jobs(self._watch.holders - 1)}"
            self._tell_of("joined", self._watch.driver.status, reason)
        await self._watch.mark(job_id)

    async def run(self) -> None:
        """See `Index.run`. It ends when this job has left; for the last one out, when the watch has ended."""
        with trio.CancelScope(shield=True):
            await first_of(self._left.wait, self._watch.ended.wait)
            while self._is_last and not self._watch.ended.is_set():
                with self._guest.hurry.step(math.inf) as wait:
                    await self._watch.ended.wait()
                if wait.cancelled_caught:
                    self._watch.hurry.next()

    async def ready(self) -> None:
        """See `Index.ready`. Who joins a watch that is up waits for nothing."""
        await self._watch.driver.ready()

    def agent_starts(self) -> None:
        """See `Index.agent_starts`. One agent that is early spoils the watch for all."""
        self._watch.driver.agent_starts()

    def finish(self) -> None:
        """See `Index.finish`. The watch goes on for those who still use it."""
        self._leave(cancelled=False)

    def cancel(self) -> None:
        """See `Index.cancel`. It is no matter to those who still use the watch."""
        if self._is_last:
            self._watch.driver.cancel()
        self._leave(cancelled=True)

    def abandon(self) -> None:
        """The job is over, on whatever road: nothing of it is left here. May be called again."""
        self._leave(cancelled=True)
        self._watch.forget(self)

    async def report(self) -> IndexReport:
        """See `Index.report`."""
        if self._report is None:
            await self._watch.ended.wait()
            report = self._watch.report
            self._report = evolve(report, reason=self._guest.masker.text(report.reason))
        return self._report

    def hear(self, event: Event) -> None:
        """Something happened to the watch."""
        changes: dict[str, Any] = {}
        for name in FREE_TEXTS:
            text = getattr(event, name, "")
            if (masked := self._guest.masker.text(text)) != text:
                changes[name] = masked
        self._guest.emit(evolve(event, **changes) if changes else event)

    def _leave(self, *, cancelled: bool) -> None:
        if self._left.is_set():
            return
        self._left.set()
        watch = self._watch
        self._is_last = watch.leave(self, cancelled=cancelled)
        if self._is_last or watch.ended.is_set():
            return  # the report is the watch's
        holders = watch.holders
        use = "uses" if holders == 1 else "use"
        reason = f"shared: {_jobs(holders)} still {use} the watch; the last one out settles the index"
        metrics = watch.driver.so_far()
        # The mark stays until the last one out has proved the index.
        self._report = IndexReport(
            status=IndexStatus.WATCHING, reason=reason, stale=True, watch_restarts=metrics.restarts, metrics=metrics
        )
        self._tell_of("left", self._report.status, reason)

    def _tell_of(self, cause: str, status: IndexStatus, reason: str) -> None:
        self._guest.emit(IndexChanged(state=self.state.value, cause=cause, status=status, reason=reason))


def _jobs(number: int) -> str:
    return f"{number} other job{'' if number == 1 else 's'}"
