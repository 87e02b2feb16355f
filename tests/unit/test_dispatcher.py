"""The dispatcher, by example: on fakes, and on a clock that jumps: a sleep here takes no time."""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from supervise.dispatch.backlog import Offer
from supervise.dispatch.breaker import BreakerState
from supervise.dispatch.source import Arrived, Vanished
from supervise.dispatch.task import Attempt, Task, of_fields
from supervise.errors import BadInput, SpecError
from supervise.events import TaskBuried, TaskClaimed, TaskFinished, TaskPutBack, TaskRetried, WorkerTrouble
from supervise.model import FailureKind, JobSpec, Outcome
from tests.dispatch_fakes import START, Act, FakeClaim, NoJob, Stage, Wall, spec_of

OVERLOADED = Act(1.0, FailureKind.OVERLOADED)
QUOTA = Act(1.0, FailureKind.QUOTA)


@asynccontextmanager
async def running(stage: Stage) -> AsyncIterator[None]:
    """The dispatcher runs in this block, and is drained at its end."""
    with trio.fail_after(2e5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.dispatcher.run)
            yield
            stage.dispatcher.drain()


def begins(stage: Stage, task_id: str) -> list[float]:
    return [ran.began for ran in stage.executor.ran if ran.task_id == task_id]


async def test_a_task_is_run_and_its_result_published(autojump_clock: MockClock) -> None:
    stage = Stage()
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.results)
    record = stage.source.results["a"]
    assert (record["status"], record["exit_code"], record["attempt"]) == ("completed", 0, 1)
    assert [type(event) for event in stage.events] == [TaskClaimed, TaskFinished]
    assert stage.dispatcher.stats.tasks_processed == 1
    assert stage.dispatcher.stats.tasks_failed == 0


async def test_a_failure_is_tried_again_after_one_and_two_seconds(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [OVERLOADED, OVERLOADED, Act(1.0)]})
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.results)
    assert begins(stage, "a") == pytest.approx([0, 2, 5], abs=1e-3)
    assert stage.source.results["a"]["retry_count"] == 2
    assert len(stage.told(TaskRetried)) == stage.dispatcher.stats.tasks_retried == 2


async def test_the_last_attempt_makes_a_dead_letter_with_the_whole_history(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [OVERLOADED]})
    async with running(stage):
        stage.source.submit("a", colour="red")
        await stage.source.until(lambda: "a" in stage.source.dead_letters)
    record = stage.source.dead_letters["a"]
    assert record["dlq_reason"] == "max_retries_exceeded"
    assert record["colour"] == "red"
    assert [each["attempt"] for each in record["attempts"]] == [1, 2, 3]
    assert len(stage.executor.ran) == 3
    assert stage.dispatcher.stats.tasks_dlq == 1


@pytest.mark.parametrize("kind", ["auth", "refused", "budget", "max_turns", "bad_output", "spawn"])
async def test_what_another_attempt_would_not_mend_is_a_dead_letter_at_once(
    autojump_clock: MockClock, kind: str
) -> None:
    stage = Stage({"a": [Act(1.0, FailureKind(kind))]})
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.dead_letters)
    assert stage.source.dead_letters["a"]["dlq_reason"] == kind
    assert len(stage.executor.ran) == 1


async def test_a_timeout_is_a_result(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [Act(1.0, Outcome.TIMED_OUT)]})
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.results)
    assert stage.source.results["a"]["exit_code"] == 124
    assert stage.dispatcher.stats.tasks_failed == 1


async def test_a_workers_death_counts_as_an_attempt(autojump_clock: MockClock) -> None:
    first, last = (of_fields({"task_id": name, "description": "d"}) for name in ("first", "last"))
    before = (Attempt(attempt=1), Attempt(attempt=2))
    stage = Stage(dead=[(first, ()), (last, before)])
    async with running(stage):
        await stage.source.until(lambda: stage.source.ended() == {"first", "last"})
    assert stage.source.results["first"]["attempt"] == 2
    assert begins(stage, "first") == pytest.approx([1.0], abs=1e-3)
    (record,) = stage.source.dead_letters.values()
    assert record["attempts"][-1]["failure_kind"] == "killed"
    assert begins(stage, "last") == []


