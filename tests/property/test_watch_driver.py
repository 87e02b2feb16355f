"""Table and driver against a scripted cidx, checked against a plain model and against the truth.

A `Scene` is a script of one job. `check` runs it and compares what the driver says with what the fakes have on
record: which program ran when, what it printed, which signals it got, and which edits the index really lacks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
from hypothesis import HealthCheck, Phase, event, find, given, settings
from hypothesis import strategies as st

from supervise.index import cidx, watch
from supervise.index.cidx import Line
from supervise.index.lifecycle import FINAL, LEAVES_MARK, RestartBudget
from supervise.index.watch import LAST_WORDS, IndexDriver, NoIndex
from supervise.model import ExitStatus, IndexReport, IndexStatus
from supervise.settings import IndexSettings
from tests.index_fakes import BAD, NEVER, OK, READY, Act, Drive, Plan, Ran, Stuck, drive

KILL_WAIT = 5.0
STOP_SECONDS = 0.07  # of `cidx stop`

#: A fake clock that jumps from deadline to deadline adds up floats, in seconds.
ROUNDING = 1e-9


# --- scenes ------------------------------------------------------------------------------------------------


def seconds(low: float, high: float, salt: int) -> st.SearchStrategy[float]:
    """Lengths, each kind with its own crumb, so that sums of different ones are hardly ever equal."""
    crumb = salt * 0.000_013_7
    return st.integers(int(low * 1000), int(high * 1000)).map(lambda ms: ms / 1000 + crumb)


@attrs.frozen
class Watch:
    """One life of the watch: when it says ready, meets an error, dies; how it answers SIGINT and SIGTERM."""

    refuses: bool
    ready: float | None
    error: float | None
    ends: float | None
    status: ExitStatus
    answer: tuple[float, ExitStatus] | None
    stubborn: bool


@attrs.frozen
class Reconcile:
    """One reconcile: how it goes, how long it takes, whether it cares for signals."""

    kind: str
    seconds: float
    answer: float | None
    stubborn: bool


@attrs.frozen
class Scene:
    settings: IndexSettings
    before: str
    stamp: float
    start: tuple[str, float]
    fix: tuple[str, float]
    watches: tuple[Watch, ...]
    reconciles: tuple[Reconcile, ...]
    agent: float
    agent_stop: float
    cancels: tuple[float, ...]
    mark_fails: tuple[str, ...]

    @property
    def plan(self) -> Plan:
        kind, length = self.start
        start = {
            "no daemon": Act(ends=length, status=BAD, parting="Daemon mode not enabled\n"),
            "daemon": Act(ends=length, daemon=True),
            "theirs": Act(ends=length, status=BAD, parting="The daemon is already running", lag=LAST_WORDS / 2),
            "hangs": Act(),
            "refuses": Act(refuses="no cidx here"),
        }[kind]
        kind, length = self.fix
        fix = {"ok": Act(ends=length), "bad": Act(ends=length, status=BAD), "hangs": Act()}[kind]
        return Plan(
            settings=self.settings,
            acts={
                "start": [start],
                "fix-config": [fix],
                "watch": [_watch_act(life) for life in self.watches],
                "index": [_reconcile_act(one) for one in self.reconciles],
                "stop": [Act(ends=STOP_SECONDS)],
            },
            before=self.before,
            stamp_seconds=self.stamp,
            mark_fails=self.mark_fails,
            agent=self.agent,
            agent_stop=self.agent_stop,
            cancels=self.cancels,
            kill_wait=KILL_WAIT,
        )


def _watch_act(life: Watch) -> Act:
    lines = [(at, line) for at, line in ((life.ready, READY), (life.error, "ERROR embedding: 401")) if at is not None]
    return Act(
        refuses="no watch here" if life.refuses else "",
        lines=tuple(lines),
        ends=life.ends,
        status=life.status,
        answer=life.answer,
        on_term=None if life.stubborn else 0.0,
    )


def _reconcile_act(one: Reconcile) -> Act:
    said = {
        "good": "indexing 5 files\nFiles processed: 5\n",
        "nothing to do": "All up to date\n",
        "errors": "indexing 5 files\nERROR embedding: 500\nFiles processed: 5\n",
        "short": "indexing 5 files\nFiles processed: 0\n",
        "cancelled": "indexing cancelled",  # without a newline
        "exit 1": "No VOYAGE_API_KEY\n",
    }
    return Act(
        refuses="no index here" if one.kind == "refuses" else "",
        ends=None if one.kind == "hangs" else one.seconds,
        status=BAD if one.kind == "exit 1" else OK,
        parting=said.get(one.kind, ""),
        lag=0.05,
        answer=None if one.answer is None else (one.answer, OK),
        on_term=None if one.stubborn else 0.0,
        works=one.kind in ("good", "nothing to do"),
    )


def mostly(cls: type, calm: dict[str, Any], wild: dict[str, Any], most: int) -> st.SearchStrategy[Any]:
    """Values whose fields are calm but for at most so many: trouble comes in few kinds at a time, in all pairs."""

    @st.composite
    def one(draw: Callable[[Any], Any]) -> Any:
        chosen = draw(st.sets(st.sampled_from(sorted(wild)), max_size=most))
        return cls(**{**{k: draw(v) for k, v in calm.items() if k not in chosen}, **{k: draw(wild[k]) for k in chosen}})

    return one()


watches = mostly(
    Watch,
    calm={
        "refuses": st.just(False),
        "ready": seconds(0.1, 4, 1),
        "error": st.none(),
        "ends": st.none(),
        "status": st.just(BAD),
        "answer": st.tuples(seconds(0.1, 1, 6), st.just(OK)),
        "stubborn": st.just(False),
    },
    wild={
        "refuses": st.just(True),
        "ready": st.none() | seconds(0, 40, 2),
        "error": seconds(0.1, 30, 3),
        "ends": seconds(0.05, 3, 4) | seconds(0.05, 60, 5),
        "status": st.sampled_from([OK, ExitStatus(signal="SIGSEGV")]),
        "answer": st.none() | st.tuples(seconds(0.1, 20, 7), st.sampled_from([OK, BAD, ExitStatus(signal="SIGINT")])),
        "stubborn": st.just(True),
    },
    most=3,
)
reconciles = mostly(
    Reconcile,
    calm={
        "kind": st.sampled_from(["good", "nothing to do"]),
        "seconds": seconds(0.1, 10, 8),
        "answer": seconds(0.1, 1, 10),
        "stubborn": st.just(False),
    },
    wild={
        "kind": st.sampled_from(["errors", "short", "cancelled", "exit 1", "hangs", "refuses"]),
        "seconds": seconds(0.1, 90, 9),
        "answer": st.none() | seconds(0.1, 20, 27),
        "stubborn": st.just(True),
    },
    most=3,
)
index_settings = mostly(
    IndexSettings,
    calm={},
    wild={
        "watch_enabled": st.just(False),
        "startup_timeout": st.just(0.0) | seconds(0.5, 40, 11),
        "assume_fresh": st.just(True),
        "settle_time": st.just(0.0) | seconds(0.5, 5, 12),
        "flush_timeout": st.just(0.0) | seconds(0.5, 8, 13),
        "termination_timeout": seconds(0, 10, 14),
        "fallback_to_reconcile": st.just(False),
        "reconcile_timeout": seconds(0.5, 60, 15),
        "reconcile_on_cancel": st.just(True),
        "command_timeout": seconds(0.5, 10, 16),
    },
    most=5,
)
scenes = mostly(
    Scene,
    calm={
        "settings": st.just(IndexSettings()),
        "before": st.just("level"),
        "stamp": st.just(0.0),
        "start": st.tuples(st.just("no daemon"), seconds(0.05, 1, 18)),
        "fix": st.tuples(st.just("ok"), seconds(0.05, 1, 19)),
        "watches": watches.map(lambda one: (one,)),
        "reconciles": st.just((Reconcile("good", 3.000_11, 0.500_14, False),)),
        "agent": seconds(0.2, 20, 20),
        "agent_stop": st.just(0.0),
        "cancels": st.just(()),
        "mark_fails": st.just(()),
    },
    wild={
        "settings": index_settings,
        "before": st.sampled_from(["unseen", "changed", "marked"]),
        "stamp": seconds(0.01, 2, 17),
        "start": st.tuples(st.sampled_from(["daemon", "theirs", "hangs", "refuses"]), seconds(0.05, 3, 18)),
        "fix": st.tuples(st.sampled_from(["bad", "hangs"]), seconds(0.05, 3, 19)),
        "watches": st.lists(watches, min_size=1, max_size=5).map(tuple),
        "reconciles": st.lists(reconciles, min_size=1, max_size=3).map(tuple),
        "agent": seconds(0.2, 120, 21),
        "agent_stop": seconds(0.1, 10, 22),
        "cancels": st.tuples(seconds(0.01, 60, 23))
        | st.tuples(seconds(0.01, 20, 24), seconds(0.01, 5, 25)).map(lambda two: (two[0], sum(two)))
        | st.lists(seconds(0.01, 60, 26), min_size=1, max_size=3).map(tuple),
        "mark_fails": st.sampled_from([("set",), ("clear",)]),
    },
    most=7,
)


#: Watches that crash again and again beside a long agent: four in a row are rare among all scenes.
crashing = st.builds(
    attrs.evolve,
    scenes,
    watches=st.just((Watch(False, 0.500_02, None, 1.000_05, BAD, (0.5, OK), False),)),
    agent=seconds(40, 120, 21),
    cancels=st.just(()),
)

# --- the model ---------------------------------------------------------------------------------------------


def said(ran: Ran, meaning: Line) -> list[float]:
    """When a program said a line of that meaning, as long as it lived."""
    return [at for at, text in ran.said if cidx.meaning(text.strip()) is meaning]


def is_proved(reconcile: Ran) -> bool:
    """It ended by itself, and is worth what it says."""
    return reconcile.status == OK and not reconcile.signals and reconcile.act.works


def is_stale_before(scene: Scene) -> bool:
    if scene.before == "unseen":
        return not scene.settings.assume_fresh
    return scene.before != "level" or "set" in scene.mark_fails


def is_clean(run: Drive, scene: Scene) -> bool:
    """Row two of the table."""
    early = run.reconciles(after_agent=False)
    level = not is_stale_before(scene) or (bool(early) and is_proved(early[0]))
    lives = run.trees.named("watch")
    if not level or len(lives) != 1:
        return False
    only = lives[0]
    ready = said(only, Line.READY)
    in_time = bool(ready) and (run.agent_began is None or ready[0] <= run.agent_began)
    answered = only.status == OK and only.asked == ["SIGINT"]
    answered = answered and only.ended <= only.signals[0][0] + scene.settings.flush_timeout
    return in_time and answered and not said(only, Line.ERROR)


def model(run: Drive, scene: Scene) -> str:
    """Which ending it must be, by what cidx really did. The rows of the table, from the top."""
    wants = scene.settings
    final = run.reconciles(after_agent=True)
    cancelled = run.cancelled < NEVER and not wants.reconcile_on_cancel
    if is_clean(run, scene):
        return "clean"
    if cancelled and not (final and is_proved(final[0])):
        return "cancelled"
    if not wants.fallback_to_reconcile:
        return "fallback off"
    if final and is_proved(final[0]):
        return "otherwise"
    return "reconcile failed"


STATUS = {
    "clean": IndexStatus.WATCH_TERMINATED,
    "cancelled": IndexStatus.STALE,
    "fallback off": IndexStatus.FAILED,
    "otherwise": IndexStatus.READY_VIA_FALLBACK,
    "reconcile failed": IndexStatus.FAILED,
}


# --- the checks --------------------------------------------------------------------------------------------


def check(scene: Scene, driver: type[IndexDriver] = IndexDriver) -> str:
    """Run a scene, check all of it, and say which ending it was."""
    run = drive(scene.plan, driver, limit=scene.settings.startup_timeout + scene.agent + 100 + longest(scene))
    check_commands(run, scene)
    check_start_of_agent(run, scene)
    check_flush(run, scene)
    check_restarts(run, scene)
    check_reconciles(run, scene)
    check_mark(run, scene)
    end = model(run, scene)
    status = STATUS[end]
    if scene.mark_fails == ("set",) or (scene.mark_fails == ("clear",) and status not in LEAVES_MARK):
        status = IndexStatus.FAILED
    hurried = end == "clean" and len(scene.cancels) > 1  # nobody waited for the flush, and it came all the same
    assert run.report.status is status or hurried, (end, run.report)
    assert run.ended - run.stop_asked <= longest(scene)
    assert run.driver.state in FINAL
    assert run.driver.status is run.report.status
    return end


def longest(scene: Scene) -> float:
    """What the end of a job may take, all graces used."""
    wants = scene.settings
    killed = wants.termination_timeout + KILL_WAIT + 0.1
    cidx_stop = wants.command_timeout + killed
    reconcile = scene.stamp + wants.flush_timeout + killed + cidx_stop
    short_command = LAST_WORDS
    flush = scene.stamp + wants.flush_timeout + cidx_stop + killed
    return reconcile + short_command + flush + wants.reconcile_timeout + reconcile


def check_commands(run: Drive, scene: Scene) -> None:
    """`start`, `fix-config`, `watch`; nothing beside a watch; `stop` for our daemon only; nothing is left."""
    order = [name for name in run.trees.order if name not in ("index", "stop")]
    assert order[:3] == ["start", "fix-config", "watch"][: len(order)]
    assert set(order[3:]) <= {"watch"}
    assert not run.trees.world.crimes
    assert not run.trees.living()
    assert not run.trees.daemons
    started = run.trees.named("start")
    stops = run.trees.named("stop")
    if started and started[0].status is not None and not started[0].signals:
        if scene.start[0] == "theirs":
            assert not stops
        if scene.start[0] == "daemon":
            assert stops
            assert stops[0].role == "index-stop"
        quick = scene.fix[0] != "hangs" and scene.fix[1] < scene.settings.command_timeout
        if quick and run.stop_asked > started[0].ended + LAST_WORDS + scene.fix[1]:
            assert "watch" in order, "neither a failed start nor a failed fix-config keeps the watch from starting"
    for failed in run.reconciles(after_agent=True):
        given_up = bool(failed.signals) and failed.signals[0][0] < failed.began + scene.settings.reconcile_timeout
        if not is_proved(failed) and not given_up and scene.start[0] != "theirs":
            assert stops
            assert stops[-1].began >= failed.began


def check_start_of_agent(run: Drive, scene: Scene) -> None:
    """It starts when the watch is up or has failed, and at most after `startup_timeout`."""
    wants = scene.settings
    lives = run.trees.named("watch")
    settled = [life.began + wants.settle_time for life in lives if life.ended > life.began + wants.settle_time]
    ready = [said(life, Line.READY)[0] for life in lives if said(life, Line.READY)]
    go = min([wants.startup_timeout, *settled, *ready])
    if run.agent_began is None:
        assert scene.cancels
        assert min(scene.cancels) <= go
        return
    assert run.agent_began <= go + ROUNDING
    alive = [ran for ran in run.trees.runs if ran.began < run.agent_began < ran.ended]
    assert abs(run.agent_began - go) <= ROUNDING or not alive


def check_flush(run: Drive, scene: Scene) -> None:
    """A living watch is asked by SIGINT, when the agent is gone; then SIGTERM, then SIGKILL, each after its time."""
    wants = scene.settings
    for life in run.trees.named("watch"):
        if not life.signals:
            assert life.ended <= max(run.stop_asked, life.began) + scene.stamp or life.act.refuses
            continue
        (asked, first), *more = life.signals
        assert first == "SIGINT"
        assert asked >= run.stop_asked
        assert run.agent_ended is None or asked >= run.agent_ended
        assert [name for _, name in more] == ["SIGTERM", "SIGKILL"][: len(more)]
        if len(scene.cancels) < 2:
            graces = [wants.flush_timeout, wants.termination_timeout]
            for (before, _), (after, _), grace in zip(life.signals, more, graces, strict=False):
                assert after >= before + grace - 1e-6


def check_restarts(run: Drive, scene: Scene) -> None:
    """After a crash: 0.5, 1, 2 s; never more than three in 60 s; and not without a crash."""
    lives = run.trees.named("watch")
    restarts: list[float] = []
    for life, following in itertools.zip_longest(lives, lives[1:]):
        lived = life.ended - life.began > scene.settings.settle_time
        crashed = bool(said(life, Line.READY)) or (lived and life.status != OK) or life is not lives[0]
        if following is None:
            recent = [at for at in restarts if life.ended - at < 60]
            stopped = run.stop_asked <= life.ended + 2.5 + LAST_WORDS
            assert life.signals or stopped or len(recent) == 3 or not crashed
        else:
            assert crashed
            assert not life.signals
            recent = [at for at in restarts if life.ended - at < 60]
            assert following.began == pytest.approx(life.ended + 0.5 * 2 ** len(recent), abs=LAST_WORDS)
            restarts.append(following.began)
            assert following.began < run.stop_asked
    assert all(late - early >= 60 - 1e-6 for early, late in zip(restarts, restarts[3:], strict=False))
    assert run.report.watch_restarts == len(restarts)


def check_reconciles(run: Drive, scene: Scene) -> None:
    """One before the agent's end at most, one after at most; each where it is due, and none where it is not."""
    wants = scene.settings
    reconciles = run.trees.named("index")
    early, final = run.reconciles(after_agent=False), run.reconciles(after_agent=True)
    assert len(early) <= 1
    assert len(final) <= 1
    metrics = run.report.metrics
    assert metrics.levellings + metrics.fallbacks == len(reconciles)
    if reconciles:
        assert wants.fallback_to_reconcile
    due = is_stale_before(scene) and wants.fallback_to_reconcile and scene.stamp < run.stop_asked
    assert due == (run.trees.order[:1] == ["index"] and bool(early)), "before the watch, if stale; and only then"
    assert metrics.levellings == due
    if early and not due:
        lives = [life for life in run.trees.named("watch") if life.ended <= early[0].began]
        assert not any(said(life, Line.READY) for life in lives), "at once, if the watch did not come up"
    end = model(run, scene)
    if end == "clean" and len(scene.cancels) < 2:
        assert not final
    if end in ("otherwise", "reconcile failed") and wants.fallback_to_reconcile:
        assert final
        assert final[0] is run.trees.runs[-1] or run.trees.order[-2:] == ["index", "stop"]
    if final and not wants.reconcile_on_cancel:
        assert final[0].began <= run.cancelled
        if run.cancelled < final[0].ended and final[0].signals:
            assert final[0].signals[0][0] <= max(run.cancelled, final[0].began)
    for reconcile in reconciles:
        assert not any(reconcile.beside(life) for life in run.trees.named("watch"))


