"""Trees end whatever the kernel shows, hides or refuses, and whatever the host does at the same time."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from supervise.errors import SpawnError, UnsupportedPlatform
from supervise.model import ExitStatus, StopPolicy
from supervise.processes import identity, session
from supervise.processes.child import ProcessTree
from supervise.processes.containment import Command
from supervise.processes.helper import Helper
from supervise.processes.marked import Marked
from supervise.processes.session import SPAWNS_AT_ONCE
from tests.processes.conftest import Leaks
from tests.processes.test_child import LIMIT, PATIENT, Bench, Heard, is_alive, only, until, within
from tests.processes.test_child import bench as bench  # a fixture

SLEEP = ("/bin/sleep", "60")

# --- a main thread that ends before the others -------------------------------------------------------------


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="the number of exit(2) is not known here")
@pytest.mark.parametrize("how", ["here", "escaped"])
@within(LIMIT)
async def test_who_lives_on_in_another_thread_is_ended(bench: Bench, how: str) -> None:
    heard = Heard()
    async with bench.tree(PATIENT) as tree:
        child = await tree.spawn(bench.command("main_thread_exits", how), stdout=heard)
        pid = await heard.pid("ready")
        process = identity.read(pid)
        assert process is not None
        assert process.state == "Z"
        assert process.alive
        if how == "escaped":
            await child.wait()
        assert [process.pid for process in tree.members()] == [pid]
    assert child.status == (ExitStatus(signal="SIGTERM") if how == "here" else ExitStatus(code=0))
    assert not is_alive(pid)
    assert tree.survivors == ()


@within(LIMIT)
async def test_a_leader_whose_end_is_not_seen_is_a_survivor(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench.tree(StopPolicy((), kill_wait=0.2), pipe_timeout=0.2) as tree:
        child = await tree.spawn(bench.command(*SLEEP))
        monkeypatch.setattr(tree._containment, "empty", lambda: True)
        monkeypatch.setattr(tree._containment, "signal_group", lambda leader, number: None)
    if bench.tier == "process-group":
        os.kill(child.pid, signal.SIGKILL)
        child._leader.popen.wait()  # type: ignore[attr-defined]  # of this tier
    assert not is_alive(child.pid)  # a guardian that was let go has ended it
    (survivor,) = tree.survivors
    assert (survivor.pid, survivor.reason) == (child.pid, "its end was not seen")


@within(LIMIT)
async def test_a_leader_that_cannot_be_seen_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench.tree() as tree:
        child = await tree.spawn(bench.command(*SLEEP))
        monkeypatch.setattr(identity, "_stat", lambda name: None)
    # Who is not seen gets no SIGTERM from us; the guardian sees for itself.
    assert child.status == ExitStatus(signal="SIGKILL" if bench.tier == "process-group" else "SIGTERM")
    assert tree.survivors == ()


# --- a leader that somebody else has reaped ----------------------------------------------------------------


@only("process-group")
@pytest.mark.parametrize("how", ["SIGCHLD is ignored", "the host reaps all"])
@pytest.mark.parametrize("end", ["by the policy", "by a signal to the group"])
@within(LIMIT)
async def test_a_group_whose_leader_was_reaped_gets_no_signal_as_a_group(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str, end: str
) -> None:
    """Its number may be a stranger's. Who is known to belong to it is signalled all the same."""
    groups: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: groups.append(group))
    heard = Heard()
    old = signal.getsignal(signal.SIGCHLD)
    if how == "SIGCHLD is ignored":
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        async with bench.tree(StopPolicy(((signal.SIGTERM, 5.0),), kill_wait=1.0)) as tree:
            leader = await tree.spawn(bench.command("/bin/sh", "-c", "sleep 60 & echo member $!"), stdout=heard)
            member = await heard.pid("member")
            await leader.wait()
            if how == "the host reaps all":
                assert os.waitpid(-1, 0) == (leader.pid, 0)
            await until(lambda: identity.read(leader.pid) is None)
            if end == "by a signal to the group":
                tree._containment.signal_group(leader.pid, signal.SIGKILL)
                await until(lambda: not is_alive(member))
    finally:
        signal.signal(signal.SIGCHLD, old)
    assert groups == []
    assert not is_alive(member)
    assert tree.survivors == ()
    assert bench.signals == (["SIGTERM"] if end == "by the policy" else [])


@only("process-group")
@within(LIMIT)
async def test_a_stranger_who_has_the_number_of_a_reaped_leader_is_no_member(bench: Bench) -> None:
    async with bench.tree(PATIENT) as ours, bench.tree(PATIENT) as others:
        leader = await ours.spawn(bench.command("/bin/true"))
        stranger = await others.spawn(bench.command(*SLEEP))
        await leader.wait()
        assert os.waitpid(leader.pid, 0) == (leader.pid, 0)
        containment: Any = ours._containment
        pidfd, start = containment._held.pop(leader.pid)
        containment._held[stranger.pid] = (pidfd, start - 1)  # as if it had the pid again, some time later
        assert ours.members() == []
        containment.signal_group(stranger.pid, signal.SIGKILL)
        containment.signal(signal.SIGKILL)
        assert is_alive(stranger.pid)
    assert stranger.status == ExitStatus(signal="SIGTERM")


