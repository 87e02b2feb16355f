"""A job, without processes: call shapes, roads out, events, results."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from attrs import evolve

import supervise
from supervise import (
    AgentReport,
    AgentRun,
    AgentSettings,
    FailureKind,
    IndexReport,
    IndexSettings,
    IndexStatus,
    Job,
    JobResult,
    JobSpec,
    JobState,
    MockAgent,
    Outcome,
    Settings,
)
from supervise.codec import event_to_json
from supervise.events import (
    AgentEvent,
    AgentText,
    AgentToolUse,
    CancelRequested,
    Event,
    EventsDropped,
    Heartbeat,
    IndexChanged,
    JobFinished,
    JobStarted,
    StateChanged,
)
from supervise.index.lifecycle import State
from supervise.job import heartbeat, nursery
from supervise.job.bus import BUFFER

LIMIT = 20


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path / "state", index=IndexSettings(mode="none"))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., JobSpec]:
    def make(agent: Any = None, **more: Any) -> JobSpec:
        return JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent() if agent is None else agent, **more)

    return make


Make = Callable[..., JobSpec]


def saved(settings: Settings, job: Job | JobResult) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((settings.state_dir / "jobs" / job.job_id / "result.json").read_bytes())
    return data


class Plain:
    """An agent from a function."""

    name = "plain"

    def __init__(self, run: Callable[[AgentRun], Awaitable[None]]) -> None:
        self._run = run

    async def run(self, run: AgentRun) -> None:
        await self._run(run)


def opened(event: trio.Event) -> Callable[[AgentRun], None]:
    """A step that tells that it was reached."""
    return lambda run: event.set()


def tasks() -> list[str]:
    """Names of all tasks of this Trio loop."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    found, todo = [], [root]
    while todo:
        task = todo.pop()
        found.append(task.name)
        todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return sorted(found)


def children_of(name: str) -> list[str]:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    todo = [root]
    while todo:
        task = todo.pop()
        children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        if task.name == name:
            return sorted(child.name for child in children)
        todo += children
    raise AssertionError(f"no task {name!r}")


@pytest.fixture(autouse=True)
async def _nothing_outlives() -> Any:
    """No task of a job outlives it."""
    before = tasks()
    yield
    assert tasks() == before


# --- call shapes -------------------------------------------------------------------------------------------


async def test_run_job(make: Make, settings: Settings) -> None:
    with trio.fail_after(LIMIT):
        spec = make(MockAgent(steps=("hello",), text="all done", cost_usd=0.5), labels={"a": "b"})
        result = await supervise.run_job(spec, settings=settings)
    assert result.outcome is Outcome.COMPLETED
    assert (result.job_id, result.text, result.cost_usd, result.labels) == (spec.job_id, "all done", 0.5, {"a": "b"})
    assert (result.index, result.survivors, result.error) == (IndexReport(), (), None)
    assert 0 < result.started_at <= result.ended_at
    assert result.raise_for_outcome() is result
    data = saved(settings, result)
    assert (data["type"], data["outcome"], data["text"]) == ("result", "completed", "all done")


async def test_start_returns_a_job_when_its_agent_runs(make: Make, settings: Settings) -> None:
    go_on = trio.Event()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            spec = make(MockAgent(steps=(lambda run: go_on.wait(),)))
            job = await nursery.start(lambda **kw: supervise.run_job(spec, settings=settings, **kw))
            assert isinstance(job, Job)
            assert job.state is JobState.RUNNING
            with pytest.raises(supervise.JobNotDone, match=spec.job_id):
                job.result_nowait()
            go_on.set()
            result = await job.result()
        assert result is job.result_nowait()
        assert job.state.value == "done"


async def test_open_job_misses_no_event(make: Make, settings: Settings) -> None:
    seen: list[Event] = []
    with trio.fail_after(LIMIT):
        spec = make(MockAgent(steps=("one", AgentText(text="two"))))
        async with supervise.open_job(spec, settings=settings) as job, job.subscribe() as events:
            assert job.state is JobState.QUEUED
            async for event in events:
                seen.append(event)
    assert isinstance(seen[0], JobStarted)
    assert (seen[0].agent, seen[0].index) == ("mock", "none")
    assert isinstance(seen[-1], JobFinished)
    assert seen[-1].result == job.result_nowait()
    assert [event.state for event in seen if isinstance(event, StateChanged)] == [
        "starting",
        "running",
        "settling",
        "done",
    ]
    assert [event.text for event in seen if isinstance(event, AgentText)] == ["one", "two"]
    assert {event.job_id for event in seen} == {spec.job_id}
    assert all(event.time is not None for event in seen)


async def test_any_number_of_readers_and_late_ones(make: Make, settings: Settings) -> None:
    async def read(job: Job, into: list[Event]) -> None:
        async with job.subscribe() as events:
            async for event in events:
                into.append(event)

    early: list[Event] = []
    other: list[Event] = []
    late: list[Event] = []
    with trio.fail_after(LIMIT):
        spec = make(MockAgent(steps=("a", "b")))
        async with supervise.open_job(spec, settings=settings) as job, trio.open_nursery() as inner:
            inner.start_soon(read, job, early)
            inner.start_soon(read, job, other)
        await read(job, late)
    assert early == other == late
    assert isinstance(early[-1], JobFinished)


