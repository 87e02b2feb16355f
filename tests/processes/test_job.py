"""Whole jobs on real processes: fake programs that record what they were asked and what they saw."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
from attrs import evolve

import supervise
from supervise import (
    AgentSettings,
    ClaudeAgent,
    FailureKind,
    IndexSettings,
    IndexStatus,
    Job,
    JobResult,
    JobSpec,
    JobState,
    Outcome,
    Settings,
)
from supervise.codec import event_to_json
from supervise.events import (
    AgentEvent,
    BadLine,
    Event,
    Heartbeat,
    IndexChanged,
    IndexOutput,
    ProcessStarted,
    SignalSent,
    StateChanged,
    TreeEmpty,
)
from supervise.processes import identity
from supervise.processes.guarded import GUARDIAN, GUARDIAN_AND_CGROUP, GuardianContainment
from supervise.processes.session import SessionContainment
from tests.processes.conftest import TOKEN
from tests.processes.fake_cidx import FakeCidx
from tests.processes.fake_claude import FakeClaude, numbered

LIMIT = 30  # seconds for a whole test; none takes nearly as long
NEVER = 600.0  # a bound that is not reached within a test

GOOD = (["init"], ["text", "hello"], ["result"])
WORKS = (["init"], ["hang"])
STUBBORN = (["ignore", "SIGTERM"], ["init"], ["spawn", "setsid"], ["hang"])

HELPER = """
import functools, sys, trio, supervise
state_dir, workspace, job_id, cidx, claude, more = map(eval, sys.argv[1:])
settings = supervise.Settings(
    state_dir=state_dir,
    containment=more.pop("containment", "auto"),
    agent=supervise.AgentSettings(command=claude, termination_timeout=more.pop("agent_termination_timeout", 5)),
    index=supervise.IndexSettings(command=cidx, mode="cidx", **more),
)
spec = supervise.JobSpec(prompt="go", workspace=workspace, job_id=job_id)
trio.run(functools.partial(supervise.run_job, spec, settings=settings))
"""


class World:
    """A workspace, a state directory, and the fake programs."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        self.workspace = tmp_path / "workspace"
        self.workspace.mkdir()
        (self.workspace / "file.txt").write_text("one\n")
        self.state_dir = tmp_path / "state"
        self.cidx = FakeCidx(tmp_path)
        self.claude = FakeClaude(tmp_path, *GOOD, record=self.cidx.record_file)
        self.helped = f"helped-{secrets.token_hex(8)}"

    def settings(self, *, agent: dict[str, Any] | None = None, **index: Any) -> Settings:
        return Settings(
            state_dir=self.state_dir,
            agent=AgentSettings(command=self.claude.command, **{"pass_env": (TOKEN,), **(agent or {})}),
            index=IndexSettings(
                **{"command": self.cidx.command, "mode": "cidx", "assume_fresh": True, "settle_time": 20, **index}
            ),
        )

    def spec(self, **more: Any) -> JobSpec:
        return JobSpec(**{"prompt": "go", "workspace": self.workspace, "timeout": 60, **more})

    async def run(self, settings: Settings | None = None, **spec: Any) -> JobResult:
        return await supervise.run_job(self.spec(**spec), settings=settings or self.settings())

    async def events(self, settings: Settings | None = None, **spec: Any) -> tuple[JobResult, list[Event]]:
        opened = supervise.open_job(self.spec(**spec), settings=settings or self.settings())
        async with opened as job, job.subscribe() as events:
            seen = [event async for event in events]
        return job.result_nowait(), seen

    def gate(self, name: str = "gate") -> Path:
        return self.tmp / name

    @property
    def marked(self) -> bool:
        return bool(list(self.state_dir.glob("workspaces/*/stale.json")))

    def logs(self, job_id: str) -> bytes:
        return b"".join(path.read_bytes() for path in (self.state_dir / "jobs" / job_id).iterdir())

    def helper(self, **settings: Any) -> subprocess.Popen[bytes]:
        """A process that supervises the job `helped`; a session of its own."""
        values = (
            str(self.state_dir),
            str(self.workspace),
            self.helped,
            self.cidx.command,
            self.claude.command,
            settings,
        )
        command = [sys.executable, "-c", HELPER, *map(repr, values)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def until(condition: Callable[[], Any]) -> None:
    """To be bounded by the test."""
    while not condition():
        await trio.sleep(0.005)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "too late"
        assert process is None or process.poll() is None, "the helper has ended"
        time.sleep(0.005)


def processes_of(job_id: str) -> list[int]:
    """Living processes that were started for a job."""
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if f"{job_id}:".encode() in file.read():
                    found.append(int(name))
        except (OSError, ValueError):
            continue
    return found


def indexers(world: World) -> list[int]:
    """Living processes of the fake indexer."""
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if world.cidx.plan_file.encode() in file.read().split(b"\0"):
                    found.append(int(name))
        except (OSError, ValueError):
            continue
    return found


def in_order(events: list[Event]) -> None:
    """The agent's tree is empty before the watch is asked to end, and nothing runs beside the watch."""
    tree = None
    agent = watch = False
    for event in events:
        match event:
            case ProcessStarted(role="agent"):
                agent = True
            case TreeEmpty(role="agent"):
                agent = False
            case SignalSent(role="watch"):
                assert not agent
            case ProcessStarted(role="watch"):
                watch = True
                assert tree is None
            case TreeEmpty(role="watch"):
                watch = False
            case ProcessStarted(role="reconcile"):
                assert not watch
                tree = event
            case TreeEmpty(role="reconcile"):
                tree = None
    assert not agent
    assert not watch
    assert tree is None


def final(result: JobResult, world: World) -> tuple[Outcome, IndexStatus, bool]:
    """Outcome, status, and whether the mark is there: as the result, and as the disk says."""
    assert result.index.stale == world.marked
    assert result.survivors == ()
    assert processes_of(result.job_id) == []
    assert indexers(world) == []
    data = json.loads((world.state_dir / "jobs" / result.job_id / "result.json").read_bytes())
    assert (data["outcome"], data["index"]["status"]) == (result.outcome.value, result.index.status.value)
    return result.outcome, result.index.status, world.marked


async def test_a_good_job(world: World) -> None:
    with trio.fail_after(LIMIT):
        result, events = await world.events()
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.WATCH_TERMINATED, False)
    assert (result.exit_code, result.signal, result.text) == (0, None, "all done")
    assert (result.usage.input_tokens, result.cost_usd, result.num_turns) == (10, 0.0123, 2)
    assert world.cidx.order() == [
        "watch begin",
        "watch ready",
        "agent begin",
        "agent end",
        "watch SIGINT",
        "watch end",
    ]
    in_order(events)
    commands = [entry["argv"] for entry in world.cidx.record() if entry["what"] == "begin" and "argv" in entry]
    assert commands == [["start"], ["fix-config", "--force"], ["watch"]]


