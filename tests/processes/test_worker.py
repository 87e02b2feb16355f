"""The worker on a real directory: what is dropped there comes to its one end, and the heartbeat tells how it fares."""

from __future__ import annotations

import os
import shutil
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from attrs import evolve

from supervise import BadInput, MockAgent, SettingsError, SuperviseError
from supervise.dispatch import worker as worker_module
from supervise.dispatch.dispatcher import Dispatcher
from supervise.dispatch.spool import Spool
from supervise.dispatch.submit import job_id_of
from supervise.dispatch.task import Task
from supervise.dispatch.worker import Worker, open_worker
from supervise.errors import AlreadyRunning
from supervise.events import (
    Event,
    TaskBuried,
    TaskClaimed,
    TaskFinished,
    TaskPutBack,
    TaskReceived,
    TaskRetried,
    WorkerChanged,
    WorkerTrouble,
)
from supervise.executors.mock import MockExecutor
from supervise.model import JOB_ID, JobResult, JobSpec, Usage
from supervise.settings import AgentSettings, BreakerSettings, IndexSettings
from tests.processes.fake_cidx import FakeCidx
from tests.processes.lone import Programs
from tests.processes.workers import WORKER, Files, Gate, eventually, made_up, playing, settings_of, status, task


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events if getattr(event, "task_id", "")]


# --- how tasks come ----------------------------------------------------------------------------------------


async def test_what_lies_there_before_the_start_is_done(files: Files, root: Path) -> None:
    for number in range(5):
        files.drop(f"t{number}")
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()) as worker:
        for number in range(5):
            assert (await files.ended(f"t{number}"))["status"] == "completed"
    assert worker.stats.tasks_processed == 5
    assert files.left() == []


async def test_what_is_renamed_in_is_done_at_once(files: Files, root: Path) -> None:
    settings = settings_of(root, sweep_interval=600.0)
    async with open_worker(WORKER, settings=settings, executor=playing()):
        for number in range(3):
            files.drop(f"t{number}")
            await files.ended(f"t{number}")
    assert files.left() == []


async def test_a_file_written_in_pieces_is_left_to_its_writer(files: Files, root: Path) -> None:
    """Each piece within the grace, all of them together longer than it, and the directory looked through meanwhile."""
    data = task("slow", "say " + "x" * 60)
    settings = settings_of(root, parse_grace=1.5, sweep_interval=0.1)
    async with open_worker(WORKER, settings=settings, executor=playing(), spec_of=keep_going) as worker:
        with open(files.tasks / "slow.json", "wb", buffering=0) as file:
            for begin in range(0, len(data), 14):
                assert files.result("slow") is None
                file.write(data[begin : begin + 14])
                await trio.sleep(0.25)  # a slow writer: the length is what is tried
        await files.ended("slow")
    assert worker.stats.tasks_dlq == 0
    assert files.letters() == []


async def test_a_file_that_stays_half_is_set_aside_after_the_grace(files: Files, root: Path) -> None:
    half = task("half")[:-7]
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()):
        began = time.monotonic()
        (files.tasks / "half.json").write_bytes(half)
        letter = await files.buried("half")
        assert time.monotonic() - began >= 0.3
    assert letter["dlq_reason"] == "invalid_format"
    assert "not JSON" in letter["dlq_detail"]
    assert (files.spool.dlq / letter["file"]).read_bytes() == half


@pytest.mark.parametrize("keep", [True, False], ids=["the other name stays", "the other name goes"])
async def test_a_hard_link_is_a_whole_file(files: Files, root: Path, keep: bool) -> None:
    """Nobody closes it after writing, so that only its birth is told; with one name left, it looks like any other."""
    async with open_worker(WORKER, settings=settings_of(root, sweep_interval=600.0), executor=playing()) as worker:
        await status(worker, "healthy")
        for number in range(10):
            elsewhere = root / f"elsewhere{number}"
            elsewhere.write_bytes(task(f"linked{number}"))
            os.link(elsewhere, files.tasks / f"linked{number}.json")
            if not keep:
                elsewhere.unlink()
        for number in range(10):
            await files.ended(f"linked{number}")


async def test_one_at_a_time_the_urgent_first_and_then_as_they_came(files: Files, root: Path) -> None:
    gate = Gate()
    settings = settings_of(root, max_concurrent=1)
    async with open_worker(WORKER, settings=settings, executor=gate.executor()) as worker:
        files.drop("first")
        await eventually(lambda: gate.begun == ["first"], "the first one runs")
        for task_id, priority in (("a", "low"), ("b", 0), ("c", "urgent"), ("d", "high"), ("e", 0)):
            size = worker.queue_size
            files.drop(task_id, priority=priority)
            await eventually(lambda size=size: worker.queue_size == size + 1, f"{task_id} waits")  # type: ignore[misc]  # mypy infers no lambda with a default
        gate.let_go()
        await eventually(lambda: worker.stats.tasks_processed == 6, "all of them")
    assert gate.begun == ["first", "c", "d", "b", "e", "a"]


