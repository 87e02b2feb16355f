"""A source, an executor and a clock without files, processes and waiting; each keeps what was done to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio

from supervise.dispatch.backlog import Offer
from supervise.dispatch.backoff import Backoff
from supervise.dispatch.breaker import Breaker
from supervise.dispatch.dispatcher import Dispatcher
from supervise.dispatch.policy import Policy
from supervise.dispatch.source import Arrived, ClaimLost, Completed, News, SourceTrouble
from supervise.dispatch.task import Attempt, Task, of_fields
from supervise.errors import SuperviseError
from supervise.events import Event
from supervise.executors.protocol import Observer
from supervise.model import FailureKind, JobResult, JobSpec, Outcome

START = 1_800_000_000.0


class Wall:
    """The clock on the wall: goes on with Trio's, by a crumb each time it is looked at, and can be set."""

    def __init__(self, jumps: Sequence[tuple[float, float]] = (), crumb: float = 1e-6) -> None:
        self._jumps = jumps
        self._crumb = crumb
        self._looks = 0

    def __call__(self) -> float:
        self._looks += 1
        return self.peek()

    def peek(self) -> float:
        at = trio.current_time()
        return START + at + self._looks * self._crumb + sum(by for when, by in self._jumps if when <= at)


@attrs.define
class Waiting:
    """A task in the source. `told` is when its arrival was told; `since` when it could begin, on Trio's clock."""

    task: Task
    attempts: tuple[Attempt, ...] = ()
    at: float = 0.0
    told: float = 0.0
    number: int = 0
    was_troubled: bool = False


@attrs.frozen
class Claimed:
    """One call of `claim`: when it was, on both clocks, and who could have been claimed instead."""

    task_id: str
    attempt: int
    at: float
    wall: float
    not_before: float
    priority: int
    others: tuple[tuple[str, int], ...]  # ready for some time by then: id, priority