async def test_the_descendants_of_an_agent_that_ended_well(world: World) -> None:
    world.claude.plan(["spawn", "child"], ["spawn", "setsid"], ["spawn", "daemon"], *GOOD)
    with trio.fail_after(LIMIT):
        result, events = await world.events()
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.WATCH_TERMINATED, False)
    in_order(events)


# --- cancelled ---------------------------------------------------------------------------------------------

By = Literal["job", "scope"]
by = pytest.mark.parametrize("by", ["job", "scope"])


async def run_and_cancel(
    world: World,
    settings: Settings,
    by: By,
    reached: Callable[[Job], Any],
    and_then: Callable[[Job], Awaitable[None]] | None = None,
) -> tuple[JobResult, list[Event]]:
    """Run a job, cancel it when `reached`, do `and_then`, wait for the end."""
    scope = trio.CancelScope()
    jobs: list[Job] = []

    async def live() -> None:
        with scope:
            async with supervise.open_job(world.spec(), settings=settings) as job:
                jobs.append(job)
                await job.result()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as inner:
            inner.start_soon(live)
            await until(lambda: jobs)
            await until(lambda: reached(jobs[0]))
            if by == "job":
                jobs[0].cancel("asked")
            else:
                scope.cancel()
            if and_then is not None:
                await and_then(jobs[0])
        assert scope.cancelled_caught == (by == "scope")
        async with jobs[0].subscribe() as events:
            seen = [event async for event in events]
    in_order(seen)
    result = jobs[0].result_nowait()
    if result.outcome is Outcome.CANCELLED:
        assert result.error == ("cancelled: asked" if by == "job" else "cancelled: the caller's scope was cancelled")
    return result, seen