async def test_the_urgent_among_hundreds_that_lie_there_comes_first(files: Files, root: Path) -> None:
    """It is not among the first that are looked at."""
    gate = Gate()
    for number in range(600):
        (files.tasks / f"t{number}.json").write_bytes(task(f"t{number}"))
    files.drop("urgent", priority="urgent")
    async with open_worker(WORKER, settings=settings_of(root, max_concurrent=1), executor=gate.executor()) as worker:
        await eventually(lambda: gate.begun, "one runs")
        assert gate.begun == ["urgent"]
        worker.cancel()


async def test_a_task_waits_for_those_it_depends_on(files: Files, root: Path) -> None:
    gate = Gate()
    async with open_worker(WORKER, settings=settings_of(root), executor=gate.executor()) as worker:
        files.drop("second", dependencies=["first"])
        await eventually(lambda: files.heartbeat().get("blocked") == {"second": ["first"]}, "the heartbeat tells of it")
        files.drop("first")
        await eventually(lambda: gate.begun == ["first"], "the first one runs")
        assert worker.queue_size == 1
        gate.let_go()
        await files.ended("second")
    assert gate.begun == ["first", "second"]


async def test_a_task_may_wait_for_one_of_another_worker(files: Files, root: Path) -> None:
    """Whose directory is not there yet, and which fails first."""
    settings = settings_of(root, sweep_interval=600.0)
    async with open_worker(WORKER, settings=settings, executor=playing()) as worker:
        files.drop("mine", dependencies=["theirs"])
        await eventually(lambda: files.heartbeat().get("blocked"), "it waits")
        async with open_worker("w2", settings=settings, executor=playing()):
            others = Files(root, "w2")
            others.drop("not-this-one", "auth")
            await others.buried("not-this-one")
            assert worker.queue_size == 1
            others.drop("theirs")
            await files.ended("mine")


async def test_a_task_is_not_begun_before_its_time(files: Files, root: Path) -> None:
    begun: list[float] = []

    def script(spec: JobSpec) -> JobResult:
        begun.append(time.time())
        return made_up(spec)

    async with open_worker(WORKER, settings=settings_of(root), executor=MockExecutor(script)) as worker:
        moment = time.time() + 0.4
        files.drop("later", not_before=moment)
        await eventually(lambda: worker.queue_size == 1, "it waits")
        await files.ended("later")
    assert begun[0] >= moment


async def test_a_task_for_somebody_else_is_refused(files: Files, root: Path) -> None:
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()):
        path = files.drop("theirs", worker="w2")
        data = task("theirs", worker="w2")
        letter = await files.buried("theirs")
        files.drop("mine", worker=WORKER)
        await files.ended("mine")
    assert "for the worker 'w2'" in letter["dlq_detail"]
    assert (files.spool.dlq / letter["file"]).read_bytes() == data
    assert not path.exists()


# --- what comes of them ------------------------------------------------------------------------------------


def keep_going(given: Task, spec: JobSpec) -> JobSpec:
    """Whatever the task says, it completes."""
    return evolve(spec, prompt="ok")


async def test_a_result_says_all_that_is_known(files: Files, root: Path) -> None:
    usage = Usage(input_tokens=3, output_tokens=4, cache_read_tokens=5, cache_creation_tokens=6)

    def script(spec: JobSpec) -> JobResult:
        return made_up(
            spec,
            exit_code=0,
            stdout_tail="out",
            stderr_tail="err",
            session_id="s1",
            usage=usage,
            cost_usd=0.25,
            num_turns=7,
            duration_seconds=1.5,
        )

    async with open_worker(WORKER, settings=settings_of(root), executor=MockExecutor(script)):
        files.drop("t")
        found = await files.ended("t")
    assert abs(datetime.fromisoformat(found.pop("timestamp")).timestamp() - time.time()) < 60
    assert found.pop("claim")
    assert found == {
        "task_id": "t",
        "worker": WORKER,
        "status": "completed",
        "exit_code": 0,
        "signal": None,
        "stdout": "out",
        "stderr": "err",
        "text": "made up",
        "duration_seconds": 1.5,
        "retry_count": 0,
        "attempt": 1,
        "job_id": job_id_of(WORKER, "t", 1, root),
        "session_id": "s1",
        "usage": {"input_tokens": 3, "output_tokens": 4, "cache_read_tokens": 5, "cache_creation_tokens": 6},
        "cost_usd": 0.25,
        "num_turns": 7,
        "index_status": "none",
        "failure_kind": None,
        "error": None,
    }


