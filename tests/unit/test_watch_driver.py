"""The driver of the index by example: each ending, and each rule of the watch's life, on Trio's clock."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from attrs import evolve, fields

from supervise.events import Event, IndexChanged, IndexOutput, ReconcileFinished
from supervise.index.cidx import Cidx
from supervise.index.lifecycle import State
from supervise.index.watch import ASK_AGAIN, LAST_WORDS, NOT_ALONE, IndexDriver
from supervise.model import ExitStatus, IndexReport, IndexStatus
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.settings import IndexSettings
from tests.index_fakes import (
    BAD,
    NEVER,
    OK,
    READY,
    Act,
    Drive,
    FakeLock,
    FakeMark,
    FakeTrees,
    FakeValidation,
    Plan,
    World,
    drive,
)

SEGV = ExitStatus(signal="SIGSEGV")
DEFAULTS = IndexSettings()
NO_DAEMON = Act(ends=0.1, status=BAD, parting="Daemon mode not enabled\n")
WATCH = Act(lines=((1.0, READY),))
NEVER_READY = Act()
NO_INDEX = Act(ends=0.4, status=BAD, parting="\nNo indexes found. Run 'cidx index' first.\n\n")
HANDS_OVER = Act(ends=0.2)
CRASHES = Act(lines=((1.0, READY),), ends=2.0, status=SEGV)
GOOD = Act(ends=3.0)
HANGS = Act()
FAILS = Act(ends=1.0, status=BAD, works=False)
COMMANDS = 0.2  # seconds that the fakes' `start` and `fix-config` take


def job(
    watch: Act | Sequence[Act] = WATCH, index: Act | Sequence[Act] = GOOD, start: Act = NO_DAEMON, **more: object
) -> Drive:
    """Run a plan: what cidx's commands do, and whatever else a `Plan` takes; settings by their names."""
    names = {field.name for field in fields(Plan)}
    acts = {
        "start": [start],
        "watch": [watch] if isinstance(watch, Act) else watch,
        "index": [index] if isinstance(index, Act) else index,
    }
    for name in ("fix_config", "stop"):
        if name in more:
            acts[name.replace("_", "-")] = [more.pop(name)]  # type: ignore[list-item]  # acts by name
    settings = evolve(DEFAULTS, **{name: more.pop(name) for name in list(more) if name not in names})  # type: ignore[arg-type]  # fields by name
    return drive(Plan(settings=settings, acts=acts, **more))  # type: ignore[arg-type]  # fields by name


def outcome(run: Drive) -> tuple[str, bool]:
    """(the final status, whether the mark stays); they must agree everywhere."""
    assert run.report.stale == run.mark.marked
    assert run.driver.status is run.report.status
    assert run.report.stale or not run.world.lacking
    return run.report.status.value, run.report.stale


CLEAN = ("watch_terminated", False)
VIA_FALLBACK = ("ready_via_fallback", False)
STALE = ("stale", True)
FAILED = ("failed", True)


# --- the endings -------------------------------------------------------------------------------------------


def test_a_clean_end() -> None:
    run = job()
    assert outcome(run) == CLEAN
    assert run.report.reason == ""
    assert run.trees.order == ["start", "fix-config", "watch"]
    assert run.trees.named("watch")[0].asked == ["SIGINT"]


def test_a_clean_end_is_clean_for_a_cancelled_job_too() -> None:
    run = job(cancels=(5.0,))
    assert outcome(run) == CLEAN


def test_cancelled_before_the_index_is_known_to_be_clean() -> None:
    run = job(NEVER_READY, cancels=(5.0,))
    assert outcome(run) == STALE
    assert "cancelled" in run.report.reason
    assert not run.trees.named("index")


def test_cancelled_with_reconcile_on_cancel() -> None:
    run = job(NEVER_READY, cancels=(5.0,), reconcile_on_cancel=True)
    assert outcome(run) == VIA_FALLBACK


def test_fallback_off() -> None:
    run = job(CRASHES, fallback_to_reconcile=False)
    assert outcome(run) == FAILED
    assert not run.trees.named("index")
    assert "crashed" in run.report.reason


