"""The event log of real jobs: whole at the end, and what a kill -9 leaves of it can be drawn."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

import supervise
from supervise import Outcome
from supervise.codec import event_to_json, loads
from supervise.events import AgentToolUse
from supervise.observe.timeline import Timeline, timeline_of
from tests.processes.test_job import LIMIT, STUBBORN, WORKS, World, wait_until
from tests.processes.test_stale_mark import end_processes_of

SECRET = "hunter2+secret"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    end_processes_of(world.helped)


def log_of(world: World, job_id: str) -> list[dict[str, Any]]:
    data = (world.state_dir / "jobs" / job_id / "events.jsonl").read_bytes()
    return [loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def spans(timeline: Timeline, name: str) -> list[tuple[str, bool]]:
    """Label, and whether it has ended."""
    lanes = [lane for lane in timeline.lanes if lane.name == name]
    return [(span.label, span.ended is not None) for lane in lanes for span in lane.spans]


def marks(timeline: Timeline, name: str) -> list[str]:
    return [mark.label for lane in timeline.lanes if lane.name == name for mark in lane.marks]


async def test_the_log_of_a_job_with_an_index_is_what_a_subscriber_sees(world: World) -> None:
    with trio.fail_after(LIMIT):
        result, events = await world.events()
    log = log_of(world, result.job_id)
    assert log[:-2] == [event_to_json(event) for event in events][:-2]
    timeline = timeline_of(log)
    assert (timeline.job_id, timeline.outcome) == (result.job_id, "completed")
    assert timeline.seconds == pytest.approx(result.duration_seconds, abs=0.5)
    assert spans(timeline, "agent") == [("exit 0", True)]
    assert spans(timeline, "watch")[-1] == ("exit 0", True)
    assert [label for label, _ in spans(timeline, "job")] == ["starting", "running", "settling"]
    assert marks(timeline, "signals") == ["SIGINT → watch"]


async def test_a_secret_that_json_spells_in_another_way_is_masked_once_it_is_read(world: World) -> None:
    def said(block: dict[str, Any]) -> str:
        line = json.dumps({"type": "assistant", "message": {"content": [block]}})
        return line.replace("hunter2+", "hunter2\\u002B") + "\n"

    use = {"type": "tool_use", "id": "t", "name": "Bash", "input": {"command": f"curl -H {SECRET}", "x": [{SECRET: 1}]}}
    world.claude.plan(
        ["init"], ["raw", said(use)], ["raw", said({"type": "text", "text": f"it is {SECRET}"})], ["result"]
    )
    with trio.fail_after(LIMIT):
        result, events = await world.events(env={"MY_TOKEN": SECRET}, index=None)
    (tool,) = [event for event in events if isinstance(event, AgentToolUse)]
    assert tool.input == {"command": "curl -H ***", "x": [{"***": 1}]}
    assert SECRET not in repr([attrs.asdict(event) for event in events])
    log = (world.state_dir / "jobs" / result.job_id / "events.jsonl").read_text()
    assert "it is ***" in log
    assert SECRET not in log


async def test_no_process_of_a_job_has_its_directory_open(world: World) -> None:
    world.claude.plan(["init"], ["spawn", "setsid"], ["hang"])
    with trio.fail_after(LIMIT):
        async with supervise.open_job(world.spec(index=None), settings=world.settings()) as job:
            async with job.subscribe() as events:
                async for event in events:
                    if event.type == "agent_init":
                        break
            directory = world.state_dir / "jobs" / job.job_id
            assert open_at(directory) == [os.getpid()]
            job.cancel()
    assert open_at(directory) == []


def open_at(directory: Path) -> list[int]:
    """Processes that have the directory open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(directory):
                found.append(int(link.parts[2]))
        except OSError:  # it is gone, or has just closed this one
            continue
    return found


async def test_signals_and_the_cancel_are_on_the_timeline(world: World) -> None:
    world.claude.plan(*STUBBORN)
    settings = world.settings(agent={"termination_timeout": 0.3})
    with trio.fail_after(LIMIT):
        async with supervise.open_job(world.spec(), settings=settings) as job:
            async with job.subscribe() as events:
                async for event in events:
                    if event.type == "agent_init":
                        break
            job.cancel("enough")
    assert job.result_nowait().outcome is Outcome.CANCELLED
    timeline = timeline_of(log_of(world, job.job_id))
    assert marks(timeline, "cancel") == ["cancel"]
    assert [label.split(" ×")[0] for label in marks(timeline, "signals")][-1] == "SIGINT → watch"
    assert any(label.startswith("SIGTERM → agent") for label in marks(timeline, "signals"))


async def test_a_supervisor_killed_with_9_leaves_a_log_that_can_be_drawn(world: World) -> None:
    world.claude.plan(*WORKS)
    path = world.state_dir / "jobs" / world.helped / "events.jsonl"
    helper = world.helper()
    try:
        wait_until(lambda: path.exists() and b'"agent_init"' in path.read_bytes(), helper)
    finally:
        helper.kill()
        helper.communicate(timeout=LIMIT)
    end_processes_of(world.helped)
    with path.open("ab") as file:
        file.write(b'{"type":"heartbeat","ti')  # as it may be torn
    timeline = timeline_of(log_of(world, world.helped))
    assert timeline.ended is None
    assert spans(timeline, "agent") == [("runs", False)]
    assert spans(timeline, "watch")[-1] == ("runs", False)
    assert spans(timeline, "job")[-1] == ("running", False)
