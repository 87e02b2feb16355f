"""Trees of real processes: how they end, what becomes of their output, and what a child is given."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from supervise.errors import SpawnError
from supervise.events import Event, OutputTruncated, ProcessExited, ProcessStarted, SignalSent, TreeEmpty
from supervise.model import ExitStatus, Limits, StopPolicy
from supervise.processes import guarded, helper, identity
from supervise.processes.child import ProcessTree, TreeOptions, open_tree
from supervise.processes.containment import Command, Pipes
from supervise.processes.hurry import Hurry
from supervise.processes.identity import Process
from supervise.processes.marked import MARK
from supervise.processes.output import Lines, Logs
from supervise.processes.tiers import open_containments
from supervise.secrets import Masker
from supervise.settings import Settings
from tests.processes import children
from tests.processes.conftest import TOKEN, Leaks

CHILDREN = [sys.executable, "-I", "-S", children.__file__]
ROOT = Path(__file__).parents[2]
LIMIT = 30.0  # seconds for a whole test; none takes nearly as long
NEVER = 600.0  # a grace that does not end within a test
SOON = StopPolicy(((signal.SIGTERM, 0.2),))
PATIENT = StopPolicy(((signal.SIGTERM, NEVER),))

#: What `Settings.containment` may ask for.
TIERS = ("process-group", "guardian", "cgroup")

AsyncTest = Callable[..., Awaitable[None]]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def only(*tiers: str) -> pytest.MarkDecorator:
    """Runs a test of what one tier does, or of what no tier has a part in, with these tiers alone."""
    return pytest.mark.parametrize("bench", tiers, indirect=True)


#: About pipes, logs and tails, which all tiers share.
any_tier = only("guardian")


def promised_by_all_but(tier: str, reason: str) -> pytest.MarkDecorator:
    """Runs a test with all tiers. This one must fail it: if it ever passes, it promises more than it says."""
    fails = pytest.param(tier, marks=pytest.mark.xfail(strict=True, reason=reason))
    params = [fails if each == tier else each for each in TIERS]
    return pytest.mark.parametrize("bench", params, indirect=True)


def within(seconds: float) -> Callable[[AsyncTest], AsyncTest]:
    """Bounds an async test."""

    def decorate(test: AsyncTest) -> AsyncTest:
        @functools.wraps(test)
        async def bounded(*args: Any, **kwargs: Any) -> None:
            with trio.fail_after(seconds):
                await test(*args, **kwargs)

        return bounded

    return decorate


class Heard:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.data = b""
        self._more = trio.Event()

    def __call__(self, chunk: bytes) -> None:
        self.data += chunk
        self._more.set()
        self._more = trio.Event()

    async def until(self, pattern: str) -> re.Match[bytes]:
        """Wait until a whole line has come that fits `pattern`."""
        while (match := re.search(rb"(?m)^" + pattern.encode() + rb"\n", self.data)) is None:
            await self._more.wait()
        return match

    async def pid(self, name: str) -> int:
        return int((await self.until(rf"{name} (\d+)"))[1])


class Bench:
    """Opens trees whose events and sinks are kept."""

    def __init__(self, token: str, tmp_path: Path, tier: Any) -> None:
        self.path = tmp_path
        self.tier = tier
        self.env = {"PATH": os.environ["PATH"], TOKEN: token}
        self.events: list[Event] = []

    def command(self, *argv: str, **changes: Any) -> Command:
        """A behaviour of the fake child; or a program, if it begins with a path."""
        program = argv if "/" in argv[0] else (*CHILDREN, *argv)
        return Command(**{"argv": program, "cwd": str(self.path), "env": self.env, **changes})

    @asynccontextmanager
    async def tree(
        self, policy: StopPolicy = SOON, hurry: Hurry | None = None, **options: Any
    ) -> AsyncIterator[ProcessTree]:
        """A tree with a supervisor of its own."""
        kept = TreeOptions(**{"mark": "test", "pipe_timeout": 5.0, **options})
        settings = Settings(state_dir=self.path / "state", containment=self.tier)
        try:
            async with open_containments(settings) as containments:
                if "contain" not in options:
                    kept = evolve(kept, contain=containments.of_job("test", Limits()))
                async with open_tree("test", policy, hurry or Hurry(), options=kept, emit=self.events.append) as tree:
                    yield tree
        finally:
            if kept.logs is not None:
                kept.logs.close()

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if type(event) is kind]

    @property
    def signals(self) -> list[str]:
        return [event.signal for event in self.of(SignalSent)]


@pytest.fixture(params=TIERS)
def bench(leaks: Leaks, tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    return Bench(leaks.token, tmp_path, request.param)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what nobody tells."""
    while not condition():
        await trio.sleep(0.005)


def is_alive(pid: int) -> bool:
    process = identity.read(pid)
    return process is not None and process.alive


# --- a tree ends -------------------------------------------------------------------------------------------


@within(LIMIT)
async def test_events_come_in_order(bench: Bench) -> None:
    heard = Heard()
    async with bench.tree(PATIENT) as tree:
        child = await tree.spawn(bench.command("wait"), stdout=heard)
        assert await heard.pid("ready") == child.pid
        assert [process.pid for process in tree.members()] == [child.pid]
        assert (tree.alive(), child.status) == (1, None)
    assert bench.events == [
        ProcessStarted(role="test", pid=child.pid, program=os.path.basename(sys.executable)),
        SignalSent(role="test", signal="SIGTERM", count=1),
        ProcessExited(role="test", pid=child.pid, exit_code=None, signal="SIGTERM"),
        TreeEmpty(role="test", seconds=bench.of(TreeEmpty)[0].seconds, survivors=0),
    ]
    assert tree.survivors == ()
    assert 0 <= bench.of(TreeEmpty)[0].seconds < LIMIT