@pytest.mark.parametrize(
    ("watch", "why"),
    [
        (Act(refuses="cidx: not found"), "cidx: not found"),
        (NO_INDEX, "exit code 1: No indexes found. Run 'cidx index' first."),
        (HANDS_OVER, "unavailable"),
        (NEVER_READY, "not ready when the agent started"),
        (CRASHES, "crashed 3 time(s)"),
        (evolve(WATCH, answer=None), "did not end when it was asked to flush"),
        (evolve(WATCH, answer=(6.0, OK), on_term=None), "did not end when it was asked to flush"),
        (evolve(WATCH, answer=(0.5, BAD)), "answered the flush with exit code 1"),
        (evolve(WATCH, answer=(0.5, ExitStatus(signal="SIGINT"))), "answered the flush with signal SIGINT"),
        (evolve(WATCH, lines=((1.0, READY), (2.0, "ERROR 401"))), "printed 1 error(s)"),
        (evolve(WATCH, lines=((0.5, "ERROR 401"), (1.0, READY))), "printed 1 error(s)"),
        (evolve(WATCH, parting="ERROR at the end, without a newline", lag=1.0), "printed 1 error(s)"),
    ],
)
def test_otherwise_reconcile(watch: Act, why: str) -> None:
    run = job(watch)
    assert outcome(run) == VIA_FALLBACK
    assert why in run.report.reason
    assert len(run.reconciles(after_agent=True)) == 1


def test_the_watch_is_disabled() -> None:
    run = job(watch_enabled=False)
    assert outcome(run) == VIA_FALLBACK
    assert run.trees.order == ["index"]
    assert run.report.reason == "the watch is disabled"
    assert run.agent_began == 0.0


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (FAILS, "ended with exit code 1"),
        (evolve(GOOD, parting="ERROR embedding: 500\n", works=False), "printed errors: ERROR embedding: 500"),
        (evolve(GOOD, parting="indexing 5 files\nFiles processed: 0\n", works=False), "processed 0"),
        (evolve(GOOD, parting="cancelled", works=False), "cancelled"),
        (evolve(GOOD, parting="cancelled", lag=1.0, works=False), "cancelled"),
        (HANGS, "did not end in time"),
        (Act(refuses="cidx: not found"), "cidx: not found"),
    ],
)
def test_the_reconcile_fails(index: Act, why: str) -> None:
    run = job(NEVER_READY, index)
    assert outcome(run) == FAILED
    assert run.report.reason.startswith("the reconcile failed: ")
    assert why in run.report.reason
    assert run.trees.order[-2:] == ["index", "stop"]
    finished = [event for event in run.events if isinstance(event, ReconcileFinished)]
    assert [event.ok for event in finished] == [False]
    assert why in finished[0].reason


def test_a_reconcile_that_hangs_is_ended_in_order() -> None:
    run = job(NEVER_READY, evolve(HANGS, answer=None, on_term=None), reconcile_timeout=60.0)
    (reconcile,) = run.trees.named("index")
    began = reconcile.began
    signals = [(began + 60.0, "SIGINT"), (began + 65.0, "SIGTERM"), (began + 75.0, "SIGKILL")]
    assert reconcile.signals == [(pytest.approx(at), name) for at, name in signals]


def test_a_reconcile_that_times_out_after_a_cancel_has_timed_out() -> None:
    run = job(NEVER_READY, HANGS, cancels=(5.0,), reconcile_on_cancel=True)
    assert outcome(run) == FAILED
    assert run.report.reason == "the reconcile failed: it did not end in time"
    assert run.trees.order[-1] == "stop"


# --- the order of the start --------------------------------------------------------------------------------


def test_start_then_fix_config_then_watch_in_one_tree() -> None:
    run = job()
    start, fix, watch = run.trees.runs
    assert start.argv == ("cidx", "start")
    assert fix.argv == ("cidx", "fix-config", "--force")
    assert watch.argv == ("cidx", "watch")
    assert {ran.role for ran in run.trees.runs} == {"watch"}
    assert start.ended <= fix.began
    assert fix.ended <= watch.began


def test_a_failed_start_or_fix_config_is_no_failure() -> None:
    run = job(fix_config=Act(ends=0.1, status=BAD))
    assert outcome(run) == CLEAN
    assert next(e.line for e in run.events if isinstance(e, IndexOutput)) == "cidx fix-config ended with exit code 1"


