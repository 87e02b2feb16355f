"""Jobs that share a watch, by example, on Trio's clock; and the places that jobs wait for."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from attrs import evolve

from supervise.events import IndexChanged, IndexOutput
from supervise.index.watch import NOT_ALONE, IndexDriver
from supervise.job.turns import Turns
from supervise.log_context import about, telling_of
from supervise.model import ExitStatus, IndexStatus
from supervise.secrets import Masker
from supervise.settings import IndexSettings
from tests.index_fakes import BAD, READY, Act
from tests.pool_fakes import JobPlan, Town, outcome

SEGV = ExitStatus(signal="SIGSEGV")
OTHER = IndexSettings(flush_timeout=6.0)
SHARED = "shared: {} still {} the watch; the last one out settles the index"


def town(*plans: JobPlan, **more: Any) -> Town:
    """Play some jobs, and check what holds for all."""
    played = Town(*plans, **more).play()
    played.check()
    return played


def bounds(played: Town, name: str) -> list[tuple[float, float]]:
    return [(ran.began, ran.ended) for ran in played.trees.named(name)]


# --- one watch for all -------------------------------------------------------------------------------------


def test_a_job_alone_has_the_watch_for_itself() -> None:
    played = town(JobPlan())
    assert outcome(played) == (["watch_terminated"], False)
    assert played.jobs[0].live == [
        ("Starting", "start", "stale"),
        ("Running", "ready", "watching"),
        ("Stopping", "stop", "stale"),
        ("Terminated", "flushed", "stale"),
        ("Terminated", "end", "watch_terminated"),
    ]


def test_three_jobs_share_a_watch_and_the_last_one_out_stops_it() -> None:
    played = town(JobPlan(agent=20), JobPlan(agent=30), JobPlan(agent=10))
    assert outcome(played) == (["watching", "watch_terminated", "watching"], False)
    assert played.trees.order == ["start", "fix-config", "watch"]
    (watch,) = played.trees.named("watch")
    assert watch.asked == ["SIGINT"]
    assert watch.signals[0][0] == played.jobs[1].agent_ended
    reasons = [job.report.reason for job in played.jobs if job.report]
    assert reasons == [SHARED.format("1 other job", "uses"), "", SHARED.format("2 other jobs", "use")]


def test_who_leaves_reports_the_numbers_so_far() -> None:
    played = town(JobPlan(agent=20), JobPlan(agent=30))
    first, last = (job.report for job in played.jobs)
    assert first is not None
    assert last is not None
    assert first.metrics.starts == last.metrics.starts == 1
    assert first.metrics.uptime == pytest.approx(20.0)
    assert last.metrics.uptime == pytest.approx(30.5)
    assert first.metrics.flush_seconds is None
    assert last.metrics.flush_seconds == 0.5


def test_who_joins_late_is_ready_at_once_and_is_told_where_the_watch_is() -> None:
    played = town(JobPlan(agent=20), JobPlan(at=10, agent=5))
    first, late = played.jobs
    assert late.agent_began == 10.0
    assert late.live == [("Running", "joined", "watching"), ("Running", "left", "watching")]
    joined = late.events[0]
    assert isinstance(joined, IndexChanged)
    assert joined.reason == "shared with 1 other job"
    assert not any(cause == "joined" for _, cause, _ in first.live)
    assert outcome(played) == (["watch_terminated", "watching"], False)


def test_who_joins_late_may_be_the_last_one_out() -> None:
    played = town(JobPlan(agent=20), JobPlan(at=10, agent=50))
    assert outcome(played) == (["watching", "watch_terminated"], False)
    assert played.jobs[0].ended == played.jobs[0].agent_ended
    assert played.jobs[1].live[-1] == ("Terminated", "end", "watch_terminated")


def test_one_agent_that_is_early_spoils_the_watch_for_all() -> None:
    slow = Act(lines=((8.0, READY),))
    patient = IndexSettings(settle_time=60, startup_timeout=5)
    # The first starts after five seconds; the second, who has come later, would have waited for readiness.
    played = town(JobPlan(settings=patient), JobPlan(at=4, settings=patient, agent=20), acts={"watch": [slow]})
    assert played.jobs[0].agent_began == 5.0
    assert played.jobs[1].agent_began == pytest.approx(8.2)
    assert outcome(played) == (["watching", "ready_via_fallback"], False)
    report = played.jobs[1].report
    assert report is not None
    assert report.reason == "the watch was not ready when the agent started"


def test_a_stale_workspace_is_levelled_once_for_all() -> None:
    played = town(JobPlan(), JobPlan(at=1), stale=True)
    assert played.trees.order == ["index", "start", "fix-config", "watch"]
    assert played.disk.names == []
    assert [job.agent_began for job in played.jobs] == [pytest.approx(4.2)] * 2


def test_jobs_of_one_moment_are_all_on_the_mark_before_their_agents_start() -> None:
    played = town(*[JobPlan()] * 5, disk_seconds=0.3)
    assert len(played.outfits) == 1
    assert [job.status for job in played.jobs].count("watch_terminated") == 1


# --- cancels -----------------------------------------------------------------------------------------------


def test_a_cancelled_job_that_is_not_the_last_changes_nothing() -> None:
    played = town(JobPlan(agent=20), JobPlan(cancels=(5.0,)), JobPlan(agent=20))
    assert [job.status for job in played.jobs].count("watch_terminated") == 1
    cancelled = played.jobs[1]
    assert cancelled.status == "watching"
    assert cancelled.ended == 5.0
    assert played.trees.named("watch")[0].asked == ["SIGINT"]
    assert not played.disk.names


def test_cancelled_before_its_agent_it_spoils_nothing() -> None:
    played = town(JobPlan(agent=20), JobPlan(cancels=(0.5,)))
    assert played.jobs[1].agent_began is None
    assert outcome(played) == (["watch_terminated", "watching"], False)


def test_the_last_one_out_is_cancelled_and_the_index_not_clean() -> None:
    played = town(JobPlan(agent=5), JobPlan(agent=50, cancels=(20.0,)), acts={"watch": [Act()]})
    assert outcome(played) == (["watching", "stale"], True)
    assert set(played.disk.names) == {"j0", "j1"}
    assert not played.trees.named("index")


def test_that_an_earlier_job_was_cancelled_does_not_keep_the_last_from_a_reconcile() -> None:
    played = town(JobPlan(agent=50, cancels=(5.0,)), JobPlan(agent=20), acts={"watch": [Act()]})
    assert outcome(played) == (["watching", "ready_via_fallback"], False)


def test_a_second_cancel_of_the_last_one_hurries_the_watch() -> None:
    deaf = Act(lines=((1.0, READY),), answer=None, on_term=None)
    played = town(JobPlan(agent=2), JobPlan(agent=50, cancels=(20.0, 21.0, 22.0)), acts={"watch": [deaf]})
    (watch,) = played.trees.named("watch")
    assert watch.signals == [(20.0, "SIGINT"), (21.0, "SIGTERM"), (22.0, "SIGKILL")]
    assert played.jobs[1].ended == 22.0


def test_a_second_cancel_of_another_job_does_not() -> None:
    slow = Act(lines=((1.0, READY),), answer=(4.0, ExitStatus(code=0)))
    played = town(JobPlan(agent=50, cancels=(5.0, 6.0, 7.0)), JobPlan(agent=20), acts={"watch": [slow]})
    assert played.trees.named("watch")[0].asked == ["SIGINT"]
    assert outcome(played) == (["watching", "watch_terminated"], False)


def test_a_cancel_during_the_last_reconcile_gives_it_up() -> None:
    acts = {"watch": [Act()], "index": [Act()]}
    played = town(JobPlan(agent=5), JobPlan(agent=10, cancels=(30.0,)), acts=acts)
    assert played.trees.named("index")[0].signals == [(30.0, "SIGINT")]
    assert outcome(played) == (["watching", "stale"], True)


# --- trouble -----------------------------------------------------------------------------------------------


def test_a_crash_with_two_jobs_is_told_to_both_and_ends_with_one_reconcile() -> None:
    crash = Act(lines=((1.0, READY),), ends=5.0, status=SEGV)
    played = town(JobPlan(agent=20), JobPlan(agent=30), acts={"watch": [crash, Act(lines=((1.0, READY),))]})
    assert outcome(played) == (["watching", "ready_via_fallback"], False)
    for job in played.jobs:
        assert ("Failed", "exited", "stale") in job.live
        assert job.report is not None
        assert job.report.watch_restarts == 1
    assert len(played.trees.named("index")) == 1


def test_what_outlives_the_watch_is_told_by_the_last_one_out() -> None:
    immortal = Act(lines=((1.0, READY),), answer=None, on_term=None, immortal=True)
    played = Town(JobPlan(agent=5), JobPlan(), acts={"watch": [immortal]}).play()
    assert [[survivor.role for survivor in job.survivors] for job in played.jobs] == [[], ["watch"]]


class BugInTheWatch(IndexDriver):  # type: ignore[misc]  # final
    async def _flush(self, child: Any) -> Any:
        raise LookupError("in the flush of the word-that-hides")


class BugAtOnce(IndexDriver):  # type: ignore[misc]  # final
    async def _level_a_stale_workspace(self) -> None:
        await trio.sleep(1)
        raise LookupError("while levelling")


def test_a_bug_in_the_driver_hangs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    played = town(JobPlan(agent=5), JobPlan(), driver=BugInTheWatch, masker=lambda _: Masker(["word-that-hides"]))
    assert outcome(played) == (["watching", "failed"], True)
    report = played.jobs[1].report
    assert report is not None
    assert report.reason == "a bug in supervise: LookupError: in the flush of the ***"
    assert played.jobs[1].live[-1][1:] == ("bug", "failed")
    assert "LookupError" in caplog.text
    assert "word-that-hides" not in caplog.text


def test_a_bug_while_jobs_use_the_watch_is_told_to_all_and_keeps_their_names() -> None:
    played = town(JobPlan(), JobPlan(agent=20), JobPlan(at=5, agent=30), driver=BugAtOnce)
    assert outcome(played) == (["failed"] * 3, True)
    assert len(played.outfits) == 2  # who comes later does not join what is broken
    assert set(played.disk.names) == {"j0", "j1", "j2"}
    for job in played.jobs:
        assert job.report is not None
        assert job.report.reason == "a bug in supervise: LookupError: while levelling"
        assert job.agent_ended is not None


def test_a_job_that_cannot_be_told_is_not_the_others_affair(caplog: pytest.LogCaptureFixture) -> None:
    played = Town(JobPlan(), JobPlan(agent=20))

    def refuse(event: object) -> None:
        if isinstance(event, IndexChanged) and event.cause == "ready":
            raise LookupError("no room")

    played.jobs[0].emit = refuse  # type: ignore[method-assign,assignment]  # one that fails
    played.play().check()
    assert outcome(played) == (["watching", "watch_terminated"], False)
    assert "LookupError" in caplog.text


def test_each_job_is_told_with_its_own_secrets_masked() -> None:
    says = Act(lines=((1.0, READY), (2.0, "ERROR one-secret two-secret")))
    secrets = {"j0": "one-secret", "j1": "two-secret"}
    played = town(JobPlan(), JobPlan(), acts={"watch": [says]}, masker=lambda name: Masker([secrets[name]]))
    told = [event.line for job in played.jobs for event in job.events if isinstance(event, IndexOutput)]
    assert [line for line in told if "ERROR" in line] == ["ERROR *** two-secret", "ERROR one-secret ***"]


# --- who comes while it closes, or wants something else ----------------------------------------------------


def test_who_comes_while_the_last_one_leaves_waits_for_that_and_opens_a_new_watch() -> None:
    slow = Act(lines=((1.0, READY),), answer=(4.0, ExitStatus(code=0)))
    played = town(JobPlan(agent=10), JobPlan(at=13), acts={"watch": [slow]})
    first, second = played.jobs
    assert first.ended is not None
    assert second.began == first.ended == pytest.approx(15.2)
    assert outcome(played) == (["watch_terminated"] * 2, False)
    assert len(played.trees.named("watch")) == 2


def test_it_waits_without_a_place_and_leaves_at_once_when_cancelled() -> None:
    slow = Act(lines=((1.0, READY),), answer=(4.0, ExitStatus(code=0)))
    played = town(JobPlan(agent=10), JobPlan(at=12, cancels=(1.0,)), acts={"watch": [slow]})
    assert played.jobs[1].began is None
    assert played.jobs[1].ended == 13.0


def test_other_settings_mean_no_watch_and_a_reconcile_when_the_lock_is_free() -> None:
    played = town(JobPlan(agent=30), JobPlan(at=1, agent=5, settings=OTHER))
    first, other = played.jobs
    assert other.agent_began == 1.0
    assert outcome(played) == (["watch_terminated", "ready_via_fallback"], False)
    assert len(played.trees.named("watch")) == 1
    (reconcile,) = played.trees.named("index")
    assert first.ended is not None
    assert first.ended <= reconcile.began <= first.ended + 0.1
    assert other.report is not None
    assert other.report.reason == NOT_ALONE
    assert other.live[0] == ("Failed", "failed", "stale")


def test_other_settings_give_up_after_the_reconcile_timeout() -> None:
    played = town(JobPlan(agent=100), JobPlan(at=1, agent=5, settings=evolve(OTHER, reconcile_timeout=20)))
    other = played.jobs[1]
    assert other.ended == pytest.approx(26.0)
    assert outcome(played) == (["watch_terminated", "failed"], True)
    assert played.disk.names == ["j1"]
    assert other.report is not None
    assert other.report.reason == f"{NOT_ALONE}; the wait for it took more than 20 s"


def test_jobs_without_the_lock_share_their_reconcile() -> None:
    played = town(JobPlan(agent=30), JobPlan(at=1, agent=5, settings=OTHER), JobPlan(at=2, agent=40, settings=OTHER))
    assert outcome(played) == (["watch_terminated", "watching", "ready_via_fallback"], False)
    assert len(played.trees.named("index")) == 1


def test_another_supervisor_starts_no_watch_and_reconciles_when_the_first_is_done() -> None:
    played = town(JobPlan(agent=30), JobPlan(at=5, agent=5, supervisor=1))
    assert outcome(played) == (["watch_terminated", "ready_via_fallback"], False)
    assert len(played.trees.named("watch")) == 1


# --- places ------------------------------------------------------------------------------------------------


async def test_who_may_not_begin_keeps_no_place_and_its_place_in_line() -> None:
    turns = Turns(1)
    may = False
    first = turns.ask(lambda: may)
    second, third = turns.ask(), turns.ask(lambda: may)
    with trio.fail_after(1):
        await second.comes()
    may = True
    turns.admit()
    fourth = turns.ask()
    assert not any(turn._came.is_set() for turn in (first, third, fourth))
    for done, following in ((second, first), (first, third), (third, fourth)):
        done.end()
        with trio.fail_after(1):
            await following.comes()
    fourth.end()
    assert turns.unused


async def test_who_may_not_begin_any_more_goes_back_to_where_it_was(autojump_clock: trio.testing.MockClock) -> None:
    turns = Turns(1)
    may = True
    first = turns.ask(lambda: may)  # it has a place; before it can begin, things change
    second, third = turns.ask(lambda: may), turns.ask()
    may = False
    with trio.move_on_after(1) as waited:
        await first.comes()
    assert waited.cancelled_caught
    await third.comes()
    may = True
    third.end()
    await first.comes()
    assert not second._came.is_set()
    first.end()
    await second.comes()
    second.end()
    assert turns.unused


async def test_who_waits_can_leave() -> None:
    turns = Turns(1)
    first, second, third = turns.ask(), turns.ask(lambda: False), turns.ask()
    second.end()
    third.end()
    first.end()
    assert turns.unused


def test_bad_is_known() -> None:
    """A reconcile that fails for the last one out leaves all names."""
    played = town(
        JobPlan(agent=5), JobPlan(), acts={"watch": [Act()], "index": [Act(ends=1.0, status=BAD, works=False)]}
    )
    assert outcome(played) == (["watching", IndexStatus.FAILED.value], True)
    assert set(played.disk.names) == {"j0", "j1"}


def test_the_watch_logs_under_its_workspace_and_under_the_jobs_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    run = IndexDriver.run

    async def told_run(driver: IndexDriver) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look, seen)
            await run(driver)
            nursery.cancel_scope.cancel()

    async def look(seen: list[dict[str, str]]) -> None:
        while True:
            if about() not in seen:
                seen.append(about())
            await trio.sleep(0.5)

    monkeypatch.setattr(IndexDriver, "run", told_run)
    with telling_of(job_id="opener", task_id="t1", worker="w1"):
        played = town(JobPlan(agent=5), JobPlan(at=2, agent=30))
        assert about()["job_id"] == "opener"
    assert outcome(played) == (["watching", "watch_terminated"], False)
    shared = [
        {"index": "/w", "job_id": jobs} for jobs in ("j0", "j0,j1", "j1")
    ]  # the first one leaves before the second
    assert [each for each in seen if "job_id" in each] == shared