async def test_pending_retries_of_the_last_life_keep_their_time(autojump_clock: MockClock) -> None:
    stage = Stage()
    async with running(stage):
        task = of_fields({"task_id": "a", "description": "d"})
        stage.source.put(task, (Attempt(attempt=1),), START + 1000)
        await stage.source.until(lambda: "a" in stage.source.results)
    assert begins(stage, "a") == pytest.approx([1000], abs=1e-2)
    assert stage.source.results["a"]["attempt"] == 2


async def test_what_becomes_ready_between_two_looks_at_the_clock_is_started(autojump_clock: MockClock) -> None:
    """The wall clock goes on by ten seconds at each look: whatever is due next becomes due between two of them."""
    stage = Stage(wall=Wall(crumb=10.0))
    async with running(stage):
        for number in range(1, 20):
            stage.source.submit(f"t{number}", not_before=START + number * 7.0)
        await stage.source.until(lambda: len(stage.source.results) == 19)
    assert trio.current_time() < 200


async def test_the_breaker_opens_and_the_tasks_stay_where_they_are(autojump_clock: MockClock) -> None:
    acts = {f"t{number}": [OVERLOADED, Act(1.0)] for number in range(4)}
    stage = Stage(acts, failures=2, max_concurrent=1)
    async with running(stage):
        for name in acts:
            stage.source.submit(name)
        await trio.sleep(30)
        assert len(stage.executor.ran) == 2
        assert set(stage.source.waiting) == set(acts)
        assert stage.dispatcher.breaker_state() is BreakerState.OPEN
        assert stage.dispatcher.queue_size == 4
        turns = stage.dispatcher.turns
        await trio.sleep(20)
        assert stage.dispatcher.turns == turns
        await stage.source.until(lambda: set(stage.source.results) == set(acts))
    times = sorted(ran.began for ran in stage.executor.ran)
    assert times[:3] == pytest.approx([0, 1, 62], abs=1e-3)  # the third is the probe


async def test_a_failed_probe_opens_it_for_another_while(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [OVERLOADED]}, failures=1, max_attempts=3)
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.dead_letters)
    assert begins(stage, "a") == pytest.approx([0, 61, 122], abs=1e-3)


async def test_one_probe_at_a_time(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [OVERLOADED, Act(50.0)]}, failures=1, max_concurrent=3)
    async with running(stage):
        stage.source.submit("a", priority=1)
        await trio.sleep(0.5)
        await stage.source.until(lambda: "a" in stage.source.waiting)
        stage.source.submit("b")
        stage.source.submit("c")
        await stage.source.until(lambda: stage.source.ended() == {"a", "b", "c"})
    assert begins(stage, "b") + begins(stage, "c") == pytest.approx([111, 111], abs=1e-3)


async def test_a_quota_pauses_the_worker_and_is_nobodys_attempt(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [attrs_reset(100.0), Act(1.0)]})
    async with running(stage):
        stage.source.submit("a")
        await trio.sleep(2)
        stage.source.submit("b")
        await stage.source.until(lambda: stage.source.ended() == {"a", "b"})
    assert begins(stage, "a") == pytest.approx([0, 101], abs=1e-2)
    assert begins(stage, "b") == pytest.approx([101], abs=1e-2)
    assert stage.source.results["a"]["attempt"] == 1
    assert stage.dispatcher.breaker_failures() == 0
    assert "quota" in stage.told(TaskPutBack)[0].reason


def attrs_reset(seconds: float) -> Act:
    return Act(1.0, FailureKind.QUOTA, reset_after=seconds)


async def test_a_quota_that_names_no_reset_pauses_by_the_settings(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [QUOTA, Act(1.0)]})
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.results)
    assert begins(stage, "a") == pytest.approx([0, 301], abs=1e-2)


async def test_higher_priority_first_then_arrival(autojump_clock: MockClock) -> None:
    stage = Stage(max_concurrent=1)
    async with running(stage):
        for name, priority in [("first", 0), ("low", "low"), ("b", 1), ("urgent", "urgent"), ("c", 1)]:
            stage.source.submit(name, priority=priority)
        await stage.source.until(lambda: len(stage.source.results) == 5)
    assert [ran.task_id for ran in stage.executor.ran] == ["urgent", "b", "c", "first", "low"]