@pytest.mark.parametrize("containment", ["auto", "process-group"])
@by
async def test_cancelled_during_the_spawn(
    by: By, containment: Literal["auto", "process-group"], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawning, go_on = trio.Event(), trio.Event()
    kind: Any = SessionContainment if containment == "process-group" else GuardianContainment
    spawn = kind.spawn

    async def slow(self: Any, command: Any, pipes: Any) -> Any:
        if command.argv[: len(world.claude.command)] == world.claude.command:
            spawning.set()
            await go_on.wait()
        return await spawn(self, command, pipes)

    monkeypatch.setattr(kind, "spawn", slow)
    world.claude.plan(*WORKS)

    async def and_then(job: Job) -> None:
        await until(lambda: job.state is JobState.STOPPING)
        go_on.set()

    settings = evolve(world.settings(), containment=containment)
    result, events = await run_and_cancel(world, settings, by, lambda job: spawning.is_set(), and_then)
    assert final(result, world) == (Outcome.CANCELLED, IndexStatus.WATCH_TERMINATED, False)
    states = [event.state for event in events if isinstance(event, StateChanged)]
    assert states == ["starting", "stopping", "settling", "done"]
    assert result.signal == "SIGTERM" or result.exit_code == 143


@by
async def test_cancelled_during_the_start_wait(by: By, world: World) -> None:
    world.cidx.plan(watch={"ready": None})
    result, events = await run_and_cancel(world, world.settings(), by, lambda job: "watch begin" in world.cidx.order())
    assert final(result, world) == (Outcome.CANCELLED, IndexStatus.STALE, True)
    assert world.cidx.order() == ["watch begin", "watch SIGINT", "watch end"]
    assert not any(isinstance(event, ProcessStarted) and event.role == "agent" for event in events)


@by
async def test_cancelled_while_a_stale_index_is_reconciled(by: By, world: World) -> None:
    world.cidx.plan(index={}, reconcile={"until": str(world.gate())})
    settings = world.settings(assume_fresh=False)
    result, _ = await run_and_cancel(world, settings, by, lambda job: "reconcile begin" in world.cidx.order())
    assert final(result, world) == (Outcome.CANCELLED, IndexStatus.STALE, True)
    assert "agent begin" not in world.cidx.order()


@by
async def test_cancelled_while_running(by: By, world: World) -> None:
    world.claude.plan(["spawn", "child"], ["spawn", "setsid"], ["spawn", "daemon"], *WORKS)
    result, _ = await run_and_cancel(world, world.settings(), by, lambda job: spawned(world) == 3)
    assert final(result, world) == (Outcome.CANCELLED, IndexStatus.WATCH_TERMINATED, False)
    assert result.exit_code == 143


@by
async def test_cancelled_while_running_with_an_index_that_is_not_clean(by: By, world: World) -> None:
    world.claude.plan(*WORKS)
    world.cidx.plan(watch={"out": ["ERROR no good"]})
    running = "agent begin"
    result, _ = await run_and_cancel(world, world.settings(), by, lambda job: running in world.cidx.order())
    assert final(result, world) == (Outcome.CANCELLED, IndexStatus.STALE, True)
    assert "reconcile begin" not in world.cidx.order()


async def test_reconcile_on_cancel(world: World) -> None:
    world.claude.plan(*WORKS)
    world.cidx.plan(watch={"out": ["ERROR no good"]})
    settings = world.settings(reconcile_on_cancel=True)
    result, _ = await run_and_cancel(world, settings, "job", lambda job: "agent begin" in world.cidx.order())
    assert final(result, world) == (Outcome.CANCELLED, IndexStatus.READY_VIA_FALLBACK, False)


@by
async def test_cancelled_again_during_the_grace(by: By, world: World) -> None:
    world.claude.plan(*STUBBORN)

    async def and_then(job: Job) -> None:
        await until(lambda: "agent SIGTERM" in world.cidx.order())
        job.cancel("again")

    settings = world.settings(agent={"termination_timeout": NEVER})
    result, events = await run_and_cancel(world, settings, by, lambda job: spawned(world) == 1, and_then)
    assert final(result, world) == (Outcome.CANCELLED, IndexStatus.WATCH_TERMINATED, False)
    assert result.signal == "SIGKILL"
    sent = [event.signal for event in events if isinstance(event, SignalSent) and event.role == "agent"]
    assert sent[:2] == ["SIGTERM", "SIGKILL"]


@by
async def test_cancelled_twice_at_once(by: By, world: World) -> None:
    world.claude.plan(*STUBBORN)

    async def and_then(job: Job) -> None:
        if by == "scope":  # the scope's cancellation is to arrive first: it has no number of its own
            await until(lambda: job.cancel_reason)
        job.cancel("again")

    settings = world.settings(agent={"termination_timeout": NEVER})
    result, _ = await run_and_cancel(world, settings, by, lambda job: spawned(world) == 1, and_then)
    assert final(result, world) == (Outcome.CANCELLED, IndexStatus.WATCH_TERMINATED, False)
    assert result.signal == "SIGKILL"


@by
async def test_cancelled_during_the_final_reconcile(by: By, world: World) -> None:
    world.cidx.plan(watch={"out": ["ERROR no good"]}, reconcile={"until": str(world.gate())})
    result, _ = await run_and_cancel(world, world.settings(), by, lambda job: "reconcile begin" in world.cidx.order())
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.STALE, True)
    assert result.text == "all done"


@by
async def test_cancelled_during_the_flush(by: By, world: World) -> None:
    world.cidx.plan(watch={"flush_until": str(world.gate())})

    async def and_then(job: Job) -> None:
        world.gate().touch()

    result, _ = await run_and_cancel(
        world, world.settings(flush_timeout=20), by, lambda job: "watch SIGINT" in world.cidx.order(), and_then
    )
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.WATCH_TERMINATED, False)


def spawned(world: World) -> int:
    return sum(entry["what"] == "spawned" for entry in world.cidx.record())


# --- time --------------------------------------------------------------------------------------------------


