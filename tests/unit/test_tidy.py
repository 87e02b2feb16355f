"""What is removed of old jobs, and what never is."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import supervise
from supervise import IndexSettings, JobSpec, MockAgent, Settings
from supervise.job import tidy as tidy_module
from supervise.job.tidy import EVERY, QUIET, REMOVED, STAMP, Tidy, prepare

DAY = 86400.0


class World:
    """A directory of jobs."""

    def __init__(self, jobs: Path) -> None:
        self.jobs = jobs
        jobs.mkdir()
        self.running: set[str] = set()

    def job(self, name: str, *, age: float, ended: bool = True, size: int = 100) -> Path:
        """A job's directory that was last used `age` seconds ago."""
        directory = self.jobs / name
        directory.mkdir()
        (directory / "agent.stdout.log").write_bytes(b"x" * size)
        (directory / "heartbeat.json").write_text("{}")
        if ended:
            (directory / "result.json").write_text("{}")
        self.age(directory, age)
        return directory

    def age(self, directory: Path, age: float) -> None:
        then = time.time() - age
        for path in (*directory.iterdir(), directory):
            os.utime(path, (then, then), follow_symlinks=False)

    def tidy(self, max_age: float = 30 * DAY, max_bytes: int = 1 << 30) -> Tidy:
        return Tidy(self.jobs, max_age, max_bytes, lambda name: name in self.running)

    def look(self, **bounds: Any) -> list[str]:
        """The names that are there after a look."""
        (self.jobs / STAMP).unlink(missing_ok=True)
        self.tidy(**bounds).look()
        return sorted(name for name in os.listdir(self.jobs) if name != STAMP)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "jobs")


def test_jobs_that_ended_too_long_ago_are_removed(world: World) -> None:
    world.job("old", age=31 * DAY)
    world.job("young", age=29 * DAY)
    assert world.look() == ["young"]


def test_a_job_without_a_result_is_judged_by_its_newest_file(world: World) -> None:
    world.job("killed", age=31 * DAY, ended=False)
    running = world.job("elsewhere", age=31 * DAY, ended=False)
    os.utime(running / "heartbeat.json")
    assert world.look() == ["elsewhere"]


def test_an_old_result_beside_a_fresh_heartbeat_is_still_that_of_an_ended_job(world: World) -> None:
    directory = world.job("old", age=31 * DAY)
    os.utime(directory / "heartbeat.json")
    assert world.look() == []


def test_jobs_of_this_supervisor_that_run_are_never_touched(world: World) -> None:
    world.job("mine", age=31 * DAY)
    world.job("mine-too", age=2 * QUIET, ended=False)
    world.running |= {"mine", "mine-too"}
    assert world.look(max_bytes=0) == ["mine", "mine-too"]


def test_past_the_size_the_oldest_that_have_ended_go_first(world: World) -> None:
    for number in range(5):
        world.job(f"job{number}", age=(5 - number) * 10, size=1000)
    assert world.look(max_bytes=2100) == ["job3", "job4"]


def test_a_job_that_may_be_running_elsewhere_is_not_removed_for_its_size(world: World) -> None:
    world.job("quiet", age=QUIET + 60, ended=False, size=1000)
    world.job("running", age=QUIET - 60, ended=False, size=1000)
    assert world.look(max_bytes=0) == ["running"]


def test_a_job_that_has_written_nothing_is_not_removed_for_its_size(world: World) -> None:
    waits = world.jobs / "waits"
    waits.mkdir()
    world.age(waits, 2 * QUIET)
    world.job("running", age=10, ended=False)
    assert world.look(max_bytes=0) == ["running", "waits"]


def test_what_lies_in_directories_of_a_job_counts_too(world: World) -> None:
    deep = world.job("deep", age=100) / "more" / "still"
    deep.mkdir(parents=True)
    (deep / "large").write_bytes(b"x" * 5000)
    assert world.look(max_bytes=4000) == []


def test_strangers_are_left_alone(world: World, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "result.json").write_text("{}")
    (world.jobs / "link").symlink_to(outside)
    (world.jobs / "file").write_text("mine")
    (world.jobs / ".hidden").mkdir()
    (world.jobs / "no id!").mkdir()
    world.age(outside, 99 * DAY)
    world.age(world.jobs, 99 * DAY)
    assert world.look(max_bytes=0) == [".hidden", "file", "link", "no id!"]
    assert (outside / "result.json").exists()


def test_a_directory_of_another_user_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.job("theirs", age=99 * DAY)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert world.look() == ["theirs"]


