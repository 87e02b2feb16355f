"""The stale mark and the stamp, on real directories and with the real git."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from supervise import durable
from supervise.index.stale import DiskMark, Stamper
from supervise.processes.child import TreeOptions, open_tree
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
        return await Stamper(workspace, opener, environment, None, 20.0)()

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
async def test_nothing_that_the_workspace_configures_is_run(workspace: Path, look: Look) -> None:
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
    stamp = Stamper(workspace, opener, {"PATH": "/nonexistent", "SUPERVISE_TEST_TOKEN": leaks.token}, None, 20.0)
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
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "git"
    fake.write_text(f"#!/bin/sh\n{habit}\n")
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    opener = partial(open_tree, options=TreeOptions(mark="stale"), emit=lambda event: None)
    stamp = await Stamper(workspace, opener, {"PATH": path, "SUPERVISE_TEST_TOKEN": leaks.token}, None, 0.3)()
    assert stamp is not None
    assert stamp.startswith("times:")


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
    assert (await mark_of(workspace, look).set("j3")).startswith("job j2 ")


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
    await mark.set("j1")
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
    assert [path.name for path in mark.directory.iterdir()] == ["clean.json"]


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
        "mark = object.__new__(DiskMark)\n"
        "mark.directory = Path(sys.argv[1])\nmark._workspace = '/w'\n"
        "mark._stale, mark._clean = mark.directory / 'stale.json', mark.directory / 'clean.json'\n"
        "try:\n    mark._set('j2')\nexcept PermissionError:\n    sys.exit(7)\n"
    )
    if os.getuid() == 0:
        for path in (mark.directory, mark.directory / "clean.json"):
            os.chown(path, 65534, 65534)
        _open_the_way(mark.directory.parent)
    try:
        result = subprocess.run([sys.executable, "-c", code, str(mark.directory)], capture_output=True, text=True)
    finally:
        mark.directory.chmod(0o700)
    assert result.returncode == 7, result.stderr
    assert await mark.changed(await mark.stamp(), assume_fresh=True)


def _open_the_way(path: Path) -> None:
    """Let others pass through pytest's private directories, which pytest removes as a whole."""
    for directory in (path, *path.parents):
        if directory.stat().st_mode & 0o001 == 0:
            directory.chmod(directory.stat().st_mode | 0o011)
