"""What a killed supervisor leaves is ended by the next one that starts in the same state directory."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from supervise import Settings, open_supervisor
from supervise.model import SweepReport
from supervise.processes import cgroup, identity
from supervise.processes import sweep as sweep_module
from supervise.processes.marked import Marked
from supervise.processes.records import Record
from supervise.processes.sweep import sweep
from tests.processes import children
from tests.processes.lone import LIMIT, ROOT, Lone, lone
from tests.processes.test_child import is_alive, within

PYTHON = [sys.executable, "-I", "-S"]
CHILDREN = [*PYTHON, children.__file__]
TIERS = ["process-group", "guardian", "cgroup"]

#: A leader without a marker, and children of it: each has but one sign that it belongs to the tree.
LEADER = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(children.__file__)!r})
import children
signal.alarm(60)
def stay(name, *, ignore=()):
    for number in ignore:
        signal.signal(number, signal.SIG_IGN)
    with open("/proc/self/comm", "w") as file:
        file.write("renamed")
    children.say(name, os.getpid())
    children.pause()
def deaf():
    stay("deaf", ignore=(signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
bare = lambda code: os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", code], {{}})
if sys.argv[1:] == ["bare"]:
    children.say("leader", os.getpid())
    if children.fork() == 0:
        os.setpgid(0, 0)
        children.become("wait")
    children.pause()
children.leave(lambda: stay("daemon"))
children.leave(deaf)
os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", sys.argv[1], "bare"], {{}})
"""

#: It is in a session of its own, has a cleared environment, and has lost its parent.
LOST = [*CHILDREN, "hold_pipe", "outside"]
WAITS = [*CHILDREN, "wait"]


def settings_of(path: Path, tier: str = "process-group", **more: Any) -> dict[str, Any]:
    return {"state_dir": str(path), "containment": tier, "orphan_grace": 0.1, **more}


def swept(path: Path, tier: str = "process-group") -> SweepReport:
    """By a supervisor that is opened now."""

    async def main() -> SweepReport:
        with trio.fail_after(LIMIT):
            async with open_supervisor(settings=Settings(**settings_of(path, tier))) as supervisor:
                return supervisor.swept

    return trio.run(main)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.005)


def records(path: Path) -> list[Path]:
    return sorted((path / "run").iterdir())


def keepers(path: Path) -> tuple[int, list[int]]:
    """The zygote and the guardians of the only supervisor that lives."""
    lines = (records(path)[0] / "trees.jsonl").read_text().splitlines()
    entries = list({entry["token"]: entry for entry in map(json.loads, lines) if "token" in entry}.values())
    (zygote,) = [pid for entry in entries if entry["token"] == "zygote" for pid, _ in entry["keepers"]]
    return zygote, [pid for entry in entries if entry["token"] != "zygote" for pid, _ in entry["keepers"]]


def kill_all(supervisor: Lone, path: Path) -> None:
    """Supervisor, zygote and guardians, none of which can react."""
    zygote, guardians = keepers(path)
    pids = [supervisor.pid, zygote, *guardians]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    supervisor.kill()
    wait_until(lambda: not any(map(is_alive, pids)))


# --- a bare process group ----------------------------------------------------------------------------------------


