"""The driver of the index watch: it does what the tables in lifecycle.py say.

One `IndexDriver` serves all jobs that share a watch (see pool.py). It levels a stale workspace, runs the watch beside
the agents, and when it is told to, ends the watch and reconciles where the watch cannot be trusted. All of that it does
under the lock of the workspace; where somebody else has that, it does nothing until the end.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Protocol, final

import trio
from attrs import evolve

from supervise.errors import SpawnError
from supervise.events import Event, IndexChanged, IndexOutput, ReconcileFinished
from supervise.index import cidx
from supervise.index.cidx import Cidx, Line, ReconcileVerdict
from supervise.index.lifecycle import LEAVES_MARK, LIVE_STATUS, Facts, RestartBudget, State, ending, next_state
from supervise.index.lifecycle import Event as What
from supervise.index.lock import Lock
from supervise.index.stale import StaleMark
from supervise.index.validation import Validation
from supervise.model import ExitStatus, IndexReport, IndexStatus, StopPolicy, Survivor, WatchMetrics
from supervise.processes.child import Child, Tree, TreeOpener
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.processes.output import Lines
from supervise.settings import IndexSettings

log = logging.getLogger("supervise.index")

#: How long the last output of a command is waited for after its end, in seconds. A daemon may hold the pipe.
LAST_WORDS = 0.2

#: How often a lock that somebody else has is asked for, in seconds. Nobody tells when it is free.
ASK_AGAIN = 0.05

GIVEN_UP = "it was given up, the job ends"
NOT_ALONE = "another supervisor, or a job with other settings, watches this workspace"


class Index(Protocol):
    """The index of a job, as the job's nursery sees it."""

    @property
    def status(self) -> IndexStatus:
        """What is known of it now."""

    @property
    def state(self) -> State:
        """Where the watch is."""

    @property
    def survivors(self) -> tuple[Survivor, ...]:
        """Processes of it that could not be ended, for the job to report."""

    async def mark(self, job_id: str) -> None:
        """Put the stale mark on the disk. To be done before the agent starts. Not cancellable."""

    async def run(self) -> None:
        """The index's life, as a child of the job's nursery; ends some time after `finish` or `cancel`."""

    async def ready(self) -> None:
        """Wait until the agent may start. Cancelling ends the wait only."""

    def agent_starts(self) -> None:
        """The agent starts now: what the watch does not see from here on, it has missed."""

    def finish(self) -> None:
        """The agent's tree is empty: flush, stop, and settle the index."""

    def cancel(self) -> None:
        """As `finish`, for a job that was cancelled; a reconcile that is under way is given up."""

    async def report(self) -> IndexReport:
        """Wait for the end and say what became of the index. Cancelling ends the wait only."""


@final
class NoIndex:
    """The index of a job that has none."""

    status = IndexStatus.NONE
    state = State.NOT_STARTED
    survivors: tuple[Survivor, ...] = ()

    async def mark(self, job_id: str) -> None:
        """Nothing to mark."""

    async def run(self) -> None:
        """Nothing to run."""

    async def ready(self) -> None:
        """At once."""
        await trio.lowlevel.checkpoint()

    def agent_starts(self) -> None:
        """Nobody watches."""

    def finish(self) -> None:
        """Nothing to end."""

    def cancel(self) -> None:
        """Nothing to end."""

    async def report(self) -> IndexReport:
        """`none`."""
        await trio.lowlevel.checkpoint()
        return IndexReport()


class _Ended(Enum):
    """How one start of the watch came to its end."""

    NEVER_UP = "never up"
    CRASHED = "crashed"
    STOPPED = "stopped"


