"""Tasks from a directory: the driver of a `Spool`, on Trio.

Watch first, then scan: what comes in between is seen twice, and what is seen twice is told once. Hints come from
inotify (watching.py); where they are lost or cannot be had, the directory is looked through again. A slow sweep does so
in any case.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, TypeVarTuple, final

import trio
from attrs import evolve

from supervise.dispatch import records
from supervise.dispatch.backlog import Offer
from supervise.dispatch.policy import INVALID
from supervise.dispatch.source import Arrived, Completed, News, SourceTrouble, Vanished
from supervise.dispatch.spool import Bad, Gone, Half, Held, Spool, is_task_name
from supervise.dispatch.task import Attempt, Task
from supervise.dispatch.watching import Inotify, Polling, Watching, sees_nothing
from supervise.errors import SuperviseError
from supervise.events import Event, TaskBuried, TaskReceived, WorkerTrouble

__all__ = ["DirectorySource"]

log = logging.getLogger("supervise.dispatch")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: So many files are looked at in one go: what is found in them can be begun before the rest is read.
BATCH: Final = 200

#: So many tasks are known at a time; those past it stay in the directory until there is room.
MOST_KNOWN: Final = 100_000

THREADS: Final = 8

#: What may be in trouble.
TASKS, RESULTS, QUEUE = "directory", "results", "queue"

#: A receipt is told so many seconds later: the claim comes first, which wants the disk at the same moment.
TELL_AFTER: Final = 0.02

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter | None] = trio.lowlevel.RunVar("supervise.dispatch threads", None)


async def in_thread(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """`function(*args)` in a thread of ours: a host may use up those of Trio. Cancelling waits for it."""
    limiter = _limiter.get()
    if limiter is None:
        limiter = trio.CapacityLimiter(THREADS)
        _limiter.set(limiter)
    return await trio.to_thread.run_sync(function, *args, limiter=limiter)


async def _asked(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """As `in_thread`; what the disk refuses is trouble."""
    try:
        return await in_thread(function, *args)
    except OSError as error:
        raise SourceTrouble(told(error)) from None


def told(error: OSError) -> str:
    """What the disk refused, and what can be done about it."""
    mends = {
        errno.ENOSPC: "make room there",
        errno.EDQUOT: "make room there",
        errno.EROFS: "mount it writable",
        errno.EACCES: "give this user the right to write there",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.ENFILE: "the machine's table of open files is full",
    }
    where = f"{error.filename}: " if error.filename else ""
    mend = mends.get(error.errno or 0)
    return f"{where}{error.strerror or type(error).__name__}" + (f"; {mend}" if mend else "")


@final
class DirectorySource:
    """A `Source` over the directories of one worker. `run` has to be running.

    Args:
        spool: its directories, made.
        sweep_interval: seconds between two looks at the whole directory.
        poll_interval: likewise where no hints can be had, and after trouble.
        parse_grace: how long a file that does not parse is left to its writer, in seconds since its last change.
        emit: gets the events; a `TaskBuried` of attempt 0 is a file that was no task.
        now: the clock on the wall.

    Attributes:
        troubles: what cannot be done, and why.
        note: why hints are missing; empty if they are not.
        exhausted: they are missing because this machine has no more of something.
        looked: when the whole directory was looked at last, on Trio's clock.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        sweep_interval: float,
        poll_interval: float,
        parse_grace: float,
        emit: Callable[[Event], None] = lambda event: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.troubles: dict[str, str] = {}
        self.note = ""
        self.exhausted = False
        self.looked = -math.inf
        self._spool = spool
        self._sweep_interval = sweep_interval
        self._poll_interval = poll_interval
        self._parse_grace = parse_grace
        self._emit = emit
        self.now = now
        self._wake: Callable[[], None] = lambda: None
        self._news: list[News] = []
        self._offers: dict[str, Offer] = {}  # by name: those that have been told, and not been taken
        self._names: dict[str, str] = {}  # by task id, of the same
        self._halves: dict[str, tuple[Half, float]] = {}  # by name: with the time at which the grace is over
        self._awaited: set[str] = set()  # ids of tasks that others wait for
        self._watching: Watching = Polling()
        self._more = False
        self._to_tell: list[str] = []
        self._telling = trio.Event()

    # --- the port -----------------------------------------------------------------------------------------

    def listen(self, wake: Callable[[], None]) -> None:
        """See `Source.listen`."""
        self._wake = wake

    def news(self) -> Sequence[News]:
        """See `Source.news`."""
        news, self._news = self._news, []
        return news

    async def recover(self) -> Sequence[_Claim]:
        """See `Source.recover`."""
        found = await _asked(lambda: list(self._spool.recover()))
        return [_Claim(self, self._spool, held) for held in found]

    async def claim(self, offer: Offer) -> _Claim | None:
        """See `Source.claim`."""
        # Forgotten first: what the kernel tells of our own rename is no news, and another file of this name is.
        known = self._forget(offer.key)
        try:
            held = await _asked(self._spool.claim, offer.key, offer.task_id)
        except SourceTrouble:
            if known is not None and offer.key not in self._offers:
                self._know(known)
            raise
        return None if held is None else _Claim(self, self._spool, held)

    async def completed(self, task_ids: Iterable[str]) -> set[str]:
        """See `Source.completed`."""
        self._awaited |= set(task_ids)
        await self._watch_results()
        found, refused = await _asked(self._spool.completed, frozenset(task_ids))
        self._trouble(RESULTS, "" if refused is None else told(refused))
        self._awaited -= found
        return found

    # --- the life -----------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch the directory until cancelled. `task_status` is told after the first look."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_of_receipts, name="triggers")
            try:
                started = False
                while True:
                    await self._watch()
                    over = False
                    await self._look_through()
                    if not started:
                        task_status.started()
                        started = True
                    while not over:
                        over = await self._one_round()
            finally:
                self._watching.close()

    async def _one_round(self) -> bool:
        """Wait, and look at what may have changed. Returns whether the directory has to be watched anew."""
        with trio.move_on_at(self._deadline()):
            await self._watching.wait()
        hints = self._watching.read()
        if hints.over:
            return True
        due = trio.current_time() >= self.looked + self._interval()
        if hints.others and self._awaited:
            await self._results_changed(hints.others)
        if due and isinstance(self._watching, Polling) and not sees_nothing(self._spool.tasks):
            return True  # perhaps there are instances and watches again
        if due or (hints.everything and not isinstance(self._watching, Polling)):
            await self._look_through()
        else:
            born = [*filter(is_task_name, hints.born - hints.names)]
            whole = await in_thread(self._spool.complete_at_birth, born) if born else []
            gone = [name for name in hints.gone - hints.names if name in self._offers or name in self._halves]
            await self._look([*gone, *filter(is_task_name, hints.names), *whole])
        await self._grace_is_over()
        return False

    def _interval(self) -> float:
        """Seconds from one look through the directory to the next."""
        more = self._more and len(self._offers) < MOST_KNOWN - BATCH
        if TASKS in self.troubles or more or isinstance(self._watching, Polling):
            return self._poll_interval
        return self._sweep_interval

    def _deadline(self) -> float:
        halves = [until for _, until in self._halves.values() if TASKS not in self.troubles]
        return min([self.looked + self._interval(), *halves])

    async def _watch(self) -> None:
        """Get hints, if they can be had."""
        self._watching.close()
        self._watching = Polling()
        remote = sees_nothing(self._spool.tasks)
        note = f"{self._spool.tasks} lies on {remote}, where nobody tells of changes: it is polled" if remote else ""
        if not remote:
            try:
                # In a thread: to find the C library, Python may run a program.
                self._watching = await in_thread(Inotify, self._spool.tasks)
            except FileNotFoundError:
                note = f"{self._spool.tasks} is gone: it is made anew"
            except OSError as error:
                mend = "raise fs.inotify.max_user_instances and max_user_watches, or the limit of open files"
                note = f"changes of {self._spool.tasks} cannot be watched ({error.strerror}): it is polled; {mend}"
        self.exhausted = bool(note) and not remote
        if note != self.note:
            log.warning("%s", note or f"{self._spool.tasks} is watched again")
            if not remote:
                self._emit(WorkerTrouble(worker=self._spool.worker, what="hints", error=note))
        self.note = note
        if self._awaited:
            await self._watch_results()

    async def _look_through(self) -> None:
        """All that lies there. What was known and is there no more has been taken or removed by somebody else."""
        try:
            await in_thread(self._spool.make_again)
            names = await in_thread(self._spool.names)
        except OSError as error:
            self._trouble(TASKS, told(error))
            return
        except SuperviseError as error:  # of `make_again`
            self._trouble(TASKS, str(error))
            return
        finally:
            self.looked = trio.current_time()
        there = set(names)
        for name in [name for name in self._offers if name not in there]:
            self._forget(name)
            self._say(Vanished(name))
        for name in [name for name in self._halves if name not in there]:
            del self._halves[name]
        now = trio.current_time()
        young = {name for name, (_, until) in self._halves.items() if now < until}
        new = [name for name in names if name not in self._offers and name not in young]
        room = max(0, MOST_KNOWN - len(self._offers))
        self._more = len(new) > room
        if await self._look([*self._told_by_another_clock(), *new[:room]]):
            self._trouble(TASKS, "")
        self._trouble(QUEUE, f"it is longer than the {MOST_KNOWN} tasks that are looked at" if self._more else "")
        self._awaited &= {task_id for offer in self._offers.values() for task_id in offer.dependencies}
        if self._awaited:
            await self._results_changed()

    async def _look(self, names: Iterable[str]) -> bool:
        """At these files. Returns whether all of them could be looked at."""
        todo = list(names)
        trouble = ""
        for begin in range(0, len(todo), BATCH):
            batch = todo[begin : begin + BATCH]
            for each in await in_thread(self._look_at, batch):
                trouble = told(each) if isinstance(each, OSError) else await self._take_note(each) or trouble
        if trouble:
            self._trouble(TASKS, trouble)
            self.looked = trio.current_time()  # all of it once more, after a pause
        return not trouble

    def _look_at(self, names: list[str]) -> list[Offer | Half | Bad | Gone | OSError]:
        """What the disk refuses of one file keeps nobody from the others."""
        seen: list[Offer | Half | Bad | Gone | OSError] = []
        for name in names:
            try:
                seen.append(self._spool.look(name))
            except OSError as error:
                seen.append(error)
        return seen

    async def _take_note(self, seen: Offer | Half | Bad | Gone) -> str:
        """Returns what went wrong with it; empty if nothing did."""
        match seen:
            case Offer(key=name):
                self._halves.pop(name, None)
                return await self._take_note_of_offer(name, seen)
            case Half(name):
                known = self._halves.get(name)
                if known is None or known[0].version != seen.version:
                    self._halves[name] = (seen, trio.current_time() + self._parse_grace)
                elif trio.current_time() >= known[1]:
                    return await self._quarantine(Bad(name, seen.reason, seen=seen.seen))
            case Bad():
                return await self._quarantine(seen)
            case Gone(name):
                self._halves.pop(name, None)
                if name in self._offers:
                    self._forget(name)
                    self._say(Vanished(name))
        return ""

    async def _take_note_of_offer(self, name: str, seen: Offer) -> str:
        other = self._names.get(seen.task_id, name)
        if other != name and isinstance(await in_thread(self._spool.look, other), Gone):  # it has another name by now
            self._forget(other)
            self._say(Vanished(other))
            other = name
        if other != name:
            # One that has attempts behind it was there first, whichever was looked at first.
            before = self._offers.get(other)
            is_first = before is not None and seen.attempts > before.attempts
            first, second = (name, other) if is_first else (other, name)
            reason = f"the task id {seen.task_id!r} is taken: {first!r} waits under it; choose another"
            trouble = await self._quarantine(Bad(second, reason, seen.task_id))
            if trouble or second == name:
                return trouble
        if len(self._offers) >= MOST_KNOWN and name not in self._offers:
            self._more = True
            return ""
        offer = evolve(seen, not_before=self._believable(seen))
        if self._offers.get(name) != offer:
            self._forget(name)
            self._know(offer)
            self._say(Arrived(offer))
            self._received(offer)
        return ""

    def _believable(self, offer: Offer) -> float:
        """When a task may be tried. A pause before a retry is not longer than it was when it was written."""
        return max(offer.not_before, min(offer.retry_at, self.now() + offer.pause))

    def _told_by_another_clock(self) -> list[str]:
        """Those whose pause is longer than it was: the clock has been set back since."""
        now = self.now()
        return [name for name, each in self._offers.items() if each.not_before == each.retry_at > now + each.pause]

    async def _grace_is_over(self) -> None:
        now = trio.current_time()
        if TASKS not in self.troubles:  # or the next look through the directory sees to them
            await self._look([name for name, (_, until) in self._halves.items() if now >= until])

    async def _quarantine(self, bad: Bad) -> str:
        """Returns what went wrong; empty if nothing did."""
        if bad.name in self._offers:
            self._forget(bad.name)
            self._say(Vanished(bad.name))
        worker = self._spool.worker
        try:
            record = records.no_task(bad.name, bad.task_id, worker, bad.reason, self.now())
            there = await in_thread(self._spool.quarantine, bad, record)
        except OSError as error:
            return f"{bad.name!r} is no task ({bad.reason}), and cannot be set aside: {told(error)}"
        self._halves.pop(bad.name, None)
        if not there:
            return ""
        log.warning("%r is a dead letter: %s", bad.name, bad.reason)
        task_id = bad.task_id or bad.name
        self._emit(TaskBuried(worker=worker, task_id=task_id, attempt=0, reason=INVALID, detail=bad.reason))
        return ""

    # --- results that others wait for ---------------------------------------------------------------------

    async def _watch_results(self) -> None:
        """Of all workers: a task may depend on one of somebody else."""
        try:
            await in_thread(self._watch_all_results)
        except OSError as error:  # the sweep finds them, later
            self._trouble("hints of results", f"{told(error)}: they are seen every {self._sweep_interval:g} s")
        else:
            self._trouble("hints of results", "")

    def _watch_all_results(self) -> None:
        results, watching = self._spool.results.parent, self._watching
        watching.also(results)
        for directory in results.iterdir():
            if directory.is_dir():
                watching.also(directory)

    async def _results_changed(self, paths: Iterable[Path] | None = None) -> None:
        """Look whether an awaited task has completed: those of these paths, or all."""
        names = None if paths is None else {path.name.removesuffix(".json") for path in paths}
        awaited = self._awaited if names is None else self._awaited & names
        if paths is not None and any(path.parent == self._spool.results.parent for path in paths):
            await self._watch_results()  # a new worker
            awaited = self._awaited
        if not awaited:
            return
        try:
            found, refused = await in_thread(self._spool.completed, frozenset(awaited))
        except OSError as error:
            found, refused = set(), error
        self._trouble(RESULTS, "" if refused is None else told(refused))
        self._awaited -= found
        for task_id in found:
            self._say(Completed(task_id))

    # --- receipts -----------------------------------------------------------------------------------------

    def _received(self, offer: Offer) -> None:
        if not offer.attempts:
            self._emit(TaskReceived(worker=self._spool.worker, task_id=offer.task_id, priority=offer.priority))
        self._to_tell.append(offer.task_id)
        self._telling.set()

    async def _tell_of_receipts(self) -> None:
        """Beside the looking: a task need not wait for its trigger file."""
        while True:
            await self._telling.wait()
            with trio.CancelScope(shield=True):  # who was received is told, also when all ends
                await trio.sleep(TELL_AFTER)
                self._telling = trio.Event()
                todo, self._to_tell = self._to_tell, []
                left, trouble = await in_thread(self._write_triggers, todo)
                self._trouble("triggers", trouble)
            self._to_tell = [*left, *self._to_tell][:MOST_KNOWN]
            if left:
                await trio.sleep(self._poll_interval)
                self._telling.set()

    def _write_triggers(self, task_ids: list[str]) -> tuple[list[str], str]:
        """Returns those whose trigger could not be written, and why."""
        for number, task_id in enumerate(task_ids):
            try:
                self._spool.trigger(task_id, records.received(task_id, self._spool.worker, self.now()))
            except OSError as error:
                return task_ids[number:], told(error)
        return [], ""

    # --- small things -------------------------------------------------------------------------------------

    async def again(self, name: str) -> None:
        """Look at a file that was put back."""
        await self._look([name])

    def _know(self, offer: Offer) -> None:
        self._offers[offer.key] = offer
        self._names[offer.task_id] = offer.key

    def _forget(self, name: str) -> Offer | None:
        offer = self._offers.pop(name, None)
        if offer is not None and self._names.get(offer.task_id) == name:
            del self._names[offer.task_id]
        return offer

    def _say(self, news: News) -> None:
        self._news.append(news)
        self._wake()

    def _trouble(self, what: str, text: str) -> None:
        if text != self.troubles.get(what, ""):
            log.log(logging.ERROR if text else logging.WARNING, "%s: %s", what, text or "that works again")
            self._emit(WorkerTrouble(worker=self._spool.worker, what=what, error=text))
        if text:
            self.troubles[what] = text
        else:
            self.troubles.pop(what, None)


@final
class _Claim:
    """A `Claim` on a file in running/. The worker's lock keeps it: nothing has to be renewed."""

    def __init__(self, source: DirectorySource, spool: Spool, held: Held) -> None:
        self._source = source
        self._spool = spool
        self._held = held

    @property
    def task(self) -> Task:
        return self._held.task

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        return self._held.attempts

    async def renew(self) -> None:
        await trio.sleep_forever()

    async def finish(self, record: Mapping[str, Any]) -> None:
        await _asked(self._spool.finish, self._held, record)

    async def retry(self, attempts: tuple[Attempt, ...], at: float) -> None:
        pause = max(0.0, at - self._source.now())
        await self._source.again(await _asked(self._spool.retry, self._held, attempts, at, pause))

    async def bury(self, record: Mapping[str, Any]) -> None:
        await _asked(self._spool.bury, self._held, record)

    async def release(self) -> None:
        await self._source.again(await _asked(self._spool.release, self._held))