def test_what_a_killed_supervisor_left_is_ended_told_and_forgotten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = [*PYTHON, "-c", LEADER, LEADER]
    with lone(program, settings=settings_of(tmp_path)) as supervisor:
        names = ("leader", "ready", "daemon", "deaf")
        pids = {name: supervisor.tell(name) for name in names}
        supervisor.kill()
    assert all(map(is_alive, pids.values()))
    signs = {name: b"SUPERVISE_MARK" in Path(f"/proc/{pid}/environ").read_bytes() for name, pid in pids.items()}
    assert signs == {"leader": False, "ready": False, "daemon": True, "deaf": True}
    report = swept(tmp_path)
    assert not any(map(is_alive, pids.values()))
    assert (report.supervisors, report.survivors, report.groups) == (1, (), 0)
    found = {each.pid: each.command for each in report.found}
    assert found.keys() == set(pids.values())
    assert found[pids["daemon"]] == found[pids["deaf"]] == "renamed"
    assert all(abs(each.start_time - time.time()) < 60 for each in report.found)
    assert records(tmp_path) == []
    (told,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert all(f"{pid} ({found[pid]})" in told.getMessage() for pid in found)
    assert swept(tmp_path) == SweepReport()


def test_the_processes_of_a_living_supervisor_are_left_alone(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with lone(WAITS, settings=settings) as living, lone(WAITS, settings=settings) as killed:
        pid, other = living.tell("ready"), killed.tell("ready")
        killed.kill()
        assert [each.pid for each in swept(tmp_path).found] == [other]
        assert is_alive(pid)
        assert len(records(tmp_path)) == 1
        living.kill()
    assert [each.pid for each in swept(tmp_path).found] == [pid]


def test_who_cannot_be_ended_keeps_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with lone(WAITS, settings=settings_of(tmp_path)) as supervisor:
        pid = supervisor.tell("ready")
        supervisor.kill()
    with monkeypatch.context() as patch:
        patch.setattr(Marked, "_signal_one", lambda *args: None)
        report = trio.run(functools.partial(sweep, tmp_path, grace=0.1, kill_wait=0.2))
    assert [each.pid for each in report.survivors] == [pid]
    assert f"process {pid} of an earlier supervisor lives on" in caplog.text
    assert len(records(tmp_path)) == 1
    assert [each.pid for each in swept(tmp_path).found] == [pid]
    assert records(tmp_path) == []


def test_a_sweep_that_cannot_look_keeps_the_record_and_no_supervisor_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Record(tmp_path).close(keep=True)

    def refuse(self: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module.LeftTree, "members", refuse)
        assert swept(tmp_path) == SweepReport()
    assert "could not be looked for: Too many open files" in caplog.text
    assert swept(tmp_path) == SweepReport(supervisors=1)


@within(LIMIT)
async def test_a_sweep_that_is_cancelled_keeps_what_it_has_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        Record(tmp_path).close(keep=True)
    real, calls = sweep_module._sweep_one, []

    async def cancelled(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            scope.cancel()
            await trio.lowlevel.checkpoint()
        return await real(*args)

    with monkeypatch.context() as patch, trio.CancelScope() as scope:
        patch.setattr(sweep_module, "_sweep_one", cancelled)
        await sweep(tmp_path, grace=0.1, kill_wait=1)
    assert scope.cancelled_caught
    assert len(records(tmp_path)) == 2
    assert await sweep(tmp_path, grace=0.1, kill_wait=1) == SweepReport(supervisors=2)


def test_supervisors_that_start_at_once_sweep_once(tmp_path: Path) -> None:
    rounds, starters = 5, 3
    script = """
import functools, pathlib, sys, trio
from supervise.processes.sweep import sweep
for path in map(pathlib.Path, sys.argv[1:]):
    sys.stdin.readline()
    report = trio.run(functools.partial(sweep, path, grace=1, kill_wait=5))
    print(report.supervisors, flush=True)
"""
    paths = [tmp_path / str(number) for number in range(rounds)]
    for path in paths:
        for _ in range(3):
            Record(path).close(keep=True)
    command = [sys.executable, "-c", script, *map(str, paths)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    processes = [subprocess.Popen(command, **pipes) for _ in range(starters)]  # type: ignore[call-overload]  # options by name
    counts = []
    for path in paths:
        for process in processes:
            process.stdin.write("\n")
        counts.append(sum(int(process.stdout.readline()) for process in processes))
        assert records(path) == []
    for process in processes:
        process.communicate()
    assert counts == [3] * rounds


#: A shell that a supervisor has left, a program beside it, and a sweep that somebody starts in the shell. The sweep
#: has a child of its own. Says who they are, then what was swept.
SHELL = """
sleep 60 & echo beside $!
"$0" -c '
import functools, json, os, pathlib, subprocess, sys, trio
from supervise.codec import to_json
from supervise.processes.sweep import sweep
child = subprocess.Popen(["/bin/sleep", "60"])
report = trio.run(functools.partial(sweep, pathlib.Path(sys.argv[1]), grace=0.2, kill_wait=0.3))
print("child", child.poll())
child.kill()
child.wait()
print("line", os.getppid(), os.getpid())
print(json.dumps(to_json(report)))
' "$1"
"""


@pytest.mark.parametrize("tier", ["process-group", "cgroup"])
def test_a_sweep_out_of_a_tree_that_was_left_ends_neither_itself_nor_its_ancestors(tmp_path: Path, tier: str) -> None:
    record = Record(tmp_path)
    group = cgroup.make(record.id) if tier == "cgroup" else None
    marker = {} if group else {"SUPERVISE_MARK": f"{record.id}:job:agent:0"}
    enter = f"echo 0 > {group.path}/cgroup.procs\n" if group else ""
    if group is not None:
        record.set_cgroup(group.path)
    record.close(keep=True)
    env = {**os.environ, **marker, "PYTHONPATH": str(ROOT)}
    shell = subprocess.run(
        ["/bin/sh", "-c", enter + SHELL, sys.executable, str(tmp_path)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    beside, child, line, told = shell.stdout.splitlines()
    assert child == "child None"
    report = json.loads(told)
    assert [each["pid"] for each in report["found"]] == [int(beside.split()[1])]
    assert sorted(each["pid"] for each in report["survivors"]) == sorted(map(int, line.split()[1:]))
    assert {each["reason"] for each in report["survivors"]} == {"it runs this sweep"}
    assert not is_alive(int(beside.split()[1]))
    assert records(tmp_path) == [record.directory]
    assert swept(tmp_path) == SweepReport(supervisors=1, groups=int(tier == "cgroup"))
    assert records(tmp_path) == []


# --- with guardians ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["guardian", "cgroup"])
def test_a_supervisor_that_is_killed_alone_leaves_nothing_to_sweep_but_its_record(tmp_path: Path, tier: str) -> None:
    with lone(WAITS, LOST, settings=settings_of(tmp_path, tier)) as supervisor:
        pid = supervisor.tell("ready")
        zygote, guardians = keepers(tmp_path)
        supervisor.kill()
    wait_until(lambda: not any(map(is_alive, (pid, zygote, *guardians))))
    assert swept(tmp_path, tier) == SweepReport(supervisors=1)
    assert records(tmp_path) == []
    assert not supervisor.group or not supervisor.group.exists()


@pytest.mark.parametrize("tier", ["guardian", "cgroup"])
def test_supervisor_zygote_and_guardian_killed_at_once_leave_what_the_sweep_ends(tmp_path: Path, tier: str) -> None:
    with lone(LOST, [*CHILDREN, "daemons", "1"], settings=settings_of(tmp_path, tier)) as supervisor:
        assert supervisor.tier == {"guardian": "guardian", "cgroup": "guardian and cgroup"}[tier]
        daemon, lost = supervisor.tell("daemon"), supervisor.tell("ready")
        group = supervisor.group
        kill_all(supervisor, tmp_path)
    assert is_alive(daemon)
    assert is_alive(lost)
    assert Path(f"/proc/{lost}/environ").read_bytes() == b""
    report = swept(tmp_path, tier)
    left = {daemon, lost} if tier == "cgroup" else {daemon}
    assert {each.pid for each in report.found} == left
    assert not any(map(is_alive, left))
    assert (report.survivors, report.groups) == ((), 1 if tier == "cgroup" else 0)
    if tier == "cgroup":
        assert not group.exists()
    else:
        os.kill(lost, signal.SIGKILL)  # without a cgroup nobody can know it: the sweep does not promise it
    assert records(tmp_path) == []


@pytest.mark.parametrize(
    ("tier", "who"), [("cgroup", "both"), ("guardian", "both"), ("guardian", "guardian"), ("guardian", "zygote")]
)
def test_a_stopped_guardian_or_zygote_is_ended_with_its_tree(tmp_path: Path, tier: str, who: str) -> None:
    with lone(WAITS, LOST, WAITS, settings=settings_of(tmp_path, tier)) as supervisor:
        pid = supervisor.tell("ready")
        zygote, guardians = keepers(tmp_path)
        tree = [p.pid for guardian in guardians for p in identity.descendants(guardian)]
        assert pid in tree
        stopped = {"both": [zygote, *guardians], "guardian": guardians, "zygote": [zygote]}[who]
        for each in stopped:
            os.kill(each, signal.SIGSTOP)
        supervisor.kill()
    report = swept(tmp_path, tier)
    assert not any(map(is_alive, (*tree, zygote, *guardians)))
    assert report.survivors == ()
    assert {zygote, *guardians}.isdisjoint(each.pid for each in report.found)
    assert not supervisor.group or not supervisor.group.exists()
    assert records(tmp_path) == []


def test_what_a_guardian_that_is_dead_has_left_below_its_zygote_is_ended(tmp_path: Path) -> None:
    """Its environment is cleared and its session its own: what is left is whose child it is."""
    with lone(LOST, WAITS, settings=settings_of(tmp_path, "guardian")) as supervisor:
        supervisor.tell("ready")
        wait_until(lambda: lost_of(tmp_path))
        (lost,) = lost_of(tmp_path)
        zygote, guardians = keepers(tmp_path)
        os.kill(zygote, signal.SIGSTOP)
        supervisor.popen.send_signal(signal.SIGSTOP)
        for guardian in guardians:
            os.kill(guardian, signal.SIGKILL)
        wait_until(lambda: (process := identity.read(lost)) is not None and process.parent == zygote)
        supervisor.kill()
    report = swept(tmp_path, "guardian")
    assert not any(map(is_alive, (lost, zygote, *guardians)))
    assert report.survivors == ()


def lost_of(path: Path) -> list[int]:
    """Those below the guardian that have no marker."""
    _, guardians = keepers(path)
    found = [process for guardian in guardians for process in identity.descendants(guardian)]
    return [p.pid for p in found if p.alive and identity.environment_of(p) == b"" and p.session != p.pid]


def test_a_keeper_that_does_not_go_on_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "KEEPERS_GONE", 0.2)
    with lone(WAITS, settings=settings_of(tmp_path, "guardian")) as supervisor:
        supervisor.tell("ready")
        zygote, guardians = keepers(tmp_path)
        for each in (zygote, *guardians):
            os.kill(each, signal.SIGSTOP)
        supervisor.kill()
    real = signal.pidfd_send_signal

    def no_cont(pidfd: int, number: int) -> None:
        if number != signal.SIGCONT:
            real(pidfd, number)

    monkeypatch.setattr(signal, "pidfd_send_signal", no_cont)
    assert swept(tmp_path).survivors == ()
    assert not any(map(is_alive, (zygote, *guardians)))