@pytest.mark.parametrize("hung", ["start", "fix_config"])
def test_a_start_or_fix_config_that_hangs_is_a_watch_that_cannot_start(hung: str) -> None:
    run = job(**{hung: HANGS}, agent=100.0)  # type: ignore[arg-type]  # fields by name
    assert outcome(run) == VIA_FALLBACK
    assert f"cidx {hung.replace('_', '-')} did not end in 30 s" in run.report.reason
    assert not run.trees.named("watch")


def test_a_cidx_that_is_not_there() -> None:
    gone = Act(refuses="cidx: not found")
    run = job(gone, gone, gone, fix_config=gone, stop=gone)
    assert outcome(run) == FAILED
    assert "cidx: not found" in run.report.reason
    assert run.agent_began == 0.0


# --- daemons -----------------------------------------------------------------------------------------------


def test_our_daemon_is_ended_by_cidx_stop() -> None:
    run = job(start=Act(ends=0.1, daemon=True))
    assert outcome(run) == CLEAN
    (stop,) = run.trees.named("stop")
    (watch,) = run.trees.named("watch")
    assert stop.began >= watch.ended
    assert not run.trees.daemons
    assert run.trees.named("fix-config")[0].began == pytest.approx(0.1 + LAST_WORDS)  # it holds the pipe


def test_our_daemon_that_does_not_heed_cidx_stop_is_ended_by_the_stop_policy() -> None:
    run = job(start=Act(ends=0.1, daemon=True), stop=HANGS)
    assert outcome(run) == CLEAN
    assert not run.trees.daemons
    assert run.trees.named("stop")[0].asked == ["SIGTERM"]


@pytest.mark.parametrize("status", [OK, BAD])
def test_a_daemon_that_was_there_before_is_left_alone(status: ExitStatus) -> None:
    there = Act(ends=0.1, status=status, parting="daemon already running", lag=LAST_WORDS / 2)
    for watch, index in ((WATCH, GOOD), (HANDS_OVER, FAILS), (CRASHES, FAILS)):
        assert not job(watch, index, there).trees.named("stop")


def test_a_failed_reconcile_of_a_stale_index_stops_no_daemon_before_one_is_known() -> None:
    run = job(index=[FAILS, GOOD], before="marked")
    assert outcome(run) == VIA_FALLBACK
    assert not run.trees.named("stop")


def test_handing_over_to_a_daemon_is_unavailable_also_after_settling() -> None:
    run = job(Act(ends=2.5), start=Act(ends=0.1, daemon=True))
    assert outcome(run) == VIA_FALLBACK
    assert "unavailable" in run.report.reason
    assert run.report.metrics.crashes == 0
    assert len(run.trees.named("watch")) == 1
    assert [ran.name for ran in run.trees.runs][3:] == ["stop", "index", "index"]


# --- the start of the agent --------------------------------------------------------------------------------


def test_the_agent_starts_when_the_watch_is_ready() -> None:
    assert job().agent_began == pytest.approx(COMMANDS + 1.0)


def test_the_agent_starts_when_the_watch_has_settled_and_readiness_is_then_too_late() -> None:
    run = job(Act(lines=((5.0, READY),)))
    assert run.agent_began == pytest.approx(COMMANDS + 2.0)
    assert outcome(run) == VIA_FALLBACK
    assert run.report.reason == "the watch was not ready when the agent started"
    assert ("Running", "settled", "watching") in run.live
    assert ("Running", "ready", "watching") in run.live


def test_the_agent_waits_for_the_watch_at_most_startup_timeout() -> None:
    run = job(Act(lines=((8.0, READY),)), settle_time=60.0, startup_timeout=5.0)
    assert run.agent_began == 5.0
    assert outcome(run) == VIA_FALLBACK


def test_the_agent_waits_for_a_reconcile_at_most_startup_timeout() -> None:
    run = job(index=[Act(ends=100.0), GOOD], before="marked", agent=200.0, startup_timeout=5.0)
    assert run.agent_began == 5.0
    assert run.trees.named("index")[0].ended == 100.0
    assert outcome(run) == VIA_FALLBACK  # the agent worked while nobody watched


