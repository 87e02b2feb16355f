"""What a worker does when the machine takes something from it: it says so, loses nothing, and goes on when it can."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from supervise.dispatch.watching import Hints, Inotify
from supervise.dispatch.worker import open_worker
from supervise.events import Event, WorkerChanged, WorkerTrouble
from tests.processes.lone_worker import LoneWorker, lone_worker
from tests.processes.workers import WORKER, Files, Gate, eventually, playing, settings_of, status, task

SWEEP = 600.0  # seconds: what recovers does so by other means


def run(*command: str | Path) -> str:
    """Why a command failed; empty if it did not."""
    done = subprocess.run([*command], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if trouble := run("mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", path):
        pytest.skip(f"a small disk cannot be mounted: {trouble}")
    try:
        yield path
    finally:
        assert not run("umount", "--lazy", path)


def fill(disk: Path) -> Path:
    """Until not a byte can be written."""
    path = disk / "filler"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (4096, 1):
            try:
                while True:
                    os.write(descriptor, bytes(size))
            except OSError:  # it is full
                continue
    finally:
        os.close(descriptor)
    return path


def reasons_of(events: list[Event]) -> str:
    """All that the worker's events have told."""
    told = [text for event in events if isinstance(event, WorkerChanged) for text in event.reasons]
    return "\n".join([*told, *(event.error for event in events if isinstance(event, WorkerTrouble))])


# --- disks -------------------------------------------------------------------------------------------------


async def test_on_a_full_disk_a_result_waits_until_there_is_room(disk: Path) -> None:
    files, gate, events = Files(disk), Gate(), list[Event]()
    settings = settings_of(disk, sweep_interval=SWEEP)
    async with open_worker(WORKER, settings=settings, executor=gate.executor(), emit=events.append) as worker:
        files.drop("t")
        await eventually(lambda: gate.begun, "it runs")
        filler = fill(disk)
        gate.let_go()
        told = await status(worker, "degraded", "publication", "No space left", "make room")
        assert f"{files.spool.results}/t.json" in told
        await eventually(lambda: files.heartbeat()["status"] == "degraded", "the heartbeat says so on the full disk")
        assert not (files.spool.results / "t.json").exists()
        filler.unlink()
        await files.ended("t")
        await status(worker, "healthy")
    assert "No space left" in reasons_of(events)
    assert files.left() == []


async def test_on_a_full_disk_what_is_no_task_stays_until_there_is_room_for_its_reason(disk: Path) -> None:
    files = Files(disk)
    settings = settings_of(disk, sweep_interval=SWEEP)
    async with open_worker(WORKER, settings=settings, executor=playing()) as worker:
        await status(worker, "healthy")
        for name, data in (("bad", b"{}"), ("half", b"{")):
            (files.tasks / f".{name}").write_bytes(data)
        filler = fill(disk)
        for name in ("bad", "half"):
            (files.tasks / f".{name}").rename(files.tasks / f"{name}.json")
        await status(worker, "degraded", "cannot be set aside", "No space left", "make room")
        await trio.sleep(0.5)  # the grace of the half one is over, and it was tried several times
        await status(worker, "degraded", "cannot be set aside")
        assert sorted(path.name for path in files.tasks.iterdir()) == ["bad.json", "half.json"]
        filler.unlink()
        for name in ("bad", "half"):
            await files.buried(name)
        await status(worker, "healthy")
        assert worker.stats.tasks_dlq == 2
    assert files.left() == []


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """For whoever goes by its path; what is open stays as it is."""
    if trouble := run("mount", "--bind", disk, disk):
        pytest.skip(f"it cannot be made read-only: {trouble}")
    try:
        assert not run("mount", "-o", "remount,bind,ro", disk)
        yield
    finally:
        assert not run("umount", disk)