async def test_a_cancelled_reader_loses_nothing(make: Make, settings: Settings) -> None:
    go_on = trio.Event()
    with trio.fail_after(LIMIT):
        agent = MockAgent(steps=(lambda run: go_on.wait(), "late"))
        async with supervise.open_job(make(agent), settings=settings) as job, job.subscribe() as events:
            seen: list[Event] = []
            while not go_on.is_set():
                with trio.move_on_after(0.02) as scope:
                    seen.append(await events.__anext__())
                if scope.cancelled_caught:
                    go_on.set()
            async for event in events:
                seen.append(event)
        async with job.subscribe() as again:
            assert seen == [event async for event in again]


async def test_two_tasks_at_one_subscription(make: Make, settings: Settings) -> None:
    async def read() -> None:
        async for _ in events:
            pass

    with trio.fail_after(LIMIT):
        async with (
            supervise.open_job(make(MockAgent(hang=True)), settings=settings) as job,
            job.subscribe() as events,
            trio.open_nursery() as inner,
        ):
            inner.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError, match="subscribe"):
                await anext(events)
            job.cancel()


async def test_a_reader_who_never_reads_is_bounded_and_told(make: Make, settings: Settings) -> None:
    many = 3 * BUFFER
    with trio.fail_after(LIMIT):
        agent = MockAgent(steps=(str(number) for number in range(many)))
        async with supervise.open_job(make(agent), settings=settings) as job, job.subscribe() as events:
            await job.result()
            assert len(events._buffer) == BUFFER
        seen = [event async for event in events]
    dropped = seen[0]
    assert isinstance(dropped, EventsDropped)
    assert len(seen) == BUFFER + 1
    assert dropped.count + BUFFER == job._bus._count
    assert dropped.count >= many - BUFFER
    assert isinstance(seen[-1], JobFinished)


# --- the supervisor ----------------------------------------------------------------------------------------


async def test_the_limit_holds_and_the_order_is_kept(make: Make, settings: Settings) -> None:
    running = most = 0
    order: list[int] = []

    def agent(number: int) -> MockAgent:
        async def work(run: AgentRun) -> None:
            nonlocal running, most
            order.append(number)
            running += 1
            most = max(most, running)
            await trio.sleep(0.01)
            running -= 1

        return MockAgent(steps=(work,))

    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(max_concurrent=2, settings=settings) as sup, trio.open_nursery() as inner:
            for number in range(12):
                inner.start_soon(sup.start, make(agent(number), job_id=f"j{number}"))
                await trio.testing.wait_all_tasks_blocked()
                assert [job.job_id for job in sup.jobs][-1] == f"j{number}" or number in order
    assert most == 2
    assert sorted(order) == list(range(12))
    assert all(abs(place - number) < 2 for place, number in enumerate(order))  # two may change places


async def test_jobs_launched_in_one_moment_begin_in_their_order(make: Make, settings: Settings) -> None:
    order: list[int] = []

    async def begin(number: int, run: AgentRun) -> None:
        order.append(number)

    for _ in range(5):
        order.clear()
        with trio.fail_after(LIMIT):
            async with supervise.open_supervisor(max_concurrent=1, settings=settings) as sup:
                for number in range(6):
                    sup._launch(make(Plain(functools.partial(begin, number))))
        assert order == list(range(6))


async def test_a_queued_job_can_be_cancelled(make: Make, settings: Settings) -> None:
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(max_concurrent=1, settings=settings) as sup, trio.open_nursery() as inner:
            first = await sup.start(make(MockAgent(hang=True)))
            inner.start_soon(sup.start, make(MockAgent(), job_id="queued"))
            inner.start_soon(sup.start, make(MockAgent(text="third"), job_id="third"))
            await trio.testing.wait_all_tasks_blocked()
            queued, third = (next(job for job in sup.jobs if job.job_id == name) for name in ("queued", "third"))
            assert queued.state is JobState.QUEUED
            queued.cancel("not wanted")
            result = await queued.result()
            first.cancel()
            assert (await third.result()).text == "third"
    assert result.outcome is Outcome.CANCELLED
    assert result.error == "cancelled: not wanted"
    assert result.index.status is IndexStatus.NONE
    assert saved(settings, result)["outcome"] == "cancelled"


async def test_leaving_the_supervisor_waits_for_its_jobs(make: Make, settings: Settings) -> None:
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=settings) as sup:
            jobs = [await sup.start(make(MockAgent(steps=(0.02,)))) for _ in range(3)]
            assert sup.jobs == tuple(jobs)
    assert [job.result_nowait().outcome for job in jobs] == [Outcome.COMPLETED] * 3
    assert sup.jobs == ()