def test_a_watch_that_cannot_start_is_answered_at_once_and_at_the_end() -> None:
    run = job(NO_INDEX)
    early, final = run.trees.named("index")
    assert early.ended == run.agent_began
    assert final.began == run.stop_asked
    assert run.report.metrics.fallbacks == 2
    assert "No indexes found" in run.report.reason


def test_the_reason_is_the_watch_and_not_the_early_reconcile() -> None:
    run = job(NO_INDEX, [FAILS, GOOD])
    assert outcome(run) == VIA_FALLBACK
    assert "No indexes found" in run.report.reason


def test_one_reconcile_at_the_start_is_enough() -> None:
    run = job(NO_INDEX, before="marked")
    assert len(run.reconciles(after_agent=False)) == 1
    assert len(run.reconciles(after_agent=True)) == 1


def test_the_reconcile_before_the_watch_is_no_fallback() -> None:
    for watch, counts in ((WATCH, (1, 0)), (NO_INDEX, (1, 1)), (CRASHES, (1, 1))):
        metrics = job(watch, before="marked").report.metrics
        assert (metrics.levellings, metrics.fallbacks) == counts


def test_no_reconcile_at_once_without_fallback() -> None:
    run = job(NO_INDEX, fallback_to_reconcile=False)
    assert not run.trees.named("index")
    assert outcome(run) == FAILED


# --- the stale mark ----------------------------------------------------------------------------------------


def test_the_mark_is_set_before_anything_and_cleared_at_the_end() -> None:
    run = job()
    assert run.marked_at_start
    assert run.mark.history == [(0.0, "set"), (run.ended, "clear")]


@pytest.mark.parametrize("index", [GOOD, FAILS])
def test_the_mark_is_released_on_every_road(index: Act) -> None:
    for cancels in ((), (0.5,)):
        run = job(NEVER_READY, index, cancels=cancels)
        assert run.mark.released == run.ended


@pytest.mark.parametrize("before", ["marked", "changed", "unseen"])
def test_a_stale_workspace_is_reconciled_before_the_watch(before: str) -> None:
    run = job(before=before)
    assert run.trees.order == ["index", "start", "fix-config", "watch"]
    assert run.trees.runs[0].ended <= run.trees.runs[1].began
    assert outcome(run) == CLEAN


def test_a_workspace_never_seen_may_be_assumed_fresh() -> None:
    run = job(before="unseen", assume_fresh=True)
    assert run.trees.order == ["start", "fix-config", "watch"]
    assert outcome(run) == CLEAN


def test_a_stale_workspace_that_could_not_be_levelled_needs_the_reconcile_at_the_end() -> None:
    run = job(index=[FAILS, GOOD], before="marked")
    assert outcome(run) == VIA_FALLBACK
    assert run.report.reason == "the index was stale before the watch"


def test_a_stale_workspace_without_fallback_stays_so() -> None:
    run = job(before="marked", fallback_to_reconcile=False)
    assert outcome(run) == FAILED
    assert run.report.reason == "the index was stale before the watch"


def test_a_mark_that_cannot_be_written() -> None:
    run = job(mark_fails=("set",))
    assert (run.report.status, run.report.stale) == (IndexStatus.FAILED, True)
    assert run.report.reason == "the stale mark could not be written: No space left on device"
    assert run.mark.stale
    assert run.mark.history == []  # and no clean record is made either: nothing proves that the disk takes it


def test_a_mark_that_cannot_be_removed() -> None:
    run = job(mark_fails=("clear",))
    assert outcome(run) == FAILED
    assert run.report.reason == "the stale mark could not be removed: Read-only file system"


def test_a_workspace_whose_state_cannot_be_told_is_stale_next_time() -> None:
    run = job(untold=True)
    assert run.trees.order[0] == "index"
    assert run.mark.stale


# --- the lock of the workspace -----------------------------------------------------------------------------


def test_the_lock_is_held_from_before_the_first_look_until_the_index_is_settled() -> None:
    for run in (job(), job(NEVER_READY), job(before="marked"), job(NEVER_READY, FAILS), job(cancels=(0.5,))):
        assert run.lock.history == [(0.0, "taken"), (run.ended, "released")]