async def test_a_timeout_of_an_agent_that_ignores_sigterm(world: World) -> None:
    world.claude.plan(*STUBBORN)
    with trio.fail_after(LIMIT):
        result, events = await world.events(world.settings(agent={"termination_timeout": 0.2}), timeout=0.5)
    assert final(result, world) == (Outcome.TIMED_OUT, IndexStatus.WATCH_TERMINATED, False)
    assert (result.failure_kind, result.signal) == (None, "SIGKILL")
    assert result.error == "the agent did not end within 0.5 s"
    assert "agent SIGTERM" in world.cidx.order()
    in_order(events)


async def test_the_timeout_does_not_include_start_and_reconcile(world: World) -> None:
    world.cidx.plan(watch={"ready": 0.6}, reconcile={"seconds": 0.6})
    world.claude.plan(["stderr", "unused"], *GOOD)
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(settle_time=0.3), timeout=0.5)
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.READY_VIA_FALLBACK, False)


async def test_a_good_result_and_then_silence(world: World) -> None:
    world.claude.plan(*GOOD, ["hang"])
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(agent={"exit_linger": 0.1}))
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.WATCH_TERMINATED, False)
    assert (result.text, result.exit_code, result.error) == ("all done", 143, None)


async def test_news_of_background_tasks_after_the_result_do_not_keep_it(world: World) -> None:
    status = json.dumps({"type": "system", "subtype": "task_notification"}) + "\nnot JSON\n"
    world.claude.plan(*GOOD, ["raw", status], ["hang"])
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(agent={"exit_linger": 0.1}))
    assert result.outcome is Outcome.COMPLETED
    assert result.exit_code == 143


async def test_a_further_turn_may_be_silent(world: World) -> None:
    world.claude.plan(*GOOD, ["init"], ["sleep", 0.5], ["result", {"result": "second"}])
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(agent={"exit_linger": 0.1}))
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "second")


async def test_a_bad_result_is_not_lingered_after(world: World) -> None:
    world.claude.plan(["result", {"is_error": True, "terminal_reason": "max_turns"}], ["sleep", 0.3], ["leave", 1])
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(agent={"exit_linger": 0.1}))
    assert (result.failure_kind, result.exit_code) == (FailureKind.MAX_TURNS, 1)


async def test_a_timeout_while_it_lingers(world: World) -> None:
    world.claude.plan(*GOOD, ["hang"])
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(agent={"exit_linger": NEVER}), timeout=0.6)
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.WATCH_TERMINATED, False)
    assert (result.text, result.error) == ("all done", None)


# --- how agents end ----------------------------------------------------------------------------------------


def error(status: int | None = None, **more: Any) -> list[Any]:
    changes = {"is_error": True, "api_error_status": status, "result": "API Error", "terminal_reason": "api_error"}
    return ["result", {**changes, **more}]


@pytest.mark.parametrize(
    ("steps", "kind", "code", "number"),
    [
        pytest.param([["init"]], FailureKind.BAD_OUTPUT, 0, None, id="no result"),
        pytest.param([], FailureKind.BAD_OUTPUT, 0, None, id="nothing at all"),
        pytest.param([["leave", 2]], FailureKind.AGENT_ERROR, 2, None, id="exit 2"),
        pytest.param([*GOOD, ["leave", 3]], FailureKind.AGENT_ERROR, 3, None, id="result, then exit 3"),
        pytest.param([["init"], ["die", "SIGKILL"]], FailureKind.KILLED, None, "SIGKILL", id="killed"),
        pytest.param([["init"], ["die", "SIGSEGV"]], FailureKind.KILLED, None, "SIGSEGV", id="crashed"),
        pytest.param([error(401), ["leave", 1]], FailureKind.AUTH, 1, None, id="401"),
        pytest.param([error(429), ["leave", 1]], FailureKind.QUOTA, 1, None, id="429"),
        pytest.param([error(529), ["leave", 1]], FailureKind.OVERLOADED, 1, None, id="529"),
        pytest.param([error(400), ["leave", 1]], FailureKind.REFUSED, 1, None, id="400"),
        pytest.param([error(500)], FailureKind.OVERLOADED, 0, None, id="500, exit 0"),
        pytest.param([*GOOD, error(500)], FailureKind.OVERLOADED, 0, None, id="good, then bad"),
    ],
)
async def test_a_failure(
    steps: list[Any], kind: FailureKind, code: int | None, number: str | None, world: World
) -> None:
    world.claude.plan(*steps)
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(mode="none"))
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, kind)
    assert (result.exit_code, result.signal) == (code, number)
    assert result.error


async def test_a_failing_agent_does_not_change_what_becomes_of_the_index(world: World) -> None:
    world.claude.plan(["leave", 2])
    with trio.fail_after(LIMIT):
        result, events = await world.events()
    assert final(result, world) == (Outcome.FAILED, IndexStatus.WATCH_TERMINATED, False)
    in_order(events)