async def test_a_disk_that_becomes_read_only_is_told_and_nothing_is_lost(disk: Path) -> None:
    files, gate = Files(disk), Gate()
    settings = settings_of(disk, sweep_interval=SWEEP)
    async with open_worker(WORKER, settings=settings, executor=gate.executor()) as worker:
        files.drop("runs")
        await eventually(lambda: gate.begun, "it runs")
        (files.tasks / ".waits").write_bytes(task("waits"))
        directory = os.open(files.tasks, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with read_only(disk):
                gate.let_go()
                os.rename(".waits", "waits.json", src_dir_fd=directory, dst_dir_fd=directory)
                await status(worker, "degraded", "publication", "claim", "Read-only file system; mount it writable")
        finally:
            os.close(directory)
        for task_id in ("runs", "waits"):
            await files.ended(task_id)
        await status(worker, "healthy")
    assert files.left() == []
    assert gate.begun == ["runs", "waits"]


# --- directories -------------------------------------------------------------------------------------------


async def test_a_tasks_directory_that_is_removed_is_made_and_watched_again(root: Path) -> None:
    files, events = Files(root), list[Event]()
    settings = settings_of(root, sweep_interval=SWEEP, poll_interval=0.2)
    async with open_worker(WORKER, settings=settings, executor=playing(), emit=events.append) as worker:
        files.drop("waits", dependencies=["nobody"])
        await eventually(lambda: worker.queue_size == 1, "it waits")
        shutil.rmtree(files.tasks)
        await eventually(files.tasks.is_dir, "it is made again")
        await status(worker, "healthy")
        await eventually(lambda: worker.queue_size == 0, "what was there is known to be gone")
        files.drop("t")
        await files.ended("t")
        shutil.rmtree(files.tasks)
        files.tasks.mkdir()  # by somebody else, at once
        await status(worker, "healthy")
        files.drop("u")
        await files.ended("u")
    assert "is gone: it is made anew" in reasons_of(events)


@pytest.mark.parametrize("name", ["running", "results", "dlq"])
async def test_another_directory_that_is_removed_is_told_and_made_again(root: Path, name: str) -> None:
    files = Files(root)
    settings = settings_of(root, sweep_interval=0.5)
    async with open_worker(WORKER, settings=settings, executor=playing()) as worker:
        await status(worker, "healthy")
        shutil.rmtree(root / name)
        files.drop("good")
        files.drop("bad", "auth")
        await status(worker, "degraded", "No such file", f"/{name}/")
        await files.ended("good")
        await files.buried("bad")
        await status(worker, "healthy")
    assert files.left() == []


async def test_a_root_that_is_renamed_away_is_told_and_not_made_anew(root: Path) -> None:
    """What was begun is published when it is back."""
    real = root / "real"
    real.mkdir()
    files, gate = Files(real), Gate()
    settings = settings_of(real, sweep_interval=0.2)
    async with open_worker(WORKER, settings=settings, executor=gate.executor()) as worker:
        files.drop("runs")
        await eventually(lambda: gate.begun, "it runs")
        files.drop("waits", dependencies=["runs"])
        await eventually(lambda: worker.queue_size == 1, "the other one waits")
        real.rename(root / "away")
        gate.let_go()
        await status(worker, "degraded", f"{real} is gone: put it back", "publication")
        assert not real.exists()
        (root / "away").rename(real)
        for task_id in ("runs", "waits"):
            await files.ended(task_id)
        await status(worker, "healthy")
    assert files.left() == []
    assert gate.begun == ["runs", "waits"]


# --- hints -------------------------------------------------------------------------------------------------


async def test_more_changes_than_the_kernel_keeps_are_looked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(root)
    lost: list[bool] = []
    read = Inotify.read

    def listening(self: Inotify) -> Hints:
        hints = read(self)
        lost.append(hints.everything)
        return hints

    monkeypatch.setattr(Inotify, "read", listening)
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip(f"too many events to fill the queue with: {limit}")
    async with open_worker(WORKER, settings=settings_of(root, sweep_interval=SWEEP), executor=playing()) as worker:
        await status(worker, "healthy")
        there, back = os.fspath(files.tasks / "noise"), os.fspath(files.tasks / "echo")
        Path(there).write_bytes(b"")
        for _ in range(limit // 2 + 1):  # Trio waits meanwhile
            os.rename(there, back)
            os.rename(back, there)
        Path(there).unlink()
        for number in range(20):
            files.drop(f"t{number}")
        for number in range(20):
            await files.ended(f"t{number}")
    assert any(lost)
    assert files.left() == []


def in_user_namespace() -> list[str]:
    """Where limits of its own can be set; those of the machine stay."""
    command = ["unshare", "--user", "--map-root-user"]
    if trouble := run(*command, "sh", "-c", "echo 1000 > /proc/sys/user/max_inotify_instances"):
        pytest.skip(f"no user namespace with limits of its own: {trouble}")

    return [*command, sys.executable]


@pytest.mark.parametrize(("limit", "words"), [("instances", "Too many open files"), ("watches", "No space left")])
def test_without_hints_the_directory_is_polled_until_there_are_some_again(root: Path, limit: str, words: str) -> None:
    files = Files(root)
    name = f"max_inotify_{limit}"
    python = in_user_namespace()
    with lone_worker(root, python=python, limits=[f"{name}=0"], sweep_interval=SWEEP, poll_interval=0.2) as worker:
        told = worker.status("degraded", words, "it is polled", f"max_user_{limit}")
        assert str(files.tasks) in told
        files.drop("polled")
        wait(lambda: files.result("polled"))
        worker.ask(f"limit {name}=1000")
        worker.status("healthy")
        files.drop("hinted")
        wait(lambda: files.result("hinted"))
    assert files.left() == []


def wait(check: Callable[[], object]) -> None:
    """For whoever has no Trio."""
    trio.run(eventually, check, "it")


def test_without_descriptors_tasks_wait_and_none_is_lost(root: Path) -> None:
    files = Files(root)

    def starve(worker: LoneWorker, first: int) -> None:
        assert worker.ask("hold-files") > 0
        for number in range(first, first + 20):
            files.drop(f"t{number}")
        worker.status("degraded", "Too many open files", "ulimit -n")
        assert worker.ask("free-files") == 0
        for number in range(first, first + 20):
            wait(lambda number=number: files.result(f"t{number}"))  # type: ignore[misc]  # mypy infers no lambda with a default
        worker.status("healthy")

    with lone_worker(root, sweep_interval=SWEEP) as worker:
        for first in (0, 100, 200):
            starve(worker, first)
    assert files.left() == []
    assert files.letters() == []


def starved_before_its_time(files: Files, worker: LoneWorker) -> list[str]:
    """Tasks that are known, and become due when no descriptor is left; later ones if this machine was too slow."""
    for delay in (1.0, 3.0, 9.0):
        names = [f"t{delay:g}-{number}" for number in range(5)]
        for name in names:
            files.drop(name, not_before=time.time() + delay)
        due = time.time() + delay
        wait(lambda names=names: all((files.spool.triggers / f"{name}.trigger").exists() for name in names))  # type: ignore[misc]  # mypy infers no lambda with a default
        assert worker.ask("hold-files") > 0
        if time.time() < due - 0.2:
            return names
        assert worker.ask("free-files") == 0
    raise AssertionError("this machine is too slow")


def test_a_claim_for_which_no_descriptor_is_left_is_made_again(root: Path) -> None:
    """The file is renamed already when that turns out."""
    files = Files(root)
    with lone_worker(root, sweep_interval=SWEEP) as worker:
        names = starved_before_its_time(files, worker)
        worker.status("degraded", "claim", "Too many open files")
        assert worker.ask("free-files") == 0
        for name in names:
            wait(lambda name=name: files.result(name))  # type: ignore[misc]  # mypy infers no lambda with a default
        worker.status("healthy")
    assert {(files.result(name) or {})["attempt"] for name in names} == {1}
    assert files.left() == []
