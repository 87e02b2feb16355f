"""The worker: takes tasks from a directory and runs them. What `supervise worker` runs, and `open_worker` gives.

It puts together what does the work: a lock that keeps it alone, a source of tasks, a dispatcher, an executor; and it
tells how it fares: by events, and in a heartbeat whose status has to be earned.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, ParamSpec, final

import trio
from attrs import evolve

from supervise.codec import rfc3339, to_json
from supervise.dispatch import instance
from supervise.dispatch.backoff import Backoff
from supervise.dispatch.breaker import Breaker, BreakerState
from supervise.dispatch.directory import DirectorySource, in_thread, told
from supervise.dispatch.dispatcher import Dispatcher, Observer, SpecOf, Stats
from supervise.dispatch.instance import InstanceLock
from supervise.dispatch.policy import Policy
from supervise.dispatch.scripts import Wanted, WithScripts
from supervise.dispatch.spool import Spool
from supervise.dispatch.submit import job_id_of
from supervise.dispatch.task import Task
from supervise.errors import BadInput, SettingsError, SuperviseError
from supervise.events import Event, TaskBuried, WorkerChanged, WorkerTrouble
from supervise.executors.local import LocalExecutor
from supervise.executors.mock import MockExecutor
from supervise.executors.protocol import Executor
from supervise.job.agent_side import plain
from supervise.job.bus import Bus, Subscription
from supervise.job.supervisor import Supervisor, open_supervisor
from supervise.model import JOB_ID, JobSpec
from supervise.settings import Settings

__all__ = ["Worker", "open_worker"]

log = logging.getLogger("supervise.dispatch")

P = ParamSpec("P")

#: How long the dispatcher's loop may take to go round when it is asked to, in seconds.
TURN_TIMEOUT: Final = 5.0

#: So often the whole directory may have missed its sweep before nobody believes in it any more.
SWEEPS_MISSED: Final = 3

LOCKS: Final = "locks"

#: Under triggers/, this directory is no worker's.
ORCHESTRATOR: Final = "orchestrator"

#: How long the tasks that are there at the start may take to be read, in seconds, before any of them begins: the urgent
#: first.
FIRST_LOOK: Final = 1.0

#: So many of the tasks that wait for others are told of by name in the reasons, and so many dependencies looked for.
MOST_TOLD: Final = 10
MOST_WANTED: Final = 1000


@final
class Worker:
    """A worker that runs. Made by `open_worker`.

    Attributes:
        name: its own.
        root: the directory that holds tasks/, running/, results/ …
        settings: all bounds.
    """

    def __init__(
        self,
        name: str,
        spool: Spool,
        settings: Settings,
        executor: Executor,
        supervisor: Supervisor | None,
        locks: Sequence[InstanceLock],
        *,
        spec_of: Callable[[Task, JobSpec], JobSpec] | None,
        observe: Observer,
        emit: Callable[[Event], None],
    ) -> None:
        self.name = name
        self.root = spool.root
        self.settings = settings
        self._spool = spool
        self._supervisor = supervisor
        self._began = trio.current_time()
        self._bus = Bus("")
        self._also_emit = _harmless(emit, "emit")
        self._locks = locks
        self._lost_lock = ""
        self._ready_at = math.inf  # on Trio's clock
        self._hopeless: dict[str, Path] = {}  # by id: what others wait for, and what came of it
        self._hopeless_at = -math.inf
        self._warned: set[str] = set()
        self._drain_asked = trio.Event()
        self._cancelled = False
        self._stopped = trio.Event()
        self._changed = trio.Event()
        self._beat_trouble = ""
        self._status: tuple[str, tuple[str, ...]] = ("degraded", ("it is starting",))
        bounds = settings.worker
        self._dispatcher = Dispatcher(
            self._source_with(),
            WithScripts(executor, settings.script_dirs),
            worker=name,
            policy=Policy(
                max_attempts=bounds.max_attempts,
                backoff=Backoff(base=bounds.backoff_base, cap=bounds.backoff_cap),
                quota_pause=bounds.quota_pause,
                longest_quota_pause=bounds.longest_quota_pause,
            ),
            breaker=Breaker(failures=settings.breaker.failures, reset_after=settings.breaker.reset_after),
            max_concurrent=bounds.max_concurrent,
            spec_of=_spec_maker(name, spool.root, settings, spec_of),
            emit=self._emit,
            observe=_harmless(observe, "observe"),
            may_claim=self._is_alone,
            first_look=FIRST_LOOK,
        )

    # --- for whoever holds it -----------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """As the last heartbeat told it: `healthy`, `degraded`, `draining` or `unhealthy`."""
        return self._status[0]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not healthy."""
        return self._status[1]

    @property
    def stats(self) -> Stats:
        """Counts since the start."""
        return self._dispatcher.stats

    @property
    def queue_size(self) -> int:
        """Tasks that wait."""
        return self._dispatcher.queue_size

    @property
    def active_tasks(self) -> tuple[str, ...]:
        """Ids of the tasks under way."""
        return tuple(task_id for task_id, _ in self._dispatcher.active)

    def subscribe(self) -> Subscription:
        """The worker's events for one reader; see `Subscription`. It ends with the worker."""
        return self._bus.subscribe()

    def drain(self) -> None:
        """Take no more tasks. Those under way have `worker.drain_timeout` to end; then they are cancelled."""
        self._dispatcher.drain()
        self._drain_asked.set()
        self._changed.set()

    def cancel(self) -> None:
        """End the tasks under way, and put them back. Called again, it goes to the next step of their stop policy."""
        self.drain()
        again, self._cancelled = self._cancelled, True
        if not again:
            self._dispatcher.cancel()
        elif self._supervisor is not None:
            for job in self._supervisor.jobs:
                job.cancel("the worker was asked again to end")

    @property
    def put_back(self) -> int:
        """How many tasks were cancelled and put back because the worker ended."""
        return self._dispatcher.put_back

    @property
    def unpublished(self) -> int:
        """How many results, dead letters and retries could not be published before the worker ended, and are lost."""
        return self._dispatcher.unpublished

    async def stopped(self) -> None:
        """Wait until no task is under way any more, after `drain` or `cancel`. Cancelling ends the wait only."""
        await self._stopped.wait()

    def __repr__(self) -> str:
        return f"<Worker {self.name} {self.status}>"

    # --- the life -----------------------------------------------------------------------------------------

    def _source_with(self) -> DirectorySource:
        bounds = self.settings.worker
        self._source = DirectorySource(
            self._spool,
            sweep_interval=bounds.sweep_interval,
            poll_interval=bounds.poll_interval,
            parse_grace=bounds.parse_grace,
            emit=self._emit,
        )
        return self._source

    async def _live(self) -> None:
        """Until drained. First what a dead worker has left is seen to, then the directory is looked at."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._beat, name="heartbeat")
                nursery.start_soon(self._bound_the_drain, name="drain")
                async with trio.open_nursery() as working:
                    watching = trio.CancelScope()
                    working.start_soon(self._dispatch, working, watching, name="dispatcher")
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                self._dispatcher.draining = True
                try:
                    await in_thread(self._spool.give_up_begun)
                except OSError as error:  # the next start finds it
                    log.error("a task that was claimed by half could not be put back: %s", told(error))
                await self._beat_once(stopped=True)
            self._bus.close()
            self._stopped.set()

    async def _dispatch(self, nursery: trio.Nursery, watching: trio.CancelScope) -> None:
        async def then_watch() -> None:
            with watching:  # also the wait: a worker may be asked to end before it is ready
                await self._dispatcher.ready.wait()
                self._ready_at = trio.current_time()
                async with trio.open_nursery() as source:
                    await source.start(self._source.run)
                    self._dispatcher.begin()
                    self._changed.set()

        nursery.start_soon(then_watch, name="source")
        try:
            await self._dispatcher.run()
        finally:
            watching.cancel()

    async def _bound_the_drain(self) -> None:
        await self._drain_asked.wait()
        await trio.sleep(self.settings.worker.drain_timeout)
        if not self._stopped.is_set():
            log.warning("the drain timeout is over: the tasks under way are cancelled and put back")
            self.cancel()
        await trio.sleep_forever()

    # --- how it fares -------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """A heartbeat every so often, and whenever something has changed."""
        while True:
            self._changed = trio.Event()
            await self._beat_once()
            with trio.move_on_after(self.settings.heartbeat_interval):
                await self._changed.wait()

    async def _beat_once(self, *, stopped: bool = False) -> None:
        await self._look_for_hopeless()
        status, reasons = await self._earned()
        dispatcher = self._dispatcher
        record: dict[str, Any] = {
            "worker": self.name,
            "timestamp": rfc3339(time.time()),
            "uptime_seconds": round(trio.current_time() - self._began, 3),
            "queue_size": dispatcher.queue_size,
            "active_tasks": [{"task_id": task_id, "attempt": attempt} for task_id, attempt in dispatcher.active],
            "circuit_breaker_state": dispatcher.breaker_state().value,
            "stats": to_json(dispatcher.stats),
            "status": status,
            "reasons": list(reasons),
            "blocked": {task_id: list(ids) for task_id, ids in dispatcher.blocked.items()},
            "pid": os.getpid(),
            "stopped": stopped,
        }
        try:
            await in_thread(self._spool.beat, record)
            trouble = ""
        except OSError as error:
            trouble = told(error)
        if trouble != self._beat_trouble:
            log.log(
                logging.ERROR if trouble else logging.WARNING, "heartbeat: %s", trouble or "it can be written again"
            )
        self._beat_trouble = trouble
        if trouble:  # the file, if it can be written, has no reason to say that it cannot
            status, reasons = "degraded" if status == "healthy" else status, (*reasons, f"heartbeat: {trouble}")
        self._status = (status, reasons)
        self._emit(
            WorkerChanged(
                worker=self.name,
                status=status,
                reasons=reasons,
                queue_size=dispatcher.queue_size,
                active_tasks=self.active_tasks,
                breaker=dispatcher.breaker_state().value,
                breaker_failures=dispatcher.breaker_failures(),
            )
        )

    async def _earned(self) -> tuple[str, tuple[str, ...]]:
        """The status: what was seen to work, not what nobody complained of."""
        dispatcher, source = self._dispatcher, self._source
        dead: list[str] = [] if self._is_alone() else [self._lost_lock]
        if dispatcher.ready.is_set() and not await self._turns():
            dead.append(f"the dispatcher did not go round in {TURN_TIMEOUT:g} s")
        if dispatcher.draining:
            ends = "it ends when its tasks have ended"
            return "unhealthy" if dead else "draining", (*dead, ends)
        if not dispatcher.ready.is_set():
            why = [f"{what}: {error}" for what, error in dispatcher.troubles.items()]
            return "degraded", (*why, "it is starting: what a dead worker left is seen to")
        was_looked_at = source.looked > -math.inf
        age = trio.current_time() - (source.looked if was_looked_at else self._ready_at)
        bounds = self.settings.worker
        if age > SWEEPS_MISSED * max(bounds.sweep_interval, bounds.poll_interval):
            what = "was last looked at" if was_looked_at else "was never looked at: the worker began"
            dead.append(f"the directory {what} {age:.0f} s ago")
        if dead:
            return "unhealthy", tuple(dead)
        weak = [f"{what}: {error}" for what, error in dispatcher.troubles.items()]
        weak += [f"{what}: {text}" for what, text in source.troubles.items()]
        weak += [source.note] if source.exhausted else []
        if not was_looked_at:
            weak.append("it is starting: the directory is looked at")
        weak += [
            f"the lock file {lock.path} was removed or replaced; others may take it"
            for lock in self._locks[1:]
            if not _is_intact(lock)
        ]
        weak += [f"tasks wait for each other: {', '.join(circle)}" for circle in dispatcher.circles[:MOST_TOLD]]
        if dispatcher.breaker_state() is not BreakerState.CLOSED:
            weak.append(f"the circuit breaker is {dispatcher.breaker_state().value}")
        if dispatcher.paused_until > time.time():
            weak.append(f"a quota is used up; it goes on at {rfc3339(dispatcher.paused_until)}")
        return ("degraded" if weak else "healthy"), (*weak, *self._blocked_for_ever())

    def _is_alone(self) -> bool:
        """Whether no other worker of this name can have started. If one can, this one takes no more, and ends."""
        own = self._locks[0]
        # With the whole root away, nobody can start in it. It may go and come back between two looks.
        if not self._lost_lock and not _is_intact(own) and self.root.is_dir() and not _is_intact(own):
            self._lost_lock = (
                f"the lock file {own.path} was removed or replaced, so that another worker of this name may have "
                "started; this one ends: start it anew, and leave the file alone"
            )
            log.error("%s", self._lost_lock)
            self._emit(WorkerTrouble(worker=self.name, what="lock", error=self._lost_lock))
            self.drain()
        return not self._lost_lock

    async def _look_for_hopeless(self) -> None:
        """Which of those that others wait for have ended, and not completed. A dead letter may be tried again."""
        if trio.current_time() < self._hopeless_at:
            return
        self._hopeless_at = trio.current_time() + self.settings.heartbeat_interval
        wanted = {each for ids in self._dispatcher.blocked.values() for each in ids}
        try:
            self._hopeless = await in_thread(_ended, self._spool, sorted(wanted)[:MOST_WANTED]) if wanted else {}
        except OSError as error:
            self._hopeless = {}
            log.warning("whether tasks wait in vain is not known: %s", told(error))

    def _blocked_for_ever(self) -> list[str]:
        """That is no trouble of the worker's."""
        reasons: list[str] = []
        for task_id, ids in self._dispatcher.blocked.items() if self._hopeless else ():
            for other in self._hopeless.keys() & {*ids}:
                reason = f"task {task_id} waits for {other}, which did not complete: {self._hopeless[other]}"
                if task_id not in self._warned:
                    self._warned.add(task_id)
                    log.warning("%s; retry that one, or remove this", reason)
                reasons.append(reason)
        return sorted(reasons)[:MOST_TOLD]

    async def _turns(self) -> bool:
        """Whether the dispatcher's loop goes round when it is woken."""
        dispatcher = self._dispatcher
        before = dispatcher.turns
        dispatcher.wake()
        with trio.move_on_after(TURN_TIMEOUT):
            while dispatcher.turns == before and not dispatcher.over:
                await dispatcher.turned()
        return dispatcher.turns != before or dispatcher.over

    def _emit(self, event: Event) -> None:
        if isinstance(event, TaskBuried) and event.attempt == 0:
            self._dispatcher.set_aside()
        if isinstance(event, WorkerTrouble):
            self._changed.set()
        self._bus.publish(event)
        self._also_emit(event)