async def test_of_two_results_the_last_counts(world: World) -> None:
    world.claude.plan(error(500), ["init"], ["result", {"result": "second", "total_cost_usd": 2.5}])
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(mode="none"))
    assert (result.outcome, result.text, result.cost_usd) == (Outcome.COMPLETED, "second", 2.5)


async def test_what_it_said_on_standard_error_is_told(world: World) -> None:
    world.claude.plan(["stderr", "first\nboom"], ["leave", 2])
    with trio.fail_after(LIMIT):
        result, events = await world.events(world.settings(mode="none"))
    assert (result.error or "").endswith("boom")
    assert result.stderr_tail == "first\nboom"
    lines = [getattr(event, "line", None) for event in events if isinstance(event, AgentEvent)]
    assert lines == ["first", "boom"]  # a last line without a newline is a line


async def test_an_agent_that_is_not_there(world: World) -> None:
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=world.settings()) as sup:
            job = await sup.start(world.spec(agent=ClaudeAgent(command="no-such-agent-here")))
            result = job.result_nowait()
    assert final(result, world) == (Outcome.FAILED, IndexStatus.WATCH_TERMINATED, False)
    assert result.failure_kind is FailureKind.SPAWN
    assert "no-such-agent-here" in (result.error or "")
    assert (result.exit_code, result.signal) == (None, None)


async def test_an_answer_of_20_megabytes(world: World) -> None:
    size = 20 * 1024 * 1024
    world.claude.plan(["init"], ["result_of_size", size])
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(mode="none"))
    assert result.outcome is Outcome.COMPLETED
    assert result.text == numbered(size)
    data = json.loads((world.state_dir / "jobs" / result.job_id / "result.json").read_bytes())
    assert data["text"] == result.text


async def test_a_line_past_the_limit(world: World) -> None:
    world.claude.plan(["init"], ["line_of_size", 200_000], *GOOD, ["hang"])
    with trio.fail_after(LIMIT):
        result, events = await world.events(world.settings(mode="none", agent={"max_line": 100_000}))
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.BAD_OUTPUT)
    assert "100000 bytes" in (result.error or "")
    assert [event.too_long for event in events if isinstance(event, BadLine)] == [True]


# --- when the agent starts, and on what --------------------------------------------------------------------


async def test_the_agent_waits_for_readiness(world: World) -> None:
    world.cidx.plan(watch={"ready_until": str(world.gate())})
    with trio.fail_after(LIMIT):
        async with supervise.open_job(world.spec(), settings=world.settings()) as job:
            await until(lambda: "watch begin" in world.cidx.order())
            assert job.state is JobState.STARTING
            world.gate().touch()
    assert final(job.result_nowait(), world) == (Outcome.COMPLETED, IndexStatus.WATCH_TERMINATED, False)
    assert world.cidx.order()[:3] == ["watch begin", "watch ready", "agent begin"]


async def test_a_watch_that_settles_is_not_trusted(world: World) -> None:
    world.cidx.plan(watch={"ready": None})
    with trio.fail_after(LIMIT):
        result, events = await world.events(world.settings(settle_time=0.1))
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.READY_VIA_FALLBACK, False)
    in_order(events)
    assert world.cidx.order()[-2:] == ["reconcile begin", "reconcile end"]


async def test_the_agent_waits_no_longer_than_the_startup_timeout(world: World) -> None:
    world.cidx.plan(watch={"ready_until": str(world.gate())})
    world.claude.plan(["touch", str(world.gate())], *GOOD)
    with trio.fail_after(LIMIT):
        result, events = await world.events(world.settings(startup_timeout=0.2))
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.READY_VIA_FALLBACK, False)
    in_order(events)


async def test_a_watch_that_cannot_start_is_answered_at_once(world: World) -> None:
    world.cidx.plan(watch={"exit_at_start": 1, "out": ["No indexes found"]})
    with trio.fail_after(LIMIT):
        result, events = await world.events()
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.READY_VIA_FALLBACK, False)
    in_order(events)
    order = world.cidx.order()
    assert order.index("reconcile end") < order.index("agent begin")
    assert order.count("reconcile begin") == 2


async def test_a_crash_of_the_watch(world: World) -> None:
    world.cidx.plan(watch=[{"crash": 1, "crash_until": str(world.gate())}, {}])
    world.claude.plan(["init"], ["touch", str(world.gate())], ["until", str(world.gate("again"))], ["result"])
    with trio.fail_after(LIMIT):
        async with supervise.open_job(world.spec(), settings=world.settings()) as job:
            await until(lambda: world.cidx.order().count("watch ready") == 2)
            world.gate("again").touch()
    assert final(job.result_nowait(), world) == (Outcome.COMPLETED, IndexStatus.READY_VIA_FALLBACK, False)
    assert job.result_nowait().index.watch_restarts == 1


