"""The dispatcher against a source and an executor that do anything: what must be true of every life of a worker."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
from hypothesis import HealthCheck, Phase, event, find, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from supervise.dispatch.backlog import Backlog, Offer
from supervise.dispatch.breaker import Breaker, Permit
from supervise.dispatch.dispatcher import Dispatcher
from supervise.dispatch.task import Attempt, Task, of_fields
from supervise.model import FailureKind, Outcome
from tests.dispatch_fakes import START, Act, NoJob, Ran, Stage, Wall

LIMIT = 3
FAILURES = 3
RESET = 60.0
IDS = [f"t{number}" for number in range(8)]

# --- scenes --------------------------------------------------------------------------------------------------


@attrs.frozen
class Submitted:
    """A task: when it comes, and what becomes of each attempt at it."""

    at: float
    priority: int
    dependencies: tuple[str, ...]
    delay: float
    acts: tuple[Act, ...]
    attempts: int  # that were made before
    is_dead: bool  # the worker before had it under way when it died


@attrs.frozen
class Scene:
    tasks: tuple[Submitted, ...]
    max_concurrent: int
    troubles: dict[str, set[int]]
    losses: dict[tuple[str, int], float]
    jumps: tuple[tuple[float, float], ...]
    crumb: float
    drain: float
    cancel: float
    chances: tuple[float, ...]


def seconds(high: float, salt: int) -> st.SearchStrategy[float]:
    """Lengths, each kind with its own crumb, so that sums of different ones are hardly ever equal."""
    return st.integers(0, int(high * 10)).map(lambda tenths: tenths / 10 + salt * 0.000_131_7)


gives = st.sampled_from(
    [Outcome.COMPLETED] * 4
    + [Outcome.TIMED_OUT, Outcome.CANCELLED, NoJob, RuntimeError]
    + [FailureKind.OVERLOADED] * 4
    + [FailureKind.NETWORK, FailureKind.QUOTA, FailureKind.AUTH, FailureKind.KILLED]
)
acts = st.builds(
    Act,
    seconds=seconds(20, 1),
    gives=gives,
    reset_after=st.none() | seconds(200, 2),
    deaf=st.sampled_from([False, False, False, True]),
)
submitted = st.builds(
    Submitted,
    at=seconds(40, 3),
    priority=st.integers(-1, 2),
    dependencies=st.lists(st.sampled_from(IDS), max_size=2, unique=True).map(tuple) | st.just(()),
    delay=st.just(0.0) | seconds(100, 4),
    acts=st.lists(acts, min_size=1, max_size=4).map(tuple),
    attempts=st.sampled_from([0, 0, 0, 1, 2]),
    is_dead=st.sampled_from([False, False, False, True]),
)
never = st.just(math.inf)
scenes = st.builds(
    Scene,
    tasks=st.lists(submitted, min_size=1, max_size=len(IDS)).map(tuple),
    max_concurrent=st.integers(1, 3),
    troubles=st.dictionaries(
        st.sampled_from(["recover", "claim", "completed", "finish", "retry", "bury", "release"]),
        st.sets(st.integers(0, 6), max_size=4),
        max_size=3,
    ),
    losses=st.dictionaries(st.tuples(st.sampled_from(IDS), st.integers(1, 2)), seconds(10, 5), max_size=1),
    jumps=st.lists(st.tuples(seconds(100, 6), st.sampled_from([-300.0, -5.0, 5.0, 300.0])), max_size=2).map(tuple),
    crumb=st.sampled_from([1e-6, 1e-6, 0.01]),
    drain=st.one_of(never, never, seconds(60, 7)),
    cancel=st.one_of(never, never, seconds(60, 8)),
    chances=st.lists(st.floats(0, 1), min_size=1, max_size=4).map(tuple),
)


# --- one life --------------------------------------------------------------------------------------------------


class Told(Breaker):  # type: ignore[misc]  # final
    """A breaker that keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(failures=FAILURES, reset_after=RESET)
        self.permits: list[Permit] = []
        self.reports: list[tuple[int, bool, float]] = []

    def ask(self, now: float) -> Permit | None:
        permit = super().ask(now)
        if permit is not None:
            self.permits.append(permit)
        return permit

    def report(self, permit: Permit, *, ok: bool, now: float) -> None:
        self.reports.append((permit.number, ok, now))
        super().report(permit, ok=ok, now=now)