async def test_jobs_run_under_a_supervisor_of_the_worker(files: Files, root: Path) -> None:
    def with_agent(given: Task, spec: JobSpec) -> JobSpec:
        return evolve(spec, agent=MockAgent(text=given.description.upper(), cost_usd=0.5), index=None)

    settings = evolve(settings_of(root), executor="local", containment="process-group")
    seen: list[tuple[str, str]] = []

    def observe(given: Task, event: Event) -> None:
        seen.append((given.task_id, event.type))

    async with open_worker(WORKER, settings=settings, spec_of=with_agent, observe=observe):
        files.drop("t", "shout")
        found = await files.ended("t")
    assert (found["status"], found["text"], found["cost_usd"], found["exit_code"]) == ("completed", "SHOUT", 0.5, 0)
    assert found["job_id"] == job_id_of(WORKER, "t", 1, root)
    assert (root / "state" / "jobs" / found["job_id"]).is_dir()
    assert {task_id for task_id, _ in seen} == {"t"}


async def test_a_receipt_is_told_by_a_trigger_and_events_tell_the_rest(files: Files, root: Path) -> None:
    events: list[Event] = []
    async with open_worker(WORKER, settings=settings_of(root), executor=playing(), emit=events.append):
        files.drop("t", "network ok", priority="high")
        await files.ended("t")
        trigger = files.spool.triggers / "t.trigger"
        await eventually(trigger.exists, "the trigger")
        assert b'"status":"received"' in trigger.read_bytes()
    assert kinds(events) == ["TaskReceived", "TaskClaimed", "TaskRetried", "TaskClaimed", "TaskFinished"]
    received, _, retried, claimed, finished = [event for event in events if getattr(event, "task_id", "")]
    assert isinstance(received, TaskReceived)
    assert received.priority == 10
    assert isinstance(retried, TaskRetried)
    assert (retried.attempt, retried.failure_kind) == (1, "network")
    assert isinstance(claimed, TaskClaimed)
    assert claimed.attempt == 2
    assert isinstance(finished, TaskFinished)
    assert finished.status == "completed"


async def test_what_may_work_later_is_tried_again(files: Files, root: Path) -> None:
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()) as worker:
        files.drop("t", "network overloaded ok")
        found = await files.ended("t")
        assert (found["attempt"], found["retry_count"]) == (3, 2)
        files.drop("u", "stalled killed agent_error ok")
        letter = await files.buried("u")
        assert letter["dlq_reason"] == "max_retries_exceeded"
        assert [each["failure_kind"] for each in letter["attempts"]] == ["stalled", "killed", "agent_error"]
        assert [each["attempt"] for each in letter["attempts"]] == [1, 2, 3]
    stats = worker.stats
    assert (stats.tasks_processed, stats.tasks_failed, stats.tasks_retried, stats.tasks_dlq) == (2, 1, 4, 1)


@pytest.mark.parametrize("kind", ["auth", "refused", "budget", "max_turns", "bad_output", "spawn"])
async def test_what_will_not_work_later_is_a_dead_letter_at_once(files: Files, root: Path, kind: str) -> None:
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()):
        files.drop("t", kind, mine={"deep": [1, 10**40, "ü"]}, _other=None)
        letter = await files.buried("t")
    assert (letter["dlq_reason"], letter["retry_count"], letter["dlq_worker"]) == (kind, 0, WORKER)
    assert (letter["task_id"], letter["description"]) == ("t", kind)
    assert (letter["mine"], letter["_other"]) == ({"deep": [1, 10**40, "ü"]}, None), "unknown keys survive"
    assert "_supervise" not in letter


async def test_a_task_that_takes_too_long_has_a_result(files: Files, root: Path) -> None:
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()):
        files.drop("t", "timed_out")
        found = await files.ended("t")
    assert (found["status"], found["exit_code"]) == ("timed_out", 124)


async def test_a_pending_retry_outlives_the_worker(files: Files, root: Path) -> None:
    settings = settings_of(root, backoff_base=0.6, backoff_cap=0.6)
    async with open_worker(WORKER, settings=settings, executor=playing()) as worker:
        files.drop("t", "network ok", mine=1)
        await eventually(lambda: worker.stats.tasks_retried, "the first attempt")
        failed = time.time()
    assert [path.name for path in files.tasks.iterdir()] == ["t~retry.json"]
    async with open_worker(WORKER, settings=settings, executor=playing()) as worker:
        found = await files.ended("t")
        assert time.time() - failed >= 0.3, "the pause goes on"
    assert (found["attempt"], found["retry_count"]) == (2, 1)
    assert files.left() == []


def abandon(files: Files, task_id: str) -> None:
    """As a worker does that dies during an attempt."""
    files.drop(task_id)
    held = files.spool.claim(f"{task_id}.json", task_id)
    assert held is not None


async def test_the_death_of_a_worker_counts_as_an_attempt(files: Files, root: Path) -> None:
    abandon(files, "t")
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()):
        assert (await files.ended("t"))["attempt"] == 2
    assert files.left() == []


async def test_a_task_that_kills_each_worker_is_a_dead_letter(files: Files, root: Path) -> None:
    abandon(files, "t")
    async with open_worker(WORKER, settings=settings_of(root, max_attempts=1), executor=playing()):
        letter = await files.buried("t")
    assert letter["dlq_reason"] == "max_retries_exceeded"
    assert letter["attempts"][0]["error"] == "the worker died during this attempt"
    assert files.left() == []


