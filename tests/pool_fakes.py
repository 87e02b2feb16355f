"""Jobs that share watches, without processes and without a disk, on Trio's clock.

A `Town` has one workspace, with one index, one state directory and one lock, and any number of supervisors, each with a
`WatchPool`. It plays jobs in the order of `supervise/job/nursery.py`, and holds what happens against the truth: which
names are on the mark, who is at work, and what the index really lacks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio
import trio.testing
from attrs import Factory, frozen

from supervise.events import Event, IndexChanged
from supervise.index.cidx import Cidx
from supervise.index.pool import Guest, SharedWatch, WatchPool, Wish
from supervise.index.watch import IndexDriver
from supervise.job.turns import Turns
from supervise.model import IndexReport, IndexStatus, Survivor
from supervise.processes.child import ProcessTree
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.secrets import Masker
from supervise.settings import IndexSettings
from tests.index_fakes import HEALTHY, Act, FakeLock, FakeTrees, FakeValidation, Ran, World, _watchdog

WORKSPACE = "/w"


class Disk:
    """What the state directory holds of the workspace."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.names: list[str] = []
        self.clean: str | None = f"v{world.version}"
        self.alive: set[NamedMark] = set()

    @property
    def stale(self) -> bool:
        return bool(self.names) or self.clean != f"v{self.world.version}"


class NamedMark:
    """A `StaleMark` as `DiskMark` is, in memory."""

    def __init__(self, town: Town) -> None:
        self._town = town
        self._disk = town.disk
        self._settles: set[str] = set()
        self._is_setting = False
        self.last_reconcile_seconds: float | None = None

    async def set(self, job_id: str) -> str:
        if self._is_setting:
            self._town.crimes.append("two jobs are put on one mark at one time")
        self._is_setting = True
        await trio.sleep(self._town.disk_seconds)
        self._is_setting = False
        before = list(self._disk.names)
        if self in self._disk.alive:
            self._settles.add(job_id)
            why = ""
        else:
            alone = not self._disk.alive
            self._disk.alive.add(self)
            self._settles = {job_id, *(before if alone else ())}
            why = f"job {before[-1]} was here" if before else ""
        if job_id not in self._disk.names:
            self._disk.names.append(job_id)
        return why

    async def stamp(self) -> str | None:
        version = self._disk.world.version
        await trio.sleep(self._town.disk_seconds)
        return f"v{version}"

    async def changed(self, stamp: str | None, *, assume_fresh: bool) -> str:
        await trio.lowlevel.checkpoint()
        return "" if stamp == self._disk.clean else "changed"

    async def clear(self, stamp: str | None, reconcile_seconds: float | None) -> None:
        await trio.sleep(self._town.disk_seconds)
        for name in self._settles & self._town.at_work:
            self._town.crimes.append(f"the name of {name} was taken off the mark while it is at work")
        self._disk.names = [name for name in self._disk.names if name not in self._settles]
        if not self._disk.names:
            self._disk.clean = stamp
            if not self._disk.stale and self._disk.world.lacking:
                self._town.crimes.append("the index is said to be level, and lacks edits")

    def release(self) -> None:
        self._disk.alive.discard(self)


class FakeOutfit:
    """An `Outfit` over the town's fakes."""

    trees: tuple[ProcessTree, ...] = ()

    def __init__(
        self,
        town: Town,
        driver: type[IndexDriver],
        wish: Wish,
        guest: Guest,
        emit: Callable[[Event], None],
        hurry: Hurry,
    ) -> None:
        self.closed = False
        self.lock = FakeLock(town.lock_of, until=town.locked_until)
        self.validation = town.validation
        town.outfits.append(self)
        self.driver = driver(
            tool=Cidx(),
            settings=wish.settings,
            command=lambda argv: Command(argv=argv, cwd=wish.workspace, env={}),
            open_tree=town.trees,
            mark=NamedMark(town),
            lock=self.lock,
            validation=self.validation,
            emit=partial(self._emit, town, emit),
            hurry=hurry,
        )

    def _emit(self, town: Town, emit: Callable[[Event], None], event: Event) -> None:
        if isinstance(event, IndexChanged) and event.cause in ("stop", "flushed"):
            (watch,) = (watch for watch in town.watches() if watch._outfit is self)
            if watch.holders:
                town.crimes.append(f"the watch was stopped while {watch.holders} jobs used it")
        emit(event)

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        self.closed = True


