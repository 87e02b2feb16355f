"""Hints of changes from the kernel, and where there are none."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from supervise.dispatch.watching import Hints, Inotify, Polling, sees_nothing
from supervise.errors import MissingExtra
from tests.processes.lone_worker import lone_worker
from tests.processes.workers import Files

LIMIT = 10.0  # seconds for a hint


@contextmanager
def inotify(directory: Path) -> Iterator[Inotify]:
    watching = Inotify(directory)
    try:
        yield watching
    finally:
        watching.close()


async def hints(watching: Inotify) -> Hints:
    """Those that are there, or come."""
    with trio.fail_after(LIMIT):
        await watching.wait()
    return watching.read()


async def test_a_file_renamed_in_is_told(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x")
    (tmp_path / "watched").mkdir()
    with inotify(tmp_path / "watched") as watching:
        (tmp_path / "elsewhere").rename(tmp_path / "watched" / "a.json")
        assert await hints(watching) == Hints(names=frozenset({"a.json"}))


async def test_a_file_being_written_is_born_and_told_when_it_is_closed(tmp_path: Path) -> None:
    with inotify(tmp_path) as watching:
        with open(tmp_path / "a.json", "wb", buffering=0) as file:
            file.write(b"{")
            assert await hints(watching) == Hints(born=frozenset({"a.json"}))
            file.write(b"}")
            assert watching.read() == Hints(), "a write alone is no hint"
        assert await hints(watching) == Hints(names=frozenset({"a.json"}))


@pytest.mark.parametrize("kind", ["hard link", "link", "pipe", "directory"])
async def test_what_nobody_will_close_is_born(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").write_text("x")
    (tmp_path / "watched").mkdir()
    path = tmp_path / "watched" / "a.json"
    with inotify(tmp_path / "watched") as watching:
        match kind:
            case "hard link":
                path.hardlink_to(tmp_path / "elsewhere")
            case "link":
                path.symlink_to("nowhere")
            case "pipe":
                os.mkfifo(path)
            case _:
                path.mkdir()
        assert await hints(watching) == Hints(born=frozenset({"a.json"}))


async def test_a_file_that_is_removed_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("x")
    (tmp_path / "b.json").write_text("x")
    with inotify(tmp_path) as watching:
        (tmp_path / "a.json").unlink()
        assert await hints(watching) == Hints(gone=frozenset({"a.json"}))
        (tmp_path / "b.json").rename(tmp_path / "elsewhere")
        assert await hints(watching) == Hints(gone=frozenset({"b.json"}), names=frozenset({"elsewhere"}))


async def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\n.json")
    with inotify(tmp_path) as watching:
        (tmp_path / name).write_text("x")
        assert name in (await hints(watching)).names


@pytest.mark.parametrize("how", ["removed", "renamed away"])
async def test_a_directory_that_goes_is_over(tmp_path: Path, how: str) -> None:
    directory = tmp_path / "watched"
    directory.mkdir()
    with inotify(directory) as watching:
        if how == "removed":
            shutil.rmtree(directory)
        else:
            directory.rename(tmp_path / "away")
        assert (await hints(watching)).over


async def test_other_directories_are_told_apart(tmp_path: Path) -> None:
    for name in ("main", "other"):
        (tmp_path / name).mkdir()
    with inotify(tmp_path / "main") as watching:
        watching.also(tmp_path / "other")
        watching.also(tmp_path / "other")  # as often as one likes
        (tmp_path / "other" / "r.json").write_text("x")
        assert await hints(watching) == Hints(others=frozenset({tmp_path / "other" / "r.json"}))
        shutil.rmtree(tmp_path / "other")
        assert not (await hints(watching)).over
        with pytest.raises(FileNotFoundError):
            watching.also(tmp_path / "other")


async def test_a_cancelled_wait_loses_no_hint(tmp_path: Path) -> None:
    with inotify(tmp_path) as watching:
        with trio.move_on_after(0.01) as scope:
            await watching.wait()
        assert scope.cancelled_caught
        assert watching.read() == Hints()
        (tmp_path / "a.json").write_text("x")
        with trio.CancelScope() as scope:
            scope.cancel()
            await watching.wait()
        assert "a.json" in (await hints(watching)).names


@pytest.mark.parametrize("name", ["nobody", "a-file"])
def test_what_is_no_directory_cannot_be_watched_and_leaves_no_descriptor(tmp_path: Path, name: str) -> None:
    (tmp_path / "a-file").write_text("x")
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        Inotify(tmp_path / name)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inotify_simple", None)
    with pytest.raises(MissingExtra, match="inotify-simple"):
        Inotify(tmp_path)


async def test_a_closed_watch_wakes_whoever_waits(tmp_path: Path) -> None:
    watching = Inotify(tmp_path)
    woken = trio.Event()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await watching.wait()
        woken.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        watching.close()
    assert woken.is_set()


async def test_polling_waits_for_ever_and_tells_of_everything(tmp_path: Path, autojump_clock: trio.abc.Clock) -> None:
    watching = Polling()
    with trio.move_on_after(3600.0) as scope:
        await watching.wait()
    assert scope.cancelled_caught
    watching.also(tmp_path)
    assert watching.read() == Hints(everything=True)
    watching.close()


# --- file systems ------------------------------------------------------------------------------------------

#: As proc_pid_mountinfo(5) has it; later lines lie on top of earlier ones.
MOUNTS = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:20 / /proc rw,nosuid - proc proc rw
23 21 0:21 / /srv/nfs rw shared:3 - nfs4 server:/export rw,vers=4.2
24 23 0:22 / /srv/nfs/local rw shared:4 master:1 - tmpfs tmpfs rw
25 21 0:23 / /srv/cifs rw - cifs //server/share rw
26 21 0:24 / /mnt/with\040space rw - fuse.sshfs user@host:/ rw
27 21 0:25 / /mnt/blocks rw - fuseblk /dev/sdb1 rw
28 21 0:26 / /mnt/vm rw - virtiofs shared rw
29 21 0:27 / /twice rw - nfs server:/a rw
30 21 0:28 / /twice rw - ext4 /dev/sdc1 rw
31 21 0:29 / /again rw - ext4 /dev/sdc1 rw
32 21 0:30 / /again rw - 9p share rw
33 21 0:31 / /back\134slash rw - nfs4 server:/b rw
34 21 0:32 / /merged rw - overlay overlay rw,lowerdir=/a
35 21 0:33 / /plain-fuse rw - fuse whatever rw
"""