class FakeSource:
    """A `Source` in memory.

    Attributes:
        troubles: by method, the numbers of the calls that are refused.
        losses: (id, attempt) whose claim is lost, and how many seconds after it was given.
    """

    def __init__(
        self,
        wall: Wall,
        *,
        troubles: Mapping[str, Iterable[int]] = {},
        losses: Mapping[tuple[str, int], float] = {},
        dead: Sequence[tuple[Task, tuple[Attempt, ...]]] = (),
    ) -> None:
        self.waiting: dict[str, Waiting] = {}
        self.running: dict[str, FakeClaim] = {}
        self.results: dict[str, Mapping[str, Any]] = {}
        self.dead_letters: dict[str, Mapping[str, Any]] = {}
        self.lost: set[str] = set()
        self.released: set[str] = set()  # no job could be run for them: all others come first
        self.claims: list[Claimed] = []
        self.log: list[tuple[float, str, str]] = []
        self.most = 0
        self.changed = trio.Event()
        self.wall = wall
        self.losses = losses
        self._troubles = {name: set(numbers) for name, numbers in troubles.items()}
        self._calls: dict[str, int] = {}
        self._wake: Callable[[], None] = lambda: None
        self._news: list[News] = []
        self._awaited: set[str] = set()
        self._done_at: dict[str, float] = {}
        self._numbers = 0
        for task, attempts in dead:
            self.running[task.task_id] = FakeClaim(self, task, attempts)

    # --- for the test --------------------------------------------------------------------------------------

    def put(self, task: Task, attempts: tuple[Attempt, ...] = (), at: float = 0.0) -> None:
        self._numbers += 1
        comes_last = task.task_id in self.released
        self.waiting[task.task_id] = Waiting(task, attempts, at, trio.current_time(), self._numbers, comes_last)
        self._say(Arrived(self._offer(task.task_id)))

    def submit(self, task_id: str, **fields: Any) -> None:
        self.put(of_fields({"task_id": task_id, "description": "d", **fields}))

    def ended(self) -> set[str]:
        return {*self.results, *self.dead_letters, *self.lost}

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.wait()

    def count(self, name: str) -> int:
        return self._calls.get(name, 0)

    # --- the port ------------------------------------------------------------------------------------------

    def listen(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def news(self) -> Sequence[News]:
        news, self._news = self._news, []
        return news

    async def recover(self) -> Sequence[FakeClaim]:
        await self.call("recover")
        return list(self.running.values())

    async def claim(self, offer: Offer) -> FakeClaim | None:
        now, wall = trio.current_time(), self.wall.peek()
        found = self.waiting.get(offer.task_id)
        others = [each for each in self.waiting.values() if self._could_begin(each, now) and each is not found]
        told = tuple((each.task.task_id, each.task.priority) for each in others)
        claimed = Claimed(offer.task_id, offer.attempts + 1, now, wall, offer.not_before, offer.priority, told)
        self.claims.append(claimed)
        try:
            await self.call("claim")
        except SourceTrouble:
            if found is not None:
                found.was_troubled = True
            raise
        if self.waiting.pop(offer.task_id, None) is None:
            return None
        assert found is not None
        assert offer.task_id not in self.running
        assert set(found.task.dependencies) <= self.completed_ids(), "a dependency has not completed"
        claim = self.running[offer.task_id] = FakeClaim(self, found.task, found.attempts)
        self.most = max(self.most, len(self.running))
        return claim

    async def completed(self, task_ids: Iterable[str]) -> set[str]:
        self._awaited |= set(task_ids)
        try:
            await self.call("completed")
        except SourceTrouble:  # it finds out by itself
            for task_id in set(task_ids) & self.completed_ids():
                self._say(Completed(task_id))
            raise
        return set(task_ids) & self.completed_ids()

    # --- small things --------------------------------------------------------------------------------------

    def completed_ids(self) -> set[str]:
        return {task_id for task_id, record in self.results.items() if record["status"] == "completed"}

    async def call(self, name: str) -> None:
        number = self._calls[name] = self._calls.get(name, 0) + 1
        await trio.lowlevel.checkpoint()
        if number - 1 in self._troubles.get(name, ()):
            raise SourceTrouble(f"{name} does not work, said call {number}")

    def note(self, what: str, task_id: str) -> None:
        self.log.append((trio.current_time(), what, task_id))
        if what == "finish" and task_id in self.completed_ids():
            self._done_at[task_id] = trio.current_time()
            if task_id in self._awaited:
                self._say(Completed(task_id))
        self.changed.set()
        self.changed = trio.Event()

    def _offer(self, task_id: str) -> Offer:
        each = self.waiting[task_id]
        return Offer(
            key=f"{task_id}.json",
            task_id=task_id,
            priority=each.task.priority,
            dependencies=each.task.dependencies,
            not_before=max(each.task.not_before, each.at),
            attempts=len(each.attempts),
        )

    def _could_begin(self, each: Waiting, now: float) -> bool:
        """For a moment at least."""
        before = self.wall.peek() - 1e-3
        done = all(self._done_at.get(task_id, math.inf) < now for task_id in each.task.dependencies)
        due = max(each.task.not_before, each.at) <= before
        return each.told < now and done and due and not each.was_troubled

    def _say(self, news: News) -> None:
        self._news.append(news)
        self._wake()


class FakeClaim:
    """A `Claim` on a task in memory."""

    def __init__(self, source: FakeSource, task: Task, attempts: tuple[Attempt, ...]) -> None:
        self.task = task
        self.attempts = attempts
        self._source = source
        after = source.losses.get((task.task_id, len(attempts) + 1), math.inf)
        self._lost_at = trio.current_time() + after if after < math.inf else math.inf

    async def renew(self) -> None:
        await trio.sleep_until(self._lost_at)
        await self._check()

    async def finish(self, record: Mapping[str, Any]) -> None:
        await self._end("finish")
        assert self.task.task_id not in self._source.ended()
        self._source.results[self.task.task_id] = dict(record)
        self._source.note("finish", self.task.task_id)

    async def retry(self, attempts: tuple[Attempt, ...], at: float) -> None:
        await self._end("retry")
        self._source.put(self.task, attempts, at)
        self._source.note("retry", self.task.task_id)

    async def bury(self, record: Mapping[str, Any]) -> None:
        await self._end("bury")
        assert self.task.task_id not in self._source.ended()
        self._source.dead_letters[self.task.task_id] = dict(record)
        self._source.note("bury", self.task.task_id)

    async def release(self) -> None:
        await self._end("release")
        self._source.released.add(self.task.task_id)
        self._source.put(self.task, self.attempts)
        self._source.note("release", self.task.task_id)

    async def _check(self) -> None:
        if trio.current_time() >= self._lost_at:
            if self._source.running.get(self.task.task_id) is self:
                del self._source.running[self.task.task_id]
                self._source.lost.add(self.task.task_id)
                self._source.note("lost", self.task.task_id)
            raise ClaimLost(f"the claim on {self.task.task_id} was lost")

    async def _end(self, what: str) -> None:
        await self._source.call(what)
        await self._check()
        assert self._source.running.pop(self.task.task_id) is self, "a claim ends once"


@attrs.frozen
class Act:
    """What an attempt does: how long it takes, and its outcome: one of Outcome, FailureKind, or an error to raise."""

    seconds: float = 1.0
    gives: Outcome | FailureKind | type[Exception] = Outcome.COMPLETED
    reset_after: float | None = None
    deaf: bool = False


@attrs.define
class Ran:
    """An attempt that was made. `ended` is None for one that was cancelled, `left` only while it is under way."""

    task_id: str
    attempt: int
    act: Act
    began: float
    ended: float | None = None
    wall: float = 0.0  # at its end
    left: float | None = None


class FakeExecutor:
    """Does what the plan says for each attempt at each task; what is not planned completes."""

    name = "fake"

    def __init__(self, plan: Mapping[str, Sequence[Act]] | None = None, wall: Wall | None = None) -> None:
        self.plan = dict(plan or {})
        self.wall = wall or Wall()
        self.ran: list[Ran] = []
        self.active = 0
        self.most = 0

    async def execute(self, spec: JobSpec, observer: Observer) -> JobResult:
        task_id = spec.labels["task"]
        number = sum(ran.task_id == task_id for ran in self.ran)
        acts = self.plan.get(task_id, ())
        act = acts[min(number, len(acts) - 1)] if acts else Act()
        ran = Ran(task_id, int(spec.labels["attempt"]), act, trio.current_time())
        self.ran.append(ran)
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            with trio.CancelScope(shield=act.deaf):
                await trio.sleep(act.seconds)
        finally:
            self.active -= 1
            ran.left = trio.current_time()
        ran.ended = trio.current_time()
        ran.wall = self.wall.peek()
        gives = act.gives
        if isinstance(gives, type):
            raise gives("no job could be run")
        failed = isinstance(gives, FailureKind)
        return JobResult(
            job_id=spec.job_id,
            outcome=Outcome.FAILED if isinstance(gives, FailureKind) else gives,
            failure_kind=gives if isinstance(gives, FailureKind) else None,
            error="it failed" if failed else None,
            reset_at=None if act.reset_after is None else ran.wall + act.reset_after,
            duration_seconds=act.seconds,
        )


def spec_of(task: Task, attempt: int) -> JobSpec:
    labels = {"task": task.task_id, "attempt": str(attempt)}
    return JobSpec(prompt=task.description, workspace=Path("/"), job_id=f"{task.task_id}.{attempt}", labels=labels)


class Stage:
    """A dispatcher and all that it needs."""

    def __init__(
        self,
        plan: Mapping[str, Sequence[Act]] | None = None,
        *,
        kind: type[Dispatcher] = Dispatcher,
        max_concurrent: int = 2,
        max_attempts: int = 3,
        failures: int = 5,
        reset_after: float = 60.0,
        wall: Wall | None = None,
        chance: Callable[[], float] = lambda: 0.0,
        spec_of: Callable[[Task, int], JobSpec] = spec_of,
        may_claim: Callable[[], bool] = lambda: True,
        first_look: float = 0.0,
        **source: Any,
    ) -> None:
        self.wall = wall or Wall()
        self.source = FakeSource(self.wall, **source)
        self.executor = FakeExecutor(plan, self.wall)
        self.events: list[Event] = []
        self.breaker = Breaker(failures=failures, reset_after=reset_after)
        self.policy = Policy(
            max_attempts=max_attempts,
            backoff=Backoff(base=1.0, cap=300.0),
            quota_pause=300.0,
            longest_quota_pause=3600.0,
        )
        self.dispatcher = kind(
            self.source,
            self.executor,
            worker="w",
            policy=self.policy,
            breaker=self.breaker,
            max_concurrent=max_concurrent,
            spec_of=spec_of,
            emit=self.events.append,
            may_claim=may_claim,
            first_look=first_look,
            now=self.wall,
            chance=chance,
        )

    def told(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class NoJob(SuperviseError):
    """As an executor that is closed."""