async def test_a_task_waits_for_those_that_it_depends_on(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [Act(5.0)]})
    async with running(stage):
        stage.source.submit("b", dependencies=["a", "z"])
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.results)
        await trio.sleep(1)
        assert stage.dispatcher.blocked == {"b": ("z",)}
        stage.source.submit("z")
        await stage.source.until(lambda: "b" in stage.source.results)
    assert begins(stage, "b") == pytest.approx([7], abs=1e-3)


async def test_draining_takes_no_more_and_waits_for_what_is_under_way(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [Act(10.0)]}, max_concurrent=1)
    async with running(stage):
        stage.source.submit("a")
        stage.source.submit("b")
        await trio.sleep(1)
        stage.dispatcher.drain()
        await stage.source.until(lambda: "a" in stage.source.results)
    assert set(stage.source.waiting) == {"b"}
    assert trio.current_time() == pytest.approx(10)


async def test_a_second_signal_puts_everything_back_uncounted(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [Act(10.0)], "b": [Act(10.0)]})
    async with running(stage):
        stage.source.submit("a")
        stage.source.submit("b")
        await trio.sleep(1)
        stage.dispatcher.drain()
        await trio.sleep(1)
        stage.dispatcher.cancel()
    assert trio.current_time() == pytest.approx(2)
    assert {name: each.attempts for name, each in stage.source.waiting.items()} == {"a": (), "b": ()}
    assert len(stage.told(TaskPutBack)) == 2


async def test_cancelling_the_dispatcher_puts_everything_back_and_propagates(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [Act(10.0)]})
    with trio.move_on_after(3) as scope:
        stage.source.submit("a")
        await stage.dispatcher.run()
    assert scope.cancelled_caught
    assert stage.source.waiting["a"].attempts == ()


async def test_a_result_that_comes_in_spite_of_the_cancellation_is_published(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [Act(10.0, deaf=True)]})
    async with running(stage):
        stage.source.submit("a")
        await trio.sleep(1)
        stage.dispatcher.cancel()
    assert stage.source.results["a"]["attempt"] == 1
    assert not stage.source.waiting


async def test_an_executor_that_can_run_nothing_costs_no_attempt(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [Act(0.0, NoJob), Act(0.0, NoJob), Act(1.0)]}, max_attempts=1)
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.results)
    assert begins(stage, "a") == pytest.approx([0, 0.25, 0.75], abs=1e-2)
    assert [event.what for event in stage.told(WorkerTrouble)] == ["executor", "executor"]
    assert not stage.dispatcher.troubles


async def test_any_other_error_of_an_executor_is_a_failure_of_the_agent(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [Act(0.0, ZeroDivisionError)]}, max_attempts=2)
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.dead_letters)
    record = stage.source.dead_letters["a"]
    assert [each["failure_kind"] for each in record["attempts"]] == ["agent_error"] * 2
    assert "ZeroDivisionError" in record["dlq_detail"]


async def test_a_task_of_which_no_job_can_be_made_is_a_dead_letter(autojump_clock: MockClock) -> None:
    def refuses(task: object, attempt: int) -> object:
        raise SpecError("workspace is not allowed")

    stage = Stage(spec_of=refuses)  # type: ignore[arg-type]  # it never returns
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.dead_letters)
    assert stage.source.dead_letters["a"]["dlq_reason"] == "invalid_format"
    assert stage.told(TaskBuried)[0].detail == "workspace is not allowed"


async def test_a_publication_is_tried_until_it_works_and_its_place_stays_taken(autojump_clock: MockClock) -> None:
    stage = Stage(max_concurrent=1, troubles={"finish": range(5)})
    async with running(stage):
        stage.source.submit("a")
        stage.source.submit("b")
        await trio.sleep(1.1)
        assert "finish does not work" in stage.dispatcher.troubles["publication"]
        await stage.source.until(lambda: stage.source.ended() == {"a", "b"})
    assert len(stage.executor.ran) == 2
    assert begins(stage, "b") == pytest.approx([1 + 0.25 + 0.5 + 1 + 2 + 4], abs=1e-3)
    assert stage.told(WorkerTrouble)[-1].error == ""


