"""One watch for each workspace, on real processes: jobs that share it, and supervisors that keep out of the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

import supervise
from supervise import IndexStatus, Job, JobState, MockAgent, Outcome, Supervisor
from supervise.events import Event, Heartbeat, IndexChanged, IndexOutput
from supervise.index import lock as lock_module
from supervise.index.lock import WorkspaceLock
from supervise.index.validation import DiskValidation
from supervise.index.watch import NOT_ALONE
from supervise.processes import identity
from tests.processes.test_job import LIMIT, WORKS, World, final, in_order, indexers, until, wait_until


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Gated:
    """Specs of jobs whose agents work until they are let go, and their results."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.go: dict[str, trio.Event] = {}

    def spec(self, name: str, **more: Any) -> supervise.JobSpec:
        event = self.go[name] = trio.Event()
        return self.world.spec(job_id=name, agent=MockAgent(steps=(lambda run: event.wait(),)), **more)

    async def end(self, job: Job) -> supervise.JobResult:
        self.go[job.job_id].set()
        return await job.result()


@pytest.fixture
def gated(world: World) -> Gated:
    return Gated(world)


@asynccontextmanager
async def supervisor(world: World, **more: Any) -> AsyncIterator[Supervisor]:
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=world.settings(**more)) as sup:
            yield sup
        assert sup._watches.empty
        assert sup._turns.unused
    assert indexers(world) == []
    assert_free(world)


def assert_free(world: World) -> None:
    """Nobody has the lock of the workspace."""
    descriptor = os.open(world.workspace, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def is_locked(world: World) -> bool:
    try:
        assert_free(world)
    except BlockingIOError:
        return True
    return False


def count(world: World, what: str) -> int:
    return world.cidx.order().count(what)


async def events_of(job: Job) -> list[Event]:
    async with job.subscribe() as events:
        return [event async for event in events]


def names_on_the_mark(world: World) -> list[str]:
    files = list(world.state_dir.glob("workspaces/*/stale.json"))
    return [name for file in files for name in json.loads(file.read_bytes())["jobs"]]


# --- jobs of one supervisor --------------------------------------------------------------------------------


async def test_three_jobs_share_one_watch_and_the_last_one_out_stops_it(world: World, gated: Gated) -> None:
    link = world.tmp / "link"
    link.symlink_to(world.workspace)
    async with supervisor(world) as sup:
        jobs = [await sup.start(gated.spec(name)) for name in ("one", "two")]
        jobs.append(await sup.start(gated.spec("three", workspace=link)))
        assert sorted(names_on_the_mark(world)) == ["one", "three", "two"]
        first = await gated.end(jobs[0])
        assert (first.index.status, first.index.stale) == (IndexStatus.WATCHING, True)
        assert first.index.reason == "shared: 2 other jobs still use the watch; the last one out settles the index"
        await gated.end(jobs[2])
        assert "watch SIGINT" not in world.cidx.order()
        last = await gated.end(jobs[1])
        assert final(last, world) == (Outcome.COMPLETED, IndexStatus.WATCH_TERMINATED, False)
        in_order(await events_of(jobs[1]))
    assert world.cidx.order() == ["watch begin", "watch ready", "watch SIGINT", "watch end"]
    async with supervisor(world, assume_fresh=False) as sup:  # the index is level
        await sup.run(world.spec(agent=MockAgent()))
    assert "reconcile begin" not in world.cidx.order()


async def test_who_joins_late_shares_events_and_heartbeats_and_no_marker(world: World, gated: Gated) -> None:
    world.cidx.plan(watch={"env": True, "crash": 3, "crash_until": str(world.gate())})
    settings = evolve(world.settings(), heartbeat_interval=0.02)
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=settings) as sup:
            first = await sup.start(gated.spec("one"))
            async with sup.open_job(gated.spec("two")) as second, second.subscribe() as events:
                async for event in events:
                    if isinstance(event, Heartbeat) and any(process.role == "watch" for process in event.processes):
                        break
                await second.spawned()
                assert second.index_status is IndexStatus.WATCHING
                await gated.end(first)
                world.gate().touch()
                await until(lambda: "watch end" in world.cidx.order())
                await gated.end(second)
    told = [event for event in await events_of(second) if isinstance(event, IndexChanged)]
    assert (told[0].cause, told[0].state, told[0].status) == ("joined", "Running", IndexStatus.WATCHING)
    assert "exited" in [event.cause for event in told]
    assert [event.cause for event in await events_of(first) if isinstance(event, IndexChanged)][-1] == "left"
    (begun,) = (entry for entry in world.cidx.record() if entry["who"] == "watch" and entry["what"] == "begin")
    assert ":watch-" in begun["env"]["SUPERVISE_MARK"]
    assert "one:" not in begun["env"]["SUPERVISE_MARK"]
    assert (world.state_dir / "jobs" / "one" / "watch.stdout.log").stat().st_size  # of who has opened it
    assert not list((world.state_dir / "jobs" / "two").glob("watch*"))