@pytest.mark.parametrize("before", ["level", "marked"])
def test_without_the_lock_there_is_nothing_until_the_end_and_then_a_reconcile(before: str) -> None:
    run = job(locked_until=5.0, before=before)
    assert run.agent_began == 0.0
    assert run.trees.order == ["index"]
    assert run.reconciles(after_agent=True)[0].began == run.stop_asked == 10.0
    assert outcome(run) == VIA_FALLBACK
    assert run.report.reason == NOT_ALONE
    assert run.live[0] == ("Failed", "failed", "stale")


def test_the_reconcile_waits_for_the_lock() -> None:
    run = job(locked_until=60.0)
    assert run.reconciles(after_agent=True)[0].began == pytest.approx(60.0, abs=ASK_AGAIN)
    assert outcome(run) == VIA_FALLBACK
    waits = [event.reason for event in run.events if isinstance(event, IndexChanged) and "waiting" in event.reason]
    assert waits == ["waiting for whoever watches this workspace, at most 600 s"]
    assert run.lock.history[-1] == (run.ended, "released")


def test_a_lock_that_is_not_to_be_had_within_the_reconcile_timeout() -> None:
    run = job(locked_until=NEVER, reconcile_timeout=60.0)
    assert run.ended == pytest.approx(70.0)
    assert outcome(run) == FAILED
    assert run.report.reason == f"{NOT_ALONE}; the wait for it took more than 60 s"
    assert run.trees.order == []


def test_a_cancelled_job_does_not_wait_for_the_lock() -> None:
    for cancelled in (5.0, 30.0):
        run = job(locked_until=NEVER, cancels=(cancelled,))
        assert run.ended == cancelled
        assert outcome(run) == STALE


def test_a_second_cancel_ends_the_wait_that_the_first_did_not() -> None:
    run = job(locked_until=NEVER, cancels=(30.0, 31.0), reconcile_on_cancel=True)
    assert run.ended == 31.0
    assert outcome(run) == FAILED
    assert run.report.reason == f"{NOT_ALONE}; the wait for it was given up"


def test_without_fallback_nobody_waits_for_the_lock() -> None:
    run = job(locked_until=NEVER, fallback_to_reconcile=False)
    assert run.ended == 10.0
    assert outcome(run) == FAILED
    assert run.report.reason == NOT_ALONE


def test_a_lock_that_cannot_be_asked_for() -> None:
    run = job(lock_fails=True)
    assert (run.agent_began, run.ended) == (0.0, 10.0)
    assert outcome(run) == FAILED
    assert run.report.reason == "the workspace cannot be locked: Too many open files"
    assert run.trees.order == []


# --- what is remembered of fix-config ----------------------------------------------------------------------


def test_fix_config_is_skipped_where_it_is_known_to_be_good() -> None:
    run = job(validated=True)
    assert run.trees.order == ["start", "watch"]
    assert outcome(run) == CLEAN
    assert run.validation.good


def test_a_good_fix_config_and_a_watch_that_was_ready_are_remembered() -> None:
    assert job().validation.good
    assert job(cancels=(5.0,)).validation.good


@pytest.mark.parametrize(
    ("watch", "fix"),
    [
        (WATCH, Act(ends=0.1, status=BAD)),
        (NEVER_READY, Act(ends=0.1)),
        (NO_INDEX, Act(ends=0.1)),
        (HANDS_OVER, Act(ends=0.1)),
        (CRASHES, Act(ends=0.1)),
        (Act(refuses="not found"), Act(ends=0.1)),
    ],
)
def test_anything_less_is_not(watch: Act, fix: Act) -> None:
    assert not job(watch, fix_config=fix).validation.good


@pytest.mark.parametrize("watch", [NEVER_READY, NO_INDEX, HANDS_OVER, CRASHES, Act(refuses="not found")])
def test_it_is_forgotten_when_the_watch_did_not_come_up_or_crashed(watch: Act) -> None:
    assert not job(watch, validated=True).validation.good


def test_it_is_not_forgotten_for_a_job_that_ends_before_the_watch_is_up() -> None:
    assert job(cancels=(0.5,), validated=True).validation.good


# --- crashes -----------------------------------------------------------------------------------------------


