"""The stale mark and the stamp, on real directories and with the real git."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from supervise import durable
from supervise.index import stale
from supervise.index.stale import DiskMark, Stamper
from supervise.model import StopPolicy, Survivor
from supervise.processes.child import TreeOptions, open_tree
from supervise.processes.hurry import Hurry
from tests.index_fakes import Act, FakeTrees, World
from tests.processes.conftest import Leaks

GIT = shutil.which("git")
IDENTITY = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
in_git = pytest.mark.parametrize("workspace", ["git", "git below the top"], indirect=True)
Look = Callable[[Path], Awaitable[str | None]]


def git(workspace: Path, *arguments: str) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": str(workspace.parent), "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", *IDENTITY, *arguments]
    return subprocess.run(command, cwd=workspace, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(params=["git", "no git", "git below the top"])
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with some files, whose name is unkind; or one in a work tree."""
    workspace = tmp_path / "a work\nspace" / "in it"
    top = workspace.parent if "below" in request.param else workspace
    workspace.mkdir(parents=True)
    (workspace / "kept.py").write_text("one\n")
    (workspace / "other.py").write_text("two\n")
    (workspace / "sub dir").mkdir()
    (workspace / "sub dir" / "ünï\ncode.py").write_text("three\n")
    (workspace / os.fsdecode(b"not \xff utf-8.py")).write_text("four\n")
    (workspace / ".code-indexer").mkdir()
    (workspace / ".code-indexer" / "config.json").write_text("{}")
    if request.param != "no git":
        if GIT is None:
            pytest.skip("git is not installed")
        git(top, "init", "-q", "-b", "main")
        git(top, "add", "--all", "--", ".", ":(exclude)**/.code-indexer/**")
        git(top, "commit", "-q", "-m", "one")
    return workspace


@pytest.fixture
def look(leaks: Leaks, tmp_path: Path) -> Look:
    """Stamps a workspace."""

    async def stamp(workspace: Path) -> str | None:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SUPERVISE_TEST_TOKEN": leaks.token}
        opener = partial(open_tree, options=TreeOptions(mark="stale"), emit=lambda event: None)
        return await Stamper(workspace, opener, environment, None, 20.0, Hurry())()

    return stamp


def is_git(workspace: Path) -> bool:
    return (workspace / ".git").exists() or (workspace.parent / ".git").exists()


def mark_of(workspace: Path, look: Look) -> DiskMark:
    return DiskMark(workspace.parent.parent / "state", workspace, partial(look, workspace))


# --- the stamp ---------------------------------------------------------------------------------------------


def edit(workspace: Path) -> None:
    (workspace / "kept.py").write_text("changed\n")


def edit_in_a_directory(workspace: Path) -> None:
    (workspace / "sub dir" / "ünï\ncode.py").write_text("changed\n")


def edit_a_name_that_is_no_utf8(workspace: Path) -> None:
    (workspace / os.fsdecode(b"not \xff utf-8.py")).write_text("changed\n")


def edit_of_the_same_length(workspace: Path) -> None:
    (workspace / "kept.py").write_text("ONE\n")


def new(workspace: Path) -> None:
    (workspace / "new file\n.py").write_text("new\n")


def new_in_a_new_directory(workspace: Path) -> None:
    (workspace / "new" / "deep").mkdir(parents=True)
    (workspace / "new" / "deep" / "file.py").write_text("new\n")


def delete(workspace: Path) -> None:
    (workspace / "kept.py").unlink()


def rename(workspace: Path) -> None:
    (workspace / "kept.py").rename(workspace / "renamed.py")


def chmod(workspace: Path) -> None:
    (workspace / "kept.py").chmod(0o755)


def symlink(workspace: Path) -> None:
    (workspace / "kept.py").unlink()
    (workspace / "kept.py").symlink_to("other.py")


def commit(workspace: Path) -> None:
    git(workspace, "commit", "-q", "--allow-empty", "-m", "two")


def stage(workspace: Path) -> None:
    (workspace / "kept.py").write_text("staged\n")
    git(workspace, "add", "kept.py")
    (workspace / "kept.py").write_text("one\n")  # in the work tree it is as it was


def staged_rename(workspace: Path) -> None:
    git(workspace, "mv", "kept.py", "moved\n.py")


def branch(workspace: Path) -> None:
    git(workspace, "switch", "-q", "-c", "other")


