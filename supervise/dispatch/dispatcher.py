"""The dispatcher: takes tasks from a source and hands them to an executor. It knows no file and no process.

One loop decides (`_start_what_can_start`), one task of Trio's for each attempt acts. What is decided is in pure
modules: backlog.py says which task is next, breaker.py whether anybody may try, policy.py what becomes of a task after
an attempt.
"""

from __future__ import annotations

import itertools
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
from supervise.dispatch.policy import INVALID, MAX_RETRIES, Bury, Finish, Pause, Policy, Retry, counts_for_breaker
from supervise.dispatch.source import Arrived, Claim, ClaimLost, Completed, Source, SourceTrouble, Vanished
from supervise.dispatch.task import MOST_PRIORITY, Attempt, Task
from supervise.errors import BadInput, SpecError, SuperviseError
from supervise.events import Event, TaskBuried, TaskClaimed, TaskFinished, TaskPutBack, TaskRetried, WorkerTrouble
from supervise.executors.protocol import Executor
from supervise.log_context import telling_of
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
        spec_of: makes a task and an attempt's number a job; what it raises makes the task a dead letter.
        emit: gets the events. Must neither raise nor block.
        observe: gets the jobs' own events. Likewise.
        may_claim: asked before each claim; whoever says no drains the dispatcher.
        first_look: nothing begins for so many seconds, unless `begin` is called, so that the urgent among the tasks
            that are there already come first.
        now: the clock on the wall, in seconds since the epoch.
        chance: draws a number from 0 to 1.

    Attributes:
        stats: counts.
        troubles: what does not work at the moment, and why.
        active: the tasks under way, by id, each with the number of its attempt.
        draining: no task is taken any more.
        put_back: tasks that were cancelled and put back.
        unpublished: ends of attempts that could not be published before this dispatcher's own end.
        paused_until: of a quota, in seconds since the epoch; 0 for none.
        ready: set when what a dead worker has left is seen to.
        turns: how often the loop went round; it does when it is woken.
        over: it does no more.
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
        may_claim: Callable[[], bool] = lambda: True,
        first_look: float = 0.0,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.stats = Stats()
        self.troubles: dict[str, str] = {}
        self.active: list[tuple[str, int]] = []
        self.draining = False
        self.put_back = 0
        self.unpublished = 0
        self.paused_until = 0.0
        self.ready = trio.Event()
        self.turns = 0
        self.over = False
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
        self._may_claim = may_claim
        self._first_look = first_look
        self._now = now
        self._chance = chance
        self._backlog = Backlog()
        self._places = max_concurrent
        self._woken = trio.Event()
        self._unasked: set[str] = set()  # ids of dependencies, of which the source could not say whether they are done
        self._attempts = trio.CancelScope()
        self._recovery = trio.CancelScope()
        self._pause_ends = 0.0  # on Trio's clock
        self._held_until = -math.inf  # likewise
        self._bad_luck: dict[str, int] = {}  # what could not be done at all: how often in a row
        self._claiming: set[str] = set()  # keys of offers
        self._broken: set[str] = set()  # likewise: half claimed, perhaps, and so gone from where they were
        self._refusals = 0  # jobs that could not be run at all
        self._refused: set[str] = set()  # ids of their tasks
        self._probe: Offer | None = None  # after trouble, one at a time may try

    # --- for the worker -----------------------------------------------------------------------------------

    @property
    def queue_size(self) -> int:
        """Tasks that wait."""
        return len(self._backlog)

    @property
    def blocked(self) -> dict[str, tuple[str, ...]]:
        """Tasks that wait for others, and for which: a hundred of them."""
        return self._backlog.blocked

    @property
    def circles(self) -> tuple[tuple[str, ...], ...]:
        """Tasks that wait for each other, for ever."""
        return self._backlog.circles

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

    def begin(self) -> None:
        """The source has told of all that was there at the start."""
        if not self._bad_luck:
            self._held_until = -math.inf
        self.wake()

    def drain(self) -> None:
        """Take no more tasks; `run` returns when those under way have ended."""
        self.draining = True
        self._recovery.cancel()  # what a dead worker has left is found by the next one as well
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
        try:
            with self._attempts:
                with self._recovery:
                    await self._see_to_the_dead()
                self._held_until = trio.current_time() + self._first_look
                self.ready.set()
                async with trio.open_nursery() as nursery:
                    while not (self.draining and not self.active):
                        await self._go_round(nursery)
        finally:
            self.over = True
            self._turned.set()

    async def _go_round(self, nursery: trio.Nursery) -> None:
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
            if self.draining:
                return
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
                    if offer.task_id in self._refused:  # all others come first: perhaps it is refused for itself
                        offer = evolve(offer, priority=-MOST_PRIORITY - 1)
                    # First it waits, then we ask: what completes in between is told by news or by the answer.
                    self._backlog.add(offer, missing=offer.dependencies)
                    wanted.update(offer.dependencies)
                case Vanished(key) if key not in self._broken:
                    if gone := self._backlog.remove(key):
                        self._refused.discard(gone.task_id)
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
        while self._places and not self.draining and not self._is_paused(now) and not self._is_held(clock):
            offer = self._backlog.next(now)
            if offer is None or not self._may_claim():
                return
            permit = self._breaker.ask(clock)
            if permit is None:
                return
            arrival = self._backlog.arrival(offer.key)
            self._backlog.remove(offer.key)
            self._places -= 1
            self._probe = offer if self._bad_luck else None
            self.active.append((offer.task_id, offer.attempts + 1))
            nursery.start_soon(self._attempt, offer, arrival, permit, name=f"task {offer.task_id}")

    def _is_paused(self, now: float) -> bool:
        """By both clocks: the one on the wall may be set back, the other stands still while the machine sleeps."""
        return now < self.paused_until and trio.current_time() < self._pause_ends

    def _is_held(self, clock: float) -> bool:
        """After trouble nobody begins for a while, and then one at a time."""
        return clock < self._held_until or self._probe is not None

    def _pause(self, now: float, clock: float) -> float:
        """How long nothing will happen by itself, in seconds. For ever, for a worker that has nothing to do."""
        if self.draining or not self._places or self._probe is not None:
            return math.inf
        if self._is_paused(now):
            return min(self.paused_until - now, LOOK_AGAIN) if len(self._backlog) else math.inf
        if clock < self._held_until:
            return self._held_until - clock if len(self._backlog) else math.inf
        if self._backlog.next(now) is not None:  # so it is the breaker that keeps it from starting
            wait = self._breaker.opens_in(clock)
            return wait if wait > 0 else math.inf
        next_time = self._backlog.next_time()
        return math.inf if next_time is None else min(max(0.0, next_time - now), LOOK_AGAIN)

    # --- one attempt --------------------------------------------------------------------------------------

    async def _attempt(self, offer: Offer, arrival: int, permit: Permit) -> None:
        try:
            with telling_of(worker=self._worker, task_id=offer.task_id):
                claim = await self._claim(offer, arrival)
                if claim is not None:
                    await self._run(claim, permit)
        finally:
            self._breaker.given_up(permit)  # unless it has been handed back
            self.active.remove((offer.task_id, offer.attempts + 1))
            self._places += 1
            if self._probe is offer:
                self._probe = None
            self.wake()

    async def _claim(self, offer: Offer, arrival: int) -> Claim | None:
        if offer.key in self._claiming:  # the source had told of it again while it was being taken
            return None
        self._claiming.add(offer.key)
        try:
            claim = await self._source.claim(offer)
        except SourceTrouble as error:
            self._hold("claim", error)
            self._broken.add(offer.key)
            if offer.key not in self._backlog:  # it was not told of anew meanwhile
                self._backlog.add(offer, arrival=arrival)
            return None
        finally:
            self._claiming.remove(offer.key)
        self._broken.discard(offer.key)
        self._works("claim")
        return claim

    def _hold(self, what: str, error: Exception) -> None:
        """It would be the same with each task: nobody tries for a while."""
        self._trouble(what, error)
        clock = trio.current_time()
        if clock >= self._held_until:  # else it had begun before that
            self._bad_luck[what] = self._bad_luck.get(what, 0) + 1
            self._held_until = clock + _pause_after(self._bad_luck[what])

    def _works(self, what: str) -> None:
        self._mended(what)
        if self._bad_luck.pop(what, 0) and not self._bad_luck:
            self._held_until, self._probe = -math.inf, None
            self.wake()

    @trio.lowlevel.enable_ki_protection
    async def _run(self, claim: Claim, permit: Permit) -> None:
        number = len(claim.attempts) + 1
        task, limit = claim.task, self._policy.limit(claim.task)
        if len(claim.attempts) >= limit:  # it is lower than it was
            detail = f"it had {len(claim.attempts)} attempts, and may have {limit} now; {claim.attempts[-1].error}"
            await self._bury(claim, claim.attempts, MAX_RETRIES, detail, {"seconds": 0.0})
            return
        self._emit(TaskClaimed(worker=self._worker, task_id=task.task_id, attempt=number))
        unfit: Exception | None = None
        refusal: Exception | None = None
        result: JobResult | None = None
        started = self._now()
        try:
            unfit, spec = self._spec(task, number)
            if spec is not None:
                result = await self._execute(claim, spec)
        except (SpecError, BadInput) as error:
            unfit = error
        except SuperviseError as error:
            refusal = error
        except BaseException:  # a cancellation, which the nursery there wraps in a group
            with trio.CancelScope(shield=True):
                await self._put_back(claim, number, "the worker ends")
            raise
        if unfit is not None:
            attempt = Attempt(
                attempt=number, started=started, ended=self._now(), failure_kind=INVALID, error=_told(unfit)
            )
            await self._carry_out(claim, Bury(INVALID), attempt, None)
        elif refusal is not None:
            await self._refuse(claim, number, refusal)
        if result is None:
            return
        self._refused.discard(task.task_id)
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

    def _spec(self, task: Task, number: int) -> tuple[Exception | None, JobSpec | None]:
        """The job for an attempt, or why there is none: whatever a function of somebody's own raises."""
        try:
            return None, self._spec_of(task, number)
        except Exception as error:
            if not isinstance(error, SuperviseError):
                log.error("task %s: no job could be made of it", task.task_id, exc_info=error)
            return error, None

    async def _refuse(self, claim: Claim, number: int, error: Exception) -> None:
        """No job could be run at all. That is no fault of the task's, unless it is so again when others run."""
        task = claim.task
        if task.task_id in self._refused and "executor" not in self.troubles:
            now = self._now()
            kind = FailureKind.SPAWN.value
            attempt = Attempt(attempt=number, started=now, ended=now, failure_kind=kind, error=str(error))
            decision = self._policy.after_failure(task, number, now=now, chance=self._chance())
            await self._carry_out(claim, decision, attempt, None)
            return
        self._refusals += 1
        self._refused.add(task.task_id)
        self._hold("executor", error)
        if await self._insist("put back", claim.release, task.task_id):
            reason = f"no job could be run: {error}"
            self._emit(TaskPutBack(worker=self._worker, task_id=task.task_id, attempt=number, reason=reason))

    async def _execute(self, claim: Claim, spec: JobSpec) -> JobResult | None:
        """Run the job, the claim kept meanwhile. None if nothing came of it, and all is said.

        Raises SuperviseError: no job could be run at all.
        """
        refusals = self._refusals
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

        def it_runs() -> None:
            """Of one that began before the last trouble that says nothing."""
            if refusals == self._refusals:
                self._works("executor")

        def observe(event: Event) -> None:
            it_runs()
            self._observe(claim.task, event)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(renew, name="renew")
            try:
                result = await self._executor.execute(spec, observe)
            except Exception as error:
                trouble = error
            nursery.cancel_scope.shield = True  # what came of the job is not lost to a cancellation of this moment
            nursery.cancel_scope.cancel()
        if lost is not None and result is None:
            log.error("%s", lost)
            return None
        if trouble is not None and not isinstance(trouble, SuperviseError):  # a bug, of a runner of somebody's own
            log.error("task %s: the executor raised", claim.task.task_id, exc_info=trouble)
            told = f"the executor raised {_told(trouble)}"
            kind = FailureKind.AGENT_ERROR
            return JobResult(job_id=spec.job_id, outcome=Outcome.FAILED, failure_kind=kind, error=told)
        if trouble is not None:
            raise trouble
        it_runs()
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
                if await self._insist("publication", lambda: claim.finish(record), task.task_id):
                    completed = result.outcome is Outcome.COMPLETED
                    self._count(tasks_processed=1, tasks_failed=0 if completed else 1)
                    self._emit(TaskFinished(**names, **spent, status=result.outcome.value))
                    if completed:
                        self._backlog.completed(task.task_id)
            case Retry(at):
                if await self._insist("put back", lambda: claim.retry(history, at), task.task_id):
                    self._count(tasks_retried=1)
                    kind, error = attempt.failure_kind, attempt.error
                    self._emit(TaskRetried(**names, **spent, failure_kind=kind, error=error, at=at))
            case Bury(reason):
                await self._bury(claim, history, reason, attempt.error, spent)
            case Pause(until):
                self.paused_until = max(self.paused_until, until)
                self._pause_ends = max(self._pause_ends, trio.current_time() + until - now)
                if await self._insist("put back", lambda: claim.retry(claim.attempts, until), task.task_id):
                    self._emit(TaskPutBack(**names, reason=f"a quota is used up: {attempt.error}"))

    async def _bury(
        self, claim: Claim, history: Sequence[Attempt], reason: str, detail: str, spent: dict[str, Any]
    ) -> None:
        task_id, number = claim.task.task_id, history[-1].attempt
        record = records.dead_letter(claim.task, self._worker, history, reason, detail, self._now())
        if await self._insist("dead letter", lambda: claim.bury(record), task_id):
            self._refused.discard(task_id)
            self._count(tasks_processed=1, tasks_failed=1, tasks_dlq=1)
            names: dict[str, Any] = {"worker": self._worker, "task_id": task_id, "attempt": number}
            self._emit(TaskBuried(**names, **spent, reason=reason, detail=detail))

    async def _insist(self, what: str, do: Callable[[], Awaitable[object]], task_id: str = "") -> bool:
        """Do it, again and again if need be; the place of the task stays taken meanwhile. False if the claim is lost.

        The first try is made also when everything ends, and another one at the end: a result that is there shall be
        published.
        """
        try:
            for tries in itertools.count():
                with trio.CancelScope(shield=tries == 0):
                    if (done := await self._try(what, do)) is not None:
                        return done
                await trio.sleep(_pause_after(tries + 1))
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                if (done := await self._try(what, do)) is not None:
                    return done
            if task_id and self.ready.is_set():  # else it is found by the next worker as it was by this one
                self._leave_unpublished(what, task_id)
            raise
        raise AssertionError("it is tried for ever")

    async def _try(self, what: str, do: Callable[[], Awaitable[object]]) -> bool | None:
        """Whether it is done; None if it has to be tried again."""
        try:
            await do()
        except ClaimLost as error:
            log.error("%s", error)
            return False
        except SourceTrouble as error:
            self._trouble(what, error)
            return None
        self._mended(what)
        return True

    def _leave_unpublished(self, what: str, task_id: str) -> None:
        self.unpublished += 1
        told = (
            f"task {task_id}: what came of its attempt is lost, since the worker ends ({self.troubles[what]}); "
            "the next start counts the attempt as one in which the worker died"
        )
        log.error("%s: %s", what, told)
        self._emit(WorkerTrouble(worker=self._worker, what=what, error=told))

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


def _told(error: Exception) -> str:
    """Ours speak for themselves."""
    return str(error) if isinstance(error, SuperviseError) else f"{type(error).__name__}: {error}"


def _pause_after(failures: int) -> float:
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 32))