@pytest.mark.parametrize("containment", ["auto", "process-group"])
async def test_one_of_three_is_cancelled(containment: Any, world: World, gated: Gated) -> None:
    settings = evolve(world.settings(), containment=containment)
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=settings) as sup:
            jobs = [await sup.start(gated.spec(name)) for name in ("one", "two", "three")]
            jobs[0].cancel()  # the one that has opened it
            cancelled = await jobs[0].result()
            assert (cancelled.outcome, cancelled.index.status) == (Outcome.CANCELLED, IndexStatus.WATCHING)
            assert len(indexers(world)) == 1
            await gated.end(jobs[1])
            last = await gated.end(jobs[2])
    assert final(last, world) == (Outcome.COMPLETED, IndexStatus.WATCH_TERMINATED, False)
    assert world.cidx.order() == ["watch begin", "watch ready", "watch SIGINT", "watch end"]


async def test_a_crash_of_the_watch_with_two_jobs(world: World, gated: Gated) -> None:
    world.cidx.plan(watch=[{"crash": 1, "crash_until": str(world.gate())}, {}])
    async with supervisor(world) as sup:
        jobs = [await sup.start(gated.spec(name)) for name in ("one", "two")]
        world.gate().touch()
        await until(lambda: count(world, "watch ready") == 2)
        first, last = [await gated.end(job) for job in jobs]
    assert (first.index.status, first.index.watch_restarts) == (IndexStatus.WATCHING, 1)
    assert final(last, world) == (Outcome.COMPLETED, IndexStatus.READY_VIA_FALLBACK, False)
    assert count(world, "reconcile begin") == 1


async def test_a_second_cancel_of_the_last_one_hurries_the_flush(world: World, gated: Gated) -> None:
    world.cidx.plan(watch={"flush_until": str(world.gate())})
    async with supervisor(world, flush_timeout=600.0) as sup:
        jobs = [await sup.start(gated.spec(name)) for name in ("one", "two")]
        await gated.end(jobs[0])
        jobs[1].cancel()
        await until(lambda: "watch SIGINT" in world.cidx.order())
        jobs[1].cancel("again")
        assert (await jobs[1].result()).index.status is IndexStatus.STALE


async def test_the_block_of_the_supervisor_is_left_by_an_exception(world: World, gated: Gated) -> None:
    with trio.fail_after(LIMIT), pytest.raises(KeyError):  # noqa: PT012  # leaving the block is what raises
        async with supervise.open_supervisor(settings=world.settings()) as sup:
            for name in ("one", "two"):
                await sup.start(gated.spec(name))
            raise KeyError
    assert indexers(world) == []
    assert not world.marked
    assert_free(world)


