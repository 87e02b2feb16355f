"""A supervisor that has run many jobs is as small as one that has run a few."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import trio

from supervise import JobSpec, Outcome, Settings, Supervisor, open_supervisor
from supervise.agents.command import run_command
from supervise.agents.protocol import AgentRun
from supervise.events import AgentEvent, AgentResult
from supervise.processes import identity
from tests.processes.conftest import Leaks
from tests.processes.lone import group_of, inside
from tests.processes.test_child import within
from tests.processes.test_sweep import keepers

JOBS = 500
MEMORY = 20 << 20  # a job that keeps as much as its smallest pipe buffer would need more


class Silent:
    """A protocol of no words."""

    def feed(self, data: bytes) -> list[AgentEvent]:
        return []

    def close(self) -> list[AgentEvent]:
        return [AgentResult(subtype="success")]


class TrueAgent:
    name = "true"

    async def run(self, run: AgentRun) -> None:
        await run_command(run, ("/bin/true",), Silent(), stdin=b"")


class Traces:
    """What a job could leave behind in a living supervisor."""

    def __init__(self, leaks: Leaks, state_dir: Path, group: Path | None) -> None:
        zygote, _ = keepers(state_dir)
        below = identity.descendants(zygote)
        names = [thread.name.partition(" ")[0] for thread in threading.enumerate()]
        #: Trio's own idle ones, which end by themselves ten seconds after their last use.
        self.trio_threads = names.count("Trio")
        self.of: dict[str, object] = {
            "descriptors": Counter(target.partition("[")[0] for target in leaks.descriptors()),
            "threads": Counter(name for name in names if name != "Trio"),
            "zombies": leaks.zombies(),
            "below the zygote": sorted((identity.command_of(each.pid), each.alive) for each in below),
            "cgroups": [] if group is None else inside(group),
            "records": sorted(path.name for path in (state_dir / "run").rglob("*")),
            "other": sorted(path.name for path in state_dir.iterdir()),
        }
        self.zygote = memory_of(zygote)
        self.memory = memory_of(os.getpid())


def memory_of(pid: int) -> int:
    process = identity.read(pid)
    assert process is not None
    return process.rss_bytes


async def run(supervisor: Supervisor, count: int) -> float:
    """Run jobs one after another. Returns the seconds of each."""
    began = time.perf_counter()
    for _ in range(count):
        result = await supervisor.run(JobSpec(prompt="go", workspace="/", index=None, agent=TrueAgent()))
        assert result.outcome is Outcome.COMPLETED, result.error
    return (time.perf_counter() - began) / count


#: As many as the limits of our own threads allow at a time, and none for each job.
MOST_TRIO_THREADS = 12


@pytest.mark.slow
@within(120)
async def test_hundreds_of_jobs_leave_nothing(tmp_path: Path, leaks: Leaks) -> None:
    async with open_supervisor(settings=Settings(state_dir=tmp_path)) as supervisor:
        await run(supervisor, 20)
        before = await settled(leaks, tmp_path, group_of(supervisor))
        each = await run(supervisor, JOBS)
        after = await settled(leaks, tmp_path, group_of(supervisor))
        assert after.of == before.of
        assert after.trio_threads <= MOST_TRIO_THREADS
        assert after.memory - before.memory < MEMORY
        assert after.zygote - before.zygote < MEMORY / 10
        assert len([path for path in (tmp_path / "jobs").iterdir() if path.is_dir()]) == JOBS + 20
        print(f"{each * 1000:.1f} ms for each job, {after.memory - before.memory} bytes kept")  # see it by -rP
    assert os.listdir(tmp_path / "run") == []


async def settled(leaks: Leaks, state_dir: Path, group: Path | None) -> Traces:
    """When the last guardian has ended: it does so by itself, after its job. One waits for the next job."""
    with trio.move_on_after(5):
        while True:
            traces = Traces(leaks, state_dir, group)
            if traces.of["below the zygote"] == [("sv-guardian", True)] and traces.of["cgroups"] == []:
                break
            await trio.sleep(0.01)
    return traces
