"""The event log of a job, without processes: what is in it, how large it gets, and what a bad disk costs."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import supervise
from supervise import (
    AgentReport,
    AgentRun,
    IndexSettings,
    JobResult,
    JobSpec,
    MockAgent,
    Outcome,
    Settings,
)
from supervise.codec import event_from_json, event_to_json, loads
from supervise.events import (
    AgentText,
    CancelRequested,
    Event,
    Heartbeat,
    IndexOutput,
    JobFinished,
    SignalSent,
    UnknownEvent,
    published,
)
from supervise.job import event_log
from supervise.job.event_log import EVENTS, WAITING, EventLog
from supervise.model import IndexStatus
from supervise.secrets import Masker

SECRET = "sk-secret-0123456789"
SMALLEST = 65536


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path / "state", index=IndexSettings(mode="none"), events_max_bytes=SMALLEST)


def lines(path: Path) -> list[dict[str, Any]]:
    """The log; each line is whole."""
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [loads(line) for line in data.splitlines()]


def log_of(settings: Settings, job_id: str) -> list[dict[str, Any]]:
    return lines(settings.state_dir / "jobs" / job_id / EVENTS)


def at(event: Event) -> Event:
    return published(event, time=time.time(), job_id="j1")


def text(size: int = 10) -> Event:
    return at(AgentText(text="x" * size))


def signal_sent(number: int = 1) -> Event:
    return at(SignalSent(role="agent", signal="SIGTERM", count=number))


def beat() -> Event:
    return at(
        Heartbeat(
            state="running",
            index_status=IndexStatus.NONE,
            uptime=1,
            agent_silent_seconds=None,
            agent_lines=0,
            rss_bytes=0,
            cpu_seconds=0,
            containment="",
        )
    )


def result(**more: Any) -> JobResult:
    return JobResult(**{"job_id": "j1", "outcome": Outcome.COMPLETED, **more})


async def kept(path: Path, events: list[Event], *, batch: int = 100, max_bytes: int = SMALLEST) -> list[dict[str, Any]]:
    """What is in a log after these events, the disk being asked after each `batch` of them."""
    log = EventLog(path, max_bytes)
    for number, event in enumerate(events, 1):
        log.take(event)
        if number % batch == 0:
            log._write(log._taken(), str)
    await log.close(result(), str)
    assert path.stat().st_size <= max_bytes
    return lines(path)


async def test_the_log_holds_what_a_subscriber_sees(settings: Settings, tmp_path: Path) -> None:
    spec = JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent(text="done"))
    async with supervise.open_job(spec, settings=settings) as job, job.subscribe() as events:
        seen = [event_to_json(event) async for event in events]
    log = log_of(settings, job.job_id)
    assert [each["type"] for each in log] == [each["type"] for each in seen]
    assert log[:-2] == seen[:-2]
    assert log[-2]["state"] == "done"
    assert log[-1]["result"] == {
        "job_id": job.job_id,
        "outcome": "completed",
        "failure_kind": None,
        "error": None,
        "index": {"status": "none"},
        "duration_seconds": job.result_nowait().duration_seconds,
    }
    assert all(len(each["time"]) == len("2026-11-21T12:00:00.000000Z") for each in log)


async def test_every_line_is_an_event_that_can_be_read_back(settings: Settings, tmp_path: Path) -> None:
    spec = JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent(text="done"))
    job_id = (await supervise.run_job(spec, settings=settings)).job_id
    events = [event_from_json(each) for each in log_of(settings, job_id)]
    assert isinstance(events[-1], JobFinished)
    assert events[-1].result.outcome is Outcome.COMPLETED


async def test_the_log_is_whole_when_the_result_is_there(settings: Settings, tmp_path: Path) -> None:
    async with supervise.open_supervisor(settings=settings) as sup:
        for _ in range(5):
            job = await sup.start(JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent()))
            await job.result()
            assert log_of(settings, job.job_id)[-1]["type"] == "job_finished"


async def test_nobody_else_may_read_the_log(settings: Settings, tmp_path: Path) -> None:
    job_id = (
        await supervise.run_job(JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent()), settings=settings)
    ).job_id
    assert (settings.state_dir / "jobs" / job_id / EVENTS).stat().st_mode & 0o777 == 0o600


async def test_an_earlier_log_of_this_id_is_replaced(settings: Settings, tmp_path: Path) -> None:
    spec = JobSpec(prompt="go", workspace=tmp_path, job_id="again", agent=MockAgent())
    for _ in range(2):
        done = await supervise.run_job(spec, settings=settings)
    log = log_of(settings, "again")
    assert [each["type"] for each in log].count("job_started") == 1
    assert log[-1]["result"]["duration_seconds"] == done.duration_seconds


async def test_a_job_that_was_cancelled_while_it_waited_has_a_log(settings: Settings, tmp_path: Path) -> None:
    async with supervise.open_supervisor(max_concurrent=1, settings=settings) as sup:
        first = await sup.start(JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent(hang=True)))
        async with trio.open_nursery() as nursery:
            spec = JobSpec(prompt="go", workspace=tmp_path, job_id="waits", env={"MY_TOKEN": SECRET})
            nursery.start_soon(sup.start, spec)
            await trio.testing.wait_all_tasks_blocked()
            sup.jobs[1].cancel(f"changed my mind about {SECRET}")
        first.cancel()
    log = log_of(settings, "waits")
    assert [each["type"] for each in log] == ["cancel", "state", "job_finished"]
    assert log[0]["reason"] == "changed my mind about ***"
    assert SECRET not in str(log)
    assert SECRET not in (settings.state_dir / "jobs" / "waits" / "result.json").read_text()


async def test_a_cancelled_scope_loses_nothing_of_the_log(settings: Settings, tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with supervise.open_job(
            JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent(hang=True)), settings=settings
        ) as job:
            await job.spawned()
            scope.cancel()
            await trio.sleep_forever()
    log = log_of(settings, job.job_id)
    assert log[0]["type"] == "job_started"
    seen = [event_to_json(event) for event in job._bus._history]
    assert [(each["type"], each.get("state")) for each in log] == [(each["type"], each.get("state")) for each in seen]
    assert log[-1]["result"]["outcome"] == "cancelled"


async def test_secrets_in_free_texts_are_masked(settings: Settings, tmp_path: Path) -> None:
    spec = JobSpec(prompt="go", workspace=tmp_path, env={"MY_TOKEN": SECRET}, agent=MockAgent(hang=True))
    async with supervise.open_job(spec, settings=settings) as job:
        await job.spawned()
        job._publish(IndexOutput(kind="error", line=f"ERROR with {SECRET}"))
        job.cancel(f"because of {SECRET}")
    data = (settings.state_dir / "jobs" / job.job_id / EVENTS).read_text()
    assert SECRET not in data
    assert data.count("***") == 3  # line, reason, and the error of the result


async def test_what_is_written_is_there_before_the_end(settings: Settings, tmp_path: Path) -> None:
    async with supervise.open_job(
        JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent(hang=True)), settings=settings
    ) as job:
        await job.spawned()
        path = settings.state_dir / "jobs" / job.job_id / EVENTS
        with trio.fail_after(20):
            while not path.exists() or b"heartbeat" not in path.read_bytes():  # a file tells nobody
                await trio.sleep(0.01)
        job.cancel()


async def test_past_three_quarters_agents_and_heartbeats_are_left_out(tmp_path: Path) -> None:
    events = [text(1000) for _ in range(100)]
    log = await kept(tmp_path / EVENTS, [*events, beat(), signal_sent(), text(), beat(), signal_sent()])
    types = [each["type"] for each in log]
    texts = types.count("agent_text")
    assert 40 < texts < 49
    after = ["events_dropped", "signal_sent", "events_dropped", "signal_sent", "state", "job_finished"]
    assert types[texts:] == after
    assert [each["count"] for each in log if each["type"] == "events_dropped"] == [101 - texts, 2]


async def test_past_all_of_it_only_the_end_is_written(tmp_path: Path) -> None:
    log = await kept(tmp_path / EVENTS, [signal_sent(number) for number in range(2000)])
    signals = [each for each in log if each["type"] == "signal_sent"]
    assert [each["count"] for each in signals] == list(range(len(signals)))
    assert [each["type"] for each in log[len(signals) :]] == ["events_dropped", "state", "job_finished"]
    assert log[-3]["count"] == 2000 - len(signals)


async def test_the_longest_error_fits_behind_a_full_log(tmp_path: Path) -> None:
    for worst in ("\x01", "\U0001f600", "\ud800\U0001f600"):
        path = tmp_path / f"{ord(worst[0])}"
        log = EventLog(path, SMALLEST)
        for number in range(1500):
            log.take(signal_sent(number))
        log._write(log._taken(), str)
        await log.close(result(error=worst * 100_000), str)
        assert path.stat().st_size <= SMALLEST
        assert lines(path)[-1]["type"] == "job_finished"


async def test_a_burst_that_the_disk_cannot_follow_leaves_out_what_agents_say(tmp_path: Path) -> None:
    events = [*(text() for _ in range(WAITING + 500)), *(signal_sent() for _ in range(10))]
    log = await kept(tmp_path / EVENTS, events, batch=10_000, max_bytes=1 << 20)
    types = [each["type"] for each in log]
    assert types[:WAITING] == ["agent_text"] * WAITING
    assert types[WAITING:] == ["events_dropped", *["signal_sent"] * 10, "state", "job_finished"]
    assert log[WAITING]["count"] == 500


async def test_what_waits_is_bounded_whatever_it_is(tmp_path: Path) -> None:
    log = EventLog(tmp_path / EVENTS, SMALLEST)
    for _ in range(10 * WAITING):
        log.take(signal_sent())
    assert len(log._waiting) == 2 * WAITING
    await log.close(result(), str)
    told = lines(tmp_path / EVENTS)
    written = len([each for each in told if each["type"] == "signal_sent"])
    assert sum(each["count"] for each in told if each["type"] == "events_dropped") == 10 * WAITING - written


async def test_an_event_that_is_no_json_is_left_out_and_counted(tmp_path: Path) -> None:
    class Odd:
        def __str__(self) -> str:
            raise ValueError("no text")

    log = await kept(tmp_path / EVENTS, [text(), at(UnknownEvent(raw={"odd": Odd()})), signal_sent()])
    assert [each["type"] for each in log] == ["agent_text", "events_dropped", "signal_sent", "state", "job_finished"]


async def test_a_disk_that_is_full_is_told_once_and_costs_nothing_else(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if EVENTS in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(event_log.os, "write", full)
    with caplog.at_level(logging.ERROR, "supervise.job"):
        done = await supervise.run_job(
            JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent(text="fine")), settings=settings
        )
    assert (done.outcome, done.text) == (Outcome.COMPLETED, "fine")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert EVENTS in told[0]


@pytest.mark.parametrize("link", [os.symlink, os.link])
async def test_a_stranger_at_the_place_of_the_log_is_not_written_to(
    settings: Settings, tmp_path: Path, link: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Linker:
        name = "linker"

        async def run(self, run: AgentRun) -> None:
            run.started()
            link(victim, settings.state_dir / "jobs" / "linked" / EVENTS)
            run.report(AgentReport(text="ok"))

    victim = tmp_path / "victim"
    victim.write_text("mine")
    with caplog.at_level(logging.ERROR, "supervise.job"):
        done = await supervise.run_job(
            JobSpec(prompt="go", workspace=tmp_path, job_id="linked", agent=Linker()), settings=settings
        )
    assert done.outcome is Outcome.COMPLETED
    assert victim.read_text() == "mine"
    assert "ends here" in caplog.text


async def test_a_machine_without_threads_to_spare_costs_the_log_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
    monkeypatch.setattr(event_log, "GATHER", 0.0)
    log = EventLog(tmp_path / EVENTS, SMALLEST)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.keep, str)
        log.take(text())
        await trio.testing.wait_all_tasks_blocked()
        log.stop()
    await log.close(result(), str)
    assert "can't start new thread" in caplog.text
    assert not (tmp_path / EVENTS).exists()


async def test_stopping_between_two_batches_loses_no_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "GATHER", 0.0)
    log = EventLog(tmp_path / EVENTS, 1 << 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.keep, str)
        for number in range(200):
            log.take(signal_sent(number))
            await trio.lowlevel.checkpoint()
        log.stop()
        log.take(at(CancelRequested(reason="late", step=1)))
    await log.close(result(), str)
    log.take(text())
    told = lines(tmp_path / EVENTS)
    assert [each["count"] for each in told if each["type"] == "signal_sent"] == list(range(200))
    assert [each["type"] for each in told[200:]] == ["cancel", "state", "job_finished"]
    assert json.dumps(told).count('"agent_text"') == 0


async def test_one_event_that_is_too_large_costs_no_word_of_the_job_itself(tmp_path: Path) -> None:
    log = await kept(tmp_path / EVENTS, [*(text(15_000) for _ in range(10)), signal_sent(), signal_sent()], batch=1)
    types = [each["type"] for each in log]
    assert types == [*["agent_text"] * 3, "events_dropped", "signal_sent", "signal_sent", "state", "job_finished"]
    assert log[3]["count"] == 7


async def test_a_batch_on_its_way_to_the_disk_is_not_lost_when_the_job_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there_is_a_thread = trio.Event()

    async def in_thread(write: Any, *args: Any, **_: Any) -> None:
        await there_is_a_thread.wait()
        write(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", in_thread)
    monkeypatch.setattr(event_log, "GATHER", 0.0)
    log = EventLog(tmp_path / EVENTS, SMALLEST)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.keep, str)
        log.take(signal_sent())
        await trio.testing.wait_all_tasks_blocked()
        log.stop()
        await trio.testing.wait_all_tasks_blocked()
        there_is_a_thread.set()
    await log.close(result(), str)
    assert [each["type"] for each in lines(tmp_path / EVENTS)] == ["signal_sent", "state", "job_finished"]


async def test_what_happens_before_the_job_begins_is_in_its_log(settings: Settings, tmp_path: Path) -> None:
    spec = JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent())
    async with supervise.open_job(spec, settings=settings) as job:
        job.cancel("before it has begun")
    assert log_of(settings, job.job_id)[0]["reason"] == "before it has begun"


async def test_a_disk_that_refuses_at_the_very_last_costs_no_result(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    close = os.close

    def refuse(descriptor: int) -> None:
        is_log = EVENTS in os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)
        if is_log:
            raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(event_log.os, "close", refuse)
    with trio.fail_after(20):
        done = await supervise.run_job(JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent()), settings=settings)
    assert done.outcome is Outcome.COMPLETED
    assert "Disk quota exceeded" in caplog.text


async def test_a_bug_in_the_log_costs_no_result(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(EventLog, "_put", fail)
    with trio.fail_after(20):
        done = await supervise.run_job(JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent()), settings=settings)
    assert done.outcome is Outcome.COMPLETED
    assert "KeyError" in caplog.text


async def test_a_reason_without_end_does_not_fill_the_log(tmp_path: Path) -> None:
    log = await kept(tmp_path / EVENTS, [at(CancelRequested(reason="x" * 10_000_000, step=1)), signal_sent()])
    assert [each["type"] for each in log] == ["cancel", "signal_sent", "state", "job_finished"]


class SlowDisk:
    """Writes to event logs hang until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hangs, self.go_on = threading.Event(), threading.Event()
        self._write = os.write
        monkeypatch.setattr(event_log.os, "write", self.write)
        monkeypatch.setattr(event_log, "PATIENCE", 0.1)
        monkeypatch.setattr(event_log, "GATHER", 0.0)

    def write(self, descriptor: int, data: Any) -> int:
        if EVENTS in os.readlink(f"/proc/self/fd/{descriptor}"):
            self.hangs.set()
            assert self.go_on.wait(20)
            data = data[:50]
        return self._write(descriptor, data)