@frozen(kw_only=True)
class JobPlan:
    """One job.

    Attributes:
        at: when it is asked for, in seconds.
        agent: how long its agent works; it edits at its start, halfway and at its end.
        cancels: when it is cancelled, in seconds after `at`; all but the first say "hurry".
        settings: its index; jobs with the same can share.
        supervisor: whose job it is.
    """

    at: float = 0.0
    agent: float = 10.0
    cancels: tuple[float, ...] = ()
    settings: IndexSettings = Factory(IndexSettings)
    supervisor: int = 0


class Played:
    """One job, and what became of it."""

    def __init__(self, name: str, plan: JobPlan) -> None:
        self.name = name
        self.plan = plan
        self.events: list[Event] = []
        self.hurry = Hurry()
        self.began: float | None = None
        self.agent_began: float | None = None
        self.agent_ended: float | None = None
        self.left: float | None = None
        self.ended: float | None = None
        self.report: IndexReport | None = None
        self.survivors: tuple[Survivor, ...] = ()

    def emit(self, event: Event) -> None:
        assert self.ended is None, "told after its end"
        self.events.append(event)

    @property
    def live(self) -> list[tuple[str, str, str]]:
        """(state, cause, status) of each change."""
        return [(e.state, e.cause, e.status.value) for e in self.events if isinstance(e, IndexChanged)]

    @property
    def status(self) -> str:
        assert self.report is not None
        return self.report.status.value