@pytest.mark.parametrize("what", ["recover", "claim", "completed"])
async def test_trouble_of_the_source_delays_and_loses_nothing(autojump_clock: MockClock, what: str) -> None:
    stage = Stage(troubles={what: range(3)})
    async with running(stage):
        stage.source.submit("a")
        stage.source.submit("b", dependencies=["a"])
        await stage.source.until(lambda: stage.source.ended() == {"a", "b"})
        await trio.sleep(60)
    assert len(stage.executor.ran) == 2
    assert not stage.dispatcher.troubles


async def test_a_lost_claim_ends_its_attempt_and_publishes_nothing(autojump_clock: MockClock) -> None:
    stage = Stage({"a": [Act(10.0)]}, losses={("a", 1): 3.0})
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.lost)
        await trio.sleep(1)
        assert not stage.dispatcher.active
    assert stage.executor.ran[0].ended is None
    assert not stage.source.results
    assert not stage.source.waiting
    assert stage.dispatcher.stats.tasks_processed == 0


async def test_a_worker_that_has_nothing_to_do_does_not_wake_up(autojump_clock: MockClock) -> None:
    stage = Stage()
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.results)
        await trio.sleep(1)
        turns = stage.dispatcher.turns
        await trio.sleep(100_000)
        assert stage.dispatcher.turns == turns
        assert turns <= 6


@pytest.mark.parametrize("by", [-5000.0, 5000.0])
async def test_a_clock_that_is_set_is_looked_at_again_within_a_minute(autojump_clock: MockClock, by: float) -> None:
    stage = Stage(wall=Wall(jumps=[(10.0, by)]))
    async with running(stage):
        stage.source.submit("a", not_before=START + 500)
        await stage.source.until(lambda: "a" in stage.source.results)
    (began,) = begins(stage, "a")
    due = max(10.0, 500 - by)
    assert due - 1e-2 <= began <= due + 60


async def test_no_more_at_a_time_than_allowed(autojump_clock: MockClock) -> None:
    stage = Stage(max_concurrent=3)
    async with running(stage):
        for number, _ in zip(itertools.count(), range(10), strict=False):
            stage.source.submit(f"t{number}")
        await stage.source.until(lambda: len(stage.source.results) == 10)
    assert stage.executor.most == stage.source.most == 3
    assert trio.current_time() == pytest.approx(math.ceil(10 / 3))


# --- trouble, and what it must not do ------------------------------------------------------------------------


async def test_claims_that_are_refused_hold_the_worker_and_not_each_task(autojump_clock: MockClock) -> None:
    stage = Stage(max_concurrent=1, troubles={"claim": range(8)})
    async with running(stage):
        for number in range(100):
            stage.source.submit(f"t{number:02}")
        await trio.sleep(20)
        assert len(stage.source.claims) <= 7, "it asked for each of them"
        await stage.source.until(lambda: len(stage.source.results) == 100)
    assert [ran.task_id for ran in stage.executor.ran] == [f"t{number:02}" for number in range(100)], "by arrival"
    assert not stage.dispatcher.troubles


async def test_after_trouble_one_task_tries_for_all(autojump_clock: MockClock) -> None:
    stage = Stage(max_concurrent=3, troubles={"claim": range(5)})
    async with running(stage):
        for number in range(6):
            stage.source.submit(f"t{number}")
        await stage.source.until(lambda: len(stage.source.results) == 6)
    moments = [claimed.at for claimed in stage.source.claims]
    assert moments[:3] == [moments[0]] * 3, "nobody knew"
    assert len(set(moments[3:6])) == 3, "one at a time"


async def test_no_job_can_be_run_for_anybody_and_it_costs_no_attempt(autojump_clock: MockClock) -> None:
    acts = {f"t{number}": [Act(0.0, NoJob)] * 3 + [Act(1.0)] for number in range(3)}
    stage = Stage(acts, max_attempts=1)
    async with running(stage):
        for name in acts:
            stage.source.submit(name)
        await stage.source.until(lambda: set(stage.source.results) == set(acts))
    assert {record["attempt"] for record in stage.source.results.values()} == {1}
    assert len(stage.executor.ran) == 12