@pytest.mark.parametrize(
    "reconcile",
    [
        pytest.param({"code": 1}, id="fails"),
        pytest.param({"out": ["ERROR a.py"]}, id="ERROR and exit 0"),
        pytest.param({"out": ["indexing 5 files", "Files processed: 0"]}, id="contradicts itself"),
        pytest.param({"until": "/nonexistent/never"}, id="never ends"),
    ],
)
async def test_a_reconcile_that_is_not_to_be_believed(reconcile: dict[str, Any], world: World) -> None:
    world.cidx.plan(watch={"out": ["ERROR no good"]}, reconcile=reconcile)
    with trio.fail_after(LIMIT):
        result, events = await world.events(world.settings(reconcile_timeout=1.0))
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.FAILED, True)
    in_order(events)
    assert "reconcile" in result.index.reason
    assert world.cidx.record()[-1]["who"] == "stop"


async def test_a_watch_that_ignores_everything(world: World) -> None:
    world.cidx.plan(watch={"ignore": ["SIGINT", "SIGTERM"]})
    with trio.fail_after(LIMIT):
        result, events = await world.events(world.settings(flush_timeout=0.1, termination_timeout=0.1))
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.READY_VIA_FALLBACK, False)
    in_order(events)
    assert [line for line in world.cidx.order() if "SIG" in line] == ["watch SIGINT", "watch SIGTERM"]


async def test_without_an_indexer_the_job_runs_and_the_mark_stays(world: World) -> None:
    with trio.fail_after(LIMIT):
        result, _ = await world.events(world.settings(command="no-such-cidx-here"))
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.FAILED, True)
    assert "no-such-cidx-here" in result.index.reason


@pytest.mark.parametrize("there", [True, False])
async def test_auto_asks_the_workspace(there: bool, world: World) -> None:
    if there:
        (world.workspace / ".code-indexer").mkdir()
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(mode="auto"))
    assert result.index.status is (IndexStatus.WATCH_TERMINATED if there else IndexStatus.NONE)
    assert ("watch begin" in world.cidx.order()) == there


async def test_a_spec_without_an_index(world: World) -> None:
    with trio.fail_after(LIMIT):
        result = await world.run(index=None)
    assert final(result, world) == (Outcome.COMPLETED, IndexStatus.NONE, False)
    assert not (world.state_dir / "workspaces").exists()


async def test_the_mark_is_there_while_the_agent_runs(world: World) -> None:
    world.claude.plan(*WORKS)
    with trio.fail_after(LIMIT):
        async with supervise.open_job(world.spec(), settings=world.settings()) as job:
            await job.spawned()
            assert world.marked
            assert job.index_status is IndexStatus.WATCHING
            job.cancel()
    assert not world.marked


# --- secrets -----------------------------------------------------------------------------------------------

AGENT_KEY = 'sk-ant-"quoted"\\and/slashed-0123456789'
INDEX_KEY = "pa-voyage-0123456789"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in {
        "PATH": os.defpath,
        "HOME": "/home/me",
        "LANG": "C.UTF-8",
        "HTTPS_PROXY": "",
        "ANTHROPIC_API_KEY": AGENT_KEY,
        "VOYAGE_API_KEY": INDEX_KEY,
        "GITHUB_TOKEN": "ghp-not-for-anybody",
        "GIVEN": "given",
    }.items():
        monkeypatch.setenv(name, value)
    yield
    monkeypatch.undo()  # before the search for leaks


@pytest.mark.usefixtures("keys")
async def test_each_child_gets_its_own_environment_and_keys(world: World) -> None:
    world.claude.plan(["environment"], ["arguments_of_all"], *GOOD)
    world.cidx.plan(watch={"env": True, "out": ["ERROR no good"]}, reconcile={"env": True})
    settings = world.settings(agent={"pass_env": ("GIVEN", "NOT_THERE"), "env": {"A": "settings", "B": "settings"}})
    with trio.fail_after(LIMIT):
        result = await world.run(settings, env={"B": "spec"}, prompt="the prompt")
    assert result.outcome is Outcome.COMPLETED
    seen = {entry["what"]: entry for entry in world.claude.record()}
    shared = {"PATH": os.defpath, "HOME": "/home/me", "LANG": "C.UTF-8", "HTTPS_PROXY": ""}
    env = seen["environment"]["env"]
    assert f":{result.job_id}:agent:" in env.pop("SUPERVISE_MARK")
    assert env == {**shared, "ANTHROPIC_API_KEY": AGENT_KEY, "GIVEN": "given", "A": "settings", "B": "spec"}
    assert seen["environment"]["stdin"] == "the prompt"
    assert seen["environment"]["argv"] == ["-p", "--output-format", "stream-json", "--verbose"]
    for who in ("watch", "reconcile"):
        env = next(entry["env"] for entry in world.cidx.record() if entry["who"] == who and entry.get("env"))
        mark = env.pop("SUPERVISE_MARK")  # an id of its own: it may be shared, and belongs to no job
        assert re.search(rf":watch-[0-9a-f]+:{who}:", mark)
        assert result.job_id not in mark
        assert env == {**shared, "VOYAGE_API_KEY": INDEX_KEY}
    every_argument = " ".join(seen["arguments"]["all"])
    assert world.claude.plan_file in every_argument  # the look was a good one
    assert AGENT_KEY not in every_argument
    assert INDEX_KEY not in every_argument