@asynccontextmanager
@trio.lowlevel.enable_ki_protection
async def open_worker(
    name: str,
    *,
    settings: Settings | None = None,
    executor: Executor | None = None,
    spec_of: Callable[[Task, JobSpec], JobSpec] | None = None,
    observe: Observer = lambda task, event: None,
    emit: Callable[[Event], None] = lambda event: None,
) -> AsyncIterator[Worker]:
    """Run a worker beside the block.

        settings = Settings(worker=WorkerSettings(root="/srv/agents", workspace="/srv/project"))
        async with supervise.open_worker("w1", settings=settings) as worker:
            await worker.stopped()

    Args:
        name: the worker's; one at a time runs under a root. `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
        settings: all bounds; `worker.root` has to be there.
        executor: who runs the jobs; default what `settings.executor` names.
        spec_of: called with each task and the `JobSpec` made for it; returns the spec to run. An exception from it
            makes the task a dead letter.
        observe: called with each task and each event of its job. Must not block. What it raises is logged, once.
        emit: called with each event of the worker, none left out; otherwise as `Worker.subscribe`. Likewise.

    Raises:
        SettingsError: no root, a bad name, or an executor that is not there.
        AlreadyRunning: the worker of this name runs, or somebody has the lock file.
        SuperviseError: the directories cannot be made or written.
        MissingExtra: the extra `worker` is not installed.
        UnsupportedPlatform: as `open_supervisor`.

    Leaving the block drains the worker: `worker.drain_timeout` bounds that. An exception in the block, or a
    cancellation, ends the tasks under way, puts them back, and leaves unwrapped.
    """
    settings = settings or Settings()
    spool = _spool(name, settings)
    await in_thread(spool.create)
    failure: BaseException | None = None
    async with AsyncExitStack() as stack:
        locks: list[InstanceLock] = []
        for path in _lock_files(spool, settings):
            # The second one is where others look for a pid, and for nothing else.
            lock = instance.hold(path, timeout=settings.worker.lock_timeout, plain=bool(locks))
            locks.append(await stack.enter_async_context(lock))
        await in_thread(spool.clear_unfinished_beats)
        supervisor: Supervisor | None = None
        if executor is None and settings.executor == "local":
            opened = open_supervisor(max_concurrent=settings.worker.max_concurrent, settings=settings)
            supervisor = await stack.enter_async_context(opened)
            executor = LocalExecutor(supervisor)
        elif executor is None:
            executor = _executor(settings)
        if settings.worker.workspace is None:
            log.warning("worker %s: no worker.workspace is set: tasks that name no workspace are refused", name)
        parts = (name, spool, settings, executor, supervisor, locks)
        worker = Worker(*parts, spec_of=spec_of, observe=observe, emit=emit)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker._live, name=f"supervise worker {name}")
                try:
                    yield worker
                    worker.drain()
                    await worker.stopped()
                except BaseException as error:  # raised below, so that the nursery does not wrap it
                    failure = error
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            other = group.split(trio.Cancelled)[1]
            if other is not None:  # a bug; that the block was cancelled by it is no news
                raise plain(other) from None
            if failure is None:
                raise
        if failure is not None:
            raise failure