async def test_a_task_for_which_alone_no_job_can_be_run_ends_and_keeps_nobody_from_running(
    autojump_clock: MockClock,
) -> None:
    stage = Stage({name: [Act(0.0, NoJob)] for name in ("x", "y")}, max_concurrent=1)
    async with running(stage):
        for name in ("x", "y"):
            stage.source.submit(name, priority="urgent")
        for number in range(20):
            stage.source.submit(f"t{number}")
        await stage.source.until(lambda: len(stage.source.ended()) == 22)
        assert trio.current_time() < 60
    for name in ("x", "y"):
        letter = stage.source.dead_letters[name]
        assert (letter["dlq_reason"], letter["dlq_detail"]) == ("max_retries_exceeded", "no job could be run")
        assert len(begins(stage, name)) <= 3 + 2, "uncounted at first, since it might have been the same with others"
    assert not stage.dispatcher.troubles


@pytest.mark.parametrize("kind", [SpecError, BadInput])
async def test_an_executor_may_refuse_a_task_for_good(autojump_clock: MockClock, kind: type[Exception]) -> None:
    stage = Stage({"a": [Act(0.0, kind)]})
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.dead_letters)
    assert stage.source.dead_letters["a"]["dlq_reason"] == "invalid_format"
    assert len(stage.executor.ran) == 1
    assert not stage.told(WorkerTrouble)