@pytest.mark.parametrize(
    ("directory", "found"),
    [
        ("/var/spool", ""),
        ("/srv/nfs", "nfs4"),
        ("/srv/nfs/deep/er", "nfs4"),
        ("/srv/nfs-not", ""),
        ("/srv/nfs/local/tasks", ""),
        ("/srv/cifs/tasks", "cifs"),
        ("/mnt/with space/tasks", "fuse.sshfs"),
        ("/mnt/blocks/tasks", ""),
        ("/mnt/vm", "virtiofs"),
        ("/twice/tasks", ""),
        ("/again/tasks", "9p"),
        ("/back\\slash", "nfs4"),
        ("/merged/tasks", ""),
        ("/plain-fuse/tasks", "fuse"),
        ("/srv/nfs/../elsewhere", ""),
    ],
)
def test_a_file_system_that_others_change_unseen_is_told_by_name(tmp_path: Path, directory: str, found: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.lstrip())
    assert sees_nothing(Path(directory), os.fspath(mounts)) == found


def test_a_link_is_followed_to_its_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    real = tmp_path / "real"
    real.mkdir()
    mounts.write_text(f"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n22 21 0:9 / {real} rw - nfs server:/ rw\n")
    (tmp_path / "link").symlink_to(real)
    assert sees_nothing(tmp_path / "link" / "tasks", os.fspath(mounts)) == "nfs"


def test_where_nobody_tells_of_mounts_hints_are_believed(tmp_path: Path) -> None:
    assert sees_nothing(tmp_path, os.fspath(tmp_path / "nobody")) == ""


def test_this_machine_is_understood(tmp_path: Path) -> None:
    assert sees_nothing(Path("/proc")) == ""
    assert isinstance(sees_nothing(tmp_path), str)


# --- nothing to do -----------------------------------------------------------------------------------------


def test_a_worker_without_tasks_sleeps(tmp_path: Path) -> None:
    """Not a thread of it wakes, and its loop does not go round; a task that waits for its time changes nothing."""
    files = Files(tmp_path)
    files.drop("later", not_before="2999-01-01T00:00:00Z")
    files.drop("blocked", dependencies=["nobody"])
    with lone_worker(tmp_path, sweep_interval=600.0, poll_interval=600.0, heartbeat_interval=600.0) as worker:
        switches, turns = worker.ask("idle")
    assert turns == 0
    assert switches <= 6, "the timer of the test itself, and a thread of Trio's that ends when nobody needs it"


async def test_who_asks_for_more_of_what_is_closed_gets_nothing(tmp_path: Path) -> None:
    watching = Inotify(tmp_path)
    watching.close()
    watching.also(tmp_path)