class Life:
    """A scene, as it was played."""

    def __init__(self, scene: Scene, kind: type[Dispatcher]) -> None:
        self.scene = scene
        self.ended = math.inf
        self.drained = min(scene.drain, scene.cancel)
        self.named = dict(zip(IDS, scene.tasks, strict=False))
        self.tasks = {name: self._task(name, each) for name, each in self.named.items()}
        self.stage: Stage
        self.kind = kind

    def _task(self, name: str, each: Submitted) -> Task:
        due = START + each.at + each.delay if each.delay else None
        earlier = [other for other in each.dependencies if other < name]  # no circles
        fields = {"priority": each.priority, "dependencies": earlier, "not_before": due}
        return of_fields({"task_id": name, "description": "d", **fields})

    async def play(self) -> None:
        scene = self.scene
        history = {
            name: tuple(Attempt(attempt=n + 1) for n in range(each.attempts)) for name, each in self.named.items()
        }
        chances = itertools.cycle(scene.chances)
        self.stage = stage = Stage(
            {name: (*each.acts, Act()) for name, each in self.named.items()},
            kind=self.kind,
            max_concurrent=scene.max_concurrent,
            max_attempts=LIMIT,
            wall=Wall(scene.jumps, scene.crumb),
            chance=lambda: next(chances),
            troubles=scene.troubles,
            losses=scene.losses,
            dead=[(self.tasks[name], history[name]) for name, each in self.named.items() if each.is_dead],
        )
        stage.dispatcher._breaker = self.breaker = Told()
        with trio.fail_after(100_000):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._signals, nursery.cancel_scope)
                nursery.start_soon(self._submit, history)
                await stage.dispatcher.run()
                self.ended = trio.current_time()
                nursery.cancel_scope.cancel()

    async def _submit(self, history: dict[str, tuple[Attempt, ...]]) -> None:
        source = self.stage.source
        for name, each in sorted(self.named.items(), key=lambda item: item[1].at):
            await trio.sleep_until(each.at)
            if not each.is_dead:
                source.put(self.tasks[name], history[name])
        await source.until(self._is_over)
        await trio.sleep(LIMIT * RESET)
        turns = self.stage.dispatcher.turns
        await trio.sleep(5000)
        self.idle_turns = self.stage.dispatcher.turns - turns
        self.drained = min(self.drained, trio.current_time())
        self.stage.dispatcher.drain()

    def counted_refusals(self) -> list[Ran]:
        """Of the jobs that could not be run, those that were somebody's attempt: the next one has another number."""
        source, found = self.stage.source, list[Ran]()
        for name in self.named:
            ran = [one for one in self.stage.executor.ran if one.task_id == name]
            last = len(source.dead_letters.get(name, {}).get("attempts", ()))
            for place in (source.waiting, source.running):
                last = max(last, len(place[name].attempts) if name in place else 0)
            following = [*(one.attempt for one in ran[1:]), last + 1]
            found += [
                one
                for one, number in zip(ran, following, strict=False)
                if one.act.gives is NoJob and number > one.attempt
            ]
        return found

    idle_turns = 0

    def _is_over(self) -> bool:
        """All have ended, but for those that wait for what never completes."""
        source = self.stage.source
        hopeless = source.ended() - source.completed_ids()
        for name, task in self.tasks.items():  # dependencies come first
            if hopeless & set(task.dependencies) and name not in source.ended():
                hopeless.add(name)
        return set(self.tasks) <= hopeless | source.ended() and not source.running

    async def _signals(self, scope: trio.CancelScope) -> None:
        dispatcher = self.stage.dispatcher
        with trio.move_on_at(self.scene.cancel):
            await trio.sleep_until(self.scene.drain)
            dispatcher.drain()
            await trio.sleep_forever()
        dispatcher.cancel()


def check(scene: Scene, kind: type[Dispatcher] = Dispatcher) -> Life:
    """Play it, and check all of it."""
    life = Life(scene, kind)
    trio.run(life.play, clock=MockClock(autojump_threshold=0))
    check_ends(life)
    check_claims(life)
    check_attempts(life)
    check_breaker(life)
    check_quota(life)
    check_signals(life)
    assert life.idle_turns <= 2, "it wakes up, and has nothing to do"
    return life