def test_a_crashed_watch_is_restarted_with_a_growing_pause_and_three_times() -> None:
    run = job(CRASHES, agent=60.0)
    lives = run.trees.named("watch")
    pauses = [after.began - before.ended for before, after in pairwise(lives)]
    assert pauses == [pytest.approx(p) for p in (0.5, 1.0, 2.0)]
    assert run.report.watch_restarts == 3
    assert run.report.metrics.crashes == 4
    assert run.trees.order == ["start", "fix-config", *["watch"] * 4, "index"]
    assert [state for state, _, _ in run.live][-4:] == ["Failed", "FallbackReconcile", "Terminated", "Terminated"]
    assert outcome(run) == VIA_FALLBACK


def test_restarts_are_forgotten_after_a_minute() -> None:
    run = job([evolve(CRASHES, ends=25.0)] * 9 + [WATCH], agent=400.0)
    restarts = [life.began for life in run.trees.named("watch")[1:]]
    assert len(restarts) > 3
    assert all(late - early >= 60 for early, late in zip(restarts, restarts[3:], strict=False))


def test_one_crash_is_enough_to_distrust_a_watch_that_ended_well() -> None:
    run = job([CRASHES, WATCH], agent=20.0)
    assert outcome(run) == VIA_FALLBACK
    assert run.report.reason == "the watch crashed 1 time(s)"


def test_a_watch_that_says_ready_and_ends_at_once_has_crashed() -> None:
    run = job([Act(ends=0.3, parting=READY + "\n", lag=LAST_WORDS / 2), WATCH], agent=20.0)
    assert run.report.metrics.crashes == 1
    assert run.report.watch_restarts == 1
    assert outcome(run) == VIA_FALLBACK


def test_a_watch_that_ends_before_it_is_asked_to_flush_has_not_flushed() -> None:
    """The stamp takes a while; the job is over, the watch not yet asked, and it ends with exit code 0."""
    run = job(Act(lines=((1.0, READY),), ends=11.5), stamp_seconds=1.0)
    assert run.stop_asked < 1.0 + COMMANDS + 11.5 < run.stop_asked + 1.0
    assert outcome(run) == VIA_FALLBACK
    assert run.report.metrics.crashes == 1


# --- the flush ---------------------------------------------------------------------------------------------


def test_the_flush_is_asked_for_when_the_agent_is_gone() -> None:
    run = job(agent_stop=3.0, cancels=(5.0,))
    (watch,) = run.trees.named("watch")
    assert watch.signals == [(8.0, "SIGINT")]
    assert run.agent_ended == 8.0


def test_a_flush_that_is_not_answered_is_followed_by_the_stop_policy() -> None:
    run = job(evolve(WATCH, answer=None, on_term=None))
    (watch,) = run.trees.named("watch")
    asked = run.stop_asked
    assert watch.signals == [(asked, "SIGINT"), (asked + 5.0, "SIGTERM"), (asked + 15.0, "SIGKILL")]
    (reconcile,) = run.trees.named("index")
    assert reconcile.began >= watch.ended
    assert outcome(run) == VIA_FALLBACK


def test_a_watch_that_nothing_ends_is_a_survivor() -> None:
    run = job(evolve(WATCH, answer=None, on_term=None, immortal=True), fallback_to_reconcile=False)
    assert [survivor.role for survivor in run.driver.survivors] == ["watch"]
    assert run.ended == pytest.approx(run.stop_asked + 5.0 + 10.0 + 5.0 + 5.0)  # and its pipes were waited for


# --- cancels -----------------------------------------------------------------------------------------------


def test_a_cancel_during_the_start_ends_it_at_once() -> None:
    run = job(start=HANGS, cancels=(3.0,))
    assert run.agent_began is None
    assert run.ended == pytest.approx(3.0)
    assert outcome(run) == STALE
    assert "the job ended before the watch was started" in run.report.reason


def test_a_cancel_before_readiness() -> None:
    run = job(cancels=(0.5,))
    assert run.agent_began is None
    assert outcome(run) == STALE


@pytest.mark.parametrize("before", ["level", "marked", "unseen"])
def test_a_cancel_gives_up_the_first_stamp_at_once(before: str) -> None:
    run = job(before=before, stamp_seconds=30.0, cancels=(3.0,), agent=100.0)
    assert run.ended == pytest.approx(3.0)
    assert run.trees.order == []
    assert outcome(run) == STALE