@within(LIMIT)
async def test_a_child_that_ends_by_itself_gets_no_signal(bench: Bench) -> None:
    async with bench.tree() as tree:
        child = await tree.spawn(bench.command("leave_with", "7"))
        assert await child.wait() == ExitStatus(code=7)
        await child.drained()
    assert [type(event) for event in bench.events] == [ProcessStarted, ProcessExited, TreeEmpty]


@within(LIMIT)
async def test_an_empty_tree_says_nothing(bench: Bench) -> None:
    async with bench.tree() as tree:
        await tree.stop()
    assert bench.events == []


@within(LIMIT)
async def test_stopping_in_the_block_ends_the_tree_and_another_can_follow(bench: Bench) -> None:
    async with bench.tree() as tree:
        first = await tree.spawn(bench.command("wait"))
        await tree.stop()
        assert first.status is not None
        assert tree.alive() == 0
        second = await tree.spawn(bench.command("wait"))
        assert tree.alive() == 1
    assert second.status is not None


@within(LIMIT)
async def test_who_ignores_sigterm_is_killed_after_the_grace(bench: Bench) -> None:
    heard = Heard()
    async with bench.tree(StopPolicy(((signal.SIGTERM, 0.3),))) as tree:
        child = await tree.spawn(bench.command("ignore", "SIGTERM", "SIGHUP", "SIGINT"), stdout=heard)
        await heard.pid("ready")
        began = trio.current_time()
    assert trio.current_time() - began >= 0.3
    assert child.status == ExitStatus(signal="SIGKILL")
    assert bench.signals == ["SIGTERM", "SIGKILL"]


@within(LIMIT)
async def test_a_stopped_child_is_continued_so_that_sigterm_reaches_it(bench: Bench) -> None:
    heard = Heard()
    async with bench.tree(PATIENT) as tree:
        child = await tree.spawn(bench.command("stop_itself"), stdout=heard)
        await heard.pid("ready")
        await until(lambda: (process := identity.read(child.pid)) is not None and process.state == "T")
    assert child.status == ExitStatus(signal="SIGTERM")
    assert bench.signals == ["SIGTERM"]


@within(LIMIT)
async def test_the_leaders_exit_does_not_end_the_grace_of_the_others(bench: Bench) -> None:
    heard = Heard()
    clean = bench.path / "clean"
    async with bench.tree(PATIENT) as tree:
        child = await tree.spawn(bench.command("slow_member", str(clean), "0.5"), stdout=heard)
        await heard.pid("member")
    assert child.status == ExitStatus(signal="SIGTERM")
    assert clean.exists()
    assert bench.signals == ["SIGTERM"]


@within(LIMIT)
async def test_who_outlives_its_leader_is_ended(bench: Bench) -> None:
    heard = Heard()
    async with bench.tree(PATIENT) as tree:
        child = await tree.spawn(bench.command("leader_exits"), stdout=heard)
        members = {await heard.pid("in_group"), await heard.pid("in_session")}
        assert await child.wait() == ExitStatus(code=0)
        assert {process.pid for process in tree.members()} == members
    assert not any(map(is_alive, members))
    assert bench.of(SignalSent) == [SignalSent(role="test", signal="SIGTERM", count=2)]


@within(LIMIT)
async def test_daemons_are_found_by_the_marker(bench: Bench) -> None:
    heard = Heard()
    async with bench.tree() as tree:
        await tree.spawn(bench.command("daemons", "3"), stdout=heard)
        await heard.until(r"(daemon \d+\n){2}daemon \d+")
        daemons = [int(pid) for pid in re.findall(rb"daemon (\d+)", heard.data)]
        assert tree.alive() == 4
    assert not any(map(is_alive, daemons))
    assert tree.survivors == ()


@within(LIMIT)
async def test_who_hides_its_environment_is_found_by_session_or_parent(bench: Bench) -> None:
    heard = Heard()
    async with bench.tree() as tree:
        child = await tree.spawn(bench.command("disguised", "in_session", "own_session"), stdout=heard)
        await heard.until(r"ready \d+\nready \d+")
        hidden = {int(pid) for pid in re.findall(rb"ready (\d+)", heard.data)}
        assert {process.pid for process in tree.members()} == {child.pid, *hidden}
    # SIGTERM took the parent of the one that has its own session; it was known by then.
    assert child.status == ExitStatus(signal="SIGTERM")
    assert not any(map(is_alive, hidden))


@within(LIMIT)
async def test_who_hides_its_environment_and_lost_its_parent_is_found_by_session(bench: Bench) -> None:
    heard = Heard()
    async with bench.tree() as tree:
        child = await tree.spawn(bench.command("disguised", "in_session", "exit"), stdout=heard)
        hidden = await heard.pid("ready")
        await child.wait()
        assert [process.pid for process in tree.members()] == [hidden]
    assert not is_alive(hidden)


@only("process-group")
@within(LIMIT)
async def test_a_second_look_finds_whom_the_first_one_missed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    real = identity.started_since
    async with bench.tree() as tree:
        child = await tree.spawn(bench.command("hold_pipe", "escaped"), stdout=heard)
        holder = await heard.pid("holder")
        await child.wait()

        def missed(start: int, *, skip: Collection[int] = ()) -> tuple[list[Process], set[int]]:
            found, seen = real(start, skip=skip)
            return (found, seen) if skip else ([each for each in found if each.pid != holder], seen - {holder})

        with monkeypatch.context() as patch:
            patch.setattr(identity, "started_since", missed)
            assert tree.alive() == 0
            assert not tree._containment.empty()
    assert not is_alive(holder)