ANYWHERE = [
    *(edit, edit_in_a_directory, edit_a_name_that_is_no_utf8, edit_of_the_same_length),
    *(new, new_in_a_new_directory, delete, rename, chmod, symlink),
]


async def is_seen(workspace: Path, look: Look, change: Callable[[Path], None]) -> None:
    before = await look(workspace)
    assert before == await look(workspace)
    change(workspace)
    after = await look(workspace)
    assert after not in (None, before)
    assert after == await look(workspace)
    assert after.startswith("git:" if is_git(workspace) else "times:")


@pytest.mark.parametrize("change", ANYWHERE)
async def test_each_kind_of_change_is_seen(workspace: Path, look: Look, change: Callable[[Path], None]) -> None:
    await is_seen(workspace, look, change)


@in_git
@pytest.mark.parametrize("change", [commit, stage, staged_rename, branch])
async def test_each_kind_of_change_in_git_is_seen(workspace: Path, look: Look, change: Callable[[Path], None]) -> None:
    await is_seen(workspace, look, change)


@pytest.mark.parametrize("first", [edit, new])
async def test_a_second_change_of_what_had_changed_already_is_seen(
    workspace: Path, look: Look, first: Callable[[Path], None]
) -> None:
    first(workspace)
    before = await look(workspace)
    for name in ("kept.py", "new file\n.py"):
        if (workspace / name).exists():
            (workspace / name).write_text("again!\n")
    assert await look(workspace) != before


async def test_what_the_indexer_writes_is_no_change(workspace: Path, look: Look) -> None:
    before = await look(workspace)
    (workspace / ".code-indexer" / "config.json").write_text("[]")
    (workspace / ".code-indexer" / "index").mkdir()
    (workspace / ".code-indexer" / "index" / "vectors").write_bytes(b"123")
    assert await look(workspace) == before


@in_git
async def test_what_a_fetch_leaves_in_git_is_no_change(workspace: Path, look: Look) -> None:
    remote = workspace.parent.parent / "remote.git"
    top = workspace if (workspace / ".git").exists() else workspace.parent
    git(workspace, "clone", "-q", "--bare", str(top), str(remote))
    git(workspace, "remote", "add", "origin", str(remote))
    git(workspace, "fetch", "-q")
    git(workspace, "branch", "-q", "--set-upstream-to=origin/main")
    before = await look(workspace)
    elsewhere = workspace.parent.parent / "clone"
    git(workspace, "clone", "-q", str(remote), str(elsewhere))
    git(elsewhere, "commit", "-q", "--allow-empty", "-m", "theirs")
    git(elsewhere, "push", "-q")
    git(workspace, "fetch", "-q")
    assert "behind" in git(workspace, "status", "--short", "--branch")
    assert await look(workspace) == before


@in_git
async def test_an_edit_in_a_repository_within_is_seen(workspace: Path, look: Look) -> None:
    inner = workspace / "vendored"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "a.py").write_text("one\n")
    git(inner, "add", ".")
    git(inner, "commit", "-q", "-m", "one")
    before = await look(workspace)
    (inner / "a.py").write_text("two\n")
    middle = await look(workspace)
    (inner / "a.py").write_text("three\n")
    assert len({before, middle, await look(workspace)}) == 3


@in_git
async def test_neither_hooks_nor_a_file_system_monitor_of_the_workspace_are_run(workspace: Path, look: Look) -> None:
    trap = workspace.parent.parent / "trap"
    trap.write_text(f"#!/bin/sh\ntouch '{trap}.sprung'\n")
    trap.chmod(0o755)
    git(workspace, "config", "core.fsmonitor", str(trap))
    git(workspace, "config", "core.hooksPath", str(trap.parent))
    edit(workspace)
    assert await look(workspace) is not None
    assert not trap.with_name("trap.sprung").exists()


async def test_without_git_the_times_tell(workspace: Path, leaks: Leaks) -> None:
    opener = partial(open_tree, options=TreeOptions(mark="stale"), emit=lambda event: None)
    environment = {"PATH": "/nonexistent", "SUPERVISE_TEST_TOKEN": leaks.token}
    stamp = Stamper(workspace, opener, environment, None, 20.0, Hurry())
    before = await stamp()
    assert before is not None
    assert before.startswith("times:")
    edit(workspace)
    assert await stamp() != before