def open_logs() -> int:
    """Event logs that this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += EVENTS in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed them
            continue
    return count


async def test_a_disk_that_hangs_holds_up_the_end_of_no_job(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SlowDisk(monkeypatch)
    spec = JobSpec(prompt="go", workspace=tmp_path, job_id="j1", agent=MockAgent(text="fine"))
    with trio.fail_after(10), caplog.at_level(logging.ERROR, "supervise.job"):
        done = await supervise.run_job(spec, settings=settings)
    assert (done.outcome, done.text) == (Outcome.COMPLETED, "fine")
    assert disk.hangs.is_set()
    path = settings.state_dir / "jobs" / "j1" / EVENTS
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"the event log {path} ends here: the disk has not answered for 0.1 s; the job goes on without it"]
    assert open_logs() == 1  # the thread has it still
    disk.go_on.set()
    with trio.fail_after(10):
        while open_logs():  # a thread that was left alone tells nobody
            await trio.sleep(0.01)
    assert len(path.read_bytes()) == 50  # it writes no more than what it was at
    assert len(caplog.records) == 1


async def test_the_hanging_disk_of_one_job_holds_up_no_other_ones_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = [EventLog(tmp_path / name / EVENTS, SMALLEST) for name in ("a", "b", "c", "d", "e", "f")]
    release = threading.Event()
    for log in logs:
        log._path.parent.mkdir()
    for log in logs[:-1]:
        monkeypatch.setattr(log, "_put", lambda lines: release.wait(20))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for log in logs[:-1]:
                nursery.start_soon(log.close, result(), str)
            await trio.testing.wait_all_tasks_blocked()
            await logs[-1].close(result(), str)
            release.set()
    assert lines(logs[-1]._path)[-1]["type"] == "job_finished"


async def test_a_thread_that_ends_as_it_is_given_up_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "PATIENCE", 0.003)
    for number in range(100):
        log = EventLog(tmp_path / f"{number}-{EVENTS}", SMALLEST)
        write = log._write

        def slow(*args: Any, write: Any = write, seconds: float = number % 7 / 1000) -> None:
            write(*args)
            time.sleep(seconds)

        monkeypatch.setattr(log, "_write", slow)
        log.take(text())
        await log._in_thread(log._write, log._taken(), str)
        await log.close(result(), str)
    with trio.fail_after(10):
        while open_logs():  # a thread that was left alone tells nobody
            await trio.sleep(0.01)


async def test_secrets_are_masked_whatever_field_they_are_in(settings: Settings, tmp_path: Path) -> None:
    class Odd:
        name = "odd"

        async def run(self, run: AgentRun) -> None:
            run.started()
            payload = {"path": Path("/x") / SECRET, "bytes": SECRET.encode(), "set": {SECRET}, Path(SECRET): 1}
            run.emit(UnknownEvent(raw={"deep": [payload, (SECRET,)], "number": 1.5, "none": None}))
            run.emit(AgentText(text="x", raw={"fine": [1, True, {"a": "b"}]}))
            run.report(AgentReport(text="ok"))

    spec = JobSpec(prompt="go", workspace=tmp_path, job_id="j1", env={"MY_TOKEN": SECRET}, agent=Odd())
    async with supervise.open_job(spec, settings=settings) as job, job.subscribe() as events:
        seen = [event async for event in events if isinstance(event, UnknownEvent | AgentText)]
    assert seen[0].raw == {
        "deep": [{"path": "/x/***", "bytes": "***", "set": ["***"], "***": 1}, ("***",)],
        "number": 1.5,
        "none": None,
    }
    assert seen[1].raw == {"fine": [1, True, {"a": "b"}]}
    assert SECRET not in (settings.state_dir / "jobs" / "j1" / EVENTS).read_text()


async def test_what_becomes_text_only_when_it_is_written_is_masked_too(tmp_path: Path) -> None:
    events = [
        at(UnknownEvent(raw={"path": Path(SECRET), "bytes": SECRET.encode()})),
        at(SignalSent(role=SECRET, signal="X", count=1)),
    ]
    log = EventLog(tmp_path / EVENTS, SMALLEST)
    for event in events:
        log.take(event)
    await log.close(result(), Masker([SECRET]).text)
    told = lines(tmp_path / EVENTS)
    assert [each["type"] for each in told] == ["agent_unknown", "signal_sent", "state", "job_finished"]
    assert (told[0]["raw"], told[1]["role"]) == ({"path": "***", "bytes": "b'***'"}, "***")


async def test_a_secret_that_is_a_word_of_the_log_tears_no_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / EVENTS, SMALLEST)
    for event in (signal_sent(), text(), signal_sent()):
        log.take(event)
    await log.close(result(), Masker(["signal_sent"]).text)
    told = [(each["type"], each.get("count")) for each in lines(tmp_path / EVENTS)]
    assert told == [
        ("events_dropped", 1),
        ("agent_text", None),
        ("events_dropped", 1),
        ("state", None),
        ("job_finished", None),
    ]
