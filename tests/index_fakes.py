"""A cidx without processes, a mark without a disk, and a job without an agent, all on Trio's clock.

`drive` runs one `IndexDriver` through one job, in the order of `supervise/job/nursery.py`. The fakes know the truth:
which edits the index lacks. A test can ask it whether the mark was cleared with a right.
"""

from __future__ import annotations

import gc
import itertools
import math
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing
from attrs import Factory, define, frozen

from supervise.errors import SpawnError
from supervise.events import Event, IndexChanged
from supervise.index import cidx
from supervise.index.cidx import Cidx, Line
from supervise.index.watch import IndexDriver
from supervise.model import ExitStatus, IndexReport, StopPolicy, Survivor
from supervise.processes.child import Sink
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.settings import IndexSettings

READY = "Watchdog observer started monitoring: /w"
OK = ExitStatus(code=0)
BAD = ExitStatus(code=1)
KILLED = ExitStatus(signal="SIGKILL")
NEVER = math.inf


@frozen(kw_only=True)
class Act:
    """What one run of a program does. Times are seconds after its spawn.

    Attributes:
        refuses: it cannot be started, for this reason.
        lines: what it prints, and when.
        parting: what it prints last, newlines as they are; read `lag` seconds after its end is known.
        ends: when it ends by itself; `None` for never.
        status: with which status.
        answer: how it answers its first SIGINT: after so many seconds, with this status; `None` for not at all.
        on_term: how many seconds SIGTERM takes; `None` if it does not care.
        daemon: it leaves a process in the tree that holds its pipes, until `cidx stop` or a SIGTERM.
        immortal: not even SIGKILL ends it.
        works: a reconcile that does level the index, whatever it says.
    """

    refuses: str = ""
    lines: tuple[tuple[float, str], ...] = ()
    parting: str = ""
    lag: float = 0.0
    ends: float | None = None
    status: ExitStatus = OK
    answer: tuple[float, ExitStatus] | None = (0.5, OK)
    on_term: float | None = 0.0
    daemon: bool = False
    immortal: bool = False
    works: bool = True


#: How a healthy cidx without daemon mode behaves.
HEALTHY: Mapping[str, Sequence[Act]] = {
    "start": [Act(ends=0.1, status=BAD, parting="Daemon mode not enabled\n")],
    "fix-config": [Act(ends=0.1)],
    "watch": [Act(lines=((1.0, READY),))],
    "index": [Act(ends=3.0, lines=((0.5, "indexing 5 files"),), parting="Files processed: 5\n")],
    "stop": [Act(ends=0.1, status=BAD)],
}


class World:
    """The workspace, and what its index lacks of it."""

    def __init__(self) -> None:
        self.version = 1
        self.lacking: set[int] = set()
        self.watching: dict[FakeChild, set[int]] = {}
        self.crimes: list[str] = []

    def edit(self) -> None:
        """The agent changes a file. The watches that are up have it in their hands, but not yet in the index."""
        self.version += 1
        for pending in self.watching.values():
            pending.add(self.version)
        if not self.watching:
            self.lacking.add(self.version)

    def watch_said(self, child: FakeChild, line: str) -> None:
        """A watch sees edits from its readiness on; one that met an error has lost them."""
        meaning = cidx.meaning(line)
        if meaning is Line.READY:
            self.watching[child] = set()
        elif meaning is Line.ERROR:
            self.lacking |= self.watching.pop(child, set())

    def watch_ended(self, child: FakeChild) -> None:
        """What it had in its hands is in the index if it was asked to flush and says that it did."""
        pending = self.watching.pop(child, set())
        if not (child.interrupted and child.status == OK):
            self.lacking |= pending

    def reconciled(self, since: int) -> None:
        """A reconcile that began at version `since` has worked."""
        self.lacking = {version for version in self.lacking if version > since}


@define(eq=False)
class Ran:
    """One run of a program, on record: what it did, which signals it got and what it said, each with its time."""

    name: str
    role: str
    argv: tuple[str, ...]
    act: Act
    began: float
    ended: float = NEVER
    status: ExitStatus | None = None
    signals: list[tuple[float, str]] = Factory(list)
    said: list[tuple[float, str]] = Factory(list)

    @property
    def asked(self) -> list[str]:
        """The signals' names."""
        return [name for _, name in self.signals]

    def beside(self, other: Ran) -> bool:
        """Whether both ran at one time."""
        return self.began < other.ended and other.began < self.ended