class Town:
    """See the module."""

    def __init__(
        self,
        *plans: JobPlan,
        acts: Mapping[str, Sequence[Act]] = HEALTHY,
        places: int = 100,
        stale: bool = False,
        disk_seconds: float = 0.0,
        locked_until: float = 0.0,
        driver: type[IndexDriver] = IndexDriver,
        masker: Callable[[str], Masker] = lambda name: Masker(),
    ) -> None:
        self.world = World()
        self.trees = FakeTrees(acts, self.world)
        self.disk = Disk(self.world)
        if stale:
            self.disk.names.append("earlier")
            self.world.lacking.add(1)
        self.disk_seconds = disk_seconds
        self.lock_of: dict[str, object] = {}
        self.locked_until = locked_until
        self.validation = FakeValidation()
        self.outfits: list[FakeOutfit] = []
        self.crimes = self.world.crimes
        self.at_work: set[str] = set()
        self.jobs = [Played(f"j{number}", plan) for number, plan in enumerate(plans)]
        self._driver = driver
        self._places = places
        self._masker = masker
        self._pools: dict[int, tuple[Turns, WatchPool]] = {}

    def watches(self) -> list[SharedWatch]:
        """Those of all supervisors."""
        pools = [pool for _, pool in self._pools.values()]
        return [watch for pool in pools for each in pool._watches.values() for watch in each]

    def play(self, *, limit: float = 20_000.0) -> Town:
        """All jobs, to their ends."""
        trio.run(self._play, limit, clock=trio.testing.MockClock(autojump_threshold=0))
        return self

    async def _play(self, limit: float) -> None:
        async with trio.open_nursery() as watchdog:
            watchdog.start_soon(_watchdog, limit)
            async with trio.open_nursery() as nursery:
                for number in {job.plan.supervisor for job in self.jobs}:
                    turns = Turns(self._places)
                    outfitter = partial(FakeOutfit, self, self._driver)
                    self._pools[number] = turns, WatchPool(nursery, outfitter, turns.admit)
                for job in self.jobs:
                    nursery.start_soon(self._job, job)
            watchdog.cancel_scope.cancel()
        for turns, pool in self._pools.values():
            assert turns.unused
            assert pool.empty

    async def _job(self, job: Played) -> None:
        """As `run` in supervise/job/nursery.py."""
        turns, pool = self._pools[job.plan.supervisor]
        await trio.sleep_until(job.plan.at)
        turn = turns.ask(lambda: not pool.is_closing(WORKSPACE))
        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel, job, scope)
            try:
                with scope:
                    await turn.comes()
                    job.began = trio.current_time()
                    await self._live(job, pool)
            finally:
                job.ended = trio.current_time()
                turn.end()
            nursery.cancel_scope.cancel()

    async def _live(self, job: Played, pool: WatchPool) -> None:
        guest = Guest(
            directory=Path("/") / job.name, env={}, masker=self._masker(job.name), emit=job.emit, hurry=job.hurry
        )
        lease = pool.join(Wish(workspace=WORKSPACE, settings=job.plan.settings, user=None), guest)
        agent_ended, index_ended = trio.Event(), trio.Event()
        self.at_work.add(job.name)

        async def index() -> None:
            try:
                await lease.run()
                with trio.move_on_after(1, shield=True):
                    job.report = await lease.report()
            finally:
                index_ended.set()

        def left() -> None:
            self.at_work.discard(job.name)
            job.left = trio.current_time()

        try:
            await lease.mark(job.name)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(index)
                agent_runs = False
                try:
                    with trio.move_on_after(job.plan.settings.startup_timeout):
                        await lease.ready()
                    if job.name not in self.disk.names:
                        self.crimes.append(f"{job.name} works without its name on the mark")
                    lease.agent_starts()
                    nursery.start_soon(self._agent, job, agent_ended)
                    agent_runs = True
                    await agent_ended.wait()
                    left()
                    lease.finish()
                    await index_ended.wait()
                except BaseException:
                    with trio.CancelScope(shield=True):
                        if agent_runs and not agent_ended.is_set():
                            await agent_ended.wait()
                        left()
                        lease.cancel()
                        await index_ended.wait()
                    raise
        finally:
            job.survivors = lease.survivors
            lease.abandon()

    async def _agent(self, job: Played, ended: trio.Event) -> None:
        job.agent_began = trio.current_time()
        try:
            self.world.edit()
            for _ in range(2):
                await trio.sleep(job.plan.agent / 2)
                self.world.edit()
        finally:
            self.world.edit()
            job.agent_ended = trio.current_time()
            ended.set()

    async def _cancel(self, job: Played, scope: trio.CancelScope) -> None:
        for number, after in enumerate(sorted(job.plan.cancels)):
            await trio.sleep_until(job.plan.at + after)
            if number == 0:
                scope.cancel()
            else:
                job.hurry.next()

    @property
    def heavy(self) -> list[Ran]:
        """The watches and reconciles, of which one at a time may run."""
        return [ran for ran in self.trees.runs if ran.name in ("watch", "index") and not ran.act.refuses]

    def check(self) -> None:
        """What holds whatever happens."""
        for one, other in itertools.combinations(self.heavy, 2):
            assert not one.beside(other), f"{one.name} at {one.began:g} beside {other.name} at {other.began:g}"
        assert not self.crimes
        assert not self.trees.living()
        assert not self.trees.daemons
        assert not self.disk.alive
        assert not self.lock_of
        assert not self.at_work
        assert all(outfit.closed for outfit in self.outfits)
        for job in self.jobs:
            if job.began is None:
                assert job.plan.cancels, "it never began"
                continue
            assert job.report is not None
            if job.report.status in (IndexStatus.WATCH_TERMINATED, IndexStatus.READY_VIA_FALLBACK):
                assert not job.report.stale
                assert job.name not in self.disk.names
            else:
                assert job.report.stale
            if job.report.status is IndexStatus.WATCHING:
                assert job.report.reason.startswith("shared: ")
                assert job.ended == job.left, "it waits for nobody"


def outcome(town: Town) -> tuple[list[Any], bool]:
    """(the jobs' statuses in order, whether the mark is there)."""
    return [job.status for job in town.jobs], bool(town.disk.names)
