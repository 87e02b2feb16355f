"""Guardian and zygote: what they promise, whoever is killed, stopped, hidden or short of something meanwhile."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import supervise
from supervise import AgentSettings, FailureKind, IndexSettings, JobSpec, Outcome, Settings
from supervise.errors import SpawnError, UnsupportedPlatform
from supervise.model import ExitStatus, Limits, StopPolicy
from supervise.processes import guarded, helper, identity
from supervise.processes.child import ProcessTree, TreeOptions, open_tree
from supervise.processes.containment import Command, Pipes
from supervise.processes.hurry import Hurry
from supervise.processes.tiers import open_containments
from tests.processes.conftest import TOKEN, Leaks
from tests.processes.fake_claude import FakeClaude
from tests.processes.test_child import (
    CHILDREN,
    LIMIT,
    PATIENT,
    ROOT,
    SOON,
    Heard,
    as_root,
    assert_default_signals,
    is_alive,
    until,
    within,
)

SLEEP = ("/bin/sleep", "60")
GRACE = 0.3  # the orphans'
BOUND = GRACE + 2.0


class Supervised:
    """Trees of one supervisor, on a guardian."""

    def __init__(self, options: TreeOptions, token: str, path: Path) -> None:
        self.options = options
        self.path = path
        self.env = {"PATH": os.environ["PATH"], TOKEN: token}

    def tree(self, policy: StopPolicy = SOON) -> Any:
        return open_tree("test", policy, Hurry(), options=self.options, emit=lambda event: None)

    def command(self, *argv: str, **changes: Any) -> Command:
        """A behaviour of the fake child; or a program, if it begins with a path."""
        program = argv if "/" in argv[0] else (*CHILDREN, *argv)
        return Command(**{"argv": program, "cwd": str(self.path), "env": self.env, **changes})

    @property
    def helper(self) -> helper.Helper:
        found: Any = self.options.contain
        return found.func.__self__._helper  # type: ignore[no-any-return]  # private, and found through Any

    @property
    def zygote(self) -> int:
        running = self.helper._running
        assert running is not None
        return running.popen.pid


def guardian_of(tree: ProcessTree) -> int:
    containment: Any = tree._containment
    return int(containment._guardian[0])


class Bench:
    def __init__(self, tier: Any, token: str, path: Path) -> None:
        self.tier, self.token, self.path = tier, token, path

    @asynccontextmanager
    async def supervisor(self, **settings: Any) -> AsyncIterator[Supervised]:
        values = {"state_dir": self.path / "state", "containment": self.tier, "orphan_grace": GRACE, **settings}
        async with open_containments(Settings(**values)) as containments:
            contain = containments.of_job("test", Limits())
            owner = Supervised(TreeOptions(mark="test", contain=contain), self.token, self.path)
            group = owner.helper.cgroup
            assert (group is not None) == (self.tier == "cgroup")
            yield owner
        assert group is None or not group.exists()
        assert keepers_of(os.getpid()) == []
        assert list((self.path / "state" / "run").iterdir()) == []


def keepers_of(pid: int) -> list[int]:
    """Zygotes that a process has."""
    return [each.pid for each in identity.descendants(pid) if identity.command_of(each.pid).startswith("sv-")]


@pytest.fixture(params=["guardian", "cgroup"])
def bench(leaks: Leaks, tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param, leaks.token, tmp_path)


async def started(owner: Supervised, tree: ProcessTree, *behaviour: str, word: str = "ready") -> int:
    """Start a behaviour. Returns the pid that it says."""
    heard = Heard()
    await tree.spawn(owner.command(*behaviour), stdout=heard)
    return await heard.pid(word)


# --- exit status -------------------------------------------------------------------------------------------


@within(LIMIT)
async def test_the_status_is_exact(bench: Bench) -> None:
    codes = (0, 1, 77, 255)
    numbers = (signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV)
    async with bench.supervisor() as owner, owner.tree() as tree:
        for code in codes:
            child = await tree.spawn(owner.command("/bin/sh", "-c", f"exit {code}"))
            assert await child.wait() == ExitStatus(code=code)
        for number in numbers:
            child = await tree.spawn(owner.command("/bin/sh", "-c", f"kill -{int(number)} $$"))
            assert await child.wait() == ExitStatus(signal=number.name)


@within(LIMIT)
async def test_the_status_comes_at_once_although_a_grandchild_lives_on(bench: Bench) -> None:
    async with bench.supervisor() as owner, owner.tree() as tree:
        child = await tree.spawn(owner.command("/bin/sh", "-c", "sleep 60 & exit 7"))
        with trio.fail_after(1):
            assert await child.wait() == ExitStatus(code=7)
        assert tree.alive() == 1


# --- who is killed -----------------------------------------------------------------------------------------


async def stubborn(owner: Supervised, tree: ProcessTree) -> list[int]:
    """Children that ignore SIGTERM: one that waits for its parent, daemons, and one that hides in every way."""
    return [
        await started(owner, tree, "ignore", "SIGTERM", "SIGHUP"),
        await started(owner, tree, "daemons", "1", word="daemon"),
        await started(owner, tree, "disguised", "own_session", "exit"),
    ]


@within(LIMIT)
async def test_a_guardian_killed_alone_leaves_nobody(bench: Bench) -> None:
    async with bench.supervisor() as owner, owner.tree() as other:
        bystander = await started(owner, other, "wait")
        async with owner.tree(PATIENT) as tree:
            pids = await stubborn(owner, tree)
            child = await tree.spawn(owner.command(*SLEEP))
            os.kill(guardian_of(tree), signal.SIGKILL)
            with trio.fail_after(BOUND):
                assert await child.wait() == ExitStatus(signal="SIGKILL")
                await until(lambda: not any(map(is_alive, pids)))
            began = trio.current_time()
        assert trio.current_time() - began < 2  # the grace is for nobody
        assert tree.survivors == ()
        assert is_alive(bystander)
        async with owner.tree() as third:
            assert await started(owner, third, "wait")


@within(LIMIT)
async def test_a_tree_without_a_guardian_starts_nothing(bench: Bench) -> None:
    async with bench.supervisor() as owner, owner.tree() as tree:
        child = await tree.spawn(owner.command(*SLEEP))
        os.kill(guardian_of(tree), signal.SIGKILL)
        await child.wait()
        with pytest.raises(SpawnError, match="the guardian of its tree was killed") as caught:
            await tree.spawn(owner.command(*SLEEP))
        assert caught.value.kind == "other"


@within(LIMIT)
async def test_a_guardian_in_advance_that_was_killed_is_replaced(bench: Bench) -> None:
    async with bench.supervisor() as owner:
        await until(owner.helper._in_advance)
        (pid,) = owner.helper._in_advance()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not is_alive(pid))
        async with owner.tree() as tree:
            assert await started(owner, tree, "wait")
        assert tree.survivors == ()


@within(LIMIT)
async def test_a_killed_guardian_fails_the_job(bench: Bench) -> None:
    claude = FakeClaude(bench.path, ["init"], ["ignore", "SIGTERM"], ["spawn", "daemon"], ["hang"])
    workspace = bench.path / "workspace"
    workspace.mkdir()
    settings = Settings(
        state_dir=bench.path / "state",
        containment=bench.tier,
        orphan_grace=GRACE,
        agent=AgentSettings(command=claude.command, pass_env=(TOKEN,)),
        index=IndexSettings(mode="none"),
    )
    async with supervise.open_job(JobSpec(prompt="go", workspace=workspace), settings=settings) as job:
        await until(lambda: Path(claude.record_file).exists() and any(e["what"] == "spawned" for e in claude.record()))
        agent = next(entry["pid"] for entry in claude.record())
        process = identity.read(agent)
        assert process is not None
        assert identity.command_of(process.parent) == "sv-guardian"
        os.kill(process.parent, signal.SIGKILL)
        with trio.fail_after(BOUND):
            result = await job.result()
    assert (result.outcome, result.failure_kind) == (Outcome.FAILED, FailureKind.KILLED)
    assert result.signal == "SIGKILL"
    assert result.survivors == ()


@within(LIMIT)
async def test_trees_go_on_without_their_zygote(bench: Bench) -> None:
    async with bench.supervisor() as owner:
        async with owner.tree(PATIENT) as tree:
            child = await tree.spawn(owner.command(*SLEEP))
            await started(owner, tree, "wait")
            first = owner.zygote
            os.kill(first, signal.SIGKILL)
            await until(lambda: not is_alive(first))
            async with owner.tree() as second:
                assert await started(owner, second, "wait")
                assert owner.zygote != first
            assert second.survivors == ()
            assert is_alive(child.pid)
            assert tree.alive() == 2
            assert await started(owner, tree, "wait")  # its guardian forks as before
        assert child.status == ExitStatus(signal="SIGTERM")
        assert tree.survivors == ()


@within(LIMIT)
async def test_a_tree_is_found_without_guardian_and_zygote(bench: Bench) -> None:
    async with bench.supervisor() as owner:
        async with owner.tree() as tree:
            pids = [
                await started(owner, tree, "ignore", "SIGTERM", "SIGHUP"),
                await started(owner, tree, "daemons", "1", word="daemon"),
            ]
            if bench.tier == "cgroup":  # which holds whom nobody else finds
                pids.append(await started(owner, tree, "hold_pipe", "outside"))
            guardian, zygote = guardian_of(tree), owner.zygote
            for pid in (zygote, guardian):
                os.kill(pid, signal.SIGSTOP)
            for pid in (zygote, guardian):
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not is_alive(guardian))
        assert tree.survivors == ()
        assert not any(map(is_alive, pids))


SUPERVISOR = """
import os, signal, sys, time, trio
from tests.processes.conftest import TOKEN
from tests.processes.test_child import Heard
from tests.processes.test_guardian import *