async def test_a_supervisor_whose_block_was_left(make: Make, settings: Settings) -> None:
    leaving, left = trio.Event(), trio.Event()

    async def slow_to_stop(run: AgentRun) -> None:
        run.started()
        try:
            await trio.sleep_forever()
        finally:
            leaving.set()
            with trio.CancelScope(shield=True):
                await left.wait()

    async def late(sup: supervise.Supervisor) -> None:
        await leaving.wait()
        with pytest.raises(supervise.SuperviseError, match=r"job late cannot start.*was left"):
            await sup.start(make(job_id="late"))
        left.set()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as inner:
            with pytest.raises(KeyError):  # noqa: PT012  # leaving the block is what raises
                async with supervise.open_supervisor(settings=settings) as sup:
                    await sup.run(make(job_id="old"))
                    await sup.start(make(Plain(slow_to_stop)))
                    inner.start_soon(late, sup)
                    raise KeyError
        with pytest.raises(supervise.SuperviseError, match="job old cannot start"):
            await sup.start(make(job_id="old"))
        with pytest.raises(supervise.SuperviseError, match="job new cannot start"):
            async with sup.open_job(make(job_id="new")):
                pass
    assert sup.jobs == ()
    assert (settings.state_dir / "jobs" / "old" / "result.json").exists()


async def test_what_an_earlier_job_of_this_id_left_is_removed_at_once(make: Make, settings: Settings) -> None:
    directory = settings.state_dir / "jobs" / "same"
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(max_concurrent=1, settings=settings) as sup:
            await sup.run(make(MockAgent(steps=(0.01,)), job_id="same"))
            assert {"result.json", "heartbeat.json"} <= {path.name for path in directory.iterdir()}
            other = await sup.start(make(MockAgent(hang=True)))
            async with sup.open_job(make(job_id="same")) as again:
                assert again.state is JobState.QUEUED
                assert not {"result.json", "heartbeat.json"} & {path.name for path in directory.iterdir()}
                other.cancel()


async def test_jobs_directories_are_private_and_ours(
    make: Make, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = settings.state_dir / "jobs" / "open"
    directory.mkdir(parents=True)
    for path in (directory, *directory.parents[:2]):
        path.chmod(0o755)
    with trio.fail_after(LIMIT):
        await supervise.run_job(make(job_id="open"), settings=settings)
        assert directory.stat().st_mode & 0o777 == 0o700
        assert [path.stat().st_mode & 0o777 for path in directory.parents[:2]] == [0o755] * 2
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(supervise.SettingsError, match=r"state/run belongs to another user"):
            await supervise.run_job(make(job_id="open"), settings=settings)


async def test_a_host_that_holds_all_threads_holds_up_no_job(make: Make, settings: Settings) -> None:
    release = threading.Event()
    held = trio.to_thread.current_default_thread_limiter()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as inner:
            for _ in range(int(held.total_tokens)):
                inner.start_soon(trio.to_thread.run_sync, release.wait)
            try:
                while held.available_tokens:
                    await trio.sleep(0.001)
                with trio.move_on_after(LIMIT / 2):
                    result = await supervise.run_job(make(MockAgent(hang=True), timeout=0.05), settings=settings)
                    assert not held.available_tokens
            finally:
                release.set()
    assert result.outcome is Outcome.TIMED_OUT
    assert saved(settings, result)["outcome"] == "timed_out"


async def test_two_jobs_of_one_id(make: Make, settings: Settings) -> None:
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=settings) as sup:
            job = await sup.start(make(MockAgent(hang=True), job_id="same"))
            with pytest.raises(supervise.SpecError, match=r"JobSpec.job_id is 'same'.*choose another"):
                await sup.start(make(job_id="same"))
            assert job.state is JobState.RUNNING
            job.cancel()
            await job.result()
            again = await sup.run(make(job_id="same"))
    assert again.outcome is Outcome.COMPLETED
    assert saved(settings, again)["outcome"] == "completed"


@pytest.mark.parametrize("number", [0, -1, 1.5, None])
async def test_a_limit_that_is_none(number: Any, settings: Settings) -> None:
    with pytest.raises(supervise.SpecError, match="max_concurrent"):
        async with supervise.open_supervisor(max_concurrent=number, settings=settings):
            pass


# --- the end -----------------------------------------------------------------------------------------------


async def test_cancel_twice(make: Make, settings: Settings) -> None:
    running = trio.Event()
    with trio.fail_after(LIMIT):
        agent = MockAgent(steps=(opened(running),), hang=True)
        async with supervise.open_job(make(agent), settings=settings) as job, job.subscribe() as events:
            await running.wait()
            job.cancel("first")
            job.cancel("second")
            result = await job.result()
            job.cancel("of a job that is done")
            seen = [event async for event in events]
    assert (result.outcome, result.error) == (Outcome.CANCELLED, "cancelled: first")
    asked = [event for event in seen if isinstance(event, CancelRequested)]
    assert [(event.reason, event.step) for event in asked] == [("first", 1), ("second", 2)]
    with pytest.raises(supervise.JobFailed, match=r"cancelled: cancelled: first") as raised:
        result.raise_for_outcome()
    assert raised.value.result is result


async def test_cancelled_before_anything_happened(make: Make, settings: Settings) -> None:
    ran = False

    async def run(run: AgentRun) -> None:
        nonlocal ran
        ran = True

    with trio.fail_after(LIMIT):
        async with supervise.open_job(make(Plain(run)), settings=settings) as job:
            job.cancel()
    assert job.result_nowait().outcome is Outcome.CANCELLED
    assert not ran


async def test_an_agent_is_not_started_for_a_job_cancelled_at_that_moment(make: Make, settings: Settings) -> None:
    ran = False

    async def run(run: AgentRun) -> None:
        nonlocal ran
        ran = True

    class Index(FakeIndex):
        def agent_starts(self) -> None:
            job.cancel()

    with trio.fail_after(LIMIT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nursery, "NoIndex", Index)
        async with supervise.open_job(make(Plain(run)), settings=settings) as job:
            pass
    assert job.result_nowait().outcome is Outcome.CANCELLED
    assert not ran