def _spool(name: str, settings: Settings) -> Spool:
    if not isinstance(name, str) or not JOB_ID.fullmatch(name):
        raise SettingsError(f"the worker's name is {name!r}, but must match {JOB_ID.pattern}")
    if name == ORCHESTRATOR:
        raise SettingsError(f"the worker's name is {name!r}, whose triggers are those of others; choose another")
    root = settings.worker.root
    if root is None:
        raise SettingsError("a worker needs a root: set worker.root (SUPERVISE_WORKER__ROOT, --root) to a directory")
    return Spool(Path(os.path.abspath(root)), name)


def _lock_files(spool: Spool, settings: Settings) -> list[Path]:
    """The root's own, always: what a worker of this name left is ours only if it is the only one."""
    own = spool.root / LOCKS / f"{spool.worker}.lock"
    try:
        own.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise SuperviseError(
            f"the worker's directory {own.parent} cannot be used: {error.strerror}; name another root (worker.root)"
        ) from None
    other = settings.worker.lock_file
    return [own] if other is None or os.path.realpath(other) == os.path.realpath(own) else [own, other]


def _executor(settings: Settings) -> Executor:
    if settings.executor == "mock":
        return MockExecutor()
    raise SettingsError(f"executor is {settings.executor!r}, which this version does not have; use local or mock")