@final
class IndexDriver:
    """Drives the watch of one workspace, for one job or for several.

    Args:
        tool: the indexer's command lines.
        settings: bounds and choices.
        command: makes a `Command` (directory, environment, user) of an argument vector.
        open_tree: starts processes.
        mark: the stale mark of the workspace.
        lock: the lock of the workspace.
        validation: what is remembered of `cidx fix-config`.
        emit: gets the events.
        hurry: ends waits early.
        kill_wait: as in `StopPolicy`, seconds.
    """

    def __init__(
        self,
        *,
        tool: Cidx,
        settings: IndexSettings,
        command: Callable[[tuple[str, ...]], Command],
        open_tree: TreeOpener,
        mark: StaleMark,
        lock: Lock,
        validation: Validation,
        emit: Callable[[Event], None],
        hurry: Hurry,
        kill_wait: float = 5.0,
    ) -> None:
        self.state = State.NOT_STARTED
        self.status = IndexStatus.STALE  # as the mark on the disk says; nothing is known yet
        self.survivors: tuple[Survivor, ...] = ()
        self._tool = tool
        self._settings = settings
        self._command = command
        self._open_tree = open_tree
        self._mark = mark
        self._lock = lock
        self._validation = validation
        self._emit = emit
        self._hurry = hurry
        graceful = (signal.SIGTERM, settings.termination_timeout)
        self._stop_watch = StopPolicy((graceful,), kill_wait)
        # A reconcile, too, ends in order at SIGINT and in disorder at SIGTERM.
        self._stop_reconcile = StopPolicy(((signal.SIGINT, settings.flush_timeout), graceful), kill_wait)
        self._facts = Facts(fallback=settings.fallback_to_reconcile, reconcile_on_cancel=settings.reconcile_on_cancel)
        self._metrics = WatchMetrics()
        self._budget = RestartBudget()
        self._marked_before = ""
        self._mark_trouble = ""
        self._reason = ""
        self._stamp: str | None = None
        self._daemon = _Daemon.NONE
        self._agent_started = False
        self._may_start = trio.Event()
        self._stop_asked = trio.Event()
        self._report: IndexReport | None = None
        self._reported = trio.Event()
        self._giving_up: trio.CancelScope | None = None  # of what a cancelled job does not wait for
        self._up_since: float | None = None

    # --- what the job says --------------------------------------------------------------------------------

    async def mark(self, job_id: str) -> None:
        """See `Index.mark`."""
        with trio.CancelScope(shield=True):
            try:
                self._marked_before = await self._mark.set(job_id) or self._marked_before
            except OSError as error:
                self._mark_trouble = f"the stale mark could not be written: {error.strerror}"
                log.error(self._mark_trouble)

    async def ready(self) -> None:
        """See `Index.ready`."""
        await self._may_start.wait()

    def agent_starts(self) -> None:
        """See `Index.agent_starts`."""
        self._agent_started = True

    def finish(self) -> None:
        """See `Index.finish`."""
        self._stop_asked.set()

    def cancel(self) -> None:
        """See `Index.cancel`."""
        self._facts = self._facts.with_(cancelled=True)
        self._stop_asked.set()
        if self._giving_up is not None and not self._settings.reconcile_on_cancel:
            self._giving_up.cancel()

    async def report(self) -> IndexReport:
        """See `Index.report`."""
        await self._reported.wait()
        assert self._report is not None
        return self._report

    def so_far(self) -> WatchMetrics:
        """The numbers at this moment."""
        up = 0.0 if self._up_since is None else trio.current_time() - self._up_since
        return evolve(self._metrics, uptime=self._metrics.uptime + up)

    def release_mark(self) -> None:
        """No job is at work here any more. To be called where `run` may have ended before it was told to."""
        self._mark.release()

    # --- the life -----------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """See `Index.run`. Cancelling the caller's scope does not reach it; `cancel` does."""
        with trio.CancelScope(shield=True):
            try:
                if await self._is_alone():
                    await self._level_a_stale_workspace()
                    await self._watch_until_stopped()
                self._may_start.set()
                await self._stop_asked.wait()
                await self._settle()
            finally:
                self._may_start.set()
                self._lock.release()
                if self._stop_asked.is_set():  # else by a bug, and the jobs whose names are on the mark are at work
                    self._mark.release()
                if self._report is None:  # a bug is on its way up; nobody shall wait for ever
                    self._conclude(IndexStatus.FAILED, "the driver of the index failed")

    async def _is_alone(self) -> bool:
        """Take the lock of the workspace, for good. Beside somebody who has it, nothing is done before the end."""
        try:
            why = "" if await self._lock.take() else NOT_ALONE
        except OSError as error:
            why = _unlockable(error)
        if why:
            self._reason = why
            self._facts = self._facts.with_(alone=False)
            self._apply(What.FAILED, why)
        return not why

    async def _level_a_stale_workspace(self) -> None:
        """Reconcile before the watch what an earlier job, or somebody else, left behind."""
        stamp: str | None = None  # so the workspace is stale: for a job that ends already, nothing is lost by that
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._when_stop_asked, nursery.cancel_scope.cancel)
            stamp = await self._mark.stamp()
            nursery.cancel_scope.cancel()
        why = self._marked_before or await self._mark.changed(stamp, assume_fresh=self._settings.assume_fresh)
        self._facts = self._facts.with_(level_before=not why)
        if why and self._settings.fallback_to_reconcile:
            trouble = await self._reconcile(
                f"the index was stale: {why}", until=self._stop_asked, stamp=stamp, before_the_watch=True
            )
            self._facts = self._facts.with_(level_before=not trouble)

    async def _when_stop_asked(self, do: Callable[[], None]) -> None:
        await self._stop_asked.wait()
        do()

    async def _watch_until_stopped(self) -> None:
        """The watch, started again after crashes as long as the budget lasts."""
        if not self._settings.watch_enabled:
            self._reason = "the watch is disabled"
            self._apply(What.FAILED, self._reason)
            return
        first = True
        while not self._stop_asked.is_set():
            ended = await self._one_watch(first=first)
            if ended is _Ended.STOPPED:
                return
            if ended is _Ended.NEVER_UP and first:
                await self._answer_at_once()
                return
            pause = self._budget.pause(trio.current_time())
            if pause is None:
                log.error("the watch keeps crashing; it stays down until the reconcile at the end")
                return
            with trio.move_on_after(pause):
                await self._stop_asked.wait()
            if self._stop_asked.is_set():
                return
            self._budget = self._budget.spent(trio.current_time())
            self._metrics = evolve(self._metrics, restarts=self._metrics.restarts + 1)
            first = False

    async def _answer_at_once(self) -> None:
        """The watch cannot start: the agent shall work on a fresh index all the same. Once is enough."""
        tried = self._metrics.levellings + self._metrics.fallbacks
        if self._settings.fallback_to_reconcile and not tried:
            await self._reconcile(self._reason, until=self._stop_asked)

    async def _one_watch(self, *, first: bool) -> _Ended:
        """Start the watch, and stay with it to its end."""
        self._apply(What.START, "" if first else "again after a crash")
        now = time.time()
        self._metrics = evolve(
            self._metrics, starts=self._metrics.starts + 1, started_at=self._metrics.started_at or now
        )
        ready = trio.Event()
        ear = _Ear(lambda line: self._watch_line(line, ready))
        event, reason, ended = What.FAILED, "", _Ended.NEVER_UP
        was_up = False
        async with self._open_tree("watch", self._stop_watch, self._hurry) as tree:
            try:
                trouble = await self._prepare(tree) if first else ""
                if trouble:
                    reason = trouble
                elif not self._stop_asked.is_set():
                    child = await self._spawn(tree, self._tool.watch, ear)
                    was_up = await self._until_up(child, ready)
                    if ready.is_set() and first:
                        await self._validation.remember()
                    event, reason, ended = await self._until_down(child, was_up, ready)
                else:
                    event, reason, ended = What.FAILED, "the job ended before the watch was started", _Ended.STOPPED
            except SpawnError as error:
                reason = str(error)
            if self._daemon is _Daemon.OURS:
                await self._stop_daemon()
        ear.close()
        self.survivors += tree.survivors
        if ended in (_Ended.NEVER_UP, _Ended.CRASHED) or (was_up and not ready.is_set()):
            await self._validation.forget()
        self._reason = reason or self._reason
        self._count_down()
        if ended is _Ended.NEVER_UP:
            self._metrics = evolve(self._metrics, failed_starts=self._metrics.failed_starts + 1)
        if ended is _Ended.CRASHED:
            self._metrics = evolve(self._metrics, crashes=self._metrics.crashes + 1)
            self._facts = self._facts.with_(crashes=self._facts.crashes + 1)
        # Told when the tree is empty: in a state of rest, nothing runs.
        self._apply(event, reason)
        return ended

    async def _prepare(self, tree: Tree) -> str:
        """`cidx start` and `cidx fix-config`, in the watch's tree. Returns what keeps the watch from starting."""
        start = await self._run(tree, self._tool.start)
        if start is None:
            return "" if self._stop_asked.is_set() else self._late("cidx start")
        status, output = start
        if cidx.says_already_running(output):
            self._daemon = _Daemon.THEIRS
        elif status.ok and tree.alive():
            self._daemon = _Daemon.OURS
        return "" if await self._validation.known() else await self._validate(tree)

    async def _validate(self, tree: Tree) -> str:
        """`cidx fix-config`. Returns what keeps the watch from starting."""
        fixed = await self._run(tree, self._tool.fix_config)
        if fixed is None:
            return "" if self._stop_asked.is_set() else self._late("cidx fix-config")
        if fixed[0].ok:
            await self._validation.note()
        else:  # the watch will say itself whether it can live with its configuration
            self._emit(IndexOutput(kind="fix_config", line=f"cidx fix-config ended with {fixed[0]}"))
        return ""

    def _late(self, what: str) -> str:
        return f"{what} did not end in {self._settings.command_timeout:g} s"

    async def _run(self, tree: Tree, argv: tuple[str, ...]) -> tuple[ExitStatus, str] | None:
        """One of the short commands; `None` if it did not end, or the job ends meanwhile."""
        child = await self._spawn(tree, argv)
        with trio.move_on_after(self._settings.command_timeout):
            await first_of(child.wait, self._stop_asked.wait)
        if child.status is None:
            return None
        await _last_words(child)
        return child.status, "\n".join(child.tails())

    async def _until_up(self, child: Child, ready: trio.Event) -> bool:
        """Wait for readiness, settling, the end, or the stop. Returns whether the watch is now Running."""
        with trio.move_on_after(self._settings.settle_time):
            await first_of(child.wait, ready.wait, self._stop_asked.wait)
        if child.status is not None or self._stop_asked.is_set():
            return False
        if not ready.is_set():
            self._apply(What.SETTLED, f"no readiness line in {self._settings.settle_time:g} s: it is not trusted")
        self._up_since = trio.current_time()
        self._may_start.set()
        return True

    async def _until_down(self, child: Child, was_up: bool, ready: trio.Event) -> tuple[What, str, _Ended]:
        """Stay with the watch until it ends by itself, or is asked to."""
        await first_of(child.wait, self._stop_asked.wait)
        if child.status is None:
            # Older than the flush: what changes later is not covered by it. This takes a while.
            self._stamp = await self._mark.stamp()
        if child.status is None:
            return await self._flush(child)
        await _last_words(child)
        if ready.is_set() or (was_up and not child.status.ok):
            self._may_start.set()
            return What.EXITED, f"the watch ended unasked with {child.status}", _Ended.CRASHED
        if child.status.ok:
            return What.EXITED, "unavailable: exit code 0 before readiness, a daemon watches", _Ended.NEVER_UP
        last = next((line for line in reversed("\n".join(child.tails()).splitlines()) if line.strip()), "")
        return What.EXITED, f"the watch ended at its start with {child.status}: {last.strip()[:200]}", _Ended.NEVER_UP

    async def _flush(self, child: Child) -> tuple[What, str, _Ended]:
        """Ask for pending edits."""
        self._apply(What.STOP, "")
        began = trio.current_time()
        child.interrupt()
        with self._hurry.step(self._settings.flush_timeout) as wait:
            await child.wait()
        self._metrics = evolve(self._metrics, flush_seconds=trio.current_time() - began)
        if child.status is None and trio.current_time() < wait.deadline:
            return What.EXITED, "the flush was cut short by a further cancel", _Ended.STOPPED
        if child.status is None:
            return What.EXITED, "the watch did not end when it was asked to flush", _Ended.STOPPED
        if not child.status.ok:
            return What.EXITED, f"the watch answered the flush with {child.status}", _Ended.STOPPED
        self._facts = self._facts.with_(flushed=True)
        return What.FLUSHED, "", _Ended.STOPPED

    async def _reconcile(
        self,
        why: str,
        *,
        until: trio.Event | None = None,
        stamp: str | None = None,
        before_the_watch: bool = False,
    ) -> str:
        """`cidx index --reconcile`. Returns what speaks against it: empty if it may be believed.

        `until` gives it up, and so does a cancellation without `reconcile_on_cancel`.
        """
        if self._is_unwanted(until):
            return GIVEN_UP
        self._stamp = stamp or await self._mark.stamp()  # older than the reconcile, as for the flush
        if self._is_unwanted(until):
            return GIVEN_UP
        self._apply(What.RECONCILE, why)
        count = "levellings" if before_the_watch else "fallbacks"
        self._metrics = evolve(self._metrics, **{count: getattr(self._metrics, count) + 1})
        verdict = ReconcileVerdict()
        ear = _Ear(verdict.line)
        began = trio.current_time()
        given_up = False
        try:
            async with self._open_tree("reconcile", self._stop_reconcile, self._hurry) as tree:
                child = await self._spawn(tree, self._tool.reconcile, ear)
                with self._hurry.step(self._settings.reconcile_timeout) as self._giving_up:
                    if self._is_unwanted(until):  # since before it could be told
                        self._giving_up.cancel()
                    await first_of(child.wait, *(() if until is None else (until.wait,)))
                status = child.status
                given_up = status is None and trio.current_time() < self._giving_up.deadline
            ear.close()
            self.survivors += tree.survivors
            trouble = GIVEN_UP if given_up else verdict.against(status)
        except SpawnError as error:
            trouble = str(error)
        finally:
            self._giving_up = None
        seconds = trio.current_time() - began
        self._emit(ReconcileFinished(ok=not trouble, seconds=seconds, reason=trouble))
        if trouble:
            if until is None and not given_up:  # an early one knows nothing of daemons that were there before
                await self._stop_daemon()
            self._apply(What.FAILED, f"the reconcile failed: {trouble}")
            return trouble
        self._metrics = evolve(self._metrics, reconcile_seconds=seconds)
        self.status = IndexStatus.READY_VIA_FALLBACK
        self._apply(What.RECONCILED, "")
        return ""

    def _is_unwanted(self, until: trio.Event | None) -> bool:
        """Whether the job does not want a reconcile any more."""
        if until is not None and until.is_set():
            return True
        return self._facts.cancelled and not self._settings.reconcile_on_cancel

    async def _wait_for_the_lock(self) -> None:
        """Who has the lock may have a watch: no reconcile beside that."""
        limit = self._settings.reconcile_timeout
        self._apply(What.FAILED, f"waiting for whoever watches this workspace, at most {limit:g} s")
        trouble = ""
        try:
            with self._hurry.step(limit) as self._giving_up:
                if self._is_unwanted(None):
                    self._giving_up.cancel()
                while not await self._lock.take():  # noqa: ASYNC110  # another process has it, and tells nobody
                    await trio.sleep(ASK_AGAIN)
            if not self._lock.held:
                early = trio.current_time() < self._giving_up.deadline
                trouble = f"the wait for it {'was given up' if early else f'took more than {limit:g} s'}"
        except OSError as error:
            trouble = _unlockable(error)
        finally:
            self._giving_up = None
        if trouble:
            self._reason = trouble if trouble in self._reason else f"{self._reason}; {trouble}"
            self._facts = self._facts.with_(locked_out=True)

    async def _settle(self) -> None:
        """The end, the same for every outcome of the agent."""
        if ending(self._facts).reconcile and not self._lock.held:
            await self._wait_for_the_lock()
        status = ending(self._facts).status
        reason = "" if status is IndexStatus.WATCH_TERMINATED else self._why_not_clean()
        if ending(self._facts).reconcile and (trouble := await self._reconcile(reason)):
            # A cancellation that came meanwhile counts.
            cancelled = ending(self._facts).status is IndexStatus.STALE
            status = IndexStatus.STALE if cancelled else IndexStatus.FAILED
            reason = reason if cancelled else f"the reconcile failed: {trouble}"
        if status is IndexStatus.STALE:
            reason = f"the job was cancelled before the index was known to be clean ({reason})"
        if self._mark_trouble:  # nothing on the disk says that the index may be believed
            status, reason = IndexStatus.FAILED, self._mark_trouble
        if status not in LEAVES_MARK:
            try:
                await self._mark.clear(self._stamp, self._metrics.reconcile_seconds)
            except OSError as error:
                status, reason = IndexStatus.FAILED, f"the stale mark could not be removed: {error.strerror}"
        self._conclude(status, reason)

    def _why_not_clean(self) -> str:
        facts = self._facts
        if not facts.alone:
            return self._reason
        if not facts.level_before:
            return "the index was stale before the watch"
        if facts.crashes:
            return f"the watch crashed {facts.crashes} time(s)"
        if facts.errors:
            return f"the watch printed {facts.errors} error(s)"
        if facts.flushed and not facts.ready_in_time:
            return "the watch was not ready when the agent started"
        return self._reason or "the watch did not run"

    def _conclude(self, status: IndexStatus, reason: str) -> None:
        self.status = status
        saved = None
        measured = self._metrics.reconcile_seconds or self._mark.last_reconcile_seconds
        if status is IndexStatus.WATCH_TERMINATED and measured is not None:
            saved = measured - (self._metrics.flush_seconds or 0.0)
        self._report = IndexReport(
            status=status,
            reason=reason,
            watch_restarts=self._metrics.restarts,
            stale=status in LEAVES_MARK,
            metrics=evolve(self._metrics, saved_seconds=saved),
        )
        if status in LEAVES_MARK:
            log.warning("the index is %s: %s", status.value, reason)
        try:
            self._emit(IndexChanged(state=self.state.value, cause="end", status=status, reason=reason))
        finally:
            self._reported.set()

    # --- small things -------------------------------------------------------------------------------------

    def _apply(self, event: What, reason: str) -> None:
        self.state = next_state(self.state, event)
        self.status = LIVE_STATUS[self.state] or self.status
        if event in (What.FAILED, What.EXITED):
            log.warning("index: %s", reason)
        self._emit(IndexChanged(state=self.state.value, cause=event.value, status=self.status, reason=reason))

    async def _spawn(self, tree: Tree, argv: tuple[str, ...], ear: _Ear | None = None) -> Child:
        if ear is None:
            return await tree.spawn(self._command(argv))
        return await tree.spawn(self._command(argv), stdout=ear.out.feed, stderr=ear.err.feed)

    def _watch_line(self, line: str, ready: trio.Event) -> None:
        meaning = cidx.meaning(line)
        if meaning is Line.ERROR:
            self._facts = self._facts.with_(errors=self._facts.errors + 1)
        elif meaning is Line.READY and not ready.is_set():
            ready.set()
            if not self._agent_started and self._facts.crashes == 0:
                self._facts = self._facts.with_(ready_in_time=True)
            self._apply(What.READY, "")
        if meaning is not Line.OTHER:
            self._emit(IndexOutput(kind=meaning.value, line=line[:500]))

    def _count_down(self) -> None:
        if self._up_since is not None:
            self._metrics = evolve(
                self._metrics,
                stopped_at=time.time(),
                uptime=self._metrics.uptime + trio.current_time() - self._up_since,
            )
            self._up_since = None

    async def _stop_daemon(self) -> None:
        """`cidx stop`: not for a daemon that was there before us. Its exit code says nothing (no daemon: 1)."""
        if self._daemon is _Daemon.THEIRS:
            return
        self._daemon = _Daemon.NONE
        try:
            async with self._open_tree("index-stop", self._stop_watch, self._hurry) as tree:
                child = await self._spawn(tree, self._tool.stop)
                with self._hurry.step(self._settings.command_timeout):
                    await child.wait()
            self.survivors += tree.survivors
        except SpawnError as error:
            log.warning("cidx stop: %s", error)


def _unlockable(error: OSError) -> str:
    return f"the workspace cannot be locked: {error.strerror}"


class _Ear:
    """Hears both outputs of a program by lines, to be closed when its tree is left: the last line may lack its end."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.out, self.err = Lines(on_line), Lines(on_line)

    def close(self) -> None:
        self.out.close()
        self.err.close()


class _Daemon(Enum):
    NONE = "none"
    OURS = "ours"
    THEIRS = "theirs"


async def _last_words(child: Child) -> None:
    """The end of a program is known before all that it printed is read."""
    with trio.move_on_after(LAST_WORDS):
        await child.drained()


async def first_of(*waits: Callable[[], Awaitable[object]]) -> None:
    """Return when the first of `waits` does; the others are cancelled."""

    async def run(wait: Callable[[], Awaitable[object]]) -> None:
        await wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for wait in waits:
            nursery.start_soon(run, wait)
