"""Tasks through a worker with a real index: whatever agents edit side by side, at the end it equals the files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil
import trio
from attrs import evolve

from supervise.demo.scene import PROMPT, Scene, set_up
from supervise.dispatch.submit import outcome_of, submit
from supervise.dispatch.task import Task
from supervise.dispatch.worker import Worker, open_worker
from supervise.events import Event, IndexChanged, ProcessExited, ProcessStarted
from supervise.settings import Settings, WorkerSettings
from tests.cli.conftest import TASK_AGENT

LIMIT = 15.0
TASKS = 20


def with_worker(settings: Settings, root: Path, **bounds: Any) -> Settings:
    """The scene's settings, with a worker that works at three tasks at a time."""
    worker = WorkerSettings(root=root, max_concurrent=3, backoff_base=0.05, **bounds)
    return evolve(settings, worker=worker, heartbeat_interval=0.2)


def family(place: Path) -> set[int]:
    """Our descendants, and whoever works in the place."""
    found = {child.pid for child in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if Path(os.readlink(f"/proc/{process.pid}/cwd")).is_relative_to(place):
                found.add(process.pid)
        except OSError:  # it has ended, or is the kernel's
            continue
    return found


async def results(worker: Worker, task_ids: list[str]) -> list[dict[str, Any]]:
    """What became of the tasks; waited for."""
    found: list[dict[str, Any]] = []
    with trio.fail_after(LIMIT):
        for task_id in task_ids:
            while (record := outcome_of(worker.root, worker.name, task_id)) is None:
                await trio.sleep(0.02)
            found.append(record)
    return found


def edits(number: int) -> str:
    """What an agent does: a new file, one that all write, one that is renamed, one that comes and goes."""
    steps = [
        f"text task {number}",
        f"write notes/{number}.md The note of task {number}.",
        f"write shared.md Last seen by {number}.",
        f"write drafts/{number}.md A draft of {number}.",
        f"move drafts/{number}.md manual-{number}.md",
        f"write gone/{number}.md Not for long.",
        f"remove gone/{number}.md",
        f"done edited {number}",
    ]
    return "\n".join(steps)


class Seen:
    """What the jobs have told."""

    def __init__(self) -> None:
        self.at_work: set[str] = set()
        self.most = 0
        self.joined = 0
        self.watches: set[int] = set()  # pids: each watch has the same few

    def __call__(self, task: Task, event: Event) -> None:
        match event:
            case ProcessStarted(role="agent"):
                self.at_work.add(task.task_id)
                self.most = max(self.most, len(self.at_work))
            case ProcessStarted(role="watch"):
                self.watches.add(event.pid)
            case IndexChanged(cause="joined"):
                self.joined += 1
            case ProcessExited(role="agent"):
                self.at_work.discard(task.task_id)


async def is_as_promised(scene: Scene) -> None:
    end = await scene.end()
    assert end.proof.equal, end.proof.differences
    assert end.mark is None


async def test_twenty_tasks_three_at_a_time_in_one_workspace_leave_an_index_that_equals_the_files(
    tmp_path: Path,
) -> None:
    before = family(tmp_path)
    scene = await set_up(tmp_path, None)
    settings = with_worker(scene.settings, tmp_path / "root", workspace=scene.workspace)
    command = (sys.executable, "-I", "-S", str(TASK_AGENT))
    settings = evolve(settings, agent=evolve(settings.agent, command=command))
    seen = Seen()
    with trio.fail_after(LIMIT):
        async with open_worker("w1", settings=settings, observe=seen) as worker:
            names = [f"t{number}" for number in range(TASKS)]
            for number, name in enumerate(names):
                fields = {"task_id": name, "description": edits(number), "priority": number % 3}
                await trio.to_thread.run_sync(submit, worker.root, "w1", fields)
            found = await results(worker, names)
            assert worker.stats.tasks_processed == TASKS
    for number, record in enumerate(found):
        assert (record.get("status"), record.get("text")) == ("completed", f"edited {number}"), record
        assert record["attempt"] == 1
    assert seen.most == 3
    assert seen.joined  # it is shared
    assert 1 <= len(seen.watches) < TASKS
    for number in range(TASKS):
        assert (scene.workspace / f"notes/{number}.md").read_text() == f"The note of task {number}.\n"
        assert (scene.workspace / f"manual-{number}.md").exists()
    await is_as_promised(scene)
    (scene.workspace / "later.md").write_text("Nobody has indexed this.\n")
    assert (await scene.end()).proof.differences == ("later.md: not in the index",)  # so it was a proof
    for kind in ("tasks", "running", "dlq"):
        assert os.listdir(tmp_path / "root" / kind / "w1") == []
    assert len(os.listdir(tmp_path / "root/results/w1")) == TASKS
    assert os.listdir(tmp_path / "root/locks") == []
    assert family(tmp_path) == before


async def test_the_demos_agent_works_in_several_workspaces_side_by_side(tmp_path: Path) -> None:
    before = family(tmp_path)
    names = ["one", "two", "three"]
    scenes: dict[str, Scene] = {}
    for name in names:
        (tmp_path / name).mkdir()
        scenes[name] = await set_up(tmp_path / name, None)
    settings = with_worker(scenes["one"].settings, tmp_path / "root", workspaces=(tmp_path / "one", tmp_path / "two"))
    settings = evolve(settings, agent=evolve(settings.agent, command=(*settings.agent.command, "--pace", "0.02")))
    seen = Seen()
    with trio.fail_after(LIMIT):
        async with open_worker("w1", settings=settings, observe=seen) as worker:
            for name in names:
                fields = {"task_id": name, "description": PROMPT, "workspace": str(scenes[name].workspace)}
                submit(worker.root, "w1", fields)
            found = await results(worker, names)
    one, two, three = found
    assert [record.get("status") for record in (one, two)] == ["completed", "completed"], found
    assert [record["index_status"] for record in (one, two)] == ["watch_terminated"] * 2
    assert three["dlq_reason"] == "invalid_format"
    assert "lies under none of worker.workspaces" in three["dlq_detail"]
    assert seen.watches
    for name in ("one", "two"):
        assert not (scenes[name].workspace / "orchard/util.py").exists()
        await is_as_promised(evolve(scenes[name], settings=settings))
    assert (scenes["three"].workspace / "orchard/util.py").exists()
    assert family(tmp_path) == before