@pytest.mark.parametrize("how", ["chain", "swarm"])
@within(LIMIT)
async def test_a_tree_that_keeps_forking_ends(bench: Bench, leaks: Leaks, how: str) -> None:
    heard = Heard()
    async with bench.tree(StopPolicy(((signal.SIGTERM, 0.1),))) as tree:
        await tree.spawn(bench.command("forks", how), stdout=heard)
        await heard.pid("ready")
    assert tree.survivors == ()
    assert leaks.processes() == []


@within(LIMIT)
async def test_the_steps_of_a_policy_come_in_order(bench: Bench) -> None:
    heard, hurry = Heard(), Hurry()
    log = bench.path / "signals"

    async def step_by_step() -> None:
        for name in ("SIGINT", "SIGHUP", "SIGTERM"):
            await heard.until(name)
            hurry.next()

    steps = ((signal.SIGINT, NEVER), (signal.SIGHUP, NEVER), (signal.SIGTERM, NEVER))
    async with trio.open_nursery() as nursery, bench.tree(StopPolicy(steps), hurry) as tree:
        nursery.start_soon(step_by_step)
        child = await tree.spawn(bench.command("record", str(log), "SIGINT", "SIGHUP", "SIGTERM"), stdout=heard)
        await heard.pid("ready")
    assert child.status == ExitStatus(signal="SIGKILL")
    times, names = zip(*(line.split() for line in log.read_text().splitlines()), strict=True)
    assert names == ("SIGINT", "SIGHUP", "SIGTERM")
    assert list(map(float, times)) == sorted(map(float, times))
    assert bench.signals == ["SIGINT", "SIGHUP", "SIGTERM", "SIGKILL"]


@within(LIMIT)
async def test_a_policy_without_steps_kills_at_once(bench: Bench) -> None:
    async with bench.tree(StopPolicy(())) as tree:
        child = await tree.spawn(bench.command("wait"))
    assert child.status == ExitStatus(signal="SIGKILL")
    assert bench.signals == ["SIGKILL"]


@within(LIMIT)
async def test_a_second_cancel_kills_at_once(bench: Bench) -> None:
    heard, hurry = Heard(), Hurry()

    async def impatient() -> None:
        await heard.until("SIGTERM")  # the first step is under way
        hurry.next()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(impatient)
        async with bench.tree(PATIENT, hurry) as tree:
            child = await tree.spawn(bench.command("record", str(bench.path / "log"), "SIGTERM"), stdout=heard)
            await heard.pid("ready")
    assert child.status == ExitStatus(signal="SIGKILL")


@within(LIMIT)
async def test_interrupt_is_sigint_to_the_group_only(bench: Bench) -> None:
    heard = Heard()
    log = bench.path / "log"
    async with bench.tree() as tree:
        child = await tree.spawn(bench.command("record", str(log), "SIGINT"), stdout=heard)
        await heard.pid("ready")
        child.interrupt()
        await heard.until("SIGINT")
        assert child.status is None
    child.interrupt()  # it has ended: nothing is sent
    assert bench.signals == ["SIGINT", "SIGTERM"]


class UnkillableLeader:
    pid = os.getpid()

    async def wait(self) -> ExitStatus:
        return await trio.sleep_forever()


class UnkillableContainment:
    """Its only member, which does not even exist, ends for nobody."""

    tier = "fake"

    def __init__(self, token: str) -> None:
        self.sent: list[int] = []
        self.closed = False

    async def spawn(self, command: Command, pipes: Pipes) -> UnkillableLeader:
        return UnkillableLeader()

    def members(self) -> list[Process]:
        process = identity.read(UnkillableLeader.pid)
        assert process is not None
        return [process]

    def empty(self) -> bool:
        return False

    def signal(self, number: int) -> int:
        self.sent.append(number)
        return 1

    async def change(self) -> None:
        await trio.sleep_forever()

    def signal_group(self, leader: int, number: int) -> None:
        raise AssertionError

    def not_ours(self) -> dict[int, str]:
        return {}

    async def serve(self) -> None:
        return

    def close(self, *, survivors: bool = False) -> None:
        self.closed = survivors


@any_tier
@within(LIMIT)
async def test_what_cannot_be_ended_is_told(bench: Bench) -> None:
    made: list[UnkillableContainment] = []

    def contain(token: str) -> UnkillableContainment:
        made.append(UnkillableContainment(token))
        return made[0]

    policy = StopPolicy(((signal.SIGTERM, 0.05),), kill_wait=0.2)
    async with bench.tree(policy, contain=contain) as tree:
        await tree.spawn(bench.command("wait"))
    (survivor,) = tree.survivors
    assert (survivor.pid, survivor.role) == (os.getpid(), "test")
    assert survivor.command == Path("/proc/self/comm").read_text().strip()
    assert abs(survivor.start_time - time.time()) < 24 * 3600
    assert "did not end after SIGKILL" in survivor.reason
    assert made[0].closed
    assert made[0].sent[0] == signal.SIGTERM
    assert set(made[0].sent[1:]) == {signal.SIGKILL}
    assert bench.of(TreeEmpty)[0].survivors == 1


# --- roads out of the block --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("x"), ExceptionGroup("g", [ValueError("y")]), StopIteration()])
@within(LIMIT)
async def test_an_exception_of_the_block_comes_out_as_it_is(bench: Bench, error: Exception) -> None:
    caught: BaseException | None = None
    try:
        async with bench.tree() as tree:
            child = await tree.spawn(bench.command("wait"))
            raise error
    except Exception as exc:
        caught = exc
    assert caught is error
    assert child.status is not None


@within(LIMIT)
async def test_cancelled_comes_out_as_it_is(bench: Bench) -> None:
    caught: list[BaseException] = []
    with trio.CancelScope() as scope:
        try:
            async with bench.tree() as tree:
                child = await tree.spawn(bench.command("wait"))
                scope.cancel()
                await child.wait()
        except BaseException as exc:
            caught.append(exc)
            raise
    assert scope.cancelled_caught
    assert [type(exc) for exc in caught] == [trio.Cancelled]
    assert child.status is not None