# --- workspaces, scripts -----------------------------------------------------------------------------------


def places(root: Path) -> dict[str, str]:
    """A worker's workspaces, and what lies beside them."""
    for name in ("allowed/inner", "outside", "workspace"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "allowed" / "way-out").symlink_to(root / "outside")
    (root / "way-in").symlink_to(root / "allowed" / "inner")
    return {
        "outside": f"{root}/outside",
        "a neighbour of the same beginning": f"{root}/allowed-not",
        "a link that leads out": f"{root}/allowed/way-out",
        "up and out": f"{root}/allowed/../outside",
        "up and out through a link": f"{root}/way-in/../../outside",
        "relative": "allowed/inner",
        "the whole machine": "/",
    }


@pytest.mark.parametrize(
    "case",
    [
        "outside",
        "a neighbour of the same beginning",
        "a link that leads out",
        "up and out",
        "up and out through a link",
        "relative",
        "the whole machine",
    ],
)
async def test_a_task_works_nowhere_but_in_the_workers_workspaces(files: Files, root: Path, case: str) -> None:
    workspace = places(root)[case]
    executor = playing()
    settings = settings_of(root, workspaces=[root / "allowed"])
    async with open_worker(WORKER, settings=settings, executor=executor):
        files.drop("t", workspace=workspace)
        letter = await files.buried("t")
        files.drop("good")
        await files.ended("good")
    assert letter["dlq_reason"] == "invalid_format"
    assert "workspace" in letter["dlq_detail"]
    assert [spec.labels["task_id"] for spec in executor.executed] == ["good"]


@pytest.mark.parametrize("workspace", ["allowed/inner", "allowed", "way-in", "workspace", "outside/../allowed"])
async def test_links_of_a_workspace_are_resolved_before_the_job_begins(
    files: Files, root: Path, workspace: str
) -> None:
    places(root)
    executor = playing()
    settings = settings_of(root, workspaces=[root / "allowed"])
    async with open_worker(WORKER, settings=settings, executor=executor):
        files.drop("t", workspace=f"{root}/{workspace}")
        await files.ended("t")
    assert executor.executed[0].workspace == Path(os.path.realpath(root / workspace))


async def test_a_worker_without_a_workspace_refuses_tasks_that_name_none(files: Files, root: Path) -> None:
    settings = settings_of(root, workspace=None)
    async with open_worker(WORKER, settings=settings, executor=playing()):
        files.drop("t")
        assert "worker.workspace" in (await files.buried("t"))["dlq_detail"]


async def test_a_script_that_nobody_knows_is_refused(files: Files, root: Path) -> None:
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()):
        files.drop("t", script="rm-rf")
        letter = await files.buried("t")
    assert letter["dlq_reason"] == "invalid_format"
    assert "'rm-rf'" in letter["dlq_detail"]


async def test_who_makes_the_specs_may_refuse_a_task(files: Files, root: Path) -> None:
    def refuse(given: Task, spec: JobSpec) -> JobSpec:
        raise BadInput("not on a Sunday")

    async with open_worker(WORKER, settings=settings_of(root), executor=playing(), spec_of=refuse):
        files.drop("t")
        assert (await files.buried("t"))["dlq_detail"] == "not on a Sunday"


# --- how it fares ------------------------------------------------------------------------------------------


async def test_the_heartbeat_says_how_it_fares(files: Files, root: Path) -> None:
    gate = Gate()
    async with open_worker(WORKER, settings=settings_of(root, max_concurrent=1), executor=gate.executor()) as worker:
        files.drop("a")
        await eventually(lambda: gate.begun, "a runs")
        files.drop("b")
        await eventually(lambda: files.heartbeat().get("queue_size") == 1, "the heartbeat tells of b")
        await status(worker, "healthy")
        await eventually(lambda: files.heartbeat()["status"] == "healthy", "the heartbeat is healthy")
        beat = files.heartbeat()
        assert abs(datetime.fromisoformat(beat.pop("timestamp")).timestamp() - time.time()) < 60
        assert beat.pop("uptime_seconds") > 0
        assert beat == {
            "worker": WORKER,
            "queue_size": 1,
            "active_tasks": [{"task_id": "a", "attempt": 1}],
            "circuit_breaker_state": "closed",
            "stats": {"tasks_processed": 0, "tasks_failed": 0, "tasks_retried": 0, "tasks_dlq": 0},
            "status": "healthy",
            "reasons": [],
            "blocked": {},
            "pid": os.getpid(),
            "stopped": False,
        }
        gate.let_go()
        await files.ended("b")
        worker.drain()
    beat = files.heartbeat()
    assert (beat["status"], beat["stopped"], beat["stats"]["tasks_processed"]) == ("draining", True, 2)