async def test_a_job_that_comes_while_the_watch_is_ended_waits_without_a_place(world: World, gated: Gated) -> None:
    world.cidx.plan(watch=[{"out": ["ERROR no good"]}, {}], reconcile={"until": str(world.gate())})
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(max_concurrent=2, settings=world.settings()) as sup:
            first = await sup.start(gated.spec("one"))
            gated.go["one"].set()
            await until(lambda: "reconcile begin" in world.cidx.order())
            async with (
                sup.open_job(world.spec(agent=MockAgent())) as second,
                sup.open_job(world.spec(agent=MockAgent())) as third,
                sup.open_job(world.spec(agent=MockAgent())) as fourth,
            ):
                # There are two places; those who wait for the workspace keep none.
                without = await sup.run(world.spec(agent=MockAgent(), index=None))
                assert (without.outcome, without.index.status) == (Outcome.COMPLETED, IndexStatus.NONE)
                third.cancel()
                assert (await third.result()).outcome is Outcome.CANCELLED
                assert second.state is fourth.state is JobState.QUEUED
                assert first.state is JobState.SETTLING
                world.gate().touch()
        assert sup._watches.empty
        assert sup._turns.unused
    assert final(first.result_nowait(), world) == (Outcome.COMPLETED, IndexStatus.READY_VIA_FALLBACK, False)
    assert IndexStatus.WATCH_TERMINATED in {job.result_nowait().index.status for job in (second, fourth)}
    told = [what for what in world.cidx.order() if what.endswith((" begin", " end"))]
    assert told[:4] == ["watch begin", "watch end", "reconcile begin", "reconcile end"]
    for begin, end in zip(told[::2], told[1::2], strict=True):  # one after the other
        assert (begin.removesuffix("begin"), begin[-5:]) == (end.removesuffix("end"), "begin")


async def test_other_settings_in_one_supervisor(world: World, gated: Gated) -> None:
    other = evolve(world.settings().index, flush_timeout=4.0)
    async with supervisor(world) as sup:
        first = await sup.start(gated.spec("one"))
        second = await sup.start(gated.spec("two", index=other))
        assert count(world, "watch begin") == 1
        gated.go["two"].set()
        await until(lambda: second.state is JobState.SETTLING)
        assert names_on_the_mark(world) == ["one", "two"]
        assert (await gated.end(first)).index.status is IndexStatus.WATCH_TERMINATED
        result = await second.result()
        assert final(result, world) == (Outcome.COMPLETED, IndexStatus.READY_VIA_FALLBACK, False)
        assert result.index.reason == NOT_ALONE
    assert world.cidx.order()[-3:] == ["watch end", "reconcile begin", "reconcile end"]


@pytest.mark.parametrize("containment", ["auto", "process-group"])
async def test_nothing_that_is_started_has_the_lock(containment: Any, world: World, gated: Gated) -> None:
    world.claude.plan(*WORKS)
    with trio.fail_after(LIMIT):
        async with supervise.open_supervisor(settings=evolve(world.settings(), containment=containment)) as sup:
            job = await sup.start(world.spec())
            await until(lambda: "agent begin" in world.cidx.order())
            assert is_locked(world)
            assert str(world.workspace) in targets_of(os.getpid())
            started = [int(entry["pid"]) for entry in world.cidx.record() if entry["what"] == "ready"]
            for pid in [*started, *(process.pid for process in identity.descendants(os.getpid()))]:
                assert str(world.workspace) not in targets_of(pid)
            job.cancel()
    assert_free(world)


