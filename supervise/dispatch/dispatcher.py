"""The dispatcher: takes tasks from a source and hands them to an executor. It knows no file and no process.

One loop decides (`_start_what_can_start`), one task of Trio's for each attempt acts. What is decided is in pure
modules: backlog.py says which task is next, breaker.py whether anybody may try, policy.py what becomes of a task after
an attempt.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, final

import trio
from attrs import evolve, frozen

from supervise.dispatch import records
from supervise.dispatch.backlog import Backlog, Offer
from supervise.dispatch.breaker import Breaker, BreakerState, Permit
from supervise.dispatch.policy import INVALID, Bury, Finish, Pause, Policy, Retry, counts_for_breaker
from supervise.dispatch.source import Arrived, Claim, ClaimLost, Completed, Source, SourceTrouble, Vanished
from supervise.dispatch.task import Attempt, Task
from supervise.errors import SuperviseError
from supervise.events import Event, TaskBuried, TaskClaimed, TaskFinished, TaskPutBack, TaskRetried, WorkerTrouble
from supervise.executors.protocol import Executor
from supervise.model import FailureKind, JobResult, JobSpec, Outcome

__all__ = ["Dispatcher", "Stats"]

log = logging.getLogger("supervise.dispatch")

#: A clock on the wall may be set while we wait for it: it is looked at again after so many seconds.
LOOK_AGAIN: Final = 60.0

#: Pauses before something is asked again that could not be done, doubling between these, in seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0

SpecOf = Callable[[Task, int], JobSpec]
Observer = Callable[[Task, Event], None]


@frozen(kw_only=True)
class Stats:
    """Counts since the start.

    Attributes:
        tasks_processed: came to their end, in a result or a dead letter.
        tasks_failed: of these, those that did not complete.
        tasks_retried: attempts that failed and were followed by another.
        tasks_dlq: dead letters, files that were no tasks among them.
    """

    tasks_processed: int = 0
    tasks_failed: int = 0
    tasks_retried: int = 0
    tasks_dlq: int = 0


@final
class Dispatcher:
    """Runs the tasks of a source until it is drained.

    Args:
        source: where tasks come from.
        executor: who runs their jobs.
        worker: the name told in records and events.
        policy: what becomes of a task after an attempt.
        breaker: whether anybody may try; on Trio's clock.
        max_concurrent: attempts at a time.
        spec_of: makes a task and an attempt's number a job; what it raises of ours makes the task a dead letter.
        emit: gets the events.
        observe: gets the jobs' own events. Must neither raise nor block.
        now: the clock on the wall, in seconds since the epoch.
        chance: draws a number from 0 to 1.

    Attributes:
        stats: counts.
        troubles: what does not work at the moment, and why.
        active: the tasks under way, by id, each with the number of its attempt.
        draining: no task is taken any more.
        put_back: tasks that were cancelled and put back.
        paused_until: of a quota, in seconds since the epoch; 0 for none.
        ready: set when what a dead worker has left is seen to.
        turns: how often the loop went round; it does when it is woken.
    """

    def __init__(
        self,
        source: Source,
        executor: Executor,
        *,
        worker: str,
        policy: Policy,
        breaker: Breaker,
        max_concurrent: int,
        spec_of: SpecOf,
        emit: Callable[[Event], None] = lambda event: None,
        observe: Observer = lambda task, event: None,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.stats = Stats()
        self.troubles: dict[str, str] = {}
        self.active: list[tuple[str, int]] = []
        self.draining = False
        self.put_back = 0
        self.paused_until = 0.0
        self.ready = trio.Event()
        self.turns = 0
        self._turned = trio.Event()
        self._source = source
        self._executor = executor
        self._worker = worker
        self._policy = policy
        self._breaker = breaker
        self._max_concurrent = max_concurrent
        self._spec_of = spec_of
        self._emit = emit
        self._observe = observe
        self._now = now
        self._chance = chance
        self._backlog = Backlog()
        self._places = max_concurrent
        self._woken = trio.Event()
        self._unasked: set[str] = set()  # ids of dependencies, of which the source could not say whether they are done
        self._attempts = trio.CancelScope()
        self._pause_ends = 0.0  # on Trio's clock
        self._bad_luck = 0  # claims and jobs in a row that could not even begin

    # --- for the worker -----------------------------------------------------------------------------------

    @property
    def queue_size(self) -> int:
        """Tasks that wait."""
        return len(self._backlog)

    @property
    def blocked(self) -> dict[str, tuple[str, ...]]:
        """Tasks that wait for others, and for which."""
        return self._backlog.blocked

    def breaker_state(self) -> BreakerState:
        """Whether somebody may try now."""
        return self._breaker.state(trio.current_time())

    def breaker_failures(self) -> int:
        """Failures in a row."""
        return self._breaker.failures()

    def wake(self) -> None:
        """Look around: there is news."""
        self._woken.set()

    async def turned(self) -> None:
        """Wait until the loop has gone round once more. Cancelling ends the wait only."""
        await self._turned.wait()

    def drain(self) -> None:
        """Take no more tasks; `run` returns when those under way have ended."""
        self.draining = True
        self.wake()

    def cancel(self) -> None:
        """Drain, and end the attempts under way: their tasks are put back."""
        self.drain()
        self._attempts.cancel()

    # --- the loop -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run tasks until `drain` or `cancel`, and until the last attempt has ended.

        Cancelling ends the attempts under way, puts their tasks back, and propagates.
        """
        self._source.listen(self.wake)
        with self._attempts:
            await self._see_to_the_dead()
            self.ready.set()
            async with trio.open_nursery() as nursery:
                while not (self.draining and not self.active):
                    self._woken = trio.Event()
                    await self._take_in()
                    # One moment for both: what becomes ready in between would be started by nobody.
                    now, clock = self._now(), trio.current_time()
                    self._start_what_can_start(nursery, now, clock)
                    self.turns += 1
                    self._turned.set()
                    self._turned = trio.Event()
                    pause = min(self._pause(now, clock), LONGEST_PAUSE if self._unasked else math.inf)
                    with trio.move_on_after(pause):
                        await self._woken.wait()

    async def _see_to_the_dead(self) -> None:
        """An attempt whose worker died has failed."""
        claims: Sequence[Claim] = ()

        async def recover() -> None:
            nonlocal claims
            claims = await self._source.recover()

        await self._insist("recovery", recover)
        for claim in claims:
            number = len(claim.attempts) + 1
            died = Attempt(
                attempt=number,
                ended=self._now(),
                failure_kind=FailureKind.KILLED.value,
                error="the worker died during this attempt",
            )
            decision = self._policy.after_failure(claim.task, number, now=self._now(), chance=self._chance())
            await self._carry_out(claim, decision, died, None)

    async def _take_in(self) -> None:
        """Take note of what the source tells."""
        wanted = self._unasked
        for each in self._source.news():
            match each:
                case Arrived(offer):
                    # First it waits, then we ask: what completes in between is told by news or by the answer.
                    self._backlog.add(offer, missing=offer.dependencies)
                    wanted.update(offer.dependencies)
                case Vanished(key):
                    self._backlog.remove(key)
                case Completed(task_id):
                    self._backlog.completed(task_id)
        if wanted:
            try:
                found = await self._source.completed(wanted)
            except SourceTrouble as error:  # they stay blocked until the source tells of them, or answers
                self._trouble("dependencies", error)
            else:
                self._mended("dependencies")
                self._unasked = set()
                for task_id in found:
                    self._backlog.completed(task_id)

    def _start_what_can_start(self, nursery: trio.Nursery, now: float, clock: float) -> None:
        while self._places and not self.draining and not self._is_paused(now):
            offer = self._backlog.next(now)
            permit = None if offer is None else self._breaker.ask(clock)
            if offer is None or permit is None:
                return
            self._backlog.remove(offer.key)
            self._places -= 1
            self.active.append((offer.task_id, offer.attempts + 1))
            nursery.start_soon(self._attempt, offer, permit, name=f"task {offer.task_id}")

    def _is_paused(self, now: float) -> bool:
        """By both clocks: the one on the wall may be set back, the other stands still while the machine sleeps."""
        return now < self.paused_until and trio.current_time() < self._pause_ends

    def _pause(self, now: float, clock: float) -> float:
        """How long nothing will happen by itself, in seconds. For ever, for a worker that has nothing to do."""
        if self.draining or not self._places:
            return math.inf
        if self._is_paused(now):
            return min(self.paused_until - now, LOOK_AGAIN) if len(self._backlog) else math.inf
        if self._backlog.next(now) is not None:  # so it is the breaker that keeps it from starting
            wait = self._breaker.opens_in(clock)
            return wait if wait > 0 else math.inf
        next_time = self._backlog.next_time()
        return math.inf if next_time is None else min(max(0.0, next_time - now), LOOK_AGAIN)

    # --- one attempt --------------------------------------------------------------------------------------

    async def _attempt(self, offer: Offer, permit: Permit) -> None:
        try:
            claim = await self._claim(offer)
            if claim is not None:
                await self._run(claim, permit)
        finally:
            self._breaker.given_up(permit)  # unless it has been handed back
            self.active.remove((offer.task_id, offer.attempts + 1))
            self._places += 1
            self.wake()

    async def _claim(self, offer: Offer) -> Claim | None:
        try:
            claim = await self._source.claim(offer)
        except SourceTrouble as error:
            self._trouble("claim", error)
            self._later(offer)
            return None
        self._mended("claim")
        return claim

    def _later(self, offer: Offer) -> None:
        """It could not even be claimed: once more, after a pause."""
        self._bad_luck += 1
        at = self._now() + _pause_after(self._bad_luck)
        self._backlog.add(evolve(offer, not_before=at), missing=())

    @trio.lowlevel.enable_ki_protection
    async def _run(self, claim: Claim, permit: Permit) -> None:
        number = len(claim.attempts) + 1
        task = claim.task
        self._emit(TaskClaimed(worker=self._worker, task_id=task.task_id, attempt=number))
        try:
            spec = self._spec_of(task, number)
        except SuperviseError as error:
            self._bad_luck = 0
            attempt = Attempt(attempt=number, ended=self._now(), failure_kind=INVALID, error=str(error))
            await self._carry_out(claim, Bury(INVALID), attempt, None)
            return
        started = self._now()
        try:
            result = await self._execute(claim, spec)
        except BaseException:  # a cancellation, which the nursery there wraps in a group
            with trio.CancelScope(shield=True):
                await self._put_back(claim, number, "the worker ends")
            raise
        if result is None:
            return
        if (speaks_for := counts_for_breaker(result)) is not None:
            self._breaker.report(permit, ok=speaks_for, now=trio.current_time())
        decision = self._policy.after(task, number, result, now=self._now(), chance=self._chance())
        attempt = Attempt(
            attempt=number,
            job_id=result.job_id,
            started=started,
            ended=self._now(),
            failure_kind=result.failure_kind.value if result.failure_kind else result.outcome.value,
            error=result.error or "",
        )
        await self._carry_out(claim, decision, attempt, result)

    async def _execute(self, claim: Claim, spec: JobSpec) -> JobResult | None:
        """Run the job, the claim kept meanwhile. None if nothing came of it, and all is said."""
        result: JobResult | None = None
        lost: ClaimLost | None = None
        trouble: Exception | None = None

        async def renew() -> None:
            nonlocal lost
            try:
                await claim.renew()
            except ClaimLost as error:
                lost = error
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(renew, name="renew")
            try:
                result = await self._executor.execute(spec, lambda event: self._observe(claim.task, event))
            except Exception as error:
                trouble = error
            nursery.cancel_scope.shield = True  # what came of the job is not lost to a cancellation of this moment
            nursery.cancel_scope.cancel()
        if lost is not None and result is None:
            log.error("%s", lost)
            return None
        if trouble is not None and not isinstance(trouble, SuperviseError):  # a bug, of a runner of somebody's own
            log.error("task %s: the executor raised", claim.task.task_id, exc_info=trouble)
            told = f"the executor raised {type(trouble).__name__}: {trouble}"
            kind = FailureKind.AGENT_ERROR
            return JobResult(job_id=spec.job_id, outcome=Outcome.FAILED, failure_kind=kind, error=told)
        if trouble is not None:  # no job could be run at all: that is not the task's fault
            self._bad_luck += 1
            self._trouble("executor", trouble)
            at = self._now() + _pause_after(self._bad_luck)
            await self._insist("put back", lambda: claim.retry(claim.attempts, at))
            return None
        self._bad_luck = 0
        self._mended("executor")
        return result

    async def _put_back(self, claim: Claim, number: int, reason: str) -> None:
        """Once only: what cannot be put back now is found at the next start."""
        self.put_back += 1
        try:
            await claim.release()
        except SuperviseError as error:
            log.error("task %s could not be put back: %s", claim.task.task_id, error)
        else:
            self._emit(TaskPutBack(worker=self._worker, task_id=claim.task.task_id, attempt=number, reason=reason))

    async def _carry_out(
        self, claim: Claim, decision: Finish | Retry | Bury | Pause, attempt: Attempt, result: JobResult | None
    ) -> None:
        """Do with the task what was decided, as often as it takes."""
        task, number, now = claim.task, attempt.attempt, self._now()
        history = (*claim.attempts, attempt)
        names: dict[str, Any] = {"worker": self._worker, "task_id": task.task_id, "attempt": number}
        spent: dict[str, Any] = {"seconds": 0.0}
        if result is not None:
            spent = {"seconds": result.duration_seconds, "usage": result.usage, "cost_usd": result.cost_usd}
        match decision:
            case Finish():
                assert result is not None
                record = records.result(task, self._worker, number, result, now)
                if await self._insist("publication", lambda: claim.finish(record)):
                    completed = result.outcome is Outcome.COMPLETED
                    self._count(tasks_processed=1, tasks_failed=0 if completed else 1)
                    self._emit(TaskFinished(**names, **spent, status=result.outcome.value))
                    if completed:
                        self._backlog.completed(task.task_id)
            case Retry(at):
                if await self._insist("put back", lambda: claim.retry(history, at)):
                    self._count(tasks_retried=1)
                    kind, error = attempt.failure_kind, attempt.error
                    self._emit(TaskRetried(**names, **spent, failure_kind=kind, error=error, at=at))
            case Bury(reason):
                record = records.dead_letter(task, self._worker, history, reason, attempt.error, now)
                if await self._insist("dead letter", lambda: claim.bury(record)):
                    self._count(tasks_processed=1, tasks_failed=1, tasks_dlq=1)
                    self._emit(TaskBuried(**names, **spent, reason=reason, detail=attempt.error))
            case Pause(until):
                self.paused_until = max(self.paused_until, until)
                self._pause_ends = max(self._pause_ends, trio.current_time() + until - now)
                if await self._insist("put back", lambda: claim.retry(claim.attempts, until)):
                    self._emit(TaskPutBack(**names, reason=f"a quota is used up: {attempt.error}"))

    async def _insist(self, what: str, do: Callable[[], Awaitable[None]]) -> bool:
        """Do it, again and again if need be; the place of the task stays taken meanwhile. False if the claim is lost.

        The first try is made also when everything ends: a result that is there shall be published.
        """
        tries = 0
        while True:
            try:
                with trio.CancelScope(shield=tries == 0):
                    await do()
            except ClaimLost as error:
                log.error("%s", error)
                return False
            except SourceTrouble as error:
                self._trouble(what, error)
            else:
                self._mended(what)
                return True
            tries += 1
            await trio.sleep(_pause_after(tries))

    # --- small things -------------------------------------------------------------------------------------

    def set_aside(self) -> None:
        """The source has made a dead letter of a file that was no task."""
        self._count(tasks_dlq=1)

    def _count(self, **more: int) -> None:
        self.stats = evolve(self.stats, **{name: getattr(self.stats, name) + count for name, count in more.items()})

    def _trouble(self, what: str, error: Exception) -> None:
        if self.troubles.get(what) != str(error):
            log.error("%s: %s", what, error)
            self._emit(WorkerTrouble(worker=self._worker, what=what, error=str(error)))
        self.troubles[what] = str(error)

    def _mended(self, what: str) -> None:
        if self.troubles.pop(what, None) is not None:
            log.warning("%s works again", what)
            self._emit(WorkerTrouble(worker=self._worker, what=what, error=""))


def _pause_after(failures: int) -> float:
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 32))