class Grouped:
    """A cgroup that shows other processes each time."""

    def __init__(self, *looks: list[int]) -> None:
        self.looks = list(looks)

    def pids(self) -> list[int]:
        return self.looks.pop(0)


@only("process-group")
@pytest.mark.parametrize("still", [True, False])
@within(LIMIT)
async def test_who_left_the_cgroup_while_it_was_looked_at_may_be_a_stranger(bench: Bench, still: bool) -> None:
    async with bench.tree() as tree:
        pid = (await tree.spawn(bench.command(*SLEEP))).pid
        group: Any = Grouped([pid], [pid] if still else [])
        marked = Marked("another token", lost=(), group=group)
        assert [member.pid for member in marked.members()] == ([pid] if still else [])
        marked.close()


def test_a_descriptor_is_given_of_the_right_process_alone(leaks: Leaks, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.getpid()
    start = identity.start_of(pid)
    pidfd = identity.pidfd_of(pid, start)
    assert pidfd is not None
    os.close(pidfd)
    assert identity.pidfd_of(pid, start + 1) is None
    for module, name in ((identity, "_stat"), (os, "pidfd_open")):
        monkeypatch.setattr(module, name, no_look)
        assert identity.pidfd_of(pid, start) is None
    assert identity.start_of(pid) == -1
    assert leaks.descriptors() == []


# --- what is looked up before a start ----------------------------------------------------------------------


@only("process-group")
@within(LIMIT)
async def test_files_and_users_are_looked_up_in_a_thread(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be on a network that does not answer."""
    threads = []
    for name in ("find_program", "credentials"):
        real = getattr(session, name)

        def noted(command: Command, real: Callable[[Command], object] = real) -> object:
            threads.append(threading.current_thread())
            return real(command)

        monkeypatch.setattr(session, name, noted)
    async with bench.tree() as tree:
        await (await tree.spawn(bench.command("/bin/true"))).wait()
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_a_proc_of_another_pid_namespace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", lambda path: "4711")
        with pytest.raises(UnsupportedPlatform) as caught:
            session.require_platform()
    assert "/proc belongs to another pid namespace" in str(caught.value)
    assert f"this one is {os.getpid()} here, and 4711 there" in str(caught.value)
    assert "--mount-proc" in str(caught.value)


# --- spawns while a tree ends ------------------------------------------------------------------------------


@within(LIMIT)
async def test_no_spawn_after_the_tree_was_left(bench: Bench, leaks: Leaks) -> None:
    async with bench.tree() as tree:
        pass
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SpawnError, match="its tree is being ended") as caught:
        await tree.spawn(bench.command(*SLEEP))
    assert caught.value.kind == "other"
    assert bench.events == []
    assert leaks.processes() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


@within(LIMIT)
async def test_no_spawn_while_the_tree_ends(bench: Bench) -> None:
    heard = Heard()
    async with bench.tree() as tree, trio.open_nursery() as nursery:
        await tree.spawn(bench.command("record", str(bench.path / "log"), "SIGTERM"), stdout=heard)
        await heard.pid("ready")
        nursery.start_soon(tree.stop)
        await heard.until("SIGTERM")
        with pytest.raises(SpawnError, match="its tree is being ended"):
            await tree.spawn(bench.command(*SLEEP))


@within(LIMIT)
async def test_a_spawn_in_flight_when_the_tree_is_left_is_ended(
    bench: Bench, leaks: Leaks, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees: list[ProcessTree] = []

    def slow() -> bool:  # called in the thread, before the fork
        end = time.monotonic() + LIMIT
        while not trees[0]._ending and time.monotonic() < end:
            time.sleep(0.005)  # nothing tells a thread
        return False

    ask = Helper.ask

    async def slow_ask(self: Helper) -> socket.socket:
        await until(lambda: trees[0]._ending)
        return await ask(self)

    monkeypatch.setattr("supervise.processes.session._inherits_odd_signals", slow)
    monkeypatch.setattr(Helper, "ask", slow_ask)
    async with trio.open_nursery() as nursery:
        async with bench.tree() as tree:
            trees.append(tree)
            nursery.start_soon(tree.spawn, bench.command(*SLEEP))
            await trio.testing.wait_all_tasks_blocked()
        assert leaks.processes() == []
        assert [type(event).__name__ for event in bench.events] == [
            "ProcessStarted",
            "SignalSent",
            "ProcessExited",
            "TreeEmpty",
        ]
    assert tree.survivors == ()


@within(LIMIT)
async def test_a_host_that_uses_all_threads_stops_no_tree(bench: Bench) -> None:
    go_on = threading.Event()
    threads = int(trio.to_thread.current_default_thread_limiter().total_tokens)
    async with trio.open_nursery() as nursery:
        try:
            for _ in range(threads):
                nursery.start_soon(trio.to_thread.run_sync, go_on.wait)
            await trio.testing.wait_all_tasks_blocked()
            assert trio.to_thread.current_default_thread_limiter().available_tokens == 0
            with trio.fail_after(5):
                async with bench.tree() as tree:
                    child = await tree.spawn(bench.command(*SLEEP))
            assert child.status == ExitStatus(signal="SIGTERM")
        finally:
            go_on.set()


# --- /proc -------------------------------------------------------------------------------------------------


@within(LIMIT)
async def test_processes_that_are_hidden_are_not_ours(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ours: set[int] = set()
    opens = os.open

    def refuse(path: str, flags: int, *args: int, **kwargs: int) -> int:
        parts = str(path).split("/")
        if parts[1:2] == ["proc"] and parts[-1] == "stat" and int(parts[2]) not in ours:
            number = errno.EPERM if int(parts[2]) % 2 else errno.EACCES
            raise PermissionError(number, os.strerror(number))
        return opens(path, flags, *args, **kwargs)

    async with bench.tree(PATIENT) as tree:
        child = await tree.spawn(bench.command(*SLEEP))
        ours.add(child.pid)
        monkeypatch.setattr(os, "open", refuse)
        # A guardian that we do not see is asked all the same, and sees for itself.
        assert [process.pid for process in tree.members()] == ([child.pid] if bench.tier == "process-group" else [])
        assert identity.read(1) is None
    assert child.status == ExitStatus(signal="SIGTERM")
    assert tree.survivors == ()


def no_look(name: str) -> list[bytes] | None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@only("process-group")
@within(LIMIT)
async def test_a_tree_that_nobody_can_look_at_is_killed_and_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        async with bench.tree(StopPolicy(((signal.SIGTERM, 60.0),), kill_wait=0.5)) as tree:
            children = [await tree.spawn(bench.command(*SLEEP)) for _ in range(2)]
            patch.setattr(identity, "_stat", no_look)
    assert [child.status for child in children] == [ExitStatus(signal="SIGKILL")] * 2
    assert [survivor.pid for survivor in tree.survivors] == [child.pid for child in children]
    assert {survivor.reason for survivor in tree.survivors} == {"could not look: Input/output error"}


@only("guardian", "cgroup")
@within(LIMIT)
async def test_a_guardian_ends_a_tree_that_we_cannot_look_at(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    with monkeypatch.context() as patch:
        async with bench.tree(PATIENT) as tree:
            children = [await tree.spawn(bench.command(*SLEEP)) for _ in range(2)]
            await tree.spawn(bench.command("slow_member", str(bench.path / "clean"), "0.1"), stdout=heard)
            await heard.pid("member")
            patch.setattr(identity, "_stat", no_look)
    assert [child.status for child in children] == [ExitStatus(signal="SIGTERM")] * 2
    assert (bench.path / "clean").exists()
    assert tree.survivors == ()


@within(LIMIT)
async def test_a_tree_that_can_be_looked_at_again_leaves_nobody(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    real = identity._stat
    end = time.monotonic() + LIMIT

    def sometimes(name: str) -> list[bytes] | None:
        return no_look(name) if time.monotonic() < end else real(name)

    async with bench.tree(StopPolicy(((signal.SIGTERM, 0.5),))) as tree:
        await tree.spawn(bench.command("daemons", "1"), stdout=heard)
        daemon = await heard.pid("daemon")
        end = time.monotonic() + 0.3
        monkeypatch.setattr(identity, "_stat", sometimes)
    assert not is_alive(daemon)
    assert tree.survivors == ()


# --- many trees --------------------------------------------------------------------------------------------


@only("process-group")
@within(LIMIT)
async def test_trees_that_end_at_once_share_their_looks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    trees, looks, ready = 40, 0, 0
    real = identity.started_since

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal looks
        looks += 1
        return real(*args, **kwargs)  # type: ignore[arg-type]  # handed on

    async def one() -> None:
        nonlocal ready
        async with bench.tree(PATIENT) as tree:
            await tree.spawn(bench.command(*SLEEP))
            ready += 1
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(trees):
            nursery.start_soon(one)
        await until(lambda: ready == trees)
        monkeypatch.setattr(identity, "started_since", counted)
        nursery.cancel_scope.cancel()
    assert looks < 2 * trees  # each for itself needs more than four
    assert bench.signals == ["SIGTERM"] * trees
    assert trees > SPAWNS_AT_ONCE


@within(LIMIT)
async def test_a_look_is_not_shared_past_a_change(bench: Bench) -> None:
    """Trees side by side, each with members that left their session: nobody takes another's, nor misses his own."""
    heard = [Heard(), Heard()]
    async with bench.tree() as first, bench.tree() as second:
        for tree, each in zip((first, second), heard, strict=True):
            assert tree.alive() == 0
            await tree.spawn(bench.command("daemons", "1"), stdout=each)
            assert tree.alive() >= 1
        daemons = [await each.pid("daemon") for each in heard]
        for tree, daemon in zip((first, second), daemons, strict=True):
            while daemon not in {process.pid for process in tree.members()}:  # a look serves for a while
                await trio.sleep(0.005)
            members = {process.pid for process in tree.members()}
            assert len(members) == 2
            assert daemon in members
        await first.stop()
        assert (first.alive(), second.alive()) == (0, 2)
    assert not any(map(is_alive, daemons))