def test_no_link_inside_of_a_job_leads_out_of_it(world: World, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    directory = world.job("old", age=0)
    (directory / "link").symlink_to(outside)
    (directory / "file-link").symlink_to(outside / "kept")
    world.age(directory, 99 * DAY)
    assert world.look() == []
    assert (outside / "kept").read_text() == "mine"


def test_what_a_killed_tidy_has_left_goes_the_next_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.job("old", age=99 * DAY)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed here
    left = world.look()
    assert [name.startswith(REMOVED) for name in left] == [True]
    monkeypatch.undo()
    assert world.look() == left  # another one may be just at it
    now = time.time()
    monkeypatch.setattr(tidy_module.time, "time", lambda: now + EVERY + 5)
    assert world.look() == []


@pytest.mark.parametrize("with_result", [True, False])
def test_a_job_that_begins_at_this_very_moment_gets_its_directory_back(
    world: World, monkeypatch: pytest.MonkeyPatch, with_result: bool
) -> None:
    directory = world.job("again", age=99 * DAY, ended=with_result)
    rename = os.rename

    def begin_and_rename(old: Any, new: Any, **at: Any) -> None:
        prepare(directory, ("result.json", "heartbeat.json"))
        rename(old, new, **at)

    monkeypatch.setattr(os, "rename", begin_and_rename)
    assert world.look() == ["again"]
    assert os.listdir(directory) == ["agent.stdout.log"]


def test_a_job_that_begins_while_its_old_directory_goes_gets_a_new_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = world.job("again", age=99 * DAY)
    utime, times = os.utime, []

    def tidy_and_utime(path: Any, *args: Any, **more: Any) -> None:
        if path == directory and not times:
            times.append(1)
            shutil.rmtree(directory)
        utime(path, *args, **more)

    monkeypatch.setattr(os, "utime", tidy_and_utime)
    prepare(directory, ("result.json",))
    assert os.listdir(directory) == []
    assert directory.stat().st_mode & 0o777 == 0o700


def test_two_that_tidy_at_once_do_not_trouble_each_other(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(200):
        world.job(f"old{number}", age=99 * DAY)
    top = [os.open(world.jobs, os.O_RDONLY) for _ in range(2)]
    threads = [threading.Thread(target=world.tidy()._tidy, args=(each, time.time())) for each in top]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for each in top:
        os.close(each)
    assert os.listdir(world.jobs) == []
    assert not caplog.records


def test_of_all_processes_one_looks_every_ten_minutes(world: World) -> None:
    world.tidy().look()
    world.job("old", age=99 * DAY)
    world.tidy().look()
    assert (world.jobs / "old").exists()
    then = time.time() - EVERY
    os.utime(world.jobs / STAMP, (then, then))
    world.tidy().look()
    assert not (world.jobs / "old").exists()


def test_a_stamp_from_the_future_keeps_nobody_from_looking(world: World) -> None:
    world.job("old", age=99 * DAY)
    (world.jobs / STAMP).touch()
    os.utime(world.jobs / STAMP, (time.time() + DAY, time.time() + DAY))
    world.tidy().look()
    assert not (world.jobs / "old").exists()


def test_trouble_with_one_directory_is_told_and_keeps_no_other_from_its_end(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c"):
        world.job(name, age=99 * DAY)
    rename = os.rename

    def refuse(old: Any, new: Any, **at: Any) -> None:
        if old in ("a", "b"):
            raise OSError(30, "Read-only file system")
        rename(old, new, **at)

    monkeypatch.setattr(os, "rename", refuse)
    with caplog.at_level(logging.WARNING, "supervise.job"):
        assert world.look() == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == [
        f"the logs of job a in {world.jobs} cannot be removed: Read-only file system"
    ]


def test_a_look_ends_between_two_directories_when_it_is_told_to(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        world.job(f"old{number}", age=99 * DAY)
    tidy = world.tidy()
    rmtree: Callable[..., None] = shutil.rmtree

    def remove_and_stop(*args: Any, **more: Any) -> None:
        rmtree(*args, **more)
        tidy.stop()

    monkeypatch.setattr(shutil, "rmtree", remove_and_stop)
    tidy.look()
    assert len(list(world.jobs.glob("old*"))) == 4


async def test_a_supervisor_tidies_at_its_start_beside_its_jobs(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "state", index=IndexSettings(mode="none"))
    settings.state_dir.mkdir()
    world = World(settings.state_dir / "jobs")
    world.job("old", age=99 * DAY)
    world.job("young", age=9 * DAY)
    async with supervise.open_supervisor(settings=settings) as sup:
        await sup.run(JobSpec(prompt="go", workspace=tmp_path, job_id="now", agent=MockAgent()))
        with trio.fail_after(20):
            while (world.jobs / "old").exists():  # a directory tells nobody
                await trio.sleep(0.01)
    assert sorted(path.name for path in world.jobs.iterdir()) == [STAMP, "now", "young"]


async def test_leaving_a_supervisor_stops_a_long_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(state_dir=tmp_path / "state", index=IndexSettings(mode="none"))
    settings.state_dir.mkdir()
    world = World(settings.state_dir / "jobs")
    for number in range(50):
        world.job(f"old{number:02}", age=99 * DAY)
    began, go_on = threading.Event(), threading.Event()
    rmtree: Callable[..., None] = shutil.rmtree

    def slow(*args: Any, **more: Any) -> None:
        began.set()
        assert go_on.wait(20)
        rmtree(*args, **more)

    monkeypatch.setattr(shutil, "rmtree", slow)
    with trio.fail_after(20):
        async with supervise.open_supervisor(settings=settings):
            await trio.to_thread.run_sync(began.wait)
            trio.lowlevel.current_trio_token().run_sync_soon(go_on.set)
    assert len(list(world.jobs.glob("old*"))) >= 48


async def test_trouble_of_a_look_ends_no_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Tidy) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Tidy, "look", fail)
    settings = Settings(state_dir=tmp_path / "state", index=IndexSettings(mode="none"))
    done = await supervise.run_job(JobSpec(prompt="go", workspace=tmp_path, agent=MockAgent()), settings=settings)
    assert done.outcome is supervise.Outcome.COMPLETED
    assert "a bug" in caplog.text
