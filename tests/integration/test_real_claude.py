"""The real Claude CLI as a job's agent, against a stub of its API. Skipped where that CLI is not installed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import supervise
from supervise import FailureKind, Outcome
from supervise.codec import to_json, to_line
from supervise.events import (
    AgentInit,
    AgentPermissionDenied,
    AgentResult,
    AgentRetry,
    AgentText,
    AgentToolResult,
    AgentToolUse,
    CancelRequested,
    Event,
    JobFinished,
    JobStarted,
)
from tests.integration.messages_stub import DUMMY_KEY, USAGE, ApiError, Bash, Cut, Hang, Text, start_stub
from tests.integration.real_claude import Desk, files_with, installed_cli, processes_with, scrub, until


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> str:
    return installed_cli(tmp_path_factory.mktemp("claude-home"))


@pytest.fixture
def desk(cli: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    scrub(monkeypatch)
    desk = Desk(cli, tmp_path)
    yield desk
    for pid in processes_with(desk.mark):  # a failed test's; `Desk.check` is what looks for survivors
        os.kill(pid, signal.SIGKILL)


def usage(requests: int) -> supervise.Usage:
    """What the CLI makes of the stub's tokens after so many answers."""
    return supervise.Usage(
        input_tokens=requests * USAGE["input_tokens"],
        output_tokens=requests * USAGE["output_tokens"],
        cache_read_tokens=requests * USAGE["cache_read_input_tokens"],
        cache_creation_tokens=requests * USAGE["cache_creation_input_tokens"],
    )


def of_type(kind: type[Event], events: list[Event]) -> list:
    return [event for event in events if isinstance(event, kind)]


async def test_run_job_gives_text_usage_and_session(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, Text("Hello from the stub."))
    with trio.fail_after(60):
        result = await supervise.run_job(desk.spec(stub), settings=desk.settings)
    desk.check(result, [])
    assert (result.outcome, result.failure_kind, result.exit_code) == (Outcome.COMPLETED, None, 0)
    assert result.text == "Hello from the stub."
    assert result.usage == usage(1)
    assert result.cost_usd > 0
    assert result.num_turns == 1
    assert result.session_id
    assert result.error is None
    (asked,) = stub.main_requests
    assert asked.key_ok
    assert "Do the thing." in asked.texts()


async def test_events_tell_the_run_in_order(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, Text("Hello from the stub."))
    result, events = await desk.run(desk.spec(stub, model="claude-sonnet-4-5"))
    told = [event for event in events if isinstance(event, AgentInit | AgentText | AgentResult | JobFinished)]
    assert [type(event) for event in told] == [AgentInit, AgentText, AgentResult, JobFinished]
    begin, text, end, last = told
    assert begin.session_id == end.session_id == result.session_id
    assert begin.model == stub.main_requests[0].model == "claude-sonnet-4-5"
    assert begin.cwd == str(desk.workspace)
    assert text.text == end.text == "Hello from the stub."
    assert last is events[-1]
    assert last.result == result


async def test_bash_writes_a_file(desk: Desk, nursery: trio.Nursery) -> None:
    command = "echo made > made.txt && cat made.txt"
    stub = await start_stub(nursery, Bash(command), Text("It is made."))
    result, events = await desk.run(desk.spec(stub))
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "It is made.")
    assert (desk.workspace / "made.txt").read_text() == "made\n"
    (use,) = of_type(AgentToolUse, events)
    (answer,) = of_type(AgentToolResult, events)
    assert (use.name, use.input["command"]) == ("Bash", command)
    assert (answer.id, answer.text, answer.is_error) == (use.id, "made", False)
    assert result.usage == usage(2)
    assert result.num_turns == 2


async def test_a_denied_tool_leaves_the_run_completed(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, Bash("echo made > made.txt"), Text("I was not allowed to."))
    result, events = await desk.run(desk.spec(stub, allowed_tools=()))
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "I was not allowed to.")
    assert result.permission_denials == 1
    assert [event.tool for event in of_type(AgentPermissionDenied, events)] == ["Bash"]
    assert not (desk.workspace / "made.txt").exists()


async def test_a_key_that_a_tool_prints_is_masked(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, Bash("echo key=$ANTHROPIC_API_KEY"), Text(f"The key is {DUMMY_KEY}."))
    result, events = await desk.run(desk.spec(stub))
    assert f"key={DUMMY_KEY}" in stub.main_requests[1].texts()  # it was printed
    assert files_with(DUMMY_KEY, desk.home)  # and the search for it can find it
    assert [event.text for event in of_type(AgentToolResult, events)] == ["key=***"]
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "The key is ***.")


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (401, "authentication_error", FailureKind.AUTH),
        (403, "permission_error", FailureKind.AUTH),
        (404, "not_found_error", FailureKind.REFUSED),
        (429, "rate_limit_error", FailureKind.QUOTA),
        (500, "api_error", FailureKind.OVERLOADED),
        (529, "overloaded_error", FailureKind.OVERLOADED),
    ],
)
async def test_an_api_error_fails_the_job(
    desk: Desk, nursery: trio.Nursery, status: int, error: str, kind: FailureKind
) -> None:
    stub = await start_stub(nursery, after=ApiError(status, error, headers={"x-should-retry": "false"}))
    result, events = await desk.run(desk.spec(stub, max_retries=0))
    assert (result.outcome, result.failure_kind, result.exit_code) == (Outcome.FAILED, kind, 1)
    assert result.error
    (told,) = of_type(AgentResult, events)
    assert (told.subtype, told.is_error, told.api_status) == ("success", True, status)