@in_git
@pytest.mark.parametrize("habit", ["exec sleep 60", "kill -9 $$", "exit 128"])
async def test_a_git_that_hangs_or_dies_costs_its_timeout_and_no_more(
    workspace: Path, leaks: Leaks, tmp_path: Path, habit: str
) -> None:
    stamp = await with_a_git(workspace, leaks, tmp_path, habit, timeout=0.3)()
    assert stamp is not None
    assert stamp.startswith("times:")


def with_a_git(
    workspace: Path, leaks: Leaks, tmp_path: Path, habit: str, *, timeout: float, hurry: Hurry | None = None
) -> Stamper:
    """A stamper whose git is a script."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "git"
    fake.write_text(f"#!/bin/sh\n{habit}\n")
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "SUPERVISE_TEST_TOKEN": leaks.token}
    opener = partial(open_tree, options=TreeOptions(mark="stale"), emit=lambda event: None)
    return Stamper(workspace, opener, environment, None, timeout, hurry or Hurry())


@in_git
async def test_a_further_cancel_ends_the_wait_for_a_git_that_hangs(
    workspace: Path, leaks: Leaks, tmp_path: Path
) -> None:
    hurry = Hurry()
    begun = tmp_path / "begun"
    stamp = with_a_git(workspace, leaks, tmp_path, f"touch '{begun}'; exec sleep 600", timeout=600.0, hurry=hurry)
    told: list[str | None] = []

    async def look() -> None:
        told.append(await stamp())

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            while not begun.exists():
                await trio.sleep(0.01)
            hurry.next()
    assert told == [None]


@in_git
async def test_what_outlives_the_stamp_is_told(workspace: Path) -> None:
    world = World()
    trees = FakeTrees({"--no-optional-locks": [Act(ends=0.0)]}, world)
    left = Survivor(4711, 0.0, "filter", "stamp", "immortal")
    told: list[Survivor] = []

    @asynccontextmanager
    async def opener(role: str, policy: StopPolicy, hurry: Hurry) -> AsyncIterator[Any]:
        async with trees(role, policy, hurry) as tree:
            yield tree
        tree.survivors = (left,)

    await Stamper(workspace, opener, {}, None, 20.0, Hurry(), told.extend)()
    assert told == [left]


async def test_a_workspace_that_is_gone_cannot_be_told(look: Look, tmp_path: Path) -> None:
    assert await look(tmp_path / "nowhere") is None


# --- the mark ----------------------------------------------------------------------------------------------


async def test_a_workspace_never_seen_is_stale_unless_assumed_fresh(workspace: Path, look: Look) -> None:
    mark = mark_of(workspace, look)
    stamp = await mark.stamp()
    assert await mark.changed(stamp, assume_fresh=False) == "this workspace was never seen before"
    assert await mark.changed(stamp, assume_fresh=True) == ""


async def test_clean_and_unchanged_is_not_stale(workspace: Path, look: Look) -> None:
    first = mark_of(workspace, look)
    assert await first.set("j1") == ""
    await first.clear(await first.stamp(), 12.5)
    second = mark_of(workspace, look)
    assert await second.set("j2") == ""
    assert await second.changed(await second.stamp(), assume_fresh=False) == ""
    assert second.last_reconcile_seconds == 12.5
    await second.clear(await second.stamp(), None)  # no reconcile: the last one stays on record
    third = mark_of(workspace, look)
    await third.changed(await third.stamp(), assume_fresh=False)
    assert third.last_reconcile_seconds == 12.5


async def test_clean_and_then_changed_is_stale(workspace: Path, look: Look) -> None:
    mark = mark_of(workspace, look)
    await mark.set("j1")
    await mark.clear(await mark.stamp(), None)
    edit(workspace)
    assert "has changed since 20" in await mark.changed(await mark.stamp(), assume_fresh=True)


async def test_a_state_that_cannot_be_told_is_stale(workspace: Path, look: Look) -> None:
    mark = mark_of(workspace, look)
    await mark.set("j1")
    await mark.clear(None, None)
    assert await mark.changed(None, assume_fresh=True) == "the state of the workspace cannot be told"
    assert "changed" in await mark.changed(await mark.stamp(), assume_fresh=True)


async def test_a_mark_survives_and_names_its_job(workspace: Path, look: Look) -> None:
    await mark_of(workspace, look).set("j1")
    why = await mark_of(workspace, look).set("j2")
    assert why.startswith("job j1 left it behind at 20")
    why = await mark_of(workspace, look).set("j3")
    assert why.startswith("job j2 left it behind at 20")
    assert why.endswith("(and 1 more before it)")


def named_on(mark: DiskMark) -> list[str]:
    """The jobs that the mark on the disk stands for."""
    file = mark.directory / "stale.json"
    return list(json.loads(file.read_bytes())["jobs"]) if file.exists() else []


async def test_a_clean_end_settles_what_dead_jobs_had_left(workspace: Path, look: Look) -> None:
    await mark_of(workspace, look).set("j1")
    failed = mark_of(workspace, look)
    await failed.set("j2")
    failed.release()  # it ended, and not clean
    mark = mark_of(workspace, look)
    await mark.set("j3")
    assert named_on(mark) == ["j1", "j2", "j3"]
    await mark.clear(await mark.stamp(), None)
    assert named_on(mark) == []
    assert (mark.directory / "clean.json").exists()


@pytest.mark.parametrize("first_to_end", ["long", "short"])
@pytest.mark.parametrize("leftover", [False, True])
async def test_of_two_jobs_at_once_the_first_to_end_leaves_the_mark_to_the_other(
    workspace: Path, look: Look, first_to_end: str, leftover: bool
) -> None:
    if leftover:
        await mark_of(workspace, look).set("j0")
    one, two = mark_of(workspace, look), mark_of(workspace, look)
    await one.set("long")
    assert (await two.set("short")).startswith("job long may be at work here since 20")
    early, late = (one, two) if first_to_end == "long" else (two, one)
    await early.clear(await early.stamp(), 1.0)
    early.release()
    assert set(named_on(late)) - {"j0"} == {"long", "short"} - {first_to_end}
    assert not (late.directory / "clean.json").exists()
    await late.clear(await late.stamp(), 1.0)
    late.release()
    assert not named_on(late)
    assert (late.directory / "clean.json").exists()
    assert await mark_of(workspace, look).set("next") == ""


async def test_a_job_that_fails_beside_another_leaves_its_mark_to_the_next(workspace: Path, look: Look) -> None:
    one, two = mark_of(workspace, look), mark_of(workspace, look)
    await one.set("long")
    await two.set("short")
    one.release()
    await two.clear(await two.stamp(), None)
    two.release()
    assert named_on(two) == ["long"]
    third = mark_of(workspace, look)
    assert (await third.set("third")).startswith("job long left it behind at 20")
    await third.clear(await third.stamp(), None)
    assert named_on(third) == []


async def test_a_job_of_another_process_that_lives_keeps_its_mark_until_it_dies(workspace: Path, look: Look) -> None:
    code = (
        "import sys, trio\nfrom pathlib import Path\nfrom supervise.index.stale import DiskMark\n"
        "mark = DiskMark(Path(sys.argv[1]), Path(sys.argv[2]), None)\n"
        "trio.run(mark.set, 'other')\nprint(flush=True)\nsys.stdin.read()\n"
    )
    state = workspace.parent.parent / "state"
    command = [sys.executable, "-c", code, str(state), str(workspace)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        mark = mark_of(workspace, look)
        await mark.set("j1")
        await mark.clear(await mark.stamp(), None)
        mark.release()
        assert named_on(mark) == ["other"]
        other.kill()
    assert (await mark.set("j2")).startswith("job other left it behind")
    await mark.clear(await mark.stamp(), None)
    assert named_on(mark) == []


async def test_a_mark_of_an_older_version_is_a_leftover(workspace: Path, look: Look) -> None:
    mark = mark_of(workspace, look)
    mark.directory.mkdir(parents=True)
    (mark.directory / "stale.json").write_text('{"workspace":"/w","job_id":"old","time":"2026-01-01"}')
    assert await mark.set("j1") == "job old left it behind at 2026-01-01"
    assert named_on(mark) == ["old", "j1"]
    await mark.clear(await mark.stamp(), None)
    assert named_on(mark) == []


async def test_a_mark_does_not_grow_for_ever(workspace: Path, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale, "MOST_JOBS", 3)
    for number in range(6):
        mark = mark_of(workspace, look)
        await mark.set(f"j{number}")
    assert named_on(mark) == ["j3", "j4", "j5"]


async def test_of_the_names_on_a_full_mark_ours_go_first(
    workspace: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stale, "MOST_JOBS", 3)
    other, ours = mark_of(workspace, look), mark_of(workspace, look)
    await other.set("other")
    for number in range(5):
        await ours.set(f"j{number}")
    assert named_on(ours) == ["other", "j3", "j4"]
    await ours.clear(await ours.stamp(), None)
    assert named_on(ours) == ["other"]
    other.release()
    ours.release()


@pytest.mark.parametrize("leftover", [False, True])
async def test_jobs_that_share_a_mark_are_settled_together(workspace: Path, look: Look, leftover: bool) -> None:
    if leftover:
        await mark_of(workspace, look).set("j0")
    shared, other = mark_of(workspace, look), mark_of(workspace, look)
    assert bool(await shared.set("one")) == leftover
    await other.set("other")
    assert await shared.set("two") == ""
    assert named_on(shared)[-3:] == ["one", "other", "two"]
    await shared.clear(await shared.stamp(), None)
    assert named_on(shared) == ["other"]
    shared.release()
    await other.clear(await other.stamp(), None)
    other.release()
    assert named_on(other) == []


async def test_a_name_more_that_the_disk_refuses_loses_nothing(
    workspace: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    shared = mark_of(workspace, look)
    await shared.set("one")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "replace", full)
        with pytest.raises(OSError):
            await shared.set("two")
    assert named_on(shared) == ["one"]
    other = mark_of(workspace, look)
    assert (await other.set("other")).startswith("job one may be at work here")  # the hold is still there
    shared.release()
    other.release()


async def test_many_jobs_at_once_lose_no_name(workspace: Path, look: Look) -> None:
    marks = [mark_of(workspace, look) for _ in range(8)]
    async with trio.open_nursery() as nursery:
        for number, mark in enumerate(marks):
            nursery.start_soon(mark.set, f"j{number}")
    assert sorted(named_on(marks[0])) == [f"j{number}" for number in range(8)]
    stamp = await marks[0].stamp()
    async with trio.open_nursery() as nursery:
        for mark in marks[1:]:
            nursery.start_soon(mark.clear, stamp, None)
    assert named_on(marks[0]) == ["j0"]


async def test_a_lock_that_nobody_gives_back_is_trouble(
    workspace: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stale, "LOCK_PATIENCE", 0.1)
    mark = mark_of(workspace, look)
    await mark.set("j1")
    descriptor = os.open(mark.directory / "lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another job held its lock"):
            await mark.clear(await mark.stamp(), None)
        with pytest.raises(OSError, match="another job held its lock"):
            await mark_of(workspace, look).set("j2")
    finally:
        os.close(descriptor)
    assert named_on(mark) == ["j1"]
    mark.release()


@pytest.mark.parametrize("name", ["lock", "alive"])
async def test_a_lock_that_is_a_link_is_trouble(workspace: Path, look: Look, name: str) -> None:
    mark = mark_of(workspace, look)
    mark.directory.mkdir(parents=True)
    (mark.directory / name).symlink_to(workspace / "kept.py")
    with pytest.raises(OSError):
        await mark.set("j1")


async def test_a_mark_survives_a_kill(workspace: Path, look: Look) -> None:
    code = (
        "import os, signal, sys, trio\nfrom pathlib import Path\nfrom supervise.index.stale import DiskMark\n"
        "mark = DiskMark(Path(sys.argv[1]), Path(sys.argv[2]), None)\n"
        "trio.run(mark.set, 'j1')\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    state = workspace.parent.parent / "state"
    assert subprocess.run([sys.executable, "-c", code, str(state), str(workspace)]).returncode == -9
    assert (await mark_of(workspace, look).set("j2")).startswith("job j1 left it behind")


async def test_two_names_of_one_workspace_are_one(workspace: Path, look: Look) -> None:
    link = workspace.parent.parent / "link"
    link.symlink_to(workspace)
    state = workspace.parent.parent / "state"
    assert DiskMark(state, link, partial(look, link)).directory == mark_of(workspace, look).directory
    assert DiskMark(state, workspace.parent, partial(look, link)).directory != mark_of(workspace, look).directory


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
async def test_corrupt_records_are_stale(workspace: Path, look: Look, content: bytes) -> None:
    mark = mark_of(workspace, look)
    await mark.set("j1")
    await mark.clear(await mark.stamp(), None)
    (mark.directory / "clean.json").write_bytes(content)
    why = await mark.changed(await mark.stamp(), assume_fresh=True)
    assert why == "the record of its last clean end cannot be read"
    (mark.directory / "stale.json").write_bytes(content)
    assert await mark.set("j2") == "job ? left it behind at ?"


async def test_the_mark_is_on_the_disk_when_set_returns(
    workspace: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def spy(name: str) -> None:
        real = getattr(os, name)

        def called(*args: object, **kwargs: object) -> object:
            result = real(*args, **kwargs)
            done.append(name)
            return result

        monkeypatch.setattr(os, name, called)

    mark = mark_of(workspace, look)
    stamp = await mark.stamp()
    for name in ("fsync", "rename", "unlink"):
        spy(name)
    for job_id in ("j1", "j2"):  # one that joins is no less safe
        await mark.set(job_id)
        assert done == ["fsync", "rename", "fsync"]  # the file, its name, the directory
        done.clear()
    await mark.clear(stamp, None)
    assert done == ["fsync", "rename", "fsync", "unlink", "fsync"]  # the record is safe before the mark goes


async def test_a_crash_while_the_mark_is_cleared_leaves_it(
    workspace: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = mark_of(workspace, look)
    await mark.set("j1")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "replace", fail)
    with pytest.raises(OSError):
        await mark.clear(await mark.stamp(), None)
    monkeypatch.undo()
    mark.release()
    assert (await mark_of(workspace, look).set("j2")).startswith("job j1 left it behind")


# --- a disk that refuses -----------------------------------------------------------------------------------


async def clean_then(workspace: Path, look: Look, spoil: Callable[[Path], None]) -> DiskMark:
    """A workspace that ended clean, whose next mark cannot be written."""
    mark = mark_of(workspace, look)
    await mark.set("j1")
    await mark.clear(await mark.stamp(), None)
    assert await mark.changed(await mark.stamp(), assume_fresh=False) == ""
    spoil(mark.directory)
    with pytest.raises(OSError):
        await mark.set("j2")
    return mark


def directory_in_place(directory: Path) -> None:
    (directory / "stale.json").mkdir()


async def test_without_a_mark_the_workspace_does_not_pass_for_clean_nor_for_never_seen(
    workspace: Path, look: Look
) -> None:
    mark = await clean_then(workspace, look, directory_in_place)
    for assume_fresh in (False, True):
        why = await mark.changed(await mark.stamp(), assume_fresh=assume_fresh)
        assert why == "the record of its last clean end cannot be read"


async def test_a_full_disk(workspace: Path, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    mark = await clean_then(workspace, look, lambda directory: monkeypatch.setattr(durable, "replace", full))
    assert await mark.changed(await mark.stamp(), assume_fresh=True)
    assert sorted(path.name for path in mark.directory.iterdir()) == ["alive", "clean.json", "lock"]


async def test_a_file_in_place_of_the_state_directory(workspace: Path, look: Look) -> None:
    (workspace.parent.parent / "state").write_text("in the way")
    with pytest.raises(OSError):
        await mark_of(workspace, look).set("j1")


async def test_a_directory_that_may_not_be_written(workspace: Path, look: Look) -> None:
    """As a user who owns it: for root there is no such directory."""
    mark = mark_of(workspace, look)
    await mark.set("j1")
    await mark.clear(await mark.stamp(), None)
    mark.directory.chmod(0o500)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom supervise.index.stale import DiskMark\n"
        "if os.getuid() == 0:\n    os.setgroups([])\n    os.setresgid(65534, 65534, 65534)\n"
        "    os.setresuid(65534, 65534, 65534)\n"
        "mark = DiskMark(Path(sys.argv[1]), Path(sys.argv[2]), None)\n"
        "try:\n    mark._set('j2')\nexcept PermissionError:\n    sys.exit(7)\n"
    )
    if os.getuid() == 0:
        for path in (mark.directory, *mark.directory.iterdir()):
            os.chown(path, 65534, 65534)
        _open_the_way(mark.directory.parent)
    try:
        command = [sys.executable, "-c", code, str(mark.directory.parent.parent), str(workspace)]
        result = subprocess.run(command, capture_output=True, text=True)
    finally:
        mark.directory.chmod(0o700)
    assert result.returncode == 7, result.stderr
    assert await mark.changed(await mark.stamp(), assume_fresh=True)


def _open_the_way(path: Path) -> None:
    """Let others pass through pytest's private directories, which pytest removes as a whole."""
    for directory in (path, *path.parents):
        if directory.stat().st_mode & 0o001 == 0:
            directory.chmod(directory.stat().st_mode | 0o011)