@within(LIMIT)
async def test_cancelling_a_wait_ends_the_wait_only(bench: Bench) -> None:
    async with bench.tree() as tree:
        child = await tree.spawn(bench.command("wait"))
        with trio.move_on_after(0.02) as scope:
            await child.wait()
        assert scope.cancelled_caught
        with trio.move_on_after(0.02) as scope:
            await child.drained()
        assert scope.cancelled_caught
        assert child.status is None
        assert tree.alive() == 1


@within(LIMIT)
async def test_cancelled_before_the_spawn(bench: Bench) -> None:
    with trio.CancelScope() as scope:
        async with bench.tree() as tree:
            scope.cancel()
            await tree.spawn(bench.command("wait"))
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert len(bench.of(ProcessStarted)) == len(bench.of(ProcessExited))
    assert bench.of(TreeEmpty)[0].survivors == 0


@only("process-group")
@within(LIMIT)
async def test_cancelled_while_the_spawn_is_under_way(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()
    monkeypatch.setattr(
        "supervise.processes.session._inherits_odd_signals",  # called in the thread, before the fork
        lambda: bool(token.run_sync_soon(begun.set) or not go_on.wait(LIMIT)),
    )
    async with trio.open_nursery() as nursery:

        async def spawn() -> None:
            async with bench.tree() as tree:
                await tree.spawn(bench.command("wait"))
                await trio.sleep_forever()

        nursery.start_soon(spawn)
        await begun.wait()
        nursery.cancel_scope.cancel()
        go_on.set()
    assert len(bench.of(ProcessStarted)) == len(bench.of(ProcessExited)) == 1
    assert bench.of(TreeEmpty)[0].survivors == 0


@only("guardian", "cgroup")
@within(LIMIT)
async def test_cancelled_while_the_guardian_spawns(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = helper.send
    with trio.CancelScope() as scope:

        def sent(sock: socket.socket, message: bytes, descriptors: Iterable[int] = ()) -> None:
            real(sock, message, descriptors)
            if descriptors:  # the guardian has the request, and nobody has its answer
                scope.cancel()

        monkeypatch.setattr(guarded, "send", sent)
        async with bench.tree() as tree:
            child = await tree.spawn(bench.command("wait"))
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert child.status == ExitStatus(signal="SIGTERM")
    assert len(bench.of(ProcessStarted)) == len(bench.of(ProcessExited)) == 1
    assert bench.of(TreeEmpty)[0].survivors == 0


# --- output ------------------------------------------------------------------------------------------------


@contextmanager
def peak_memory(growth: int) -> Iterator[list[Callable[[], None]]]:
    """Fails if the resident memory, as often as the sampler is called, was `growth` bytes above that at the start."""
    samples: list[int] = []

    def sample() -> None:
        process = identity.read(os.getpid())
        assert process is not None
        samples.append(process.rss_bytes)

    sample()
    yield [sample]
    sample()
    assert max(samples) - samples[0] < growth


async def sampling(sample: Callable[[], None]) -> None:
    while True:
        sample()
        await trio.sleep(0.01)


@any_tier
@within(60)
async def test_output_that_nobody_reads_is_drained(bench: Bench) -> None:
    size = 100 * 1024 * 1024
    logs = bench.path / "logs"
    logs.mkdir()
    kept = Logs(logs, 8 * 1024 * 1024)
    with peak_memory(24 * 1024 * 1024) as (sample,):
        async with bench.tree(logs=kept) as tree, trio.open_nursery() as nursery:
            nursery.start_soon(sampling, sample)
            child = await tree.spawn(bench.command("print_bytes", str(size)))
            assert await child.wait() == ExitStatus(code=0)
            await child.drained()
            nursery.cancel_scope.cancel()
    assert child._outputs[0].size == size
    last = children.block(size // children.BLOCK - 1)
    assert child.tails() == (last.decode(), "")
    assert [event.stream for event in bench.of(OutputTruncated)] == ["stdout"]
    assert sorted(path.name for path in logs.iterdir()) == ["test.stderr.log", "test.stdout.log"]
    log = (logs / "test.stdout.log").read_bytes()
    assert log.startswith(children.block(0))
    assert log.endswith(last)
    assert len(log) < 8 * 1024 * 1024 + 100
    assert "bytes left out" in log.decode()


async def print_for(bench: Bench, seconds: float) -> None:
    with peak_memory(24 * 1024 * 1024) as (sample,), trio.move_on_after(seconds) as scope:
        async with bench.tree() as tree:
            child = await tree.spawn(bench.command("print_forever"))
            await sampling(sample)
    assert scope.cancelled_caught
    assert child.status == ExitStatus(signal="SIGTERM")
    assert child._outputs[0].size > 1024 * 1024
    assert bench.of(OutputTruncated) == []  # what was in the pipe at the end was read


@any_tier
@within(LIMIT)
async def test_output_without_end_is_cancelled(bench: Bench) -> None:
    await print_for(bench, 1)


@any_tier
@within(60)
async def test_output_without_end_needs_no_memory(bench: Bench) -> None:
    await print_for(bench, 4)


@any_tier
@within(LIMIT)
async def test_no_newline_at_the_end(bench: Bench) -> None:
    out: list[str] = []
    lines = Lines(out.append)
    errors = Heard()
    async with bench.tree() as tree:
        child = await tree.spawn(bench.command("unfinished_line"), stdout=lines.feed, stderr=errors)
        await child.drained()
    lines.close()
    assert out == ["one", "two"]
    assert errors.data == b"three"
    assert child.tails() == ("one\ntwo", "three")


@any_tier
@within(LIMIT)
async def test_bytes_that_are_not_utf8(bench: Bench) -> None:
    heard = Heard()
    async with bench.tree(logs=Logs(bench.path, 100 * 1024 * 1024)) as tree:
        child = await tree.spawn(bench.command("not_utf8"), stdout=heard)
        await child.drained()
    assert heard.data == children.NOT_UTF8
    assert child.tails()[0] == children.NOT_UTF8.decode("utf-8", "replace")
    assert (bench.path / "test.stdout.log").read_bytes() == children.NOT_UTF8


@any_tier
@within(LIMIT)
async def test_a_line_of_20_megabytes(bench: Bench) -> None:
    size = 20_000_000
    out: list[str] = []
    lines = Lines(out.append, 1000)
    with peak_memory(24 * 1024 * 1024):
        async with bench.tree(logs=Logs(bench.path, 100 * 1024 * 1024)) as tree:
            child = await tree.spawn(bench.command("long_line", str(size)), stdout=lines.feed)
            await child.drained()
    assert out == ["y" * 1000, "after"]
    assert (bench.path / "test.stdout.log").stat().st_size == size + len("\nafter\n")
    assert child.tails()[0].endswith("y\nafter\n")
    assert len(child.tails()[0]) == 64 * 1024


@any_tier
@within(LIMIT)
async def test_secrets_are_masked_in_all_that_is_kept(bench: Bench) -> None:
    heard = Heard()
    async with bench.tree(masker=Masker(["hunter22"]), logs=Logs(bench.path, 100 * 1024 * 1024)) as tree:
        command = bench.command("/bin/sh", "-c", "printf 'it is hunt'; sleep 0.1; printf 'er22.'; echo hunter22 >&2")
        child = await tree.spawn(command, stdout=heard)
        await child.drained()
    assert heard.data == b"it is ***."
    assert child.tails() == ("it is ***.", "***\n")
    assert (bench.path / "test.stdout.log").read_text() == "it is ***."
    assert (bench.path / "test.stderr.log").read_text() == "***\n"


@pytest.mark.parametrize("how", ["here", "escaped"])
@within(LIMIT)
async def test_a_descendant_that_holds_the_pipe_is_ended_and_read_to_the_end(bench: Bench, how: str) -> None:
    heard = Heard()
    async with bench.tree(PATIENT) as tree:
        child = await tree.spawn(bench.command("hold_pipe", how), stdout=heard)
        assert await child.wait() == ExitStatus(code=0)
        holder = await heard.pid("holder")
        assert [process.pid for process in tree.members()] == [holder]
        with trio.move_on_after(0.02) as scope:
            await child.drained()
        assert scope.cancelled_caught
    assert not is_alive(holder)
    assert bench.of(OutputTruncated) == []
    assert child.tails()[0] == heard.data.decode()


@only("process-group")
@within(LIMIT)
async def test_reading_ends_although_a_stranger_holds_the_pipe(bench: Bench) -> None:
    # Cleared its environment, left its session and lost its parent: this tier cannot find it.
    heard = Heard()
    holder = None
    try:
        async with bench.tree(pipe_timeout=0.4) as tree:
            child = await tree.spawn(bench.command("hold_pipe", "outside"), stdout=heard)
            holder = await heard.pid("ready")
            await child.wait()
            assert tree.members() == []
            began = trio.current_time()
        assert trio.current_time() - began >= 0.4
        assert is_alive(holder)
    finally:
        if holder is not None:
            os.kill(holder, signal.SIGKILL)
            await until(lambda: not is_alive(holder))
    assert sorted(event.stream for event in bench.of(OutputTruncated)) == ["stderr", "stdout"]
    assert "holds the pipe" in bench.of(OutputTruncated)[0].reason
    assert isinstance(bench.events[-3], TreeEmpty)
    assert child.tails()[0] == f"ready {holder}\n"


@promised_by_all_but(
    "process-group", "it finds nobody who left the session, cleared its environment and lost its parent"
)
@within(LIMIT)
async def test_who_hides_in_every_way_is_ended(bench: Bench) -> None:
    heard = Heard()
    holder = None
    try:
        async with bench.tree(pipe_timeout=0.2) as tree:
            child = await tree.spawn(bench.command("hold_pipe", "outside"), stdout=heard)
            holder = await heard.pid("ready")
            await child.wait()
        assert not is_alive(holder)
        assert tree.survivors == ()
        assert bench.of(OutputTruncated) == []
    finally:
        if holder is not None and is_alive(holder):
            os.kill(holder, signal.SIGKILL)
            await until(lambda: not is_alive(holder))


@within(LIMIT)
async def test_a_child_that_closes_its_descriptors_lives_on(bench: Bench) -> None:
    async with bench.tree(PATIENT) as tree:
        child = await tree.spawn(bench.command("close_descriptors"))
        await child.drained()
        assert child.status is None
        assert tree.alive() == 1
    assert child.status == ExitStatus(signal="SIGTERM")


# --- exit status -------------------------------------------------------------------------------------------


@only("process-group", "guardian")
@within(60)
async def test_all_exit_codes_are_exact(bench: Bench) -> None:
    for first in range(0, 256, 64):
        async with bench.tree() as tree:
            # The shell starts much faster than Python.
            codes = range(first, first + 64)
            started = [await tree.spawn(bench.command("/bin/sh", "-c", f"exit {code}")) for code in codes]
            assert [await child.wait() for child in started] == [ExitStatus(code=code) for code in codes]


@only("process-group", "guardian")
@within(LIMIT)
async def test_the_signal_of_a_death_is_named(bench: Bench) -> None:
    harmless = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
    stopping = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
    numbers = {each.name: int(each) for each in set(signal.Signals) - harmless - stopping}
    numbers[f"SIG{signal.SIGRTMIN + 3}"] = signal.SIGRTMIN + 3  # has no name in Python
    async with bench.tree() as tree:
        started = [await tree.spawn(bench.command("die", str(int(number)))) for number in numbers.values()]
        assert [await child.wait() for child in started] == [ExitStatus(signal=name) for name in numbers]


# --- what a child is given ---------------------------------------------------------------------------------


@within(LIMIT)
async def test_what_a_child_is_given(bench: Bench) -> None:
    heard = Heard()
    leaked = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    try:
        async with bench.tree() as tree:
            command = bench.command("report", "a b", "c", stdin="hällo\n".encode())
            child = await tree.spawn(command, stdout=heard)
            assert (await child.wait()).ok
            await child.drained()
    finally:
        os.close(leaked)
    given = json.loads(heard.data)
    assert given["pid"] == given["session"] == given["group"] == child.pid
    assert given["descriptors"] == [0, 1, 2]
    assert given["cwd"] == str(bench.path)
    assert given["argv"] == ["a b", "c"]
    assert given["stdin"] == "hällo\n"
    assert re.fullmatch("[0-9a-f]{16}:test:test:[0-9a-f]{16}", given["environment"].pop(MARK))
    assert {name: value for name, value in given["environment"].items() if name != "LC_CTYPE"} == bench.env
    assert given["blocked"] == 0


def status_fields(text: str) -> dict[str, str]:
    """/proc/PID/status as `cat`, which sets no signals, printed it."""
    return dict(re.findall(r"(?m)^(\w+):\t(.*)$", text))


def assert_default_signals(text: str) -> None:
    fields = status_fields(text)
    # 32 and 33 are the C library's own, which no program can set: its posix_spawn(3) leaves them ignored.
    ours = ~(3 << 31)
    assert [int(fields[name], 16) & ours for name in ("SigIgn", "SigBlk", "SigCgt")] == [0, 0, 0]


@within(LIMIT)
async def test_signals_are_at_their_defaults(bench: Bench) -> None:
    async with bench.tree() as tree:
        child = await tree.spawn(bench.command("/bin/cat", "/proc/self/status"))
        await child.drained()
    assert_default_signals(child.tails()[0])


@within(LIMIT)
async def test_a_large_input_arrives_whole(bench: Bench) -> None:
    data = os.urandom(1024 * 1024)
    async with bench.tree() as tree:
        child = await tree.spawn(bench.command("/usr/bin/sha256sum", stdin=data))
        assert (await child.wait()).ok
        await child.drained()
    assert child.tails()[0].split()[0] == hashlib.sha256(data).hexdigest()


@within(LIMIT)
async def test_who_reads_no_input_is_no_trouble(bench: Bench) -> None:
    heard = Heard()
    data = bytes(1024 * 1024)
    async with bench.tree() as tree:
        lives = await tree.spawn(bench.command("wait", stdin=data), stdout=heard)
        ends = await tree.spawn(bench.command("leave_with", "3", stdin=data))
        closes = await tree.spawn(bench.command("close_descriptors", stdin=data))
        assert await ends.wait() == ExitStatus(code=3)
        await closes.drained()
        await heard.pid("ready")
    assert lives.status == closes.status == ExitStatus(signal="SIGTERM")


@as_root
@within(LIMIT)
async def test_another_user(bench: Bench) -> None:
    async with bench.tree() as tree:
        command = bench.command("/bin/cat", "/proc/self/status", user="nobody", cwd="/")
        child = await tree.spawn(command)
        assert (await child.wait()).ok
        await child.drained()
    fields = status_fields(child.tails()[0])
    assert fields["Uid"].split() == ["65534"] * 4
    assert set(fields["Gid"].split()) | set(fields["Groups"].split()) == {"65534"}


# --- spawn errors ------------------------------------------------------------------------------------------


def script(path: Path, text: str, mode: int = 0o755) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


async def refused(bench: Bench, command: Command) -> SpawnError:
    """The error of a spawn; nothing is left of the attempt while the tree is still open."""
    async with bench.tree() as tree:
        with pytest.raises(SpawnError):  # which opens what the tier holds as long as there is a tree
            await tree.spawn(command)
        descriptors = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(SpawnError) as caught:
            await tree.spawn(command)
        assert sorted(os.listdir("/proc/self/fd")) == descriptors
        assert tree.alive() == 0
    assert bench.events == []
    assert caught.value.program == command.argv[0]
    assert repr(command.argv[0]) in str(caught.value)
    return caught.value


CASES: dict[str, tuple[str, Callable[[Bench], Command]]] = {
    "no such name": ("not_found", lambda b: b.command("/x", argv=("no-such-program",))),
    "no such path": ("not_found", lambda b: b.command("/no/such/program")),
    "no such relative path": ("not_found", lambda b: b.command("./program")),
    "nothing on the path": ("not_found", lambda b: b.command("/x", argv=("sh",), env={"PATH": "/no/where"})),
    "path through a file": ("not_found", lambda b: b.command("/bin/sh/program")),
    "a directory": ("not_executable", lambda b: b.command(str(b.path))),
    "not executable": ("not_executable", lambda b: b.command(script(b.path / "p", "#!/bin/sh\n", 0o644))),
    "not executable, on the path": (
        "not_executable",
        lambda b: b.command("/x", argv=(Path(script(b.path / "p", "", 0o644)).name,), env={"PATH": str(b.path)}),
    ),
    "no interpreter": ("not_found", lambda b: b.command(script(b.path / "p", "#!/no/such/interpreter\n"))),
    "no format": ("bad_format", lambda b: b.command(script(b.path / "p", "echo hello\n"))),
    "no cwd": ("bad_cwd", lambda b: b.command("wait", cwd=str(b.path / "missing"))),
    "cwd is a file": ("bad_cwd", lambda b: b.command("wait", cwd=script(b.path / "p", ""))),
    "too large": ("limit", lambda b: b.command("leave_with", "0", "x" * 200_000)),
    "no user": ("user", lambda b: b.command("wait", user="no-such-user")),
    "NUL": ("other", lambda b: b.command("leave_with", "0", "a\0b")),
    "bad name in the environment": ("other", lambda b: b.command("wait", env={**b.env, "A=B": "c"})),
}


@only("process-group", "guardian")
@pytest.mark.parametrize("case", CASES)
@within(LIMIT)
async def test_spawn_errors_are_typed(bench: Bench, case: str) -> None:
    kind, command = CASES[case]
    error = await refused(bench, command(bench))
    assert error.kind == kind


@only("process-group")
@pytest.mark.parametrize("case", CASES)
@within(LIMIT)
async def test_spawn_errors_of_the_launcher_are_typed(bench: Bench, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervise.processes.session._inherits_odd_signals", lambda: True)
    kind, command = CASES[case]
    error = await refused(bench, command(bench))
    assert error.kind == kind


@within(LIMIT)
async def test_after_an_error_the_tree_is_as_good_as_before(bench: Bench) -> None:
    async with bench.tree() as tree:
        with pytest.raises(SpawnError):
            await tree.spawn(bench.command("/no/such/program"))
        child = await tree.spawn(bench.command("leave_with", "5"))
        assert await child.wait() == ExitStatus(code=5)


# --- supervising processes of their own --------------------------------------------------------------------

PRELUDE = f"""
import attrs, contextlib, json, os, resource, shutil, signal, sys, tempfile, trio
from supervise.errors import SpawnError
from supervise.events import SignalSent
from supervise.model import Limits, StopPolicy
from supervise.processes.child import Command, TreeOptions, open_tree
from supervise.processes.hurry import Hurry
from supervise.processes.tiers import open_containments
from supervise.settings import Settings

def say(*words):
    print(*words, flush=True)

def emit(event):
    if isinstance(event, SignalSent):
        say("sent", event.signal)

settings = Settings(containment=sys.argv[1], state_dir=sys.argv[2])

@contextlib.asynccontextmanager
async def tree(grace=30.0):
    policy = StopPolicy(((signal.SIGTERM, grace),))
    async with open_containments(settings) as containments:
        options = TreeOptions(mark="test", contain=containments.of_job("test", Limits()))
        async with open_tree("test", policy, Hurry(), options=options, emit=emit) as t:
            yield t

def command(*argv, **more):
    program = argv if "/" in argv[0] else ({", ".join(map(repr, CHILDREN))}, *argv)
    return Command(argv=program, cwd="/", env=dict(os.environ), **more)

def tell(chunk):
    os.write(1, chunk)

def descriptors():
    return len(os.listdir("/proc/self/fd"))
"""


class Helper:
    """A program that supervises; run in a session of its own."""

    def __init__(self, process: trio.Process, heard: Heard) -> None:
        self.pid = process.pid
        self.heard = heard
        self._process = process

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    async def ended(self) -> int:
        return await self._process.wait()


class Helpers:
    def __init__(self, nursery: trio.Nursery, tier: str, state_dir: Path) -> None:
        self._nursery = nursery
        self._arguments = (tier, str(state_dir))
        self.tier = tier

    async def start(self, program: str) -> Helper:
        heard = Heard()
        argv = [sys.executable, "-c", PRELUDE + program, *self._arguments]
        run = functools.partial(
            trio.run_process, argv, cwd=ROOT, check=False, start_new_session=True, stdout=-1, stderr=-1
        )
        process = await self._nursery.start(run)

        async def listen(stream: trio.abc.ReceiveStream) -> None:
            async with stream:
                async for chunk in stream:
                    heard(chunk)

        self._nursery.start_soon(listen, process.stdout)
        self._nursery.start_soon(listen, process.stderr)
        return Helper(process, heard)

    async def run(self, program: str) -> list[Any]:
        """The lines that it prints, each of them JSON."""
        helper = await self.start(program)
        code = await helper.ended()
        assert code == 0, helper.heard.data.decode()
        await helper.heard.until("the end")
        return [json.loads(line) for line in helper.heard.data.splitlines() if line[:1] in b"[{"]


@pytest.fixture(params=["process-group", "guardian"])
def helpers(leaks: Leaks, nursery: trio.Nursery, tmp_path: Path, request: pytest.FixtureRequest) -> Helpers:
    return Helpers(nursery, request.param, tmp_path / "state")


@pytest.mark.parametrize("how", ["ignores", "blocks", "both"])
@within(LIMIT)
async def test_children_of_an_odd_host_see_default_signals(helpers: Helpers, how: str) -> None:
    # What a host started by nohup, or one that blocks signals for its threads, hands down.
    given = await helpers.run(f"""
if {how!r} != "blocks":
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
if {how!r} != "ignores":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])
os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)

async def main():
    env = {{"PATH": os.environ["PATH"], "{TOKEN}": os.environ["{TOKEN}"]}}  # in the C locale
    async with tree() as t:
        out = []
        child = await t.spawn(Command(argv=("/bin/cat", "/proc/self/status"), cwd="/", env=env))
        await child.drained()
        say(json.dumps([child.tails()[0]]))
        child = await t.spawn(Command(argv=("/usr/bin/env",), cwd="/", env=env))
        await child.drained()
        say(json.dumps([sorted(child.tails()[0].split())]))
        child = await t.spawn(command("report"), stdout=tell)
        await child.drained()
        await child.wait()

trio.run(main)
say("the end")
""")
    ([status], [environment], report) = given
    assert_default_signals(status)
    assert [line.partition("=")[0] for line in environment] == ["PATH", MARK, TOKEN]
    assert report["descriptors"] == [0, 1, 2]
    assert report["pid"] == report["session"] == report["group"]


@within(LIMIT)
async def test_out_of_descriptors(helpers: Helpers) -> None:
    """With more and more free descriptors, a spawn fails at each of its steps in turn."""
    results = await helpers.run("""
async def attempt(t, free):
    before = descriptors()
    filled = []
    try:
        while True:
            filled.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        for _ in range(free):
            os.close(filled.pop())
    try:
        await t.spawn(command("leave_with", "0"))
    except SpawnError as error:
        return [error.kind, error.program], before
    else:
        return "ok", before
    finally:
        for each in filled:
            os.close(each)

async def main():
    async with tree() as t:
        ready = trio.Event()
        await t.spawn(command("wait"), stdout=lambda chunk: ready.set())
        await ready.wait()
        for free in range(30):
            result, before = await attempt(t, free)
            if result == "ok":
                break
            say(json.dumps([*result, descriptors() - before, t.alive() - 1]))
        else:
            say("never")

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
trio.run(main)
say("the end")
""")
    # Six for the pipes. Two for Popen's own; or one that tells the guardian what to start.
    assert len(results) >= (8 if helpers.tier == "process-group" else 7)
    assert results == [["limit", CHILDREN[0], 0, 0]] * len(results)


@only("process-group")
@within(LIMIT)
async def test_out_of_descriptors_after_the_fork(bench: Bench, leaks: Leaks, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", none_left)
    error = await refused(bench, bench.command("wait"))
    assert error.kind == "limit"
    assert leaks.processes() == leaks.zombies() == []


@within(LIMIT)
async def test_a_tree_ends_even_if_no_descriptor_is_free(helpers: Helpers, leaks: Leaks) -> None:
    await helpers.run("""
async def main():
    hoard = []
    async with tree(0.2) as t:
        async def ready(name):
            heard = trio.Event()
            await t.spawn(command(*name), stdout=lambda chunk: heard.set())
            await heard.wait()
        await ready(("ignore", "SIGTERM"))
        await ready(("daemons", "1"))
        try:
            while True:
                hoard.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
    for each in hoard:
        os.close(each)

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
trio.run(main)
say("the end")
""")
    assert leaks.processes() == []


@as_root
@pytest.mark.parametrize("helpers", ["process-group"], indirect=True)  # nobody may run our Python, perhaps
@within(LIMIT)
async def test_another_user_needs_root(helpers: Helpers) -> None:
    (result,) = await helpers.run("""
async def main():
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    global settings
    settings = attrs.evolve(settings, state_dir=tempfile.mkdtemp(dir="/tmp"))
    async with tree() as t:
        try:
            await t.spawn(command("/bin/true", user="root"))
        except SpawnError as error:
            say(json.dumps([error.kind, error.program, str(error)]))
    shutil.rmtree(settings.state_dir)

trio.run(main)
say("the end")
""")
    assert result[:2] == ["user", "/bin/true"]
    assert "only root" in result[2]


INTERRUPTED = """
async def main():
    async with tree(GRACE) as t:
        child = await t.spawn(command("BEHAVIOUR", "/dev/null", "SIGTERM"), stdout=tell)
        await child.wait()

try:
    trio.run(main)
except KeyboardInterrupt:
    say("interrupted")
"""


@within(LIMIT)
async def test_ctrl_c_leaves_no_process(helpers: Helpers, leaks: Leaks) -> None:
    helper = await helpers.start(INTERRUPTED.replace("GRACE", "0.2").replace("BEHAVIOUR", "record"))
    await helper.heard.pid("ready")
    helper.interrupt()
    await helper.heard.until("interrupted")
    assert re.findall(rb"sent (\w+)", helper.heard.data) == [b"SIGTERM", b"SIGKILL"]
    assert await helper.ended() == 0
    assert leaks.processes() == []


@within(LIMIT)
async def test_a_second_ctrl_c_goes_on_to_the_next_step(helpers: Helpers, leaks: Leaks) -> None:
    helper = await helpers.start(INTERRUPTED.replace("GRACE", str(NEVER)).replace("BEHAVIOUR", "record"))
    await helper.heard.pid("ready")
    helper.interrupt()
    await helper.heard.until("SIGTERM")  # said by the child: the grace has begun
    helper.interrupt()
    await helper.heard.until("interrupted")
    assert re.findall(rb"sent (\w+)", helper.heard.data) == [b"SIGTERM", b"SIGKILL"]
    assert await helper.ended() == 0
    assert leaks.processes() == []


@pytest.mark.parametrize("where", ["os.pidfd_open", "trio.lowlevel.FdStream"])
@within(LIMIT)
async def test_ctrl_c_between_the_fork_and_its_bookkeeping(helpers: Helpers, leaks: Leaks, where: str) -> None:
    helper = await helpers.start(f"""
real = {where}

def interrupted(*args):
    {where} = real
    signal.raise_signal(signal.SIGINT)
    return real(*args)

async def main():
    before = descriptors()
    try:
        async with tree() as t:
            {where} = interrupted
            await t.spawn(command("wait"))
            say("spawned")
            await trio.sleep_forever()
    finally:
        await trio.lowlevel.cancel_shielded_checkpoint()
        say("more descriptors:", descriptors() - before)

try:
    trio.run(main)
except KeyboardInterrupt:
    say("interrupted")
""")
    await helper.heard.until("interrupted")
    assert await helper.ended() == 0
    assert b"more descriptors: 0\n" in helper.heard.data
    assert leaks.processes() == []


def test_the_programs_that_these_tests_use_are_there() -> None:
    for program in ("/bin/sh", "/bin/cat", "/bin/true", "/usr/bin/env", "/usr/bin/sha256sum"):
        assert shutil.which(program)