async def test_401_is_not_retried_when_the_api_says_so(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, after=ApiError(401, "authentication_error", headers={"x-should-retry": "false"}))
    result, events = await desk.run(desk.spec(stub))
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.AUTH)
    assert len(stub.main_requests) == 1
    assert of_type(AgentRetry, events) == []


async def test_an_overloaded_api_recovers(desk: Desk, nursery: trio.Nursery) -> None:
    busy = ApiError(529, "overloaded_error")
    stub = await start_stub(nursery, busy, busy, Text("Recovered."))
    result, events = await desk.run(desk.spec(stub))
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "Recovered.")
    retries = of_type(AgentRetry, events)
    assert [(event.attempt, event.status) for event in retries] == [(1, 529), (2, 529)]
    assert all(event.delay > 0 for event in retries)
    assert result.usage == usage(1)


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_broken_stream_recovers(desk: Desk, nursery: trio.Nursery, how: str) -> None:
    stub = await start_stub(nursery, Cut(how=how), Text("Recovered."))
    result, events = await desk.run(desk.spec(stub))
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "Recovered.")
    assert [(event.attempt, event.status) for event in of_type(AgentRetry, events)] == [(1, None)]
    assert len(stub.main_requests) == 2


async def test_a_stream_that_ends_too_early_is_asked_for_again_whole(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, Cut(events=1, how="end"), Text("Recovered."))
    result, _ = await desk.run(desk.spec(stub))
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "Recovered.")
    assert [request.stream for request in stub.main_requests] == [True, False]


async def test_a_lost_connection_is_network_trouble(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, after=Cut())
    result, _ = await desk.run(desk.spec(stub, max_retries=0))
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.NETWORK)


async def test_max_turns(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, Bash("echo one"), Text("Never said."))
    result, _ = await desk.run(desk.spec(stub, max_turns=1))
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.MAX_TURNS)
    assert result.usage == usage(1)


async def test_an_api_that_never_answers_times_out(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, Hang())
    result, events = await desk.run(desk.spec(stub, timeout=3))
    assert result.outcome is Outcome.TIMED_OUT
    assert of_type(AgentResult, events) == []


@pytest.mark.parametrize("environment", ["marked", "bare"])
async def test_cancel_leaves_nothing_of_a_running_tool(desk: Desk, nursery: trio.Nursery, environment: str) -> None:
    """Also not what ignores SIGTERM in a session of its own, and what forked twice and has lost its parent."""
    stubborn, daemon = f"{desk.mark}-stubborn", f"{desk.mark}-daemon"
    shells = [
        "setsid bash -c " + shlex.quote(f"trap '' TERM HUP INT; exec -a {name} sleep 300")
        for name in (stubborn, daemon)
    ]
    bare = "env -i " if environment == "bare" else ""
    stub = await start_stub(nursery, Bash(f"{shells[0]} & ({bare}{shells[1]} &) ; echo s; sleep 300; : {desk.mark}"))

    def running() -> dict[str, int]:
        return {arguments[0]: pid for pid, arguments in processes_with(desk.mark).items()}

    seen: list[Event] = []
    with trio.fail_after(60):
        async with (
            supervise.open_job(desk.spec(stub), settings=desk.settings) as job,
            job.subscribe() as events,
        ):
            async for event in events:
                seen.append(event)
                if isinstance(event, AgentToolUse):
                    await until(lambda: {stubborn, daemon} <= running().keys())
                    alone = [os.getsid(running()[name]) == running()[name] for name in (stubborn, daemon)]
                    arguments = list(processes_with(desk.mark).values())
                    job.cancel(reason="the test has seen enough")
        result = await job.result()
    assert of_type(JobStarted, seen)[0].containment.startswith("guardian")
    desk.check(result, seen)
    assert alone == [True, True]  # both were as hard to find as they were meant to be
    assert len(arguments) >= 4  # the CLI and the tool's shell, too
    assert DUMMY_KEY not in repr(arguments)
    assert result.outcome is Outcome.CANCELLED
    assert [event.reason for event in of_type(CancelRequested, seen)] == ["the test has seen enough"]


