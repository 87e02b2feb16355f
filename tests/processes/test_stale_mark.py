"""The supervising process is killed with -9: the mark is on the disk, and the next job levels the index first."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from supervise import IndexStatus, Outcome
from tests.processes.test_job import (
    GOOD,
    LIMIT,
    STUBBORN,
    WORKS,
    World,
    in_order,
    processes_of,
    wait_until,
)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    # The containment by process group cannot reach them when nobody is left to do it.
    end_processes_of(world.helped)


def end_processes_of(job_id: str) -> None:
    def gone() -> bool:
        left = processes_of(job_id)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not left

    wait_until(gone)


def killed(world: World, reached: Callable[[], Any], *, ctrl_c_at: str = "", **settings: Any) -> list[str]:
    """Run a job in a helper and kill the helper at a moment. Returns what the programs had recorded."""
    helper = world.helper(**settings)
    try:
        if ctrl_c_at:
            wait_until(lambda: ctrl_c_at in world.cidx.order(), helper)
            os.kill(helper.pid, signal.SIGINT)
        wait_until(reached, helper)
    finally:
        helper.kill()
        _, stderr = helper.communicate(timeout=LIMIT)
    assert helper.returncode == -signal.SIGKILL, stderr.decode()
    assert world.marked
    end_processes_of(world.helped)
    assert not (world.state_dir / "jobs" / world.helped / "result.json").exists()
    return world.cidx.order()


async def the_next_job_levels_first(world: World, before: list[str]) -> None:
    world.cidx.plan()
    world.claude.plan(*GOOD)
    with trio.fail_after(LIMIT):
        result, events = await world.events()
    assert world.cidx.order()[len(before) :] == [
        "reconcile begin",
        "reconcile end",
        "watch begin",
        "watch ready",
        "agent begin",
        "agent end",
        "watch SIGINT",
        "watch end",
    ]
    in_order(events)
    assert (result.outcome, result.index.status) == (Outcome.COMPLETED, IndexStatus.WATCH_TERMINATED)
    assert not world.marked
    with trio.fail_after(LIMIT):
        again = await world.run(world.settings(assume_fresh=False))
    assert again.index.status is IndexStatus.WATCH_TERMINATED
    assert world.cidx.order().count("reconcile begin") == before.count("reconcile begin") + 1


async def test_killed_while_the_index_starts(world: World) -> None:
    world.cidx.plan(watch={"ready": None})
    before = killed(world, lambda: "watch begin" in world.cidx.order(), settle_time=60, assume_fresh=True)
    assert "agent begin" not in before
    await the_next_job_levels_first(world, before)


async def test_killed_while_a_stale_index_is_leveled(world: World) -> None:
    world.cidx.plan(reconcile={"until": str(world.gate())})
    before = killed(world, lambda: "reconcile begin" in world.cidx.order())
    assert before == ["reconcile begin"]
    await the_next_job_levels_first(world, before)


async def test_killed_while_the_agent_runs(world: World) -> None:
    world.claude.plan(["spawn", "setsid"], *WORKS)
    before = killed(world, lambda: "agent spawned" in world.cidx.order(), assume_fresh=True)
    await the_next_job_levels_first(world, before)


async def test_killed_while_the_agent_is_stopped(world: World) -> None:
    world.claude.plan(*STUBBORN)
    before = killed(
        world,
        lambda: "agent SIGTERM" in world.cidx.order(),
        ctrl_c_at="agent spawned",
        assume_fresh=True,
        agent_termination_timeout=600,
    )
    await the_next_job_levels_first(world, before)


async def test_killed_while_the_watch_flushes(world: World) -> None:
    world.cidx.plan(watch={"flush_until": str(world.gate())})
    before = killed(world, lambda: "watch SIGINT" in world.cidx.order(), assume_fresh=True, flush_timeout=600)
    await the_next_job_levels_first(world, before)


async def test_killed_during_the_final_reconcile(world: World) -> None:
    world.cidx.plan(watch={"out": ["ERROR no good"]}, reconcile={"until": str(world.gate())})
    before = killed(world, lambda: "reconcile begin" in world.cidx.order(), assume_fresh=True)
    assert before[-1] == "reconcile begin"
    await the_next_job_levels_first(world, before)


async def test_a_workspace_that_somebody_changed_is_leveled_first(world: World) -> None:
    with trio.fail_after(LIMIT):
        await world.run()
        before = world.cidx.order()
        assert not world.marked
        (world.workspace / "new.txt").write_text("by somebody else\n")
    await the_next_job_levels_first(world, before)