def check_ends(life: Life) -> None:
    """Each task ends once, or is where it was."""
    source = life.stage.source
    places = [source.results, source.dead_letters, source.lost, source.waiting, source.running]
    begun = {each.task_id for each in source.claims} | set(source.running) | source.ended() | set(source.waiting)
    for name in begun:
        assert sum(name in place for place in places) == 1, name
    if life.drained >= 5000:  # nobody ended it before its time
        assert life._is_over()
        assert set(begun) == set(life.tasks)
    stats = life.stage.dispatcher.stats
    assert stats.tasks_processed == len(source.results) + len(source.dead_letters)
    assert stats.tasks_dlq == len(source.dead_letters)
    assert stats.tasks_failed == stats.tasks_processed - len(source.completed_ids())


def check_claims(life: Life) -> None:
    """So many at a time; not before their time; by priority among those that are ready."""
    source = life.stage.source
    assert life.stage.executor.most <= life.scene.max_concurrent
    assert source.most <= life.scene.max_concurrent + sum(each.is_dead for each in life.scene.tasks)
    for claimed in source.claims:
        set_back = any(by < 0 and when <= claimed.at for when, by in life.scene.jumps)
        assert claimed.wall >= claimed.not_before or set_back  # it had been ready before
        at_once = {each.task_id for each in source.claims if each.at == claimed.at}
        for name, priority in claimed.others:
            jumped = any(0 <= claimed.at - when < 61 for when, _ in life.scene.jumps)
            assert priority <= claimed.priority or name in at_once or jumped, (claimed, name)


def check_attempts(life: Life) -> None:
    """Counted once each, never past the limit; with a pause between them."""
    source = life.stage.source
    for name, each in life.named.items():
        ran = [one for one in life.stage.executor.ran if one.task_id == name]
        assert all(one.attempt <= LIMIT for one in ran)
        counted = [one for one in ran if counts(one, life)]
        before = each.attempts + each.is_dead
        numbers = [one.attempt for one in counted]
        assert numbers == [*range(before + 1, before + 1 + len(counted))], "each is counted, and counted once"
        letter = source.dead_letters.get(name)
        if letter is not None:
            assert [one["attempt"] for one in letter["attempts"]] == [*range(1, before + 1 + len(counted))]
        result = source.results.get(name)
        if result is not None:
            assert result["attempt"] == before + len(counted) <= LIMIT
        jumped = any(by > 0 for _, by in life.scene.jumps)
        for one, following in itertools.pairwise(ran):
            if counts(one, life) and not jumped:
                assert one.ended is not None
                assert following.began >= one.ended + 0.75 * 2 ** (one.attempt - 1) - 0.5 - 11 * life.scene.crumb


def counts(ran: Ran, life: Life) -> bool:
    if ran.act.gives is NoJob:  # it does if others ran since the last time
        return ran in life.counted_refusals()
    return ran.ended is not None and ran.act.gives is not FailureKind.QUOTA


def check_breaker(life: Life) -> None:
    """After so many failures in a row nobody begins for a while; then one at a time, until one succeeds."""
    failed, opened, probe = 0, -math.inf, None
    is_open = False
    moments: list[tuple[float, int, Ran]] = []
    for ran in life.stage.executor.ran:
        moments.append((ran.began, 1, ran))
        # Also one whose claim was lost is over, and another may probe.
        moments.append((math.inf if ran.left is None else ran.left, 0, ran))
    under_way: list[Ran] = []
    for at, is_begin, ran in sorted(moments, key=lambda each: each[:2]):
        if is_begin:
            if is_open:
                assert at >= opened + RESET - 1e-6, "the breaker is open"
                assert probe is None, "a probe is under way"
                probe = ran
            under_way.append(ran)
            continue
        speaks = speaks_for(ran)
        if ran is probe:
            probe = None
            if speaks is not None:
                is_open, opened, failed = not speaks, at, 0
        elif not is_open and speaks is not None:
            failed = 0 if speaks else failed + 1
            if failed >= FAILURES:
                is_open, opened = True, at
    numbers = [number for number, _, _ in life.breaker.reports]
    assert len(numbers) == len(set(numbers)), "a permit is good for one report"