@pytest.mark.parametrize("draining", [False, True])
async def test_a_dispatcher_that_is_stuck_is_unhealthy(
    files: Files, root: Path, monkeypatch: pytest.MonkeyPatch, draining: bool
) -> None:
    stuck = trio.Event()
    take_in = Dispatcher._take_in

    async def hang(self: Dispatcher) -> None:
        if stuck.is_set():
            await trio.sleep_forever()
        await take_in(self)

    monkeypatch.setattr(Dispatcher, "_take_in", hang)
    monkeypatch.setattr(worker_module, "TURN_TIMEOUT", 0.2)
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()) as worker:
        await status(worker, "healthy")
        stuck.set()
        if draining:
            gate = worker._dispatcher.turns
            worker._dispatcher.wake()  # it hangs before it hears of the drain
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert worker._dispatcher.turns == gate
            worker.drain()
        await status(worker, "unhealthy", "did not go round", *(["it ends when"] if draining else []))
        await eventually(lambda: files.heartbeat()["status"] == "unhealthy", "the heartbeat says so")
        worker.cancel()  # a drain would wait for the loop for ever


async def test_a_directory_that_nobody_looks_at_is_unhealthy(
    files: Files, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system whose server is away: the call does not return."""
    go_on, stuck, names = threading.Event(), threading.Event(), Spool.names

    def hang(self: Spool) -> list[str]:
        if stuck.is_set():
            go_on.wait(20.0)
        return names(self)

    monkeypatch.setattr(Spool, "names", hang)
    async with open_worker(WORKER, settings=settings_of(root, sweep_interval=0.1), executor=playing()) as worker:
        await status(worker, "healthy")
        stuck.set()
        await status(worker, "unhealthy", "last looked at")
        go_on.set()
        stuck.clear()
        await status(worker, "healthy")


async def test_an_open_breaker_degrades_and_leaves_tasks_in_the_queue(files: Files, root: Path) -> None:
    broken = True

    def script(spec: JobSpec) -> JobResult:
        return made_up(spec, "auth" if broken else "")

    settings = settings_of(root, max_concurrent=1, breaker=BreakerSettings(failures=2, reset_after=0.7))
    async with open_worker(WORKER, settings=settings, executor=MockExecutor(script)) as worker:
        for number in range(2):
            files.drop(f"bad{number}")
        await eventually(lambda: worker.stats.tasks_dlq == 2, "two failures")
        files.drop("waits")
        await status(worker, "degraded", "circuit breaker")
        await eventually(lambda: files.heartbeat()["circuit_breaker_state"] != "closed", "the heartbeat says so")
        broken = False
        await files.ended("waits")
        await status(worker, "healthy")
        await eventually(lambda: files.heartbeat()["circuit_breaker_state"] == "closed", "the heartbeat says so")


async def test_a_used_up_quota_pauses_and_counts_nothing(files: Files, root: Path) -> None:
    asked: list[str] = []

    def script(spec: JobSpec) -> JobResult:
        asked.append(spec.labels["attempt"])
        return made_up(spec, "quota" if len(asked) == 1 else "")

    settings = settings_of(root, quota_pause=0.5)
    async with open_worker(WORKER, settings=settings, executor=MockExecutor(script)) as worker:
        files.drop("t")
        await status(worker, "degraded", "a quota is used up")
        assert (await files.ended("t"))["attempt"] == 1
        await status(worker, "healthy")
    assert asked == ["1", "1"]


async def test_a_worker_that_has_not_looked_yet_is_starting(
    files: Files, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, names = threading.Event(), Spool.names

    def hang(self: Spool) -> list[str]:
        go_on.wait(20.0)
        return names(self)

    monkeypatch.setattr(Spool, "names", hang)
    events: list[Event] = []
    settings = settings_of(root, sweep_interval=1.0)
    async with open_worker(WORKER, settings=settings, executor=playing(), emit=events.append) as worker:
        await status(worker, "degraded", "it is starting: the directory is looked at")
        await status(worker, "unhealthy", "was never looked at")
        go_on.set()
        await status(worker, "healthy")
    assert "inf" not in " ".join(text for event in events if isinstance(event, WorkerChanged) for text in event.reasons)


async def test_a_heartbeat_that_cannot_be_written_is_told_and_is_no_busier_than_any(
    files: Files, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beats, beat = 0, Spool.beat

    def count(self: Spool, record: dict[str, Any]) -> None:
        nonlocal beats
        beats += 1
        beat(self, record)

    monkeypatch.setattr(Spool, "beat", count)
    settings = settings_of(root, heartbeat_interval=0.1)
    async with open_worker(WORKER, settings=settings, executor=playing()) as worker:
        await status(worker, "healthy")
        place = files.spool.heartbeat.parent
        shutil.rmtree(place)
        place.symlink_to("/proc/self")
        await status(worker, "degraded", f"heartbeat: {files.spool.heartbeat}: ")
        before = beats
        await trio.sleep(1.0)  # a length on purpose: how often it beats in it is what is counted
        assert beats - before <= 12
        place.unlink()
        place.mkdir()
        await status(worker, "healthy")
        await eventually(lambda: files.heartbeat().get("status") == "healthy", "it is written again")
    assert len([each for each in caplog.records if each.getMessage().startswith("heartbeat: ")]) == 2


async def test_tasks_that_wait_in_vain_are_told_and_are_no_trouble_of_the_worker(
    files: Files, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()) as worker:
        files.drop("dead", "auth")
        files.drop("late", "timed_out")
        files.drop("a", dependencies=["dead"])
        files.drop("b", dependencies=["late", "not-yet"])
        await status(worker, "healthy", "task a waits for dead, which did not complete", "task b waits for late")
        await eventually(lambda: "waits for late" in " ".join(files.heartbeat()["reasons"]), "the heartbeat says so")
        assert not any("not-yet" in text for text in worker.reasons)
        (files.spool.dlq / "dead.json").unlink()
        files.drop("dead")  # it is tried again
        await files.ended("a")
        await eventually(lambda: not any("dead" in text for text in worker.reasons), "it waits in vain no more")
    told = [each.getMessage() for each in caplog.records if "which did not complete" in each.getMessage()]
    assert len(told) == 2, "once for each task"


async def test_tasks_that_wait_for_each_other_degrade(files: Files, root: Path) -> None:
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()) as worker:
        files.drop("c1", dependencies=["c2"])
        second = files.drop("c2", dependencies=["c1"])
        reasons = await status(worker, "degraded", "tasks wait for each other: ")
        assert "c1" in reasons
        second.unlink()
        await status(worker, "healthy")


async def test_callbacks_that_raise_are_told_once_and_end_nothing(
    files: Files, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trip(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    def with_agent(given: Task, spec: JobSpec) -> JobSpec:
        if given.task_id == "poison":
            raise KeyError("x")
        return evolve(spec, agent=MockAgent(), index=None)

    settings = evolve(settings_of(root), executor="local", containment="process-group")
    parts = {"spec_of": with_agent, "observe": trip, "emit": trip}
    async with open_worker(WORKER, settings=settings, **parts):  # type: ignore[arg-type]  # mypy knows no such dict
        for task_id in ("poison", "a", "b"):
            files.drop(task_id)
        for task_id in ("a", "b"):
            assert (await files.ended(task_id))["status"] == "completed"
        assert (await files.buried("poison"))["dlq_detail"] == "KeyError: 'x'"
    told = [each.getMessage().split()[0] for each in caplog.records if each.exc_info and "once" in each.getMessage()]
    assert sorted(told) == ["emit", "observe"]


# --- the end -----------------------------------------------------------------------------------------------


async def test_a_job_that_completed_is_not_done_again_because_its_index_takes_long(files: Files, root: Path) -> None:
    """The worker ends while the index is flushed."""
    ran: list[str] = []
    seen: list[str] = []

    def with_agent(given: Task, spec: JobSpec) -> JobSpec:
        return evolve(spec, agent=MockAgent(steps=(lambda run: ran.append(spec.job_id),)))

    cidx = FakeCidx(str(root), watch={"flush": 1.5})
    index = IndexSettings(command=cidx.command, mode="cidx", assume_fresh=True, settle_time=0.2, flush_timeout=10.0)
    settings = evolve(settings_of(root), executor="local", containment="process-group", index=index)

    def observe(given: Task, event: Event) -> None:
        seen.append(event.type)

    async with open_worker(WORKER, settings=settings, spec_of=with_agent, observe=observe) as worker:
        files.drop("a")
        await eventually(lambda: "signal_sent" in seen, "the watch is asked to flush")
        assert files.result("a") is None
        worker.cancel()
        await worker.stopped()
        assert worker.put_back == 0
    found = files.result("a")
    assert found is not None
    assert (found["status"], len(ran)) == ("completed", 1)
    assert files.left() == []


async def test_a_result_that_cannot_be_published_at_the_end_is_told(
    files: Files, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Spool, *_: object) -> None:
        raise OSError(28, "No space left on device")

    events: list[Event] = []
    settings = settings_of(root, drain_timeout=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "finish", full)
        async with open_worker(WORKER, settings=settings, executor=playing(), emit=events.append) as worker:
            files.drop("a")
            await status(worker, "degraded", "publication")
    assert (worker.unpublished, worker.put_back) == (1, 0)
    assert "task a: what came of its attempt is lost" in caplog.text
    assert any(isinstance(event, WorkerTrouble) and "is lost" in event.error for event in events)
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()):
        assert (await files.ended("a"))["attempt"] == 2


async def test_a_drain_waits_for_what_runs_and_takes_nothing_more(files: Files, root: Path) -> None:
    gate = Gate()
    async with open_worker(WORKER, settings=settings_of(root, max_concurrent=1), executor=gate.executor()) as worker:
        files.drop("a")
        await eventually(lambda: gate.begun, "a runs")
        files.drop("b")
        await eventually(lambda: worker.queue_size == 1, "b waits")
        worker.drain()
        await status(worker, "draining")
        gate.let_go()
        await worker.stopped()
        assert files.result("a")
    assert gate.begun == ["a"]
    assert [path.name for path in files.tasks.iterdir()] == ["b.json"]
    assert list(files.spool.running.iterdir()) == []


async def test_a_drain_that_takes_too_long_puts_its_tasks_back(files: Files, root: Path) -> None:
    gate, events = Gate(), list[Event]()
    settings = settings_of(root, drain_timeout=0.2)
    async with open_worker(WORKER, settings=settings, executor=gate.executor(), emit=events.append):
        path = files.drop("a", mine=1)
        await eventually(lambda: gate.begun, "a runs")
    assert gate.cancelled == ["a"]
    assert path.read_bytes() == task("a", mine=1)
    assert files.result("a") is None
    assert any(isinstance(event, TaskPutBack) for event in events)
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()):
        assert (await files.ended("a"))["attempt"] == 1, "it was not the task's fault"


async def test_a_second_cancel_goes_to_the_next_step(files: Files, root: Path) -> None:
    """The agent does not care for SIGTERM, and has minutes to end."""

    def with_agent(given: Task, spec: JobSpec) -> JobSpec:
        command = ["sh", "-c", "trap '' TERM; touch armed; while :; do sleep 0.05; done"]
        return evolve(spec, agent=Programs([command], sink=lambda data: None), index=None)

    settings = evolve(
        settings_of(root), executor="local", containment="process-group", agent=AgentSettings(termination_timeout=300.0)
    )
    async with open_worker(WORKER, settings=settings, spec_of=with_agent) as worker:
        files.drop("a")
        await eventually((root / "workspace" / "armed").exists, "the agent runs")
        worker.cancel()
        with trio.move_on_after(0.3) as patience:
            await worker.stopped()
        assert patience.cancelled_caught
        worker.cancel()
        with trio.fail_after(10):
            await worker.stopped()
    assert (files.tasks / "a.json").exists()
    assert list(files.spool.running.iterdir()) == []


@pytest.mark.parametrize(
    "error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
async def test_an_exception_in_the_block_puts_tasks_back_and_leaves_as_it_is(
    files: Files, root: Path, error: BaseException
) -> None:
    gate = Gate()

    async def fail() -> None:
        async with open_worker(WORKER, settings=settings_of(root), executor=gate.executor()):
            files.drop("a")
            await eventually(lambda: gate.begun, "a runs")
            raise error

    with pytest.raises(type(error)) as caught:
        await fail()
    assert caught.value is error
    assert gate.cancelled == ["a"]
    assert [path.name for path in files.tasks.iterdir()] == ["a.json"]
    assert list(files.spool.running.iterdir()) == []
    assert files.heartbeat()["stopped"] is True


async def test_a_cancelled_worker_puts_its_tasks_back(files: Files, root: Path) -> None:
    gate = Gate()
    with trio.CancelScope() as scope:
        async with open_worker(WORKER, settings=settings_of(root), executor=gate.executor()):
            files.drop("a")
            await eventually(lambda: gate.begun, "a runs")
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert [path.name for path in files.tasks.iterdir()] == ["a.json"]
    assert list(files.spool.running.iterdir()) == []


async def test_a_result_that_is_there_is_published_also_if_all_is_cancelled(
    files: Files, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, finish = threading.Event(), threading.Event(), Spool.finish

    def slowly(self: Spool, *args: Any) -> None:
        begun.set()
        go_on.wait(20.0)
        finish(self, *args)

    monkeypatch.setattr(Spool, "finish", slowly)
    with trio.CancelScope() as scope:
        async with open_worker(WORKER, settings=settings_of(root), executor=playing()):
            files.drop("a")
            await eventually(begun.is_set, "it is being published")
            scope.cancel()
            go_on.set()
            await trio.sleep_forever()
    assert files.result("a")
    assert files.left() == []


# --- alone -------------------------------------------------------------------------------------------------


async def test_a_second_worker_of_the_name_is_refused_with_the_pid_of_the_first(files: Files, root: Path) -> None:
    settings = settings_of(root)
    async with open_worker(WORKER, settings=settings, executor=playing()):
        with pytest.raises(AlreadyRunning, match=rf"already running \(PID {os.getpid()}\)"):
            async with open_worker(WORKER, settings=settings, executor=playing()):
                pytest.fail("there are two")
        async with open_worker("w2", settings=settings, executor=playing()):
            files.drop("t")
            await files.ended("t")
    async with open_worker(WORKER, settings=settings, executor=playing()):
        pass


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_worker_whose_lock_file_is_removed_takes_nothing_more_and_ends(
    files: Files, root: Path, replaced: bool
) -> None:
    gate = Gate()
    lock = root / "locks" / f"{WORKER}.lock"
    async with open_worker(WORKER, settings=settings_of(root), executor=gate.executor()) as worker:
        files.drop("a")
        await eventually(lambda: gate.begun, "it runs")
        lock.unlink()
        if replaced:
            lock.touch()
        files.drop("b")
        await status(worker, "unhealthy", f"the lock file {lock} was removed", "it ends when its tasks have ended")
        await eventually(lambda: files.heartbeat()["status"] == "unhealthy", "the heartbeat says so")
        gate.let_go()
        await worker.stopped()
        assert files.result("a")
    assert gate.begun == ["a"]
    assert [path.name for path in files.tasks.iterdir()] == ["b.json"]
    assert lock.exists() == replaced, "it is not ours"


async def test_the_lock_is_looked_at_before_each_claim(files: Files, root: Path) -> None:
    """No heartbeat comes in between."""
    gate = Gate()
    settings = settings_of(root, heartbeat_interval=600.0)
    async with open_worker(WORKER, settings=settings, executor=gate.executor()) as worker:
        await status(worker, "healthy")
        shutil.rmtree(root / "locks")
        files.drop("a")
        with trio.fail_after(20):
            await worker.stopped()
    assert gate.begun == []
    assert [path.name for path in files.tasks.iterdir()] == ["a.json"]


async def test_the_lock_file_for_others_is_missed_but_not_needed(files: Files, root: Path) -> None:
    path = root / "other.lock"
    async with open_worker(WORKER, settings=settings_of(root, lock_file=path), executor=playing()) as worker:
        await status(worker, "healthy")
        path.unlink()
        await status(worker, "degraded", f"the lock file {path} was removed")
        files.drop("a")
        await files.ended("a")


async def test_no_two_attempts_have_a_job_of_the_same_id(tmp_path: Path) -> None:
    """Roots may share a state directory, and all names may hold dots."""
    (tmp_path / "link").symlink_to(tmp_path / "r1")
    names = [("a", "b.1", 1), ("a.b", "1", 1), ("a", "b", 1), ("a", "b", 11), ("a", "b.1", 11)]
    names += [("w" * 128, letter + "t" * 127, 100) for letter in "xy"] + [("w" * 128, "t" * 127 + "x", 100)]
    ids = [job_id_of(*name, tmp_path / root) for name in names for root in ("r1", "r2")]
    assert len(set(ids)) == len(ids)
    assert all(JOB_ID.fullmatch(each) for each in ids)
    assert job_id_of("w", "t", 1, tmp_path / "link") == job_id_of("w", "t", 1, tmp_path / "r1")
    assert job_id_of("w", "t", 1, tmp_path / "r1").startswith("w.t.")


async def test_a_lock_file_for_others_holds_the_pid_alone(files: Files, root: Path) -> None:
    path = root / "sparkq-main.lock"
    async with open_worker(WORKER, settings=settings_of(root, lock_file=path), executor=playing()):
        assert path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(AlreadyRunning):
            async with open_worker("w2", settings=settings_of(root, lock_file=path), executor=playing()):
                pytest.fail("there are two")
    assert not path.exists()


@pytest.mark.parametrize("name", ["", "../w", ".w", "a/b", "w\n", "ü", "x" * 129, "orchestrator"])
async def test_a_worker_has_a_plain_name(root: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="worker's name"):
        async with open_worker(name, settings=settings_of(root), executor=playing()):
            pytest.fail("it runs")


async def test_directories_that_cannot_be_made_are_told_by_name(root: Path) -> None:
    settings = settings_of(root)
    (root / "results").write_text("a file")
    with pytest.raises(SuperviseError, match="results"):
        async with open_worker(WORKER, settings=settings, executor=playing()):
            pytest.fail("it runs")


async def test_a_bug_in_an_executor_is_a_failed_attempt_and_no_end_of_the_worker(files: Files, root: Path) -> None:
    def script(spec: JobSpec) -> JobResult:
        if spec.prompt == "trip":
            raise ZeroDivisionError("a bug")
        return made_up(spec)

    async with open_worker(WORKER, settings=settings_of(root), executor=MockExecutor(script)):
        files.drop("t", "trip")
        letter = await files.buried("t")
        files.drop("good")
        await files.ended("good")
    assert {each["error"] for each in letter["attempts"]} == {"the executor raised ZeroDivisionError: a bug"}


async def test_the_reader_of_events_sees_the_end_of_them(files: Files, root: Path) -> None:
    seen: list[Event] = []

    async def read(worker: Worker, *, task_status: trio.TaskStatus[None]) -> None:
        async with worker.subscribe() as events:
            task_status.started()
            async for event in events:
                seen.append(event)

    worker_lives = open_worker(WORKER, settings=settings_of(root), executor=playing())
    async with trio.open_nursery() as nursery, worker_lives as worker:
        await nursery.start(read, worker)
        files.drop("t", "auth")
        await files.buried("t")
    assert any(isinstance(event, TaskBuried) for event in seen)