def test_a_second_cancel_ends_the_stamp_before_the_flush() -> None:
    run = job(stamp_seconds=30.0, agent=100.0, settle_time=1.0, cancels=(60.0, 61.0))
    assert run.trees.named("watch")[0].signals == [(61.0, "SIGINT")]
    assert run.ended == pytest.approx(61.5)
    assert outcome(run)[0] == "stale"  # the agent did not wait 30 s for the watch


def test_a_second_cancel_ends_the_stamp_before_the_reconcile() -> None:
    run = job(NO_INDEX, stamp_seconds=5.0, agent=10.0, reconcile_on_cancel=True, cancels=(25.0, 26.0))
    assert run.reconciles(after_agent=True)[0].began == 26.0
    assert outcome(run) == VIA_FALLBACK
    assert run.mark.clean == "untold"  # the next job looks again


def test_a_cancel_gives_up_the_reconcile_of_a_stale_index() -> None:
    run = job(index=HANGS, before="marked", cancels=(3.0,))
    assert run.trees.order == ["index"]
    assert run.trees.runs[0].signals == [(3.0, "SIGINT")]
    assert outcome(run) == STALE


def test_a_cancel_during_the_flush_does_not_spoil_it() -> None:
    run = job(agent=1.0, cancels=(COMMANDS + 1.0 + 1.0 + 0.2,))
    assert run.cancelled < NEVER
    assert outcome(run) == CLEAN


def test_a_second_cancel_skips_the_wait_for_the_flush() -> None:
    run = job(evolve(WATCH, answer=(4.0, OK)), cancels=(5.0, 6.0))
    assert run.trees.named("watch")[0].signals == [(5.0, "SIGINT"), (6.0, "SIGTERM")]
    assert run.ended == 6.0
    assert outcome(run) == STALE
    assert "the flush was cut short by a further cancel" in run.report.reason


def test_a_third_cancel_kills() -> None:
    run = job(evolve(WATCH, answer=None, on_term=None), cancels=(5.0, 6.0, 7.0))
    assert run.trees.named("watch")[0].signals == [(5.0, "SIGINT"), (6.0, "SIGTERM"), (7.0, "SIGKILL")]


def test_a_cancel_during_the_last_reconcile_gives_it_up() -> None:
    run = job(NEVER_READY, HANGS, agent=5.0, cancels=(20.0,))
    (reconcile,) = run.trees.named("index")
    assert reconcile.signals == [(20.0, "SIGINT")]
    assert outcome(run) == STALE
    assert not run.trees.named("stop")
    assert "cancelled" in run.report.reason


def test_a_cancel_during_the_last_reconcile_is_not_heard_with_reconcile_on_cancel() -> None:
    run = job(NEVER_READY, Act(ends=50.0), agent=5.0, cancels=(20.0,), reconcile_on_cancel=True)
    assert outcome(run) == VIA_FALLBACK
    assert run.trees.named("index")[0].signals == []


def test_a_cancel_just_before_the_last_reconcile_is_heard() -> None:
    """The job is over; the workspace is being looked at; the reconcile has not begun."""
    run = job(NO_INDEX, fallback_to_reconcile=True, agent=5.0, stamp_seconds=1.0, cancels=(100.0,))
    before_it = run.reconciles(after_agent=True)[0].began - 0.5
    again = job(NO_INDEX, fallback_to_reconcile=True, agent=5.0, stamp_seconds=1.0, cancels=(before_it,))
    assert not again.reconciles(after_agent=True)
    assert again.ended == pytest.approx(before_it + 0.5)
    assert outcome(again) == STALE


def test_a_second_cancel_ends_a_reconcile_that_the_first_did_not() -> None:
    run = job(NEVER_READY, HANGS, agent=5.0, cancels=(20.0, 21.0), reconcile_on_cancel=True)
    assert run.trees.named("index")[0].signals == [(21.0, "SIGINT")]
    assert outcome(run) == FAILED
    assert run.report.reason == "the reconcile failed: it was given up, the job ends"


# --- what is told ------------------------------------------------------------------------------------------