class FakeChild:
    """A `Child` that plays an `Act`."""

    def __init__(self, tree: FakeTree, act: Act, ran: Ran, sinks: tuple[Sink | None, Sink | None], pid: int) -> None:
        self.pid = pid
        self.status: ExitStatus | None = None
        self.act = act
        self.ran = ran
        self.interrupted = False
        self._tree = tree
        self._sinks = sinks
        self._text = ""
        self._ended = trio.Event()
        self._drained = trio.Event()
        self._since = tree.trees.world.version

    async def wait(self) -> ExitStatus:
        await self._ended.wait()
        assert self.status is not None
        return self.status

    async def drained(self) -> None:
        await self._drained.wait()

    def tails(self) -> tuple[str, str]:
        return self._text, ""

    def interrupt(self) -> None:
        if self.status is None:
            self.signal(signal.SIGINT)

    def signal(self, number: int) -> None:
        self.ran.signals.append((trio.current_time(), signal.Signals(number).name))
        if number == signal.SIGINT and not self.interrupted:
            self.interrupted = True
            if self.act.answer is not None:
                self._tree.nursery.start_soon(self._end_in, *self.act.answer)
        elif number == signal.SIGTERM and self.act.on_term is not None:
            self._tree.nursery.start_soon(self._end_in, self.act.on_term, ExitStatus(signal="SIGTERM"))
        elif number == signal.SIGKILL and not self.act.immortal:
            self.die(KILLED)

    def die(self, status: ExitStatus) -> None:
        if self.status is not None:
            return
        self.status = self.ran.status = status
        self.ran.ended = trio.current_time()
        world = self._tree.trees.world
        if self.ran.name == "watch":
            world.watch_ended(self)
        elif self.ran.name == "index" and self.act.works and status == OK and not self.interrupted:
            world.reconciled(self._since)
        elif self.ran.name == "start" and self.act.daemon and status == OK:
            self._tree.trees.daemons.append(self._tree)
        elif self.ran.name == "stop" and not self.ran.signals:
            self._tree.trees.end_daemons()
        self._ended.set()
        self._tree.news()

    async def live(self) -> None:
        if self.act.ends is not None:
            self._tree.nursery.start_soon(self._end_in, self.act.ends, self.act.status)
        began = trio.current_time()
        for at, line in sorted(self.act.lines):
            with trio.move_on_at(began + at):
                await self._ended.wait()
            if self.status is not None:
                break
            self._print(line + "\n")
        await self._ended.wait()
        await trio.sleep(self.act.lag)
        self._print(self.act.parting)
        while self.act.daemon and self._tree in self._tree.trees.daemons:
            await self._tree.change()
        self._drained.set()

    async def _end_in(self, seconds: float, status: ExitStatus) -> None:
        with trio.move_on_after(seconds):
            await self._ended.wait()
        self.die(status)

    def _print(self, text: str) -> None:
        self._text += text
        self.ran.said.append((trio.current_time(), text))
        if self.ran.name == "watch" and self.status is None:
            self._tree.trees.world.watch_said(self, text.strip())
        if text and (sink := self._sinks[0]) is not None:
            for half in (text[: len(text) // 2], text[len(text) // 2 :]):  # pipes know no lines
                sink(half.encode())


class FakeTree:
    """A `Tree` whose processes are acts; it ends as a real one does."""

    def __init__(self, trees: FakeTrees, role: str, policy: StopPolicy, hurry: Hurry, nursery: trio.Nursery) -> None:
        self.trees = trees
        self.role = role
        self.nursery = nursery
        self.survivors: tuple[Survivor, ...] = ()
        self._policy = policy
        self._hurry = hurry
        self._children: list[FakeChild] = []
        self._change = trio.Event()

    async def spawn(self, command: Command, *, stdout: Sink | None = None, stderr: Sink | None = None) -> FakeChild:
        await trio.lowlevel.checkpoint()
        name = command.argv[1]
        act = self.trees.act(name)
        ran = Ran(name, self.role, command.argv, act, trio.current_time())
        self.trees.runs.append(ran)
        if act.refuses:
            ran.ended = ran.began
            raise SpawnError(command.argv[0], "not_found", act.refuses)
        watches = [other for other in self.trees.living() if other.ran.name == "watch"]
        if watches and name in ("watch", "index"):
            self.trees.world.crimes.append(f"{name} beside a live watch at {ran.began:g} s")
        child = FakeChild(self, act, ran, (stdout, stderr), pid=1000 + len(self.trees.runs))
        self._children.append(child)
        self.nursery.start_soon(child.live)
        return child

    def living(self) -> list[FakeChild]:
        return [child for child in self._children if child.status is None]

    def alive(self) -> int:
        return len(self.living()) + self.trees.daemons.count(self)

    def news(self) -> None:
        """Somebody ended."""
        self._change.set()
        self._change = trio.Event()

    async def change(self) -> None:
        await self._change.wait()

    async def stop(self) -> None:
        with trio.CancelScope(shield=True):
            for number, grace in self._policy.steps:
                if not self.alive():
                    break
                self._signal(number)
                with self._hurry.step(grace):
                    await self._until_empty()
            with trio.move_on_after(self._policy.kill_wait):
                if self.alive():
                    self._signal(signal.SIGKILL)
                await self._until_empty()
        self.survivors = tuple(Survivor(c.pid, 0.0, c.ran.name, self.role, "immortal") for c in self.living())

    async def close(self) -> None:
        await self.stop()
        with trio.move_on_after(5.0, shield=True):
            for child in self._children:
                await child.drained()

    def _signal(self, number: int) -> None:
        for child in self.living():
            child.signal(number)
        if number != signal.SIGINT:
            self.trees.end_daemons(self)

    async def _until_empty(self) -> None:
        while self.alive():
            await self._change.wait()


class FakeTrees:
    """A `TreeOpener` of a scripted cidx.

    Args:
        script: what each command does, run after run; the last act is repeated.
        world: gets the edits right.

    Attributes:
        runs: every run of a program, in order.
        daemons: the trees that hold a daemon, once for each.
    """

    def __init__(self, script: Mapping[str, Sequence[Act]] = HEALTHY, world: World | None = None) -> None:
        self.world = world or World()
        self.runs: list[Ran] = []
        self.daemons: list[FakeTree] = []
        self._acts = {
            name: itertools.chain(acts, itertools.repeat(acts[-1])) for name, acts in {**HEALTHY, **script}.items()
        }
        self._trees: list[FakeTree] = []

    @asynccontextmanager
    async def __call__(self, role: str, policy: StopPolicy, hurry: Hurry) -> AsyncIterator[FakeTree]:
        error: BaseException | None = None
        async with trio.open_nursery() as nursery:
            tree = FakeTree(self, role, policy, hurry, nursery)
            self._trees.append(tree)
            try:
                yield tree
            except BaseException as exc:
                error = exc
            await tree.close()
            self._trees.remove(tree)
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    def act(self, name: str) -> Act:
        return next(self._acts[name])

    def living(self) -> list[FakeChild]:
        return [child for tree in self._trees for child in tree.living()]

    def end_daemons(self, of: FakeTree | None = None) -> None:
        """All daemons end, or those of one tree."""
        ended = [tree for tree in self.daemons if of is None or tree is of]
        self.daemons = [tree for tree in self.daemons if tree not in ended]
        for tree in ended:
            tree.news()

    def named(self, name: str) -> list[Ran]:
        """The runs of one command."""
        return [ran for ran in self.runs if ran.name == name]

    @property
    def order(self) -> list[str]:
        """The commands in the order of their starts."""
        return [ran.name for ran in self.runs]


class FakeMark:
    """A `StaleMark` in memory.

    Args:
        world: whose version is the stamp.
        before: what is on record: `level`, `unseen`, `changed` or `marked`.
        stamp_seconds: how long a stamp takes.
        fails: the methods that raise `OSError`: of `set` and `clear`.
        reconcile_seconds: what is on record of the last reconcile.
        untold: no stamp can be made.
        hurry: ends a stamp early.
    """

    def __init__(
        self,
        world: World,
        before: str = "level",
        *,
        hurry: Hurry,
        stamp_seconds: float = 0.0,
        fails: Sequence[str] = (),
        reconcile_seconds: float | None = None,
        untold: bool = False,
    ) -> None:
        self.marked = before == "marked"
        self.clean: str | None = {"unseen": None, "changed": "v0"}.get(before, f"v{world.version}")
        self.last_reconcile_seconds: float | None = None
        self.history: list[tuple[float, str]] = []
        self.released: float | None = None
        self._world = world
        self._hurry = hurry
        self._stamp_seconds = stamp_seconds
        self._fails = fails
        self._reconcile_seconds = reconcile_seconds
        self._untold = untold

    async def set(self, job_id: str) -> str:
        await trio.lowlevel.checkpoint()
        if "set" in self._fails:
            self.clean = self.clean and "forgotten"
            raise OSError(28, "No space left on device")
        why = "job j0 left it behind" if self.marked else ""
        self.marked = True
        self.history.append((trio.current_time(), "set"))
        return why

    async def stamp(self) -> str | None:
        version = self._world.version
        with self._hurry.step(math.inf) as wait:
            await trio.sleep(self._stamp_seconds)
        return None if self._untold or wait.cancelled_caught else f"v{version}"

    async def changed(self, stamp: str | None, *, assume_fresh: bool) -> str:
        await trio.lowlevel.checkpoint()
        if self.clean is None:
            return "" if assume_fresh else "never seen"
        self.last_reconcile_seconds = self._reconcile_seconds
        return "" if stamp == self.clean else "changed"

    async def clear(self, stamp: str | None, reconcile_seconds: float | None) -> None:
        await trio.lowlevel.checkpoint()
        if "clear" in self._fails:
            raise OSError(30, "Read-only file system")
        self.clean = stamp or "untold"
        self.marked = False
        self.history.append((trio.current_time(), "clear"))

    def release(self) -> None:
        self.released = trio.current_time()

    @property
    def stale(self) -> bool:
        """Whether the next job would reconcile first, if nobody changes the workspace."""
        return self.marked or self.clean != f"v{self._world.version}"


class FakeLock:
    """A `Lock` in memory. `of` is who has the lock of each workspace; to be shared by those who compete.

    Args:
        until: somebody else has it until this time.
        fails: to ask for it raises `OSError`.
    """

    def __init__(self, of: dict[str, object] | None = None, *, until: float = 0.0, fails: bool = False) -> None:
        self._of = {} if of is None else of
        self._until = until
        self._fails = fails
        self.asked: list[float] = []
        self.history: list[tuple[float, str]] = []

    @property
    def held(self) -> bool:
        return self._of.get("lock") is self

    async def take(self) -> bool:
        # No checkpoint: an agent that is let go at once would else edit before the first look at the workspace.
        self.asked.append(trio.current_time())
        if self._fails:
            raise OSError(24, "Too many open files")
        if trio.current_time() < self._until or self._of.setdefault("lock", self) is not self:
            return False
        self.history.append((trio.current_time(), "taken"))
        return True

    def release(self) -> None:
        if self.held:
            del self._of["lock"]
            self.history.append((trio.current_time(), "released"))


class FakeValidation:
    """A `Validation` in memory."""

    def __init__(self, *, known: bool = False) -> None:
        self.good = known
        self.noted = False

    async def known(self) -> bool:
        await trio.lowlevel.checkpoint()
        return self.good

    async def note(self) -> None:
        await trio.lowlevel.checkpoint()
        self.noted = True

    async def remember(self) -> None:
        await trio.lowlevel.checkpoint()
        self.good = self.good or self.noted

    async def forget(self) -> None:
        await trio.lowlevel.checkpoint()
        self.good = self.noted = False


@frozen(kw_only=True)
class Plan:
    """One job, as a script.

    Attributes:
        acts: what cidx does; see `FakeTrees`.
        agent: how long the agent works; it edits at its start, halfway and at its end.
        agent_stop: how long it takes to end once it is cancelled; a further cancel ends that.
        cancels: when the job is cancelled, in seconds after its start; all but the first say "hurry".
        locked_until: somebody else has the lock of the workspace until then.
        lock_fails: it cannot be asked for.
        validated: `fix-config` is known to be good.
    """

    settings: IndexSettings = Factory(IndexSettings)
    acts: Mapping[str, Sequence[Act]] = HEALTHY
    before: str = "level"
    stamp_seconds: float = 0.0
    mark_fails: tuple[str, ...] = ()
    untold: bool = False
    reconcile_seconds: float | None = None
    agent: float = 10.0
    agent_stop: float = 0.0
    cancels: tuple[float, ...] = ()
    kill_wait: float = 5.0
    locked_until: float = 0.0
    lock_fails: bool = False
    validated: bool = False


class Drive:
    """What came out of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = World()
        self.trees = FakeTrees(plan.acts, self.world)
        self.hurry = Hurry()
        self.mark = FakeMark(
            self.world,
            plan.before,
            hurry=self.hurry,
            stamp_seconds=plan.stamp_seconds,
            fails=plan.mark_fails,
            reconcile_seconds=plan.reconcile_seconds,
            untold=plan.untold,
        )
        if self.mark.stale and not (plan.before == "unseen" and plan.settings.assume_fresh):
            self.world.lacking.add(1)
        self.lock = FakeLock(until=plan.locked_until, fails=plan.lock_fails)
        self.validation = FakeValidation(known=plan.validated)
        self.events: list[Event] = []
        self.report: IndexReport
        self.agent_began: float | None = None
        self.agent_ended: float | None = None
        self.marked_at_start: bool | None = None
        self.stop_asked: float = NEVER
        self.cancelled: float = NEVER
        self.ended: float = NEVER
        self.driver: Any = None

    @property
    def live(self) -> list[tuple[str, str, str]]:
        """(state, cause, status) of each change."""
        return [(e.state, e.cause, e.status.value) for e in self.events if isinstance(e, IndexChanged)]

    @property
    def statuses(self) -> list[str]:
        """What was told of the index, without repetitions."""
        return [status for status, _ in itertools.groupby(status for _, _, status in self.live)]

    def reconciles(self, *, after_agent: bool) -> list[Ran]:
        """The reconciles at the end, or those before."""
        return [ran for ran in self.trees.named("index") if (ran.began >= self.stop_asked) is after_agent]


class Stuck(Exception):
    """The virtual time is up."""


def drive(plan: Plan, driver: type[IndexDriver] = IndexDriver, *, limit: float = 10_000.0) -> Drive:
    """Run a plan to its end, at most `limit` seconds of virtual time."""
    run = Drive(plan)
    trio.run(_job, run, driver, limit, clock=trio.testing.MockClock(autojump_threshold=0))
    return run


async def _job(run: Drive, driver_class: type[IndexDriver], limit: float) -> None:
    plan = run.plan
    hurry = run.hurry
    driver = driver_class(
        tool=Cidx(),
        settings=plan.settings,
        command=lambda argv: Command(argv=argv, cwd="/w", env={}),
        open_tree=run.trees,
        mark=run.mark,
        lock=run.lock,
        validation=run.validation,
        emit=run.events.append,
        hurry=hurry,
        kill_wait=plan.kill_wait,
    )
    run.driver = driver
    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watchdog, limit)
        nursery.start_soon(_cancel, plan.cancels, scope, hurry)
        with scope:
            await _live(run, driver, hurry)
        nursery.cancel_scope.cancel()


async def _live(run: Drive, driver: IndexDriver, hurry: Hurry) -> None:
    """As `live` in supervise/job/nursery.py: one order on every road out."""
    ended = trio.Event()
    await driver.mark("j1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.run)
        agent_runs = False
        try:
            with trio.move_on_after(run.plan.settings.startup_timeout):
                await driver.ready()
            driver.agent_starts()
            nursery.start_soon(_agent, run, hurry, ended)
            agent_runs = True
            await ended.wait()
            run.stop_asked = trio.current_time()
            driver.finish()
            run.report = await driver.report()
        except BaseException:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                if agent_runs and not ended.is_set():
                    await ended.wait()
                run.stop_asked = min(run.stop_asked, trio.current_time())
                run.cancelled = trio.current_time()
                driver.cancel()
                run.report = await driver.report()
            raise
        finally:
            run.ended = trio.current_time()


async def _agent(run: Drive, hurry: Hurry, ended: trio.Event) -> None:
    run.agent_began = trio.current_time()
    run.marked_at_start = run.mark.marked
    try:
        run.world.edit()
        for _ in range(2):
            await trio.sleep(run.plan.agent / 2)
            run.world.edit()
    except trio.Cancelled:
        with trio.CancelScope(shield=True), hurry.step(run.plan.agent_stop):
            await trio.sleep_forever()
        run.world.edit()
        raise
    finally:
        run.agent_ended = trio.current_time()
        ended.set()


async def _cancel(times: tuple[float, ...], scope: trio.CancelScope, hurry: Hurry) -> None:
    for number, at in enumerate(sorted(times)):
        await trio.sleep_until(at)
        if number == 0:
            scope.cancel()
        else:
            hurry.next()


async def _watchdog(limit: float) -> None:
    await trio.sleep(limit)
    for thing in gc.get_objects():  # a driver that hangs behind a shield would hang the test
        if isinstance(thing, trio.CancelScope):
            thing.shield = False
    raise Stuck(f"the job did not end in {limit:g} s")