def _harmless(told: Callable[P, None], what: str) -> Callable[P, None]:
    """A function of somebody's own; what it raises is its own, too."""
    has_raised = False

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal has_raised
        try:
            told(*args, **kwargs)
        except Exception as error:
            if not has_raised:
                log.error("%s raised, which is told once; it is called on", what, exc_info=error)
            has_raised = True

    return call


def _is_intact(lock: InstanceLock) -> bool:
    """As far as can be seen: who cannot look there cannot take it."""
    try:
        return lock.is_intact
    except OSError as error:
        log.debug("the lock file %s: %s", lock.path, error.strerror)
        return True


def _ended(spool: Spool, task_ids: Sequence[str]) -> dict[str, Path]:
    """Those of the tasks that have ended without having completed, by any worker, and the record of it. Blocking."""
    found: dict[str, Path] = {}
    for kind in ("results", "dlq"):
        for directory in (spool.root / kind).iterdir():
            records = {task_id: directory / f"{task_id}.json" for task_id in task_ids}
            found |= {task_id: path for task_id, path in records.items() if os.path.lexists(path)}
    completed, _ = spool.completed(found)
    return {task_id: path for task_id, path in found.items() if task_id not in completed}


def _spec_maker(name: str, root: Path, settings: Settings, change: Callable[[Task, JobSpec], JobSpec] | None) -> SpecOf:
    def make(task: Task, attempt: int) -> JobSpec:
        spec = JobSpec(
            prompt=task.description,
            workspace=_workspace(task, settings),
            job_id=job_id_of(name, task.task_id, attempt, root),
            timeout=settings.worker.task_timeout if task.timeout is None else task.timeout,
            labels={"task_id": task.task_id, "worker": name, "attempt": str(attempt)},
        )
        if task.script is not None:
            return evolve(spec, agent=Wanted(task=task, change=change))
        return spec if change is None else change(task, spec)

    return make


def _workspace(task: Task, settings: Settings) -> str:
    """The directory that the task may work in, its links resolved."""
    default, allowed = settings.worker.workspace, settings.worker.workspaces
    if task.workspace is None:
        if default is None:
            raise BadInput("workspace is missing, and the worker has none for tasks that name none (worker.workspace)")
        return os.path.realpath(default)
    if not os.path.isabs(task.workspace):
        raise BadInput(f"workspace is {task.workspace!r}, but must be an absolute path")
    real = Path(os.path.realpath(task.workspace))
    places = [Path(os.path.realpath(place)) for place in (*allowed, *(() if default is None else (default,)))]
    if not any(real.is_relative_to(place) for place in places):
        raise BadInput(f"workspace is {task.workspace!r}, which lies under none of worker.workspaces")
    return os.fspath(real)