async def test_a_bug_of_whoever_makes_the_jobs_is_the_end_of_a_task_and_not_of_the_worker(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def trips(task: Task, attempt: int) -> JobSpec:
        if task.task_id == "poison":
            raise KeyError("x")
        return spec_of(task, attempt)

    stage = Stage(spec_of=trips)
    async with running(stage):
        stage.source.submit("poison")
        stage.source.submit("good")
        await stage.source.until(lambda: stage.source.ended() == {"poison", "good"})
    letter = stage.source.dead_letters["poison"]
    assert (letter["dlq_reason"], letter["dlq_detail"]) == ("invalid_format", "KeyError: 'x'")
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_an_exit_of_whoever_makes_the_jobs_puts_the_task_back_and_propagates(autojump_clock: MockClock) -> None:
    def leave(task: object, attempt: int) -> JobSpec:
        raise SystemExit(3)

    stage = Stage(spec_of=leave)
    stage.source.submit("a")
    with pytest.raises(BaseExceptionGroup) as caught:
        await stage.dispatcher.run()
    assert caught.group_contains(SystemExit)
    assert stage.source.waiting["a"].attempts == ()
    assert not stage.source.running


async def test_a_result_that_cannot_be_published_before_the_end_is_told(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(troubles={"finish": range(1000)})
    async with running(stage):
        stage.source.submit("a")
        await trio.sleep(30)
        tries = stage.source.count("finish")
        stage.dispatcher.cancel()
    assert stage.source.count("finish") == tries + 1, "once more"
    assert stage.dispatcher.unpublished == 1
    assert "what came of its attempt is lost" in stage.told(WorkerTrouble)[-1].error
    assert "task a: what came of its attempt is lost" in caplog.text
    assert set(stage.source.running) == {"a"}


async def test_a_result_is_published_at_the_last_moment(autojump_clock: MockClock) -> None:
    stage = Stage(troubles={"finish": range(5)})
    async with running(stage):
        stage.source.submit("a")
        await trio.sleep(1 + 0.25 + 0.5 + 1 + 2 + 1)  # within the pause before the next try
        stage.dispatcher.cancel()
    assert trio.current_time() < 6
    assert set(stage.source.results) == {"a"}
    assert stage.dispatcher.unpublished == 0
    assert stage.dispatcher.stats.tasks_processed == len(stage.told(TaskFinished)) == 1


@pytest.mark.parametrize("what", ["recover", "retry"])
async def test_a_drain_does_not_wait_for_what_a_dead_worker_has_left(autojump_clock: MockClock, what: str) -> None:
    dead = [(of_fields({"task_id": name, "description": "d"}), ()) for name in ("a", "b")]
    stage = Stage(dead=dead, troubles={what: range(1000)})
    async with running(stage):
        await trio.sleep(30)
        assert not stage.dispatcher.ready.is_set()
        stage.dispatcher.drain()
    assert trio.current_time() == pytest.approx(30)
    assert set(stage.source.running) == {"a", "b"}, "the next start finds them"
    assert stage.dispatcher.unpublished == 0


async def test_attempts_past_a_limit_that_was_lowered_are_not_made(autojump_clock: MockClock) -> None:
    stage = Stage(max_attempts=2)
    before = (Attempt(attempt=1), Attempt(attempt=2, error="a bad network"))
    async with running(stage):
        stage.source.put(of_fields({"task_id": "a", "description": "d"}), before)
        stage.source.put(of_fields({"task_id": "b", "description": "d", "max_attempts": 3}), before)
        await stage.source.until(lambda: stage.source.ended() == {"a", "b"})
    letter = stage.source.dead_letters["a"]
    assert letter["dlq_reason"] == "max_retries_exceeded"
    assert letter["dlq_detail"] == "it had 2 attempts, and may have 2 now; a bad network"
    assert [each["attempt"] for each in letter["attempts"]] == [1, 2]
    assert [ran.task_id for ran in stage.executor.ran] == ["b"]


async def test_what_is_told_of_twice_while_it_is_claimed_is_claimed_once(autojump_clock: MockClock) -> None:
    stage = Stage()
    asked, go_on = trio.Event(), trio.Event()
    claim = stage.source.claim

    async def slowly(offer: Offer) -> FakeClaim | None:
        asked.set()
        await go_on.wait()
        return await claim(offer)

    stage.source.claim = slowly  # type: ignore[method-assign]  # of this source alone
    async with running(stage):
        stage.source.submit("a")
        await asked.wait()
        stage.source._say(Arrived(stage.source._offer("a")))
        await trio.sleep(1)
        go_on.set()
        await stage.source.until(lambda: "a" in stage.source.results)
        await trio.sleep(1)
    assert len(stage.source.claims) == 1


async def test_what_is_gone_since_it_is_half_claimed_is_claimed_again(autojump_clock: MockClock) -> None:
    stage = Stage(troubles={"claim": range(1)})
    async with running(stage):
        stage.source.submit("a")
        await trio.sleep(0.1)
        stage.source._say(Vanished("a.json"))
        await stage.source.until(lambda: "a" in stage.source.results)
        stage.source.submit("b", not_before=START + 100)
        stage.source._say(Vanished("b.json"))
        await trio.sleep(1)
        assert stage.dispatcher.queue_size == 0


async def test_who_may_claim_no_more_takes_nothing_and_ends(autojump_clock: MockClock) -> None:
    alone = True

    def may_claim() -> bool:
        if not alone:
            stage.dispatcher.drain()
        return alone

    stage = Stage(may_claim=may_claim)
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.results)
        alone = False
        stage.source.submit("b")
        await trio.sleep(1)
    assert set(stage.source.waiting) == {"b"}
    assert len(stage.source.claims) == 1


async def test_the_urgent_among_those_that_are_there_at_the_start_come_first(autojump_clock: MockClock) -> None:
    stage = Stage(max_concurrent=1, first_look=1.0)
    async with running(stage):
        stage.source.submit("a")
        await trio.sleep(0.5)
        stage.source.submit("urgent", priority="urgent")
        stage.dispatcher.begin()
        await stage.source.until(lambda: len(stage.source.results) == 2)
    assert [ran.task_id for ran in stage.executor.ran] == ["urgent", "a"]
    assert begins(stage, "urgent") == pytest.approx([0.5], abs=1e-3)


async def test_a_first_look_that_takes_long_is_not_waited_for(autojump_clock: MockClock) -> None:
    stage = Stage(first_look=1.0)
    async with running(stage):
        stage.source.submit("a")
        await stage.source.until(lambda: "a" in stage.source.results)
    assert begins(stage, "a") == pytest.approx([1.0], abs=1e-3)
