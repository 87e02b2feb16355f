"""Shared watches under random jobs: who joins, leaves and is cancelled when, what the indexer does, who supervises.

What must hold is in `Town.check` and below; what each index must be worth is taken from what the fakes have on record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, Phase, event, find, given, settings
from hypothesis import strategies as st

from supervise.index.lifecycle import LEAVES_MARK
from supervise.index.pool import Lease, SharedWatch, WatchPool
from supervise.index.watch import IndexDriver
from supervise.model import ExitStatus, IndexStatus
from supervise.settings import IndexSettings
from tests.index_fakes import BAD, OK, READY, Act, FakeLock, Stuck
from tests.pool_fakes import JobPlan, NamedMark, Town

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))

#: Two kinds of job, which cannot share.
KINDS = (
    IndexSettings(startup_timeout=6, reconcile_timeout=40),
    IndexSettings(startup_timeout=6, reconcile_timeout=15, reconcile_on_cancel=True),
)


def times(low: float, high: float) -> st.SearchStrategy[float]:
    """On a grid, so that things often happen at one moment."""
    return st.integers(int(low * 4), int(high * 4)).map(lambda quarters: quarters / 4)


plans = st.builds(
    JobPlan,
    at=times(0, 30),
    agent=times(0.25, 25),
    cancels=st.just(()) | st.just(()) | st.lists(times(0, 40), min_size=1, max_size=3).map(tuple),
    settings=st.sampled_from([KINDS[0], KINDS[0], KINDS[1]]),
    supervisor=st.sampled_from([0, 0, 0, 1]),
)

watch_acts = st.sampled_from(
    [
        *[Act(lines=((1.0, READY),))] * 4,
        Act(lines=((1.0, READY),), ends=4.0, status=ExitStatus(signal="SIGSEGV")),
        Act(lines=((1.0, READY),), ends=12.0, status=BAD),
        Act(lines=((1.0, READY), (2.0, "ERROR 401"))),
        Act(lines=((8.0, READY),)),
        Act(),
        Act(ends=0.5, status=BAD),
        Act(refuses="no watch here"),
        Act(lines=((1.0, READY),), answer=None),
        Act(lines=((1.0, READY),), answer=(3.0, OK)),
        Act(lines=((1.0, READY),), answer=(0.5, BAD)),
    ]
)
index_acts = st.sampled_from(
    [
        *[Act(ends=3.0)] * 3,
        Act(ends=10.0),
        Act(ends=1.0, status=BAD, works=False),
        Act(ends=1.0, parting="ERROR 500\n", works=False),
        Act(works=False),
    ]
)


@st.composite
def towns(draw: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        "plans": draw(st.lists(plans, min_size=1, max_size=7)),
        "acts": {
            "watch": draw(st.lists(watch_acts, min_size=1, max_size=4)),
            "index": draw(st.lists(index_acts, min_size=1, max_size=4)),
        },
        "places": draw(st.sampled_from([1, 2, 100])),
        "stale": draw(st.booleans()),
        "disk_seconds": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "locked_until": draw(st.sampled_from([0.0, 0.0, 0.0, 10.0])),
    }


def play(parts: dict[str, Any], driver: type[IndexDriver] = IndexDriver) -> Town:
    """Play a town and check all of it."""
    more = {name: value for name, value in parts.items() if name != "plans"}
    town = Town(*parts["plans"], driver=driver, **more).play(limit=2000)
    town.check()
    check_mark(town)
    return town


def check_mark(town: Town) -> None:
    """It is gone if and only if all that was done to the workspace was proved."""
    names = set(town.disk.names)
    settled = [job for job in town.jobs if job.report is not None and job.report.status not in LEAVES_MARK]
    if not names and not town.disk.stale:
        assert not town.world.lacking, "the index is said to be level, and lacks edits"
    for job in town.jobs:
        if job.report is None:
            assert job.name not in names, "it never began"
        elif job.name in names:
            assert job.report.stale
    last = [job for job in settled if job.report and job.report.status is not IndexStatus.WATCHING]
    for job in town.jobs:
        if job.report is not None and job.report.status is IndexStatus.WATCHING and job.name not in names:
            assert any((end.ended or 0) >= (job.ended or 0) for end in last), "somebody has settled it after its end"


@settings(QUIET, max_examples=40)
@given(towns())
def test_one_watch_for_all_and_nothing_is_left_of_it(parts: dict[str, Any]) -> None:
    town = play(parts)
    for job in town.jobs:
        event("never began" if job.report is None else job.status)


@pytest.mark.parametrize("status", [*IndexStatus])
def test_every_end_is_reached(status: IndexStatus) -> None:
    if status in (IndexStatus.NONE, IndexStatus.RECONCILING_FALLBACK):
        return  # no job with an index ends so
    play(found(lambda parts: any(job.report and job.report.status is status for job in play(parts).jobs)))


def test_who_shares_is_many() -> None:
    """The machine is of no worth if its jobs hardly ever meet."""
    play(found(lambda parts: sum(bool(job.report) and job.status == "watching" for job in play(parts).jobs) >= 4))


def found(condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    fixed = settings(QUIET, max_examples=400, phases=[Phase.generate], derandomize=True)
    return find(towns(), condition, settings=fixed)


# --- the machine finds what it is made to find -------------------------------------------------------------


def the_first_one_out_stops_it(patch: pytest.MonkeyPatch) -> None:
    real = SharedWatch.leave

    def leave(self: Any, lease: Any, *, cancelled: bool) -> bool:
        self.driver.finish()
        return real(self, lease, cancelled=cancelled)

    patch.setattr(SharedWatch, "leave", leave)


def a_cancel_of_one_is_a_cancel_of_all(patch: pytest.MonkeyPatch) -> None:
    real = Lease.cancel

    def cancel(self: Any) -> None:
        self._watch.driver.cancel()
        real(self)

    patch.setattr(Lease, "cancel", cancel)


def nobody_stops_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(IndexDriver, "finish", lambda self: None)


def who_joins_is_not_marked(patch: pytest.MonkeyPatch) -> None:
    real = SharedWatch.mark

    async def mark(self: Any, job_id: str) -> None:
        if not self._started:
            await real(self, job_id)

    patch.setattr(SharedWatch, "mark", mark)


def jobs_are_marked_at_once(patch: pytest.MonkeyPatch) -> None:
    """Each would take a hold of its own, and lose the other's."""

    class NoLock:
        async def __aenter__(self) -> None:
            pass

        async def __aexit__(self, *error: object) -> None:
            pass

    real = SharedWatch.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        self._marking = NoLock()

    patch.setattr(SharedWatch, "__init__", init)