def test_live_statuses_of_a_clean_job() -> None:
    run = job()
    assert run.live == [
        ("Starting", "start", "stale"),
        ("Running", "ready", "watching"),
        ("Stopping", "stop", "stale"),
        ("Terminated", "flushed", "stale"),
        ("Terminated", "end", "watch_terminated"),
    ]
    assert [(e.kind, e.line) for e in run.events if isinstance(e, IndexOutput)] == [("ready", READY)]


def test_live_statuses_of_a_job_that_falls_back() -> None:
    run = job(NO_INDEX)
    assert run.statuses == [
        *("stale", "reconciling_fallback", "ready_via_fallback"),  # at once: the agent works on a fresh index
        *("reconciling_fallback", "ready_via_fallback"),
    ]
    assert run.live[-1] == ("Terminated", "end", "ready_via_fallback")


def test_the_state_of_rest_is_told_when_nothing_runs_any_more() -> None:
    run = job(evolve(CRASHES, daemon=False), agent=60.0, start=Act(ends=0.1, daemon=True))
    assert run.driver.state is State.TERMINATED
    failures = [event for event in run.events if isinstance(event, IndexChanged) and event.cause == "exited"]
    assert failures
    assert all(event.reason for event in failures)


def test_nobody_waits_for_ever_if_the_last_event_cannot_be_told() -> None:
    class Mute(IndexDriver):  # type: ignore[misc]  # final
        def __init__(self, **parts: Any) -> None:
            super().__init__(**{**parts, "emit": self._tell})

        def _tell(self, event: Event) -> None:
            if isinstance(event, IndexChanged) and event.cause == "end":
                assert not self._reported.is_set()
                raise RuntimeError("no room")

    async def main() -> IndexReport:
        hurry = Hurry()
        world = World()
        mark = FakeMark(world, hurry=hurry)
        driver = Mute(
            tool=Cidx(),
            settings=DEFAULTS,
            command=lambda argv: Command(argv=argv, cwd="/w", env={}),
            open_tree=FakeTrees(world=world),
            mark=mark,
            lock=FakeLock(),
            validation=FakeValidation(),
            emit=None,
            hurry=hurry,
        )
        driver.finish()
        with pytest.raises(RuntimeError, match="no room"):
            await driver.run()
        return await driver.report()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_trouble_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "supervise.index"):
        job(CRASHES, FAILS, agent=60.0)
    assert "the watch ended unasked with signal SIGSEGV" in caplog.text
    assert "the watch keeps crashing" in caplog.text
    assert "the reconcile failed: it ended with exit code 1" in caplog.text
    assert "the index is failed" in caplog.text


# --- metrics -----------------------------------------------------------------------------------------------


def test_metrics_of_a_clean_job() -> None:
    metrics = job(reconcile_seconds=30.0).report.metrics
    assert (metrics.starts, metrics.crashes, metrics.restarts, metrics.fallbacks) == (1, 0, 0, 0)
    assert metrics.uptime == pytest.approx(10.5)
    assert metrics.flush_seconds == pytest.approx(0.5)
    assert metrics.saved_seconds == pytest.approx(29.5)
    assert metrics.reconcile_seconds is None
    assert metrics.success_rate == 1.0
    assert metrics.started_at is not None
    assert metrics.stopped_at is not None
    assert metrics.started_at <= metrics.stopped_at


def test_metrics_of_crashes() -> None:
    metrics = job([CRASHES, WATCH], agent=20.0, reconcile_seconds=30.0).report.metrics
    assert (metrics.starts, metrics.crashes, metrics.restarts, metrics.fallbacks) == (2, 1, 1, 1)
    assert metrics.success_rate == 0.5
    assert metrics.reconcile_seconds == pytest.approx(3.0)
    assert metrics.saved_seconds is None  # nothing was


def test_what_the_watch_saved_is_measured_against_the_reconcile_of_this_very_job() -> None:
    metrics = job(before="marked").report.metrics
    assert metrics.reconcile_seconds == pytest.approx(3.0)
    assert metrics.saved_seconds == pytest.approx(2.5)


def test_nothing_is_said_to_be_saved_where_nothing_was_measured() -> None:
    assert job().report.metrics.saved_seconds is None


def test_metrics_of_a_watch_that_never_ran() -> None:
    metrics = job(watch_enabled=False).report.metrics
    assert (metrics.starts, metrics.started_at, metrics.success_rate) == (0, None, None)