def speaks_for(ran: Ran) -> bool | None:
    if ran.ended is None or ran.act.gives in (Outcome.CANCELLED, FailureKind.QUOTA, NoJob):
        return None
    return ran.act.gives is Outcome.COMPLETED


def check_quota(life: Life) -> None:
    """Nobody begins before the quota is reset."""
    for ran in life.stage.executor.ran:
        if ran.ended is not None and ran.act.gives is FailureKind.QUOTA:
            pause = 300.0 if ran.act.reset_after is None or ran.act.reset_after == 0 else ran.act.reset_after
            for claimed in life.stage.source.claims:
                if claimed.at > ran.ended:  # the clock on the wall may be set back meanwhile
                    waited = max(claimed.wall - ran.wall, claimed.at - ran.ended)
                    assert waited >= min(pause, 3600) - 0.1, "the quota is used up"


def check_signals(life: Life) -> None:
    """Drained, it takes nothing more; cancelled, it puts everything back, uncounted, and ends."""
    source, scene = life.stage.source, life.scene
    assert all(claimed.at <= life.drained for claimed in source.claims)
    assert not life.stage.dispatcher.active
    if scene.cancel < math.inf and life.ended >= scene.cancel:
        longest = max([0.0, *(act.seconds for each in scene.tasks for act in each.acts if act.deaf)])
        assert life.ended <= scene.cancel + longest + 0.1
    if not scene.troubles:
        assert not source.running
    for name in source.waiting:
        counted = [ran for ran in life.stage.executor.ran if ran.task_id == name and counts(ran, life)]
        each = life.named[name]
        assert len(source.waiting[name].attempts) == each.attempts + each.is_dead + len(counted)


# --- the machine -----------------------------------------------------------------------------------------------

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(QUIET, max_examples=60, phases=[Phase.generate])
@given(scenes)
def test_every_life_of_a_worker(scene: Scene) -> None:
    life = check(scene)
    event("ended early" if life.drained < 5000 else "ended when all was done")


def found(condition: Callable[[Scene], bool]) -> Scene:
    """Some scene for which the condition is true."""
    fixed = settings(QUIET, max_examples=1500, phases=[Phase.generate], derandomize=True, database=None)
    return find(scenes, condition, settings=fixed)


# --- the machine finds what it is made to find -----------------------------------------------------------------


class TakesMoreThanItMay(Dispatcher):  # type: ignore[misc]  # final
    def __init__(self, *args: Any, **parts: Any) -> None:
        super().__init__(*args, **parts)
        self._places += 1


class TakesNoNoticeOfTheBreaker(Dispatcher):  # type: ignore[misc]  # final
    def _start_what_can_start(self, nursery: trio.Nursery, now: float, clock: float) -> None:
        super()._start_what_can_start(nursery, now, clock + 1e9)


class WakesUpAgainAndAgain(Dispatcher):  # type: ignore[misc]  # final
    def _pause(self, now: float, clock: float) -> float:
        return min(100.0, super()._pause(now, clock))


class ForgetsWhatIsMissing(Backlog):  # type: ignore[misc]  # final
    def add(self, offer: Offer, *, missing: Any = ()) -> None:
        super().add(offer)


class WaitsForNobody(Dispatcher):  # type: ignore[misc]  # final
    def __init__(self, *args: Any, **parts: Any) -> None:
        super().__init__(*args, **parts)
        self._backlog = ForgetsWhatIsMissing()


class ForgetsAnAttempt(Dispatcher):  # type: ignore[misc]  # final
    async def _carry_out(self, claim: Any, decision: Any, attempt: Attempt, result: Any) -> None:
        history = claim.attempts[:-1]
        claim.attempts = history
        await super()._carry_out(claim, decision, attempt, result)


@pytest.mark.parametrize(
    "broken",
    [
        TakesMoreThanItMay,
        TakesNoNoticeOfTheBreaker,
        WakesUpAgainAndAgain,
        WaitsForNobody,
        ForgetsAnAttempt,
    ],
)
def test_a_broken_dispatcher_is_found(broken: type[Dispatcher]) -> None:
    def fails(scene: Scene) -> bool:
        try:
            check(scene, broken)
        except (AssertionError, BaseExceptionGroup, trio.TooSlowError):
            return True
        return False

    check(found(fails))  # the same scene is no trouble to the dispatcher as it is