@pytest.mark.usefixtures("keys")
async def test_a_child_that_prints_its_key(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.claude.plan(["init"], ["leak", "ANTHROPIC_API_KEY"])
    world.cidx.plan(
        watch={"leak": "VOYAGE_API_KEY", "out": [f"ERROR {INDEX_KEY} was refused"]},
        reconcile={"leak": "VOYAGE_API_KEY", "code": 1, "out": [f"ERROR {INDEX_KEY} was refused"]},
    )
    settings = evolve(world.settings(agent={"pass_env": ()}), heartbeat_interval=0.05)
    with trio.fail_after(LIMIT), caplog.at_level(logging.DEBUG):
        result, events = await world.events(settings)
    assert result.text == "the key was ***"
    assert result.index.status is IndexStatus.FAILED
    assert "***" in result.index.reason
    told = repr(result) + "".join(repr(event_to_json(event)) for event in events) + caplog.text
    written = world.logs(result.job_id).decode()
    for text in (told, written, result.stdout_tail, result.stderr_tail):
        assert "***" in text
    assert written.count("bare: ***") >= 2
    assert written.count("cut: ***") >= 1
    marks = b"".join(path.read_bytes() for path in world.state_dir.rglob("*.json")).decode()
    for key in (AGENT_KEY, json.dumps(AGENT_KEY)[1:-1], repr(AGENT_KEY)[1:-1], INDEX_KEY):
        for text in (told, written, marks):
            assert key not in text
    assert any(isinstance(event, IndexOutput) and "***" in event.line for event in events)


@pytest.mark.parametrize("containment", ["auto", "process-group"])
def test_a_child_that_reads_the_environment_of_its_parent(
    containment: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guardian's holds no keys. Ours does, and only `user=` hides it; what is printed of it is masked."""
    world.claude.plan(["parent_environment"], *GOOD)
    monkeypatch.setenv("GITHUB_TOKEN", "ghp-not-for-anybody")
    monkeypatch.setenv("VOYAGE_API_KEY", INDEX_KEY)
    _, stderr = world.helper(assume_fresh=True, containment=containment).communicate(timeout=LIMIT)
    assert stderr == b""
    if os.geteuid() == 0 or containment == "process-group":
        assert "agent parent environment read" in world.cidx.order()
    text = world.logs(world.helped).decode()
    assert ("GITHUB_TOKEN=***" in text) == (containment == "process-group")
    assert "ghp-not-for-anybody" not in text
    assert INDEX_KEY not in text


def own_and_their_environments(pids: list[int]) -> dict[str, bytes]:
    """Names and environments of processes, and what they were called with."""
    found: dict[str, bytes] = {}
    for pid in pids:
        directory = Path("/proc", str(pid))
        text = (directory / "environ").read_bytes() + (directory / "cmdline").read_bytes()
        name = (directory / "comm").read_text().strip()
        found[name] = found.get(name, b"") + text
    return found


@pytest.mark.usefixtures("keys")
@pytest.mark.skipif(os.geteuid() != 0, reason="guardian and zygote are not dumpable: only root can read theirs")
async def test_zygote_and_guardian_have_no_keys(world: World) -> None:
    world.claude.plan(*WORKS)
    with trio.fail_after(LIMIT):
        async with supervise.open_job(world.spec(), settings=world.settings()) as job:
            await job.spawned()
            found = own_and_their_environments(below(os.getpid()))
            job.cancel()
    assert {"sv-zygote", "sv-guardian"} < set(found)
    for name in ("sv-zygote", "sv-guardian"):
        assert found[name]  # the look was a good one
        assert AGENT_KEY.encode() not in found[name]
        assert INDEX_KEY.encode() not in found[name]
        assert b"ghp-not-for-anybody" not in found[name]
    assert any(AGENT_KEY.encode() in text for text in found.values())


def below(pid: int) -> list[int]:
    return [process.pid for process in identity.descendants(pid) if process.alive]


@pytest.mark.usefixtures("keys")
async def test_a_key_that_the_settings_give(world: World) -> None:
    world.cidx.plan(watch={"env": True, "leak": "VOYAGE_API_KEY"})
    world.claude.plan(["environment"], *GOOD)
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(voyage_api_key="pa-from-settings"))
    watch = next(entry for entry in world.cidx.record() if entry["who"] == "watch")
    assert watch["env"]["VOYAGE_API_KEY"] == "pa-from-settings"
    agent = next(entry for entry in world.claude.record() if entry["what"] == "environment")
    assert "VOYAGE_API_KEY" not in agent["env"]
    assert b"pa-from-settings" not in world.logs(result.job_id)
    assert b"the key is ***" in world.logs(result.job_id)


# --- heartbeat ---------------------------------------------------------------------------------------------


async def test_heartbeats(world: World) -> None:
    speak, spoken, settle = world.gate("speak"), world.gate("spoken"), world.gate("settle")
    world.claude.plan(
        ["hold", 32], ["burn", 0.2], ["init"], ["until", str(speak)], ["text", "x"], ["touch", str(spoken)], ["result"]
    )
    world.cidx.plan(watch={"flush_until": str(settle)})
    settings = evolve(world.settings(flush_timeout=20), heartbeat_interval=0.02)
    beats: list[Heartbeat] = []
    silence = 0.0
    with trio.fail_after(LIMIT):
        opened = supervise.open_job(world.spec(), settings=settings)
        async with opened as job, job.subscribe() as events:
            async for event in events:
                if not isinstance(event, Heartbeat):
                    continue
                beats.append(event)
                if event.agent_silent_seconds is not None and event.agent_lines == 1:
                    silence = max(silence, event.agent_silent_seconds)
                    if silence > 0.3:
                        speak.touch()
                if event.state == "settling" and sum(beat.state == "settling" for beat in beats) > 3:
                    settle.touch()
    assert beats[0].agent_silent_seconds is None
    assert all(later.uptime >= earlier.uptime for earlier, later in itertools.pairwise(beats))
    after = [beat.agent_silent_seconds for beat in beats if beat.agent_lines > 1]
    assert after
    assert min(each for each in after if each is not None) < silence
    running = [beat for beat in beats if beat.agent_lines == 1]
    agent = next(process for process in running[-1].processes if process.role == "agent")
    assert agent.pid == next(entry["pid"] for entry in world.claude.record())
    assert abs(agent.start_time - time.time()) < LIMIT
    assert 32 << 20 <= agent.rss_bytes < 1 << 30
    assert 0.15 <= agent.cpu_seconds < LIMIT
    last = running[-1]
    assert {process.role for process in last.processes} == {"agent", "watch"}
    assert last.rss_bytes == sum(process.rss_bytes for process in last.processes)
    assert last.index_status is IndexStatus.WATCHING
    assert last.containment in (GUARDIAN, GUARDIAN_AND_CGROUP)
    assert any(beat.state == "settling" and {p.role for p in beat.processes} == {"watch"} for beat in beats)
    file = json.loads((world.state_dir / "jobs" / job.job_id / "heartbeat.json").read_bytes())
    assert (file["type"], file["job_id"], file["state"]) == ("heartbeat", job.job_id, "settling")
    assert all(process["start_time"] for process in file["processes"])


async def test_live_status_of_the_index(world: World) -> None:
    world.cidx.plan(watch={"out": ["ERROR no good"]})
    with trio.fail_after(LIMIT):
        _, events = await world.events()
    told = [event.status for event in events if isinstance(event, IndexChanged)]
    assert IndexStatus.WATCHING in told
    assert told.index(IndexStatus.WATCHING) < told.index(IndexStatus.RECONCILING_FALLBACK)
    assert told[-1] is IndexStatus.READY_VIA_FALLBACK


# --- Ctrl-C ------------------------------------------------------------------------------------------------


def test_ctrl_c_once(world: World) -> None:
    world.claude.plan(["spawn", "setsid"], *WORKS)
    helper = world.helper(assume_fresh=True)
    try:
        wait_until(lambda: spawned(world) == 1, helper)
        os.kill(helper.pid, signal.SIGINT)
        _, stderr = helper.communicate(timeout=LIMIT)
    finally:
        helper.kill()
        helper.wait()
    assert helper.returncode == -signal.SIGINT, stderr.decode()
    assert stderr.strip().endswith(b"KeyboardInterrupt")
    assert b"ExceptionGroup" not in stderr
    assert processes_of(world.helped) == []
    assert world.cidx.order()[-3:] == ["agent SIGTERM", "watch SIGINT", "watch end"]
    result = json.loads((world.state_dir / "jobs" / world.helped / "result.json").read_bytes())
    assert result["outcome"] == "cancelled"
    assert result["error"] == "cancelled: the block was left by KeyboardInterrupt"
    assert not world.marked


def test_ctrl_c_twice(world: World) -> None:
    world.claude.plan(*STUBBORN)
    helper = world.helper(assume_fresh=True, agent_termination_timeout=NEVER)
    try:
        wait_until(lambda: spawned(world) == 1, helper)
        os.kill(helper.pid, signal.SIGINT)
        wait_until(lambda: "agent SIGTERM" in world.cidx.order(), helper)
        os.kill(helper.pid, signal.SIGINT)
        _, stderr = helper.communicate(timeout=LIMIT)
    finally:
        helper.kill()
        helper.wait()
    assert helper.returncode == -signal.SIGINT, stderr.decode()
    assert processes_of(world.helped) == []
    result = json.loads((world.state_dir / "jobs" / world.helped / "result.json").read_bytes())
    assert (result["outcome"], result["signal"]) == ("cancelled", "SIGKILL")