def check_mark(run: Drive, scene: Scene) -> None:
    """On the disk before the agent; cleared at the very end only, and with a right; status, report and disk agree."""
    if run.agent_began is not None and "set" not in scene.mark_fails:
        assert run.marked_at_start
    cleared = [at for at, what in run.mark.history if what == "clear"]
    assert run.mark.history[:1] == [(0.0, "set")] or "set" in scene.mark_fails
    assert cleared == ([] if run.report.stale else [run.ended])
    assert run.report.stale == (run.report.status in LEAVES_MARK)
    # A stamp that was cut short by a further cancel is no stamp: the next job reconciles, to be sure.
    assert run.report.stale == run.mark.stale or run.mark.clean == "untold"
    assert bool(run.report.reason) == (run.report.status is not IndexStatus.WATCH_TERMINATED)
    if not run.report.stale:
        assert not run.world.lacking, "the index is said to be level, and lacks edits"


# --- the machine -------------------------------------------------------------------------------------------

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(QUIET, max_examples=120)
@given(scenes)
def test_what_becomes_of_the_index(scene: Scene) -> None:
    event(check(scene))


@pytest.mark.parametrize("end", STATUS)
def test_every_ending_is_reached(end: str) -> None:
    def reaches(scene: Scene) -> bool:
        return model(drive(scene.plan), scene) == end

    assert check(found(reaches)) == end