def everybody_opens_a_watch(patch: pytest.MonkeyPatch) -> None:
    async def take(self: Any) -> bool:
        return True

    patch.setattr(FakeLock, "take", take)
    patch.setattr(FakeLock, "held", True)


def the_lock_is_given_back_too_early(patch: pytest.MonkeyPatch) -> None:
    real = IndexDriver._settle

    async def settle(self: Any) -> None:
        self._lock.release()
        await trio.sleep(0.5)
        if not self._facts.alone:
            return await real(self)
        self._lock = type("Mine", (), {"held": True, "release": lambda self: None})()
        return await real(self)

    patch.setattr(IndexDriver, "_settle", settle)


def who_comes_late_joins_what_is_closing(patch: pytest.MonkeyPatch) -> None:
    real = WatchPool.join

    def join(self: Any, wish: Any, guest: Any) -> Any:
        for watch in self._watches.get(wish.workspace, ()):
            if watch.wish == wish and not watch.ended.is_set():
                return watch.lease(guest)
        return real(self, wish, guest)

    patch.setattr(WatchPool, "join", join)
    patch.setattr(WatchPool, "is_closing", lambda self, workspace: False)


def it_settles_what_is_not_its_own(patch: pytest.MonkeyPatch) -> None:
    real = NamedMark.clear

    async def clear(self: Any, *args: Any) -> None:
        self._settles = set(self._disk.names)
        await real(self, *args)

    patch.setattr(NamedMark, "clear", clear)


def who_leaves_waits_for_the_others(patch: pytest.MonkeyPatch) -> None:
    real = Lease.run

    async def run(self: Any) -> None:
        await real(self)
        with trio.CancelScope(shield=True):
            await self._watch.ended.wait()

    patch.setattr(Lease, "run", run)


@pytest.mark.parametrize(
    "broken",
    [
        the_first_one_out_stops_it,
        a_cancel_of_one_is_a_cancel_of_all,
        nobody_stops_it,
        who_joins_is_not_marked,
        jobs_are_marked_at_once,
        everybody_opens_a_watch,
        the_lock_is_given_back_too_early,
        who_comes_late_joins_what_is_closing,
        it_settles_what_is_not_its_own,
        who_leaves_waits_for_the_others,
    ],
)
def test_a_broken_pool_is_found(broken: Callable[[pytest.MonkeyPatch], None]) -> None:
    def fails(parts: dict[str, Any]) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            broken(patch)
            try:
                play(parts)
            except (AssertionError, BaseExceptionGroup, Stuck):
                return True
        return False

    play(found(fails))  # the same town is no trouble to the pool as it is