async def test_a_second_cancel_that_finds_nothing_to_hurry_is_not_for_the_index(
    make: Make, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But one more, when the index settles, is."""
    flushed: list[bool] = []

    class Index(FakeIndex):
        async def run(self) -> None:
            with trio.CancelScope(shield=True):
                await self.ended.wait()
                for seconds in (0.05, 3600):
                    with job._hurry.step(seconds) as step:
                        await trio.sleep_forever()
                    flushed.append(trio.current_time() >= step.deadline)
                    again.set()

    again = trio.Event()
    monkeypatch.setattr(nursery, "NoIndex", Index)
    with trio.fail_after(LIMIT):
        async with supervise.open_job(make(MockAgent(hang=True)), settings=settings) as job:
            await job.spawned()
            job.cancel()
            job.cancel()
            await again.wait()
            await trio.testing.wait_all_tasks_blocked()
            job.cancel()
    assert flushed == [True, False]


async def test_what_was_finished_stays_finished(make: Make, settings: Settings) -> None:
    class Index(FakeIndex):
        def finish(self) -> None:
            job.cancel("too late")
            super().finish()

    with trio.fail_after(LIMIT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nursery, "NoIndex", Index)
        async with supervise.open_job(make(MockAgent(text="good")), settings=settings) as job:
            pass
    result = job.result_nowait()
    assert (result.outcome, result.text, result.error) == (Outcome.COMPLETED, "good", None)


async def test_an_exception_in_the_block_leaves_unwrapped_and_cancels(make: Make, settings: Settings) -> None:
    error = ValueError("of the block")
    with trio.fail_after(LIMIT):
        with pytest.raises(ValueError, match="of the block") as raised:  # noqa: PT012  # leaving the block is what raises
            async with supervise.open_job(make(MockAgent(hang=True)), settings=settings) as job:
                await job.spawned()
                raise error
        assert raised.value is error
        assert job.result_nowait().error == "cancelled: the block was left by ValueError"
        with pytest.raises(ValueError, match="of the block") as raised:  # noqa: PT012  # leaving the block is what raises
            async with supervise.open_supervisor(settings=settings) as sup:
                jobs = [await sup.start(make(MockAgent(hang=True))) for _ in range(2)]
                raise error
        assert raised.value is error
    assert {job.result_nowait().outcome for job in jobs} == {Outcome.CANCELLED}


async def test_leaving_by_an_exception_after_a_cancel_is_no_second_cancel(make: Make, settings: Settings) -> None:
    with trio.fail_after(LIMIT):
        with pytest.raises(KeyError):  # noqa: PT012  # leaving the block is what raises
            async with supervise.open_job(make(MockAgent(hang=True)), settings=settings) as job:
                await job.spawned()
                job.cancel("enough")
                raise KeyError
        async with job.subscribe() as events:
            assert [event.step async for event in events if isinstance(event, CancelRequested)] == [1]
    assert job.result_nowait().error == "cancelled: enough"


async def test_the_scope_of_the_caller_is_cancelled(make: Make, settings: Settings) -> None:
    jobs: list[Job] = []
    caught: list[BaseException] = []

    async def caller(job_status: Any = None) -> None:
        try:
            async with supervise.open_job(make(MockAgent(hang=True)), settings=settings) as job:
                jobs.append(job)
                await job.result()
        except BaseException as error:
            caught.append(error)
            raise

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as inner:
            inner.start_soon(caller)
            while not jobs or jobs[0].state is not JobState.RUNNING:
                await trio.testing.wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
    assert [type(error) for error in caught] == [trio.Cancelled]
    result = jobs[0].result_nowait()
    assert (result.outcome, result.error) == (Outcome.CANCELLED, "cancelled: the caller's scope was cancelled")
    assert saved(settings, result)["outcome"] == "cancelled"


async def test_the_scope_around_a_supervisor_is_cancelled(make: Make, settings: Settings) -> None:
    with trio.fail_after(LIMIT):
        with trio.CancelScope() as scope:
            async with supervise.open_supervisor(max_concurrent=2, settings=settings) as sup:
                jobs = [await sup.start(make(MockAgent(hang=True))) for _ in range(2)]
                async with trio.open_nursery() as inner:
                    inner.start_soon(sup.start, make(MockAgent()))
                    await trio.testing.wait_all_tasks_blocked()
                    jobs.append(sup.jobs[-1])
                    scope.cancel()
    assert scope.cancelled_caught
    for job in jobs:
        assert job.result_nowait().outcome is Outcome.CANCELLED
        assert job.result_nowait().error == "cancelled: the caller's scope was cancelled"
        assert saved(settings, job)["outcome"] == "cancelled"


async def test_the_blocks_own_exception_survives_a_cancellation_of_the_teardown(make: Make, settings: Settings) -> None:
    stopping = trio.Event()
    go_on = trio.Event()

    async def slow_to_stop(run: AgentRun) -> None:
        run.started()
        try:
            await trio.sleep_forever()
        finally:
            stopping.set()
            with trio.CancelScope(shield=True):
                await go_on.wait()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as inner:
            with trio.CancelScope() as scope:

                async def cancel() -> None:
                    await stopping.wait()
                    scope.cancel()
                    await trio.testing.wait_all_tasks_blocked()
                    go_on.set()

                inner.start_soon(cancel)
                with pytest.raises(ValueError, match="of the block"):  # noqa: PT012  # leaving the block is what raises
                    async with supervise.open_job(make(Plain(slow_to_stop)), settings=settings) as job:
                        await job.spawned()
                        raise ValueError("of the block")


# --- what agents do ----------------------------------------------------------------------------------------


@pytest.fixture
def fast_clock() -> trio.testing.MockClock:
    # No autojump: time would jump while a file is written in a thread.
    return trio.testing.MockClock(rate=50)


async def test_a_timeout(make: Make, settings: Settings, fast_clock: trio.testing.MockClock) -> None:
    with trio.fail_after(1000):
        result = await supervise.run_job(make(MockAgent(hang=True), timeout=10), settings=settings)
    assert (result.outcome, result.failure_kind) == (Outcome.TIMED_OUT, None)
    assert result.error == "the agent did not end within 10 s"
    assert result.duration_seconds >= 10


async def test_a_timeout_counts_from_the_spawn(
    make: Make, settings: Settings, fast_clock: trio.testing.MockClock
) -> None:
    async def run(run: AgentRun) -> None:
        await trio.sleep(20)
        run.started()
        await trio.sleep(20)
        run.report(AgentReport(text="in time"))

    with trio.fail_after(1000):
        result = await supervise.run_job(make(Plain(run), timeout=30), settings=settings)
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "in time")


async def test_an_agent_that_never_says_that_it_started_times_out(
    make: Make, settings: Settings, fast_clock: trio.testing.MockClock
) -> None:
    async def run(run: AgentRun) -> None:
        await trio.sleep_forever()

    with trio.fail_after(1000):
        result = await supervise.run_job(make(Plain(run), timeout=10), settings=settings)
    assert result.outcome is Outcome.TIMED_OUT


async def test_a_cancel_during_the_stop_after_a_timeout(make: Make, settings: Settings) -> None:
    """What came first names the outcome."""
    stopping = trio.Event()
    go_on = trio.Event()

    async def run(run: AgentRun) -> None:
        run.started()
        try:
            await trio.sleep_forever()
        finally:
            stopping.set()
            with trio.CancelScope(shield=True):
                await go_on.wait()
            await trio.lowlevel.checkpoint()

    with trio.fail_after(LIMIT):
        async with supervise.open_job(make(Plain(run), timeout=0.05), settings=settings) as job:
            await stopping.wait()
            job.cancel()
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
    assert job.result_nowait().outcome is Outcome.TIMED_OUT


async def test_a_timeout_during_the_stop_after_a_cancel(make: Make, settings: Settings) -> None:
    running = trio.Event()

    async def run(run: AgentRun) -> None:
        run.started()
        running.set()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.2)  # past the timeout: that it comes during the stop is what is tested

    with trio.fail_after(LIMIT):
        async with supervise.open_job(make(Plain(run), timeout=0.1), settings=settings) as job:
            await running.wait()
            job.cancel()
    assert job.result_nowait().outcome is Outcome.CANCELLED


async def test_a_finished_agent_that_lingers_past_the_timeout(make: Make, settings: Settings) -> None:
    async def run(run: AgentRun) -> None:
        run.started()
        run.report(AgentReport(text="good", finished=True))
        await trio.sleep_forever()

    with trio.fail_after(LIMIT):
        result = await supervise.run_job(make(Plain(run), timeout=0.05), settings=settings)
    assert (result.outcome, result.text, result.error) == (Outcome.COMPLETED, "good", None)


async def test_an_agent_that_raises_harms_no_other_job(make: Make, settings: Settings) -> None:
    async def bad(run: AgentRun) -> None:
        run.started()
        async with trio.open_nursery() as inner:
            inner.start_soon(trio.sleep_forever)
            raise LookupError("of the agent")

    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=settings) as sup:
            other = await sup.start(make(MockAgent(hang=True)))
            result = await sup.run(make(Plain(bad)))
            assert other.state is JobState.RUNNING
            other.cancel()
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.AGENT_ERROR)
    assert result.error == "the agent 'plain' raised LookupError: of the agent"


async def test_an_agent_that_raises_while_it_is_stopped(make: Make, settings: Settings) -> None:
    async def run(run: AgentRun) -> None:
        run.started()

        async def child() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise LookupError("on the way out")

        async with trio.open_nursery() as inner:
            inner.start_soon(child)
            inner.start_soon(trio.sleep_forever)

    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=settings) as sup:
            other = await sup.start(make(MockAgent(hang=True)))
            cancelled = await sup.start(make(Plain(run)))
            cancelled.cancel()
            assert (await cancelled.result()).outcome is Outcome.CANCELLED
            late = await sup.run(make(Plain(run), timeout=0.05))
            assert late.outcome is Outcome.TIMED_OUT
            with trio.CancelScope() as scope:
                async with sup.open_job(make(Plain(run))) as job:
                    await job.spawned()
                    scope.cancel()
                    await trio.sleep_forever()
            assert job.result_nowait().outcome is Outcome.CANCELLED
            assert other.state is JobState.RUNNING
            other.cancel()


async def test_an_agent_that_reports_nothing(make: Make, settings: Settings) -> None:
    async def run(run: AgentRun) -> None:
        run.started()

    with trio.fail_after(LIMIT):
        result = await supervise.run_job(make(Plain(run)), settings=settings)
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.BAD_OUTPUT)
    assert result.error == "the agent ended without a report"


@pytest.mark.parametrize(
    ("report", "why"),
    [
        (lambda: "no report", "SpecError: an agent must report an AgentReport, not str"),
        (lambda: AgentReport(text=None), "SpecError: AgentReport.text is None, but must be a text"),  # type: ignore[arg-type]  # a bad value, on purpose
        (lambda: AgentReport(failure_kind="bad luck"), "AgentReport.failure_kind is 'bad luck', but must be a Failure"),
    ],
)
async def test_an_agent_that_reports_nonsense(
    report: Callable[[], Any], why: str, make: Make, settings: Settings
) -> None:
    async def run(run: AgentRun) -> None:
        run.started()
        run.report(report())

    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=settings) as sup:
            other = await sup.start(make(MockAgent(hang=True)))
            result = await sup.run(make(Plain(run), env={"API_KEY": "so that texts are masked"}))
            assert other.state is JobState.RUNNING
            other.cancel()
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.AGENT_ERROR)
    assert why in (result.error or "")
    assert saved(settings, result)["failure_kind"] == "agent_error"


@pytest.mark.parametrize("error", [None, "", "two\nlines"])
async def test_a_failure_has_its_kind_and_one_line(error: str | None, make: Make, settings: Settings) -> None:
    async def run(run: AgentRun) -> None:
        run.report(AgentReport(failure_kind="auth", error=error))  # type: ignore[arg-type]  # a bad value, on purpose

    with trio.fail_after(LIMIT):
        result = await supervise.run_job(make(Plain(run)), settings=settings)
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.AUTH)
    assert result.error == ("two lines" if error else "the agent failed: auth")
    assert saved(settings, result)["failure_kind"] == "auth"


async def test_an_agent_that_emits_nonsense(make: Make, settings: Settings) -> None:
    async def run(run: AgentRun) -> None:
        run.emit("no event")  # type: ignore[arg-type]  # a bad value, on purpose

    with trio.fail_after(LIMIT):
        result = await supervise.run_job(make(Plain(run)), settings=settings)
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.AGENT_ERROR)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("3")])
async def test_an_agent_that_ends_the_program(error: BaseException, make: Make, settings: Settings) -> None:
    """It does so, after the teardown; and the result says what happened."""

    async def run(run: AgentRun) -> None:
        async with trio.open_nursery() as inner:
            inner.start_soon(trio.sleep_forever)
            raise error

    with trio.fail_after(LIMIT):
        with pytest.raises(type(error)) as raised:
            async with supervise.open_job(make(Plain(run)), settings=settings) as job:
                await job.result()
    assert raised.value is error
    result = job.result_nowait()
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.AGENT_ERROR)
    assert result.error == f"the agent 'plain' raised {type(error).__name__}: 3"
    assert saved(settings, result)["error"] == result.error


async def test_a_spawn_error_that_an_agent_lets_pass(make: Make, settings: Settings) -> None:
    async def run(run: AgentRun) -> None:
        async with run.tree() as tree:
            await tree.spawn(run.command(("/no/such/program",)))

    with trio.fail_after(LIMIT):
        result = await supervise.run_job(make(Plain(run)), settings=settings)
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.SPAWN)
    assert "/no/such/program" in (result.error or "")


@pytest.mark.parametrize("outcome", [Outcome.TIMED_OUT, Outcome.CANCELLED])
async def test_an_agent_that_swallows_its_end(outcome: Outcome, make: Make, settings: Settings) -> None:
    async def run(run: AgentRun) -> None:
        run.started()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return

    with trio.fail_after(LIMIT):
        late = outcome is Outcome.TIMED_OUT
        async with supervise.open_job(make(Plain(run), timeout=0.05 if late else 60), settings=settings) as job:
            await job.spawned()
            if not late:
                job.cancel("enough")
    result = job.result_nowait()
    assert (result.outcome, result.failure_kind) == (outcome, None)
    assert result.error == ("the agent did not end within 0.05 s" if late else "cancelled: enough")


@pytest.mark.parametrize(
    ("agent", "kind", "error"),
    [
        (MockAgent(failure_kind="quota", error="no more"), FailureKind.QUOTA, "no more"),
        (MockAgent(error="broken"), FailureKind.AGENT_ERROR, "broken"),
    ],
)
async def test_a_failure(agent: MockAgent, kind: FailureKind, error: str, make: Make, settings: Settings) -> None:
    with trio.fail_after(LIMIT):
        result = await supervise.run_job(make(agent), settings=settings)
    assert (result.outcome, result.failure_kind, result.error) == (Outcome.FAILED, kind, error)
    with pytest.raises(supervise.JobFailed, match=f"failed \\({kind.value}\\): {error}"):
        result.raise_for_outcome()


async def test_secrets_of_an_agent_without_a_process(make: Make, settings: Settings) -> None:
    secret = "sk-live-0123456789"
    raw = {"a": [f"say {secret}", {secret: 1}], "b": 2}
    steps = (secret, AgentToolUse(name="x", input={"key": secret}, raw=raw), AgentText(text="nothing", raw={"a": 1}))
    agent = MockAgent(steps=steps, text=secret, session_id=f"s-{secret}")
    spec = make(agent, env={"ANTHROPIC_API_KEY": secret}, labels={"for": secret})
    with trio.fail_after(LIMIT):
        async with supervise.open_job(spec, settings=settings) as job, job.subscribe() as events:
            seen = [event async for event in events]
    result = job.result_nowait()
    assert (result.text, result.session_id, result.labels) == ("***", "s-***", {"for": "***"})
    said = [event for event in seen if isinstance(event, AgentEvent)]
    assert said == [AgentText(text="***"), AgentToolUse(name="x", input={"key": "***"}), AgentText(text="nothing")]
    assert [event.raw for event in said] == [None, {"a": ["say ***", {"***": 1}], "b": 2}, {"a": 1}]
    assert secret not in repr([event_to_json(event) for event in seen])


async def test_secrets_do_not_reach_logs_and_results_by_exceptions(
    make: Make, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "sk-live-0123456789"

    async def run(run: AgentRun) -> None:
        raise LookupError(f"{secret} was refused")

    with trio.fail_after(LIMIT), caplog.at_level(logging.DEBUG):
        result = await supervise.run_job(make(Plain(run), env={"ANTHROPIC_API_KEY": secret}), settings=settings)
    assert result.error == "the agent 'plain' raised LookupError: *** was refused"
    assert "*** was refused" in caplog.text
    assert "Traceback" in caplog.text
    assert secret not in caplog.text
    assert not any(record.exc_info for record in caplog.records)


# --- the surroundings --------------------------------------------------------------------------------------


async def test_a_state_directory_that_cannot_be_written(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = Settings(state_dir=tmp_path / "file" / "state", index=IndexSettings(mode="none"))
    with trio.fail_after(LIMIT):
        with pytest.raises(supervise.SettingsError, match=r"state.*cannot be written.*set state_dir"):
            await supervise.run_job(make(), settings=settings)
        async with trio.open_nursery() as inner:
            with pytest.raises(supervise.SettingsError):
                await inner.start(lambda **kw: supervise.run_job(make(), settings=settings, **kw))


async def test_a_state_directory_that_goes_away(
    make: Make, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    def lose(run: AgentRun) -> None:
        (settings.state_dir / "jobs").rename(settings.state_dir / "gone")

    with trio.fail_after(LIMIT):
        result = await supervise.run_job(make(MockAgent(steps=(lose,))), settings=settings)
    assert result.outcome is Outcome.COMPLETED
    assert "could not be written" in caplog.text


async def test_the_environment_sets_nothing(
    make: Make, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SUPERVISE_STATE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("SUPERVISE_AGENT__ENV", '{"X": "Y"}')
    monkeypatch.setenv("SUPERVISE_INDEX__MODE", "cidx")
    monkeypatch.setenv("SUPERVISE_NO_SUCH_THING", "1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config" / "supervise").mkdir(parents=True)
    for file in (tmp_path / "config" / "supervise" / "supervise.toml", tmp_path / "supervise.toml"):
        file.write_text("this is = no TOML = at all")
    monkeypatch.chdir(tmp_path)
    env: dict[str, str] = {}
    with trio.fail_after(LIMIT):
        agent = MockAgent(steps=(lambda run: env.update(run.command(("x",)).env),))
        result = await supervise.run_job(make(agent), settings=settings)
    assert result.outcome is Outcome.COMPLETED
    assert not (tmp_path / "elsewhere").exists()
    assert "X" not in env
    assert (settings.state_dir / "jobs" / result.job_id).is_dir()


class FakeIndex:
    """An index that lives until it is told to end."""

    status = IndexStatus.STALE
    state = State.NOT_STARTED
    survivors = ()

    def __init__(self) -> None:
        self.ended = trio.Event()

    async def mark(self, job_id: str) -> None:
        pass

    async def run(self) -> None:
        with trio.CancelScope(shield=True):
            await self.ended.wait()

    async def ready(self) -> None:
        pass

    def agent_starts(self) -> None:
        pass

    def finish(self) -> None:
        self.ended.set()

    def cancel(self) -> None:
        self.ended.set()

    async def report(self) -> IndexReport:
        return IndexReport(status=IndexStatus.WATCH_TERMINATED)


async def test_the_nursery_holds_index_agent_and_heartbeat(
    make: Make, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "NoIndex", FakeIndex)
    with trio.fail_after(LIMIT):
        async with supervise.open_job(make(MockAgent(hang=True)), settings=settings) as job:
            await job.spawned()
            await trio.testing.wait_all_tasks_blocked()
            assert children_of(f"supervise job {job.job_id}") == ["agent", "event log", "heartbeat", "index"]
            job.cancel()


class BugInRun(FakeIndex):
    async def run(self) -> None:
        raise LookupError("in run")


class BugLater(FakeIndex):
    async def run(self) -> None:
        await super().run()
        raise LookupError("in run")


class BugInReport(FakeIndex):
    async def report(self) -> IndexReport:
        raise LookupError("in report")


class NeverReports(FakeIndex):
    async def report(self) -> IndexReport:
        await trio.sleep_forever()
        raise AssertionError


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("index", [BugInRun, BugLater, BugInReport, NeverReports])
async def test_a_bug_in_the_index_neither_hangs_nor_fails_the_job_nor_hides(
    index: type[FakeIndex],
    cancel: bool,
    make: Make,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(nursery, "NoIndex", index)
    with trio.fail_after(LIMIT):
        spec = make(MockAgent(hang=cancel))
        async with supervise.open_job(spec, settings=settings) as job, job.subscribe() as events:
            await job.spawned()
            if cancel:
                job.cancel()
            seen = [event async for event in events]
    result = job.result_nowait()
    assert result.outcome is (Outcome.CANCELLED if cancel else Outcome.COMPLETED)
    assert result.index.status is IndexStatus.FAILED
    assert result.index.stale
    assert "a bug in supervise" in result.index.reason
    assert any(isinstance(event, IndexChanged) and event.status is IndexStatus.FAILED for event in seen)
    if index is not NeverReports:
        assert "LookupError" in caplog.text


class BugInMark(FakeIndex):
    async def mark(self, job_id: str) -> None:
        raise LookupError("in mark")


class BugInAgentStarts(FakeIndex):
    def agent_starts(self) -> None:
        raise LookupError("in agent_starts")


@pytest.mark.parametrize("index", [BugInMark, BugInAgentStarts])
async def test_a_bug_in_between_fails_its_job_only(
    index: type[FakeIndex], make: Make, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=settings) as sup:
            other = await sup.start(make(MockAgent(hang=True)))
            monkeypatch.setattr(nursery, "NoIndex", index)
            result = await sup.run(make())
            assert other.state is JobState.RUNNING
            other.cancel()
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.AGENT_ERROR)
    assert (result.error or "").startswith("a bug in supervise: LookupError: in ")
    assert saved(settings, result)["outcome"] == "failed"


async def test_parts_that_cannot_be_put_together(
    make: Make, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise LookupError("no environment today")

    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(max_concurrent=1, settings=settings) as sup:
            monkeypatch.setattr(nursery, "agent_environment", broken)
            result = await sup.run(make(labels={"a": "b"}))
            monkeypatch.undo()
            assert (await sup.run(make())).outcome is Outcome.COMPLETED  # its place was given back
    assert result.error == "a bug in supervise: LookupError: no environment today"
    assert (result.outcome, result.labels) == (Outcome.FAILED, {"a": "b"})


async def test_a_bad_user_hangs_nothing(make: Make, settings: Settings) -> None:
    with trio.fail_after(LIMIT):
        agent = supervise.ClaudeAgent(command=("/bin/true",))
        result = await supervise.run_job(make(agent, user="no-such-user"), settings=settings)
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.SPAWN)
    assert "no-such-user" in (result.error or "")


async def test_an_environment_that_is_not_utf8(make: Make, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "caf\udce9-\udcff-secret")
    env: dict[str, str] = {}
    with trio.fail_after(LIMIT):
        agent = MockAgent(steps=(lambda run: env.update(run.command(("x",)).env),), text="caf\udce9-\udcff-secret")
        result = await supervise.run_job(make(agent), settings=settings)
    assert env["ANTHROPIC_API_KEY"] == "caf\udce9-\udcff-secret"
    assert result.text == "***"


async def test_heartbeats_that_fail_do_not_end_the_job(
    make: Make, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = trio.Event()

    def look(*args: object) -> Heartbeat:
        failed.set()
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(heartbeat, "_look", look)
    with trio.fail_after(LIMIT):
        result = await supervise.run_job(
            make(MockAgent(steps=(lambda run: failed.wait(),))), settings=evolve(settings, heartbeat_interval=0.01)
        )
    assert result.outcome is Outcome.COMPLETED
    assert "Too many open files" in caplog.text


async def test_heartbeats_tell_of_the_agents_silence(make: Make, settings: Settings) -> None:
    beats: list[Heartbeat] = []
    silent = trio.Event()
    with trio.fail_after(LIMIT):
        agent = MockAgent(steps=(lambda run: silent.wait(),), hang=True)
        fast = evolve(settings, heartbeat_interval=0.01, agent=AgentSettings(exit_linger=1))
        async with supervise.open_job(make(agent), settings=fast) as job, job.subscribe() as events:
            async for event in events:
                if isinstance(event, Heartbeat) and event.agent_silent_seconds is not None:
                    beats.append(event)
                    longest = max(beat.agent_silent_seconds or 0 for beat in beats)
                    if longest > 0.1:
                        silent.set()  # a sign of life follows
                    if silent.is_set() and event.agent_silent_seconds < longest:
                        job.cancel()
    assert [beat.agent_lines for beat in beats][-1] == 1
    file = json.loads((settings.state_dir / "jobs" / job.job_id / "heartbeat.json").read_bytes())
    assert (file["type"], file["job_id"]) == ("heartbeat", job.job_id)
    assert file["agent_lines"] == 1


async def test_a_supervisor_whose_block_is_over_starts_nothing(make: Make, settings: Settings) -> None:
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=settings) as sup:
            await sup.run(make())
        with pytest.raises(supervise.SuperviseError, match="cannot start"):
            await sup.start(make())
        assert sup.jobs == ()