def test_the_fifth_ending_is_a_job_without_an_index() -> None:
    async def run() -> IndexReport:
        index = NoIndex()
        await index.mark("j1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(index.run)
            await index.ready()
            index.agent_starts()
            index.finish()
            index.cancel()
        return await index.report()

    assert trio.run(run) == IndexReport(status=IndexStatus.NONE)


def found(condition: Callable[[Scene], bool], among: st.SearchStrategy[Scene] = scenes) -> Scene:
    """Some scene for which the condition is true."""
    fixed = settings(QUIET, max_examples=3000, phases=[Phase.generate], derandomize=True)
    return find(among, condition, settings=fixed)


# --- the machine finds what it is made to find -------------------------------------------------------------


class ClearsWithoutReconcile(IndexDriver):  # type: ignore[misc]  # final
    async def _reconcile(self, why: str, **more: Any) -> str:
        return ""


class BelievesAnyWatch(IndexDriver):  # type: ignore[misc]  # final
    def _watch_line(self, line: str, ready: trio.Event) -> None:
        if cidx.meaning(line) is not Line.ERROR:
            super()._watch_line(line, ready)


class TakesAnyEndForAFlush(IndexDriver):  # type: ignore[misc]  # final
    async def _flush(self, child: Any) -> Any:
        what, reason, ended = await super()._flush(child)
        self._facts = self._facts.with_(flushed=True)
        return what, reason, ended


class ReconcilesBesideTheWatch(IndexDriver):  # type: ignore[misc]  # final
    async def _until_down(self, child: Any, was_up: bool, ready: trio.Event) -> Any:
        async with self._open_tree("reconcile", self._stop_reconcile, self._hurry) as tree:
            await (await self._spawn(tree, self._tool.reconcile)).wait()
        return await super()._until_down(child, was_up, ready)


class RestartsForEver(IndexDriver):  # type: ignore[misc]  # final
    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._budget = RestartBudget(most=1000)


class NeverReports(IndexDriver):  # type: ignore[misc]  # final
    def cancel(self) -> None:
        pass


class KeepsTheAgentWaiting(IndexDriver):  # type: ignore[misc]  # final
    async def ready(self) -> None:
        with trio.CancelScope(shield=True):
            await super().ready()


class HearsNoCancelWhileItStamps(IndexDriver):  # type: ignore[misc]  # final
    def _is_unwanted(self, until: trio.Event | None) -> bool:
        return False


class MarksTooLate(IndexDriver):  # type: ignore[misc]  # final
    async def mark(self, job_id: str) -> None:
        pass

    async def run(self) -> None:
        await self._mark.set("j1")
        await super().run()


class StopsAnyDaemon(IndexDriver):  # type: ignore[misc]  # final
    async def _prepare(self, tree: Any) -> str:
        trouble = await super()._prepare(tree)
        self._daemon = watch._Daemon.OURS
        return trouble


@pytest.mark.parametrize(
    "broken",
    [
        ClearsWithoutReconcile,
        BelievesAnyWatch,
        TakesAnyEndForAFlush,
        ReconcilesBesideTheWatch,
        RestartsForEver,
        NeverReports,
        KeepsTheAgentWaiting,
        HearsNoCancelWhileItStamps,
        MarksTooLate,
        StopsAnyDaemon,
    ],
)
def test_a_broken_driver_is_found(broken: type[IndexDriver]) -> None:
    def fails(scene: Scene) -> bool:
        try:
            check(scene, broken)
        except (AssertionError, BaseExceptionGroup, Stuck):
            return True
        return False

    scene = found(fails, crashing if broken is RestartsForEver else scenes)
    check(scene)  # the same scene is no trouble to the driver as it is