def daemons(desk: Desk) -> str:
    """Shell text that leaves two daemons, one of them without an environment, and tells that they live.

    Each is started with nohup in a session of its own, has lost its parent, and ignores what asks it to end.
    """
    lines = []
    for name, bare in (("daemon", ""), ("bare", "env -i ")):
        pid = desk.root / f"{name}.pid"
        program = f"trap '' TERM HUP INT; echo $$ > {pid}; exec -a {desk.mark}-{name} sleep 300"
        lines += [
            f"( ( {bare}nohup setsid bash -c {shlex.quote(program)} >/dev/null 2>&1 & ) & )",
            f"until [ -s {pid} ]; do sleep 0.02; done; kill -0 $(cat {pid}) && echo {name}",
        ]
    return "\n".join(lines)


def daemons_of(desk: Desk) -> list[int]:
    return sorted(
        pid for pid, arguments in processes_with(desk.mark).items() if arguments[0].startswith(f"{desk.mark}-")
    )


async def test_daemons_that_a_tool_leaves_are_gone_when_the_job_has_completed(
    desk: Desk, nursery: trio.Nursery
) -> None:
    stub = await start_stub(nursery, Bash(daemons(desk)), Text("They run."))
    result, events = await desk.run(desk.spec(stub))  # which looks for processes that are left
    assert (result.outcome, result.text) == (Outcome.COMPLETED, "They run.")
    assert [event.text for event in of_type(AgentToolResult, events)] == ["daemon\nbare"]
    for name in ("daemon", "bare"):
        assert not Path("/proc", (desk.root / f"{name}.pid").read_text().strip()).exists()


async def test_daemons_that_a_tool_leaves_are_gone_when_the_job_was_cancelled(
    desk: Desk, nursery: trio.Nursery
) -> None:
    stub = await start_stub(nursery, Bash(daemons(desk)), Hang())
    seen: list[Event] = []
    with trio.fail_after(60):
        async with supervise.open_job(desk.spec(stub), settings=desk.settings) as job, job.subscribe() as events:
            async for event in events:
                seen.append(event)
                if isinstance(event, AgentToolResult):
                    assert len(daemons_of(desk)) == 2
                    job.cancel()
        result = await job.result()
    desk.check(result, seen)
    assert result.outcome is Outcome.CANCELLED


ALONE = """
import functools, sys, trio, supervise, supervise.agents.claude
from supervise.codec import from_json, loads
spec = from_json(supervise.JobSpec, loads(sys.stdin.read()))
settings = supervise.Settings(state_dir=sys.argv[1], orphan_grace=0.5)
trio.run(functools.partial(supervise.run_job, spec, settings=settings))
"""


async def test_daemons_that_a_tool_leaves_are_gone_when_the_supervisor_was_killed(
    desk: Desk, nursery: trio.Nursery
) -> None:
    stub = await start_stub(nursery, Bash(daemons(desk)), Hang())
    spec = to_line(to_json(desk.spec(stub)))
    command = [sys.executable, "-c", ALONE, str(desk.settings.state_dir)]
    with trio.fail_after(60):
        supervisor = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE)
        try:
            assert supervisor.stdin is not None
            async with supervisor.stdin:
                await supervisor.stdin.send_all(spec)
            await until(lambda: len(stub.main_requests) == 2 or supervisor.poll() is not None)  # the tool has ended
            assert supervisor.poll() is None
            assert len(daemons_of(desk)) == 2
            assert len(processes_with(desk.mark)) >= 3  # the CLI, too
        finally:
            supervisor.kill()
            await supervisor.wait()
        await until(lambda: not processes_with(desk.mark))
        async with supervise.open_supervisor(settings=desk.settings) as next_one:
            assert next_one.swept.supervisors == 1
            assert next_one.swept.found == ()


async def test_a_session_is_resumed(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, Text("The word is heron."), Text("Heron, as I said."))
    first, _ = await desk.run(desk.spec(stub, "Choose a word."))
    second, events = await desk.run(desk.spec(stub, "Which word was it?", resume=first.session_id))
    assert (second.outcome, second.text) == (Outcome.COMPLETED, "Heron, as I said.")
    assert first.session_id == second.session_id == of_type(AgentInit, events)[0].session_id
    texts = stub.main_requests[1].texts()
    words = ["Choose a word.", "The word is heron.", "Which word was it?"]
    assert [text for text in texts if text in words] == words


async def test_a_session_that_nobody_knows_fails(desk: Desk, nursery: trio.Nursery) -> None:
    stub = await start_stub(nursery, Text("Never said."))
    unknown = "0f1e2d3c-4b5a-4978-8796-a5b4c3d2e1f0"
    result, _ = await desk.run(desk.spec(stub, resume=unknown))
    assert (result.outcome, result.exit_code) == (Outcome.FAILED, 1)
    assert f"No conversation found with session ID: {unknown}" in result.error
    assert stub.main_requests == []