def targets_of(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    with suppress(FileNotFoundError):  # it has ended
        for link in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # the one that lists them
                found.append(os.readlink(f"/proc/{pid}/fd/{link}"))
    return found


# --- supervisors of several processes ----------------------------------------------------------------------


@pytest.fixture
def helper(world: World) -> Any:
    """Another process, whose job is at work in the workspace and has the watch."""
    world.claude.plan(*WORKS)
    helper = world.helper(assume_fresh=True)
    wait_until(lambda: "agent begin" in world.cidx.order(), helper)
    yield helper
    helper.kill()
    helper.communicate(timeout=LIMIT)
    wait_until(lambda: not indexers(world))


Helper = subprocess.Popen[bytes]


async def test_a_second_supervisor_reconciles_when_the_first_is_done(
    world: World, gated: Gated, helper: Helper
) -> None:
    async with supervisor(world) as sup:
        job = await sup.start(gated.spec("second"))
        gated.go["second"].set()
        await until(lambda: job.state is JobState.SETTLING)
        assert names_on_the_mark(world) == [world.helped, "second"]
        assert "reconcile begin" not in world.cidx.order()
        helper.send_signal(signal.SIGINT)
        result = await job.result()
    assert (result.index.status, result.index.reason) == (IndexStatus.READY_VIA_FALLBACK, NOT_ALONE)
    order = world.cidx.order()
    assert order.count("watch begin") == 1
    assert order.index("watch end") < order.index("reconcile begin")
    assert not world.marked


async def test_a_second_supervisor_gives_up_after_the_reconcile_timeout(world: World, helper: Helper) -> None:
    with trio.fail_after(LIMIT):
        result = await world.run(world.settings(reconcile_timeout=0.3), agent=MockAgent(), job_id="second")
    assert result.outcome is Outcome.COMPLETED
    assert (result.index.status, result.index.stale) == (IndexStatus.FAILED, True)
    assert result.index.reason == f"{NOT_ALONE}; the wait for it took more than 0.3 s"
    assert names_on_the_mark(world) == [world.helped, "second"]
    assert "reconcile begin" not in world.cidx.order()
    assert helper.poll() is None


async def test_a_kill_of_the_first_supervisor_frees_the_lock(world: World, gated: Gated, helper: Helper) -> None:
    async with supervisor(world) as sup:
        job = await sup.start(gated.spec("second"))
        gated.go["second"].set()
        await until(lambda: job.state is JobState.SETTLING)
        helper.kill()
        result = await job.result()
        assert result.index.status is IndexStatus.READY_VIA_FALLBACK
        # What the killed job has left is for the next one: it may have died after our reconcile had begun.
        assert names_on_the_mark(world) == [world.helped]
        again = await sup.run(world.spec(agent=MockAgent()))
        assert again.index.status is IndexStatus.WATCH_TERMINATED
    assert not world.marked


# --- the lock ----------------------------------------------------------------------------------------------


@pytest.fixture
def locks(world: World) -> Callable[[], WorkspaceLock]:
    return lambda: WorkspaceLock(str(world.workspace), world.state_dir / "workspaces" / "x" / "watch")


async def test_one_at_a_time_has_the_lock(world: World, locks: Callable[[], WorkspaceLock]) -> None:
    one, two = locks(), locks()
    assert await one.take()
    assert await one.take()
    assert not await two.take()
    assert (one.held, two.held) == (True, False)
    two.release()
    assert not await two.take()
    one.release()
    assert await two.take()
    two.release()
    assert not world.state_dir.exists()


async def test_a_child_between_fork_and_exec_does_not_keep_the_lock(locks: Callable[[], WorkspaceLock]) -> None:
    one = locks()
    assert await one.take()
    assert one._descriptor is not None
    copy = os.dup(one._descriptor)  # what a child has until it execs
    try:
        one.release()
        other = locks()
        assert await other.take()
        other.release()
    finally:
        os.close(copy)


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP])
async def test_a_directory_that_cannot_be_locked_has_a_file_instead(
    number: int, world: World, locks: Callable[[], WorkspaceLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def flock(descriptor: int, kind: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(world.workspace):
            raise OSError(number, os.strerror(number))
        real(descriptor, kind)

    monkeypatch.setattr(lock_module.fcntl, "flock", flock)
    one, two = locks(), locks()
    assert await one.take()
    assert not await two.take()
    assert (world.state_dir / "workspaces" / "x" / "watch").exists()
    one.release()
    assert await two.take()
    two.release()


async def test_a_directory_that_cannot_be_opened_has_a_file_instead(
    world: World, locks: Callable[[], WorkspaceLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, *args: Any, **more: Any) -> int:
        if path == str(world.workspace):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **more)

    monkeypatch.setattr(lock_module.os, "open", refuse)
    one, two = locks(), locks()
    assert await one.take()
    assert not await two.take()
    one.release()


async def test_other_trouble_is_no_reason_for_another_lock(
    world: World, locks: Callable[[], WorkspaceLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two supervisors would each hold one."""

    def full(*args: object, **more: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    one = locks()
    with monkeypatch.context() as patch:
        patch.setattr(lock_module.os, "open", full)
        with pytest.raises(OSError, match="Too many open files"):
            await one.take()
    assert not one.held
    assert not world.state_dir.exists()


async def test_a_process_that_dies_frees_the_lock(world: World, locks: Callable[[], WorkspaceLock]) -> None:
    code = (
        "import sys, trio\nfrom pathlib import Path\nfrom supervise.index.lock import WorkspaceLock\n"
        "lock = WorkspaceLock(sys.argv[1], Path('unused'))\n"
        "print(trio.run(lock.take), flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(world.workspace)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"True\n"
        one = locks()
        assert not await one.take()
        other.kill()
    assert await one.take()
    one.release()


# --- what is remembered of fix-config ----------------------------------------------------------------------


def fixes(world: World) -> int:
    return sum(entry["who"] == "fix-config" and entry["what"] == "begin" for entry in world.cidx.record())


async def test_a_good_fix_config_is_not_run_again_until_tool_or_configuration_change(world: World) -> None:
    config = world.workspace / ".code-indexer" / "config.json"
    with trio.fail_after(LIMIT):
        for _ in range(2):
            await world.run(agent=MockAgent())
        assert fixes(world) == 1
        config.parent.mkdir()
        for _ in range(2):
            config.write_text("{}")
            os.utime(config, (1, 1))
            await world.run(agent=MockAgent())
        assert fixes(world) == 2
        world.cidx.plan()  # the file is another now
        await world.run(agent=MockAgent())
        assert fixes(world) == 3


@pytest.mark.parametrize(
    "plan", [{"fix-config": {"code": 1}}, {"watch": {"ready": None}}, {"watch": {"exit_at_start": 1}}]
)
async def test_what_was_not_good_is_not_remembered(plan: dict[str, Any], world: World) -> None:
    world.cidx.plan(**plan)
    with trio.fail_after(LIMIT):
        for _ in range(2):
            await world.run(world.settings(settle_time=0.1), agent=MockAgent())
    assert fixes(world) == 2


async def test_it_is_forgotten_after_a_crash(world: World) -> None:
    world.cidx.plan(watch=[{}, {"crash": 1}, {}])
    with trio.fail_after(LIMIT):
        await world.run(agent=MockAgent())
        opened = supervise.open_job(
            world.spec(agent=MockAgent(steps=(lambda run: crashed(world),))), settings=world.settings()
        )
        async with opened as job, job.subscribe() as events:
            assert not [event async for event in events if isinstance(event, IndexOutput) and event.kind == "error"]
        assert fixes(world) == 1
        await world.run(agent=MockAgent())
    assert fixes(world) == 2


async def crashed(world: World) -> None:
    await until(lambda: count(world, "watch ready") == 3)


async def test_a_record_that_makes_no_sense_is_no_record(world: World) -> None:
    directory = world.state_dir
    directory.mkdir()
    validation = DiskValidation(directory, str(world.workspace), world.cidx.command, os.defpath)
    assert not await validation.known()
    await validation.remember()  # nothing was noted
    assert not list(directory.iterdir())
    await validation.note()
    await validation.remember()
    assert await validation.known()
    for content in (b"", b"{", b"null", b"[]", b"{}", b"\xff"):
        (directory / "validated.json").write_bytes(content)
        assert not await validation.known()
    await validation.forget()
    await validation.forget()
    assert not list(directory.iterdir())
    nowhere = DiskValidation(directory, str(world.workspace), ("no-such-cidx-here",), os.defpath)
    await nowhere.note()
    await nowhere.remember()
    assert not await nowhere.known()


async def test_a_disk_that_refuses_costs_one_more_fix_config_and_nothing_else(world: World) -> None:
    validation = DiskValidation(world.tmp / "not there", str(world.workspace), world.cidx.command, os.defpath)
    await validation.note()
    await validation.remember()
    assert not await validation.known()
    await validation.forget()