tier, state, forks, behaviours = sys.argv[1], sys.argv[2], sys.argv[3] == "forks", eval(sys.argv[4])

async def main():
    settings = Settings(
        state_dir=state, containment=tier, orphan_grace=float(sys.argv[5]), guardian_timeout=float(sys.argv[6])
    )
    async with open_containments(settings) as containments:
        options = TreeOptions(mark="test", contain=containments.of_job("test", Limits()), pipe_timeout=0.2)
        owner = Supervised(options, os.environ[TOKEN], Path("/"))
        policy = StopPolicy(((signal.SIGTERM, 0.2),), kill_wait=0.5)
        async with owner.tree(policy) as tree:
            pids = [await started(owner, tree, *words, word=word) for word, *words in behaviours]
            if forks and (fork := os.fork()) == 0:
                signal.alarm(60)
                time.sleep(60)
                os._exit(0)
            told = {"pids": pids, "fork": fork if forks else None, "guardian": guardian_of(tree)}
            print(json.dumps(told), flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
        print(json.dumps([[each.pid, each.reason] for each in tree.survivors]), flush=True)

trio.run(main)
"""

STUBBORN = [
    ("ready", "ignore", "SIGTERM", "SIGHUP"),
    ("daemon", "daemons", "2"),
    ("ready", "disguised", "own_session", "exit"),
    ("ready", "hold_pipe", "outside"),
]


@contextmanager
def another_supervisor(
    bench: Bench, behaviours: Sequence[tuple[str, ...]], *, forks: bool = False, timeout: float = 10.0, **how: Any
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """One that can be killed, and what it told. Its state is in `state` of the bench's directory."""
    state = how.pop("state", bench.path / "state")
    python = how.pop("python", sys.executable)
    words = (bench.tier, str(state), "forks" if forks else "", repr(list(behaviours)), str(GRACE), str(timeout))
    process = subprocess.Popen(
        [python, "-c", SUPERVISOR, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **{"cwd": ROOT, **how},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline() or "null")
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def gone_within(seconds: float, pids: list[int]) -> list[int]:
    """Who is still alive after so many seconds; returns as soon as nobody is."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < end:
        time.sleep(0.01)
    return left


@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with a fork of its own"])
def test_a_killed_supervisor_leaves_nobody(bench: Bench, forks: bool) -> None:
    with another_supervisor(bench, STUBBORN, forks=forks) as (process, told):
        try:
            (owner,) = (bench.path / "state" / "run").glob("*/owner.json")
            group = json.loads(owner.read_bytes())["cgroup"]
            assert (group is not None and os.path.isdir(group)) == (bench.tier == "cgroup")
            keepers = keepers_of(process.pid)
            assert told["guardian"] in keepers
            members = [each.pid for each in identity.descendants(told["guardian"]) if each.alive]
            assert set(told["pids"]) <= set(members)
            process.kill()
            process.wait()
            assert gone_within(BOUND, [*members, *keepers]) == []
            assert group is None or not os.path.exists(group)
        finally:
            if told["fork"] is not None:  # it holds our ends of all sockets
                assert is_alive(told["fork"])
                os.kill(told["fork"], signal.SIGKILL)


@pytest.mark.parametrize("first", ["guardian", "zygote"])
def test_a_killed_supervisor_leaves_nobody_although_its_helpers_are_stopped(bench: Bench, first: str) -> None:
    with another_supervisor(bench, STUBBORN) as (process, told):
        keepers = keepers_of(process.pid)
        members = [each.pid for each in identity.descendants(told["guardian"]) if each.alive]
        stopped = [pid for pid in keepers if identity.command_of(pid) == f"sv-{first}"]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait()
        if first == "zygote":  # nobody rouses it, but its guardians do their part
            assert gone_within(BOUND, members) == []
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        assert gone_within(BOUND, [*members, *keepers]) == []


# --- who is stopped ----------------------------------------------------------------------------------------


@within(LIMIT)
async def test_a_stopped_guardian_is_roused(bench: Bench) -> None:
    async with bench.supervisor() as owner:
        async with owner.tree() as tree:
            child = await tree.spawn(owner.command("/bin/sh", "-c", "read line; exit 5", stdin=b""))
            await started(owner, tree, "ignore", "SIGTERM")
            os.kill(guardian_of(tree), signal.SIGSTOP)
            with trio.fail_after(3):
                assert await child.wait() == ExitStatus(code=5)
            os.kill(guardian_of(tree), signal.SIGSTOP)
            with trio.fail_after(3):
                assert await started(owner, tree, "ignore", "SIGTERM")
            os.kill(guardian_of(tree), signal.SIGSTOP)
            began = trio.current_time()
        assert trio.current_time() - began < 3
        assert tree.survivors == ()


@within(LIMIT)
async def test_a_stopped_zygote_is_roused(bench: Bench) -> None:
    async with bench.supervisor(guardian_timeout=1.0) as owner:
        async with owner.tree() as first:
            await started(owner, first, "wait")
            os.kill(owner.zygote, signal.SIGSTOP)
            async with owner.tree() as second:  # takes the guardian that was forked in advance
                await started(owner, second, "wait")
            os.kill(owner.zygote, signal.SIGSTOP)
            async with owner.tree() as third:
                await started(owner, third, "wait")
        assert first.survivors == second.survivors == third.survivors == ()


def stop_for_ever(owner: Supervised, tree: ProcessTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a guardian; and its zygote, which would continue it. Nobody rouses them."""
    monkeypatch.setattr(guarded.GuardianContainment, "rouse", lambda self: None)
    for pid in (owner.zygote, guardian_of(tree)):
        os.kill(pid, signal.SIGSTOP)


@within(LIMIT)
async def test_a_silent_guardian_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench.supervisor(guardian_timeout=0.4) as owner, owner.tree() as tree:
        pid = await started(owner, tree, "ignore", "SIGTERM")
        guardian = guardian_of(tree)
        stop_for_ever(owner, tree, monkeypatch)
        with pytest.raises(SpawnError, match="the guardian of its tree was killed"):
            await tree.spawn(owner.command(*SLEEP))
        await until(lambda: not is_alive(guardian))  # its socket is closed before it is a zombie
        await until(lambda: not is_alive(pid))
    assert tree.survivors == ()


@within(LIMIT)
async def test_a_guardian_that_is_stopped_for_ever_does_not_keep_its_tree(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench.supervisor(guardian_timeout=0.3) as owner:
        async with owner.tree() as tree:
            pid = await started(owner, tree, "ignore", "SIGTERM")
            stop_for_ever(owner, tree, monkeypatch)
            began = trio.current_time()
        assert trio.current_time() - began < 3
        assert tree.survivors == ()
        assert not is_alive(pid)


@within(LIMIT)
async def test_the_end_of_a_leader_is_told_although_the_guardian_is_stopped_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench.supervisor(guardian_timeout=0.3) as owner, owner.tree() as tree:
        child = await tree.spawn(owner.command("/bin/sleep", "0.2"))
        stop_for_ever(owner, tree, monkeypatch)
        with trio.fail_after(3):
            status = await child.wait()
        # It was reaped by nobody whom we could ask.
        assert status == ExitStatus(signal="SIGKILL")


@within(LIMIT)
async def test_signals_for_everybody_do_not_end_guardian_and_zygote(bench: Bench) -> None:
    harmful = {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
    async with bench.supervisor() as owner, owner.tree() as tree:
        await started(owner, tree, "wait")
        guardian = guardian_of(tree)
        for number in set(signal.Signals) - harmful - {signal.SIGABRT}:
            for pid in (guardian, owner.zygote):
                os.kill(pid, number)
        assert await started(owner, tree, "wait")
        async with owner.tree() as other:
            assert await started(owner, other, "wait")
        assert (guardian_of(tree), is_alive(guardian)) == (guardian, True)


# --- what a child is given ---------------------------------------------------------------------------------

GIVEN = r"""
import json, os, resource, sys
print(json.dumps({
    "umask": os.umask(0), "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "core": resource.getrlimit(resource.RLIMIT_CORE), "fds": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
    "pid": os.getpid(), "session": os.getsid(0), "cwd": os.fsencode(os.getcwd()).hex(),
    "long": len(os.environ.get("LONG", "")),
}))
"""


async def given(owner: Supervised, tree: ProcessTree, *argv: str, **changes: Any) -> dict[str, Any]:
    program = argv or (sys.executable, "-I", "-S", "-c", GIVEN)
    child = await tree.spawn(owner.command(*program, **changes))
    assert (await child.wait()).ok, child.tails()
    await child.drained()
    return dict(json.loads(child.tails()[0]))


@contextmanager
def changed(limit: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


@within(LIMIT)
async def test_a_child_is_given_what_we_are_now(bench: Bench) -> None:
    umask = os.umask(0o022)
    try:
        async with bench.supervisor() as owner, owner.tree() as tree:
            first = await given(owner, tree)
            os.umask(0o077)
            with changed(resource.RLIMIT_NOFILE, 300):
                second = await given(owner, tree)
            third = await given(owner, tree)
    finally:
        os.umask(umask)
    assert (first["umask"], second["umask"]) == (0o022, 0o077)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert (first["nofile"], second["nofile"], third["nofile"]) == (soft, 300, soft)
    for each in (first, second):
        assert each["core"] == [1, 1]  # bytes: too few for a file, and what stops a pipe
        assert each["fds"] == [0, 1, 2]
        assert each["pid"] == each["session"]


@within(LIMIT)
async def test_a_child_has_default_signals(bench: Bench) -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGUSR1)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])
    try:
        async with bench.supervisor() as owner, owner.tree() as tree:
            child = await tree.spawn(owner.command("/bin/cat", "/proc/self/status"))
            await child.drained()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert_default_signals(child.tails()[0])


@within(LIMIT)
async def test_bytes_that_are_no_text_and_much_environment(bench: Bench) -> None:
    odd = os.path.join(os.fsencode(bench.path), b"caf\xe9 \xff")
    os.mkdir(odd)
    program = os.path.join(odd, b"pr\xf6gram")
    Path(os.fsdecode(program)).write_text(f"#!{sys.executable} -IS\n{GIVEN}")
    os.chmod(program, 0o755)
    async with bench.supervisor() as owner, owner.tree() as tree:
        many = {f"V{number}": "x" * 30_000 for number in range(9)}
        env = {**owner.env, **many, "LONG": "y" * 30_000}
        found = await given(owner, tree, os.fsdecode(program), cwd=os.fsdecode(odd), env=env)
    assert bytes.fromhex(found["cwd"]) == odd
    assert found["long"] == 30_000


CORE = "import resource; print(list(resource.getrlimit(resource.RLIMIT_CORE)))"


@within(LIMIT)
async def test_no_core_dumps(bench: Bench) -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    with changed(resource.RLIMIT_CORE, hard):  # we would leave one
        async with bench.supervisor() as owner, owner.tree() as tree:
            child = await tree.spawn(owner.command("/bin/sh", "-c", f"kill -{int(signal.SIGSEGV)} $$"))
            assert await child.wait() == ExitStatus(signal="SIGSEGV")
            limited = await tree.spawn(owner.command(sys.executable, "-c", CORE))
            await limited.wait()
            await limited.drained()
    assert json.loads(limited.tails()[0]) == [min(1, hard % 2**64)] * 2
    assert not [path for path in bench.path.iterdir() if "core" in path.name]


@within(LIMIT)
async def test_a_supervisor_that_became_somebody_else_gets_a_new_zygote(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench.supervisor() as owner:
        async with owner.tree() as tree:
            await started(owner, tree, "wait")
            first = owner.zygote
            monkeypatch.setattr(helper, "_identity", lambda: ("somebody", "else"))
            async with owner.tree() as second:
                await started(owner, second, "wait")
                assert owner.zygote != first
                assert is_alive(first)
            assert tree.alive() == 1
        await until(lambda: not is_alive(first))


@within(LIMIT)
async def test_an_old_guardian_gives_the_limits_of_now(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    async with bench.supervisor() as owner, owner.tree() as tree:
        await started(owner, tree, "wait")
        monkeypatch.setattr(helper, "_identity", lambda: ("somebody", "else"))
        with changed(resource.RLIMIT_NOFILE, 300):
            async with owner.tree() as second:  # has another zygote, which was started with this limit
                assert (await given(owner, second))["nofile"] == 300
            assert (await given(owner, tree))["nofile"] == 300
        assert (await given(owner, tree))["nofile"] == soft


# --- kernels, limits, strangers ----------------------------------------------------------------------------


@within(LIMIT)
async def test_children_are_found_by_a_scan(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "TELLS_CHILDREN", False)
    monkeypatch.setattr("supervise.processes.tiers.TELLS_CHILDREN", False)
    async with bench.supervisor() as owner:
        assert owner.helper.scan
        async with owner.tree() as tree:
            pids = await stubborn(owner, tree)
            assert set(pids) <= {process.pid for process in tree.members()}
        assert tree.survivors == ()
        assert not any(map(is_alive, pids))
        async with owner.tree() as tree:
            pids = await stubborn(owner, tree)
            os.kill(guardian_of(tree), signal.SIGKILL)
            with trio.fail_after(BOUND):
                await until(lambda: not any(map(is_alive, pids)))
        assert tree.survivors == ()


def python_of_nobody() -> str:
    """A Python for our packages that the user nobody may run."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    for python in (sys.executable, "/usr/bin/python3"):
        attempt = [python, "-c", "import sys, trio, pytest, supervise; print(sys.version_info[:2] >= (3, 11))"]
        try:
            done = subprocess.run(
                attempt, env=environment, user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True
            )
        except OSError:
            continue
        if done.stdout == b"True\n":
            return python
    pytest.skip("no Python here may be run by nobody")


@as_root
@pytest.mark.parametrize("bench", ["guardian"], indirect=True)
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, to be made setuid")
def test_who_became_root_is_told_and_nothing_spins(bench: Bench, leaks: Leaks) -> None:
    python = python_of_nobody()
    directory = Path(tempfile.mkdtemp(prefix="supervise-test-", dir="/tmp"))
    root: list[int] = []
    try:
        directory.chmod(0o777)
        program = directory / "become-root"
        shutil.copy(str(shutil.which("setpriv")), program)
        program.chmod(0o4755)
        sleep = f"echo ready $$; exec {program} --reuid 0 --regid 0 --clear-groups /bin/sleep 60"
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), TOKEN: leaks.token}
        environment["PATH"] = os.environ["PATH"]
        as_nobody: dict[str, Any] = {
            "user": 65534,
            "group": 65534,
            "extra_groups": [],
            "env": environment,
            "python": python,
        }
        behaviours = [("ready", "/bin/sh", "-c", sleep)]
        told_by = another_supervisor(bench, behaviours, timeout=0.3, state=directory / "state", **as_nobody)
        with told_by as (process, told):
            (pid,) = root = told["pids"]
            wait_for(lambda: "Uid:\t0\t0\t0\t0" in Path(f"/proc/{pid}/status").read_text())
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()  # the block is left
            survivors = json.loads(process.stdout.readline())
            assert survivors == [[pid, "it could not be signalled: Operation not permitted"]]
            assert process.wait(LIMIT) == 0
            guardian = told["guardian"]
            if is_alive(guardian):
                began = cpu_of(guardian)
                time.sleep(1.0)  # nothing tells of what is not done
                assert cpu_of(guardian) - began < 0.1
            assert cpu_of(guardian) < 1.0
            os.kill(pid, signal.SIGKILL)
            assert gone_within(5, [pid, guardian]) == []
    finally:
        for pid in root:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.005)


def cpu_of(pid: int) -> float:
    process = identity.read(pid)
    return 0.0 if process is None else process.cpu_seconds


@within(LIMIT)
async def test_many_trees_at_once(bench: Bench, leaks: Leaks) -> None:
    trees, ready = 30, 0

    async def one(owner: Supervised) -> None:
        nonlocal ready
        async with owner.tree(PATIENT) as tree:
            await tree.spawn(owner.command(*SLEEP))
            ready += 1
            await trio.sleep_forever()

    async with bench.supervisor() as owner, trio.open_nursery() as nursery:
        for _ in range(trees):
            nursery.start_soon(one, owner)
        await until(lambda: ready == trees)
        await until(lambda: len(keepers_of(os.getpid())) == trees + 2)  # the zygote, and one in advance
        nursery.cancel_scope.cancel()
    assert leaks.processes() == []


@pytest.mark.parametrize("warm", [True, False], ids=["later spawn", "first spawn"])
@within(LIMIT)
async def test_out_of_descriptors_at_each_step(
    bench: Bench, warm: bool, leaks: Leaks, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not warm:  # then nothing is there yet when there is no descriptor left

        async def cold(self: helper.Helper) -> None:
            return

        monkeypatch.setattr(helper.Helper, "warm", cold)
    kinds = []
    for free in range(30):
        async with bench.supervisor() as owner, owner.tree() as tree:
            if warm:
                await started(owner, tree, "wait")
            before = tree.alive()
            with no_descriptor_but(free):
                try:
                    await tree.spawn(owner.command(*SLEEP))
                    kinds.append("none")
                except SpawnError as error:
                    kinds.append(error.kind)
            assert tree.alive() == before + (kinds[-1] == "none")
            assert await started(owner, tree, "wait")  # it works again
        assert tree.survivors == ()
        assert leaks.processes() == []
        if kinds[-1] == "none" and free > 12:
            break
    assert kinds == sorted(kinds)  # "limit" and then "none", nothing else
    assert set(kinds) == {"limit", "none"}
    assert kinds.count("limit") >= 7


@contextmanager
def no_descriptor_but(free: int) -> Iterator[None]:
    filled: list[int] = []
    soft = max(map(int, os.listdir("/proc/self/fd"))) + 40
    with changed(resource.RLIMIT_NOFILE, soft):
        try:
            while True:
                filled.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            for _ in range(free):
                if filled:
                    os.close(filled.pop())
        try:
            yield
        finally:
            for each in filled:
                os.close(each)


# --- where a look is not to be had ---------------------------------------------------------------------------


@within(LIMIT)
async def test_guardian_and_zygote_need_no_descriptor_to_end_a_tree(bench: Bench) -> None:
    async with bench.supervisor() as owner:
        async with owner.tree() as tree:
            pids = await stubborn(owner, tree)
            for pid in (guardian_of(tree), owner.zygote):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))
        assert tree.survivors == ()
        assert not any(map(is_alive, pids))
        async with owner.tree(PATIENT) as tree:
            pids = await stubborn(owner, tree)
            os.kill(guardian_of(tree), signal.SIGKILL)
            with trio.fail_after(BOUND):
                await until(lambda: not any(map(is_alive, pids)))


@within(LIMIT)
async def test_a_spawn_that_is_not_answered_yet_keeps_a_tree_from_being_empty(bench: Bench) -> None:
    async with bench.supervisor() as owner, owner.tree() as tree:
        containment: Any = tree._containment
        await (await tree.spawn(owner.command("/bin/true"))).wait()
        await until(containment.empty)
        with pytest.MonkeyPatch.context() as patch, open(os.devnull, "r+b") as null:
            patch.setattr(trio, "move_on_after", broken_wait)  # as a Ctrl-C that breaks the wait for the answer
            pipes = Pipes(stdin=null.fileno(), stdout=null.fileno(), stderr=null.fileno())
            with pytest.raises(KeyboardInterrupt):
                await containment.spawn(owner.command("/bin/sleep", "0.2"), pipes)
            assert not containment.empty()
        await until(containment.empty)


def broken_wait(seconds: float) -> Any:
    raise KeyboardInterrupt


HANGS = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import guardian
guardian.exec_child = lambda *ignored: (signal.pause(), os._exit(0))  # as on a file system that hangs
ours, theirs = guardian.socket.socketpair()
read, write = os.pipe()
if sys.argv[2] == "socket":
    ours.close()
else:
    os.write(write, b"x")
began = time.monotonic()
pid, problem = guardian.fork_child({}, [], None, [theirs.fileno(), read])
print(problem, time.monotonic() - began < 5, flush=True)
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("lifeline", ["socket", "pidfd"])
def test_an_exec_that_hangs_does_not_make_a_guardian_deaf(lifeline: str) -> None:
    command = [sys.executable, "-I", "-S", "-c", HANGS, str(Path(helper.PROGRAM).parent), lifeline]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    assert done.stdout == "None True\n"


@within(LIMIT)
async def test_a_fork_of_our_host_does_not_keep_the_helper_waiting(bench: Bench) -> None:
    async with bench.supervisor(guardian_timeout=20.0) as owner:
        async with owner.tree() as tree:
            await started(owner, tree, "wait")
            pid = os.fork()
            if pid == 0:
                signal.pause()
                os._exit(0)
        began = time.monotonic()
    try:
        assert time.monotonic() - began < 10
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@within(LIMIT)
async def test_zygotes_that_were_killed_cost_no_descriptor(bench: Bench) -> None:
    counts = []
    async with bench.supervisor() as owner:
        for _ in range(5):
            async with owner.tree() as tree:
                await started(owner, tree, "wait")
            os.kill(owner.zygote, signal.SIGKILL)
            await until(lambda: not is_alive(owner.zygote))
            counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[-1] <= counts[1]


@pytest.mark.parametrize("change", ["os.nice(3)", "ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)", "os.setgroups([7])"])
def test_what_a_zygote_has_for_good_is_noticed_when_it_changes(change: str) -> None:
    if "setgroups" in change and os.geteuid() != 0:
        pytest.skip("only root can change its groups")
    code = (
        f"import ctypes, os; from supervise.processes.helper import _identity as i; a = i(); same = a == i(); {change}"
    )
    words = [sys.executable, "-c", f"{code}; print(same, a != i())"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, check=True)
    assert done.stdout == "True True\n"


@within(LIMIT)
async def test_a_python_that_cannot_run_a_guardian_is_no_guardian(
    leaks: Leaks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    async with open_containments(Settings(state_dir=tmp_path)) as containments:
        assert containments.tier == "process group"
        assert "/bin/false cannot run a guardian: it said nothing" in containments.notes[0]
    with pytest.raises(UnsupportedPlatform, match="containment is 'guardian', but /bin/false cannot run a guardian"):
        async with open_containments(Settings(state_dir=tmp_path, containment="guardian")):
            pytest.fail("it was opened")
    assert list((tmp_path / "run").iterdir()) == []


HIDDEN = """
mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"
"""


@as_root
@pytest.mark.skipif(
    None in map(shutil.which, ("setpriv", "unshare")), reason="needs util-linux, for a /proc of its own"
)
def test_who_is_hidden_from_us_is_ended_all_the_same() -> None:
    code = textwrap.dedent(
        """
        import ctypes, os, signal, sys, trio
        import supervise
        from supervise.processes.child import TreeOptions, open_tree
        from supervise.processes.containment import Command, Pipes
        from supervise.processes.hurry import Hurry
        from supervise.processes.tiers import open_containments
        hide = "import ctypes, os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        hide += "ctypes.CDLL(None).prctl(4, 0, 0, 0, 0); print('up', flush=True); time.sleep(60)"
        async def main():
            settings = supervise.Settings(state_dir=sys.argv[1], containment="guardian")
            policy = supervise.StopPolicy(((signal.SIGTERM, 0.2),), 5.0)
            async with open_containments(settings) as containments:
                contain = containments.of_job("j", supervise.Limits())
                options = TreeOptions(mark="j", contain=contain)
                up = trio.Event()
                async with open_tree("x", policy, Hurry(), options=options, emit=lambda e: None) as tree:
                    command = Command(argv=(sys.executable, "-I", "-S", "-c", hide), cwd="/", env={})
                    child = await tree.spawn(command, stdout=lambda data: up.set())
                    await up.wait()
                print(tree.survivors, child.status, flush=True)
        trio.run(main)
        """
    )
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "PATH": os.environ["PATH"]}
    state = tempfile.mkdtemp(prefix="supervise-test-", dir="/tmp")
    try:
        os.chown(state, 65534, 65534)
        words = [
            "unshare",
            "--pid",
            "--fork",
            "--mount",
            "sh",
            "-c",
            HIDDEN,
            "sh",
            python_of_nobody(),
            "-c",
            code,
            state,
        ]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT)
    finally:
        shutil.rmtree(state)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "() signal SIGKILL\n"
