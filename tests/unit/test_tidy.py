"""What is removed of old jobs, and what never is; and who has the directory of a job."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trio

import supervise
from supervise import IndexSettings, JobSpec, MockAgent, Settings
from supervise.job import directory as directory_module
from supervise.job import tidy as tidy_module
from supervise.job.directory import RESULT, SIGNS, occupy
from supervise.job.tidy import EVERY, QUIET, REMOVED, STAMP, Tidy
from supervise.processes.output import Logs

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
        for path in (*directory.rglob("*"), directory):
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
    top = os.open(world.jobs, os.O_RDONLY)
    world.tidy()._tidy(top, time.time())
    os.close(top)
    assert os.listdir(world.jobs) == ["theirs"]
    with pytest.raises(PermissionError, match="another user"):
        world.look()


@pytest.mark.parametrize("stranger", ["file", "directory", "link", "fifo", "directory of a job's name", "link of one"])
def test_a_directory_with_anything_that_jobs_do_not_make_is_left_alone(
    world: World, tmp_path: Path, stranger: str
) -> None:
    directory = world.job("nightly", age=0)
    match stranger:
        case "file":
            (directory / "crontab.txt").write_text("mine")
        case "directory":
            (directory / "src" / "deep").mkdir(parents=True)
        case "link":
            (directory / "link").symlink_to(tmp_path)
        case "fifo":
            os.mkfifo(directory / "agent.stderr.log")
        case "directory of a job's name":
            (directory / "agent.stderr.log").mkdir()
        case _:
            (directory / "agent.stderr.log").symlink_to(tmp_path)
    world.age(directory, 99 * DAY)
    before = sorted(os.listdir(directory))
    assert world.look(max_bytes=0) == ["nightly"]
    assert sorted(os.listdir(directory)) == before


def test_a_directory_in_which_nothing_tells_of_a_job_is_left_alone(world: World) -> None:
    (world.jobs / "logs").mkdir()
    (world.jobs / "logs" / "build.stdout.log").write_text("mine")
    world.age(world.jobs / "logs", 99 * DAY)
    assert world.look(max_bytes=0) == ["logs"]


def test_what_a_job_killed_before_its_first_write_leaves_goes_by_its_age(world: World) -> None:
    for name, age in (("old", 31 * DAY), ("young", 29 * DAY)):
        (world.jobs / name).mkdir()
        world.age(world.jobs / name, age)
    assert world.look(max_bytes=0) == ["young"]


async def test_all_that_a_job_makes_is_known_and_removed(world: World, tmp_path: Path) -> None:
    settings = Settings(state_dir=world.jobs.parent, index=IndexSettings(mode="none"))
    await supervise.run_job(
        JobSpec(prompt="go", workspace=tmp_path, job_id="real", agent=MockAgent()), settings=settings
    )
    directory = world.jobs / "real"
    assert set(SIGNS) <= {path.name for path in directory.iterdir()}
    logs = Logs(directory, 8)
    for role in ("agent", "index-stop"):
        for stream in ("stdout", "stderr"):
            log = logs.of(role, stream, lambda _: None)
            log.write(b"x" * 4)
            for _ in range(4):
                log.write(b"x" * 2)  # its supervisor is killed before head and tail are put together
    assert (directory / "agent.stdout.log.tail1").exists()
    for name in (".result.json.0123abcd", ".heartbeat.json.0123abcd"):
        (directory / name).touch()
    world.age(directory, 99 * DAY)
    assert world.look() == []
    logs.close()


def test_a_link_in_the_place_of_all_jobs_is_not_followed(world: World, tmp_path: Path) -> None:
    world.job("old", age=99 * DAY)
    link = tmp_path / "link"
    link.symlink_to(world.jobs)
    with pytest.raises(NotADirectoryError):
        Tidy(link, 1, 1, lambda _: False).look()
    assert os.listdir(world.jobs) == ["old"]


def test_what_a_killed_tidy_has_left_goes_the_next_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.job("old", age=99 * DAY)
    (world.jobs / f"{REMOVED}mine").mkdir()

    def kill(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Tidy, "_empty", kill)
        with pytest.raises(SystemExit):
            world.look()
    left = [name for name in os.listdir(world.jobs) if name not in (STAMP, f"{REMOVED}mine")]
    assert [name.startswith(REMOVED) for name in left] == [True]
    descriptor = os.open(world.jobs / left[0], os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert world.look() == sorted([*left, f"{REMOVED}mine"])  # another one is just at it
    os.close(descriptor)
    assert world.look() == [f"{REMOVED}mine"]


def test_a_strange_leftover_keeps_no_other_from_its_end(world: World, caplog: pytest.LogCaptureFixture) -> None:
    deep = world.jobs / f"{REMOVED}{'0' * 16}"
    (deep / "d" / "d").mkdir(parents=True)
    world.job("old", age=99 * DAY)
    assert world.look() == [deep.name]
    assert not caplog.records


@pytest.mark.parametrize("ended", [True, False])
def test_the_directory_of_a_living_job_stays_whatever_the_clocks_say(world: World, ended: bool) -> None:
    directory = world.job("lives", age=99 * DAY, ended=ended)
    occupied = occupy(directory)  # in another process, as it were: this tidy does not know of it
    (directory / "heartbeat.json").write_text("{}")
    world.age(directory, 99 * DAY)
    assert world.look(max_bytes=0) == ["lives"]
    occupied.release()
    assert world.look() == []


def test_a_file_of_tomorrow_keeps_no_directory_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, ended in (("killed", False), ("ended", True)):
        directory = world.job(name, age=10, ended=ended)
        world.age(directory, -3650 * DAY)
    assert world.look() == ["ended", "killed"]
    now = time.time()
    monkeypatch.setattr(tidy_module.time, "time", lambda: now + 31 * DAY)
    assert world.look() == []


def test_where_there_are_no_locks_what_is_written_to_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    world.job("killed", age=QUIET + 60, ended=False)
    world.job("ended", age=60)
    directory = world.job("running", age=0, ended=False)
    job = occupy(directory)
    (directory / "heartbeat.json").write_text("{}")
    world.age(directory, QUIET - 60)
    assert world.look(max_age=1.0, max_bytes=0) == ["running"]
    job.release()


@pytest.mark.parametrize("with_result", [True, False])
def test_a_job_that_begins_at_this_very_moment_keeps_its_directory(
    world: World, monkeypatch: pytest.MonkeyPatch, with_result: bool
) -> None:
    directory = world.job("again", age=99 * DAY, ended=with_result)
    remove = Tidy._remove
    jobs: list[Any] = []

    def begin_and_remove(self: Tidy, *args: Any) -> bool:
        jobs.append(occupy(directory))
        return remove(self, *args)

    monkeypatch.setattr(Tidy, "_remove", begin_and_remove)
    assert world.look() == ["again"]
    assert os.listdir(directory) == ["agent.stdout.log"]
    jobs[0].release()


def test_a_job_that_has_begun_and_ended_meanwhile_keeps_its_result(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = world.job("again", age=99 * DAY)
    remove = Tidy._remove

    def live_and_remove(self: Tidy, *args: Any) -> bool:
        job = occupy(directory)
        (directory / RESULT).write_text("{}")
        job.release()
        return remove(self, *args)

    monkeypatch.setattr(Tidy, "_remove", live_and_remove)
    assert world.look() == ["again"]
    assert (directory / RESULT).exists()


@pytest.mark.parametrize("step", ["mkdir", "lstat", "open", "flock"])
def test_a_job_that_begins_while_its_old_directory_goes_gets_a_new_one(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    directory = world.job("again", age=99 * DAY)
    where: Any = {"mkdir": Path, "lstat": Path, "open": os, "flock": fcntl}[step]
    real, times = getattr(where, step), []

    def tidy_and(*args: Any, **more: Any) -> Any:
        if not times and (step != "open" or args[0] == directory):
            times.append(1)
            with monkeypatch.context() as patch:
                patch.setattr(where, step, real)
                assert world.look() == []
            if step == "mkdir":
                raise FileExistsError(errno.EEXIST, "as when it was there a moment ago")
        return real(*args, **more)

    monkeypatch.setattr(where, step, tidy_and)
    job = occupy(directory)
    assert times
    assert os.listdir(directory) == []
    assert directory.stat().st_mode & 0o777 == 0o700
    job.release()


def test_beginning_and_tidying_at_once_never_fail(world: World) -> None:
    stop = threading.Event()

    def tidy() -> None:
        top = os.open(world.jobs, os.O_RDONLY)
        while not stop.is_set():
            world.tidy(max_age=0)._tidy(top, time.time() + 1)
        os.close(top)

    thread = threading.Thread(target=tidy)
    thread.start()
    try:
        for _ in range(200):
            job = occupy(world.jobs / "j")
            (world.jobs / "j" / RESULT).write_text("{}")
            job.release()
    finally:
        stop.set()
        thread.join(20)


def test_an_id_whose_job_lives_is_refused_and_its_files_are_let_be(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "BETWEEN", 0.0001)
    directory = world.jobs / "same"
    first = occupy(directory)
    (directory / "events.jsonl").write_text("{}")
    with pytest.raises(supervise.SpecError, match=r"JobSpec.job_id is 'same'.*in another process.*choose another"):
        occupy(directory)
    assert (directory / "events.jsonl").read_text() == "{}"
    first.release()
    occupy(directory).release()
    assert os.listdir(directory) == []


def test_a_tidy_that_has_the_lock_for_a_moment_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "BETWEEN", 0.1)
    directory = world.job("again", age=0)
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    threading.Timer(0.05, os.close, (descriptor,)).start()
    occupy(directory).release()


async def test_a_job_without_a_free_descriptor_is_refused_and_may_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(state_dir=tmp_path / "state", index=IndexSettings(mode="none"))
    spec = JobSpec(prompt="go", workspace=tmp_path, job_id="j1", agent=MockAgent())

    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    async with supervise.open_supervisor(settings=settings) as sup:
        with monkeypatch.context() as patch:
            patch.setattr(directory_module.os, "open", refuse)
            with pytest.raises(supervise.SuperviseError, match=r"job j1 cannot start: Too many open files.*ulimit"):
                await sup.start(spec)
        assert (await sup.run(spec)).outcome is supervise.Outcome.COMPLETED


def test_a_file_in_the_place_of_the_directory_is_named(world: World) -> None:
    (world.jobs / "j1").touch()
    with pytest.raises(supervise.SettingsError, match=rf"{world.jobs / 'j1'} is no directory.*remove it"):
        occupy(world.jobs / "j1")


@pytest.mark.parametrize("name", SIGNS)
async def test_a_directory_in_the_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    settings = Settings(state_dir=tmp_path / "state", index=IndexSettings(mode="none"))
    there = settings.state_dir / "jobs" / "j1" / name
    there.mkdir(parents=True)
    spec = JobSpec(prompt="go", workspace=tmp_path, job_id="j1", agent=MockAgent())
    async with supervise.open_supervisor(settings=settings) as sup:
        with pytest.raises(supervise.SettingsError, match=rf"{there} is a directory.*remove it"):
            await sup.run(spec)
        there.rmdir()
        assert (await sup.run(spec)).outcome is supervise.Outcome.COMPLETED


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


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (OSError(30, "Read-only file system"), "Read-only file system"),
        (RecursionError("too deep"), "RecursionError: too deep"),
    ],
)
def test_trouble_with_one_directory_is_told_and_keeps_no_other_from_its_end(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: Exception, told: str
) -> None:
    for name in ("a", "b", "c"):
        world.job(name, age=99 * DAY)
    rename = os.rename

    def refuse(old: Any, new: Any, **at: Any) -> None:
        if old in ("a", "b"):
            raise trouble
        rename(old, new, **at)

    monkeypatch.setattr(os, "rename", refuse)
    with caplog.at_level(logging.WARNING, "supervise.job"):
        assert world.look() == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == [
        f"the logs of job a in {world.jobs} cannot be removed: {told}"
    ]


def test_a_look_ends_between_two_files_when_it_is_told_to(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        world.job(f"old{number}", age=99 * DAY)
    tidy = world.tidy()
    unlink = os.unlink

    def remove_and_stop(*args: Any, **more: Any) -> None:
        unlink(*args, **more)
        tidy.stop()

    monkeypatch.setattr(os, "unlink", remove_and_stop)
    tidy.look()
    monkeypatch.undo()
    assert len(list(world.jobs.glob("old*"))) == 4
    assert [len(list(left.iterdir())) for left in world.jobs.glob(f"{REMOVED}*")] == [2]
    assert [name for name in world.look() if name.startswith(REMOVED)] == []


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


async def test_leaving_a_supervisor_waits_for_no_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(state_dir=tmp_path / "state", index=IndexSettings(mode="none"))
    settings.state_dir.mkdir()
    world = World(settings.state_dir / "jobs")
    for number in range(50):
        world.job(f"old{number:02}", age=99 * DAY)
    began, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    unlink, look = os.unlink, Tidy.look

    def hang(*args: Any, **more: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            began.set()
            assert go_on.wait(20)
        unlink(*args, **more)

    def look_and_tell(self: Tidy) -> None:
        try:
            look(self)
        finally:
            ended.set()

    monkeypatch.setattr(os, "unlink", hang)
    monkeypatch.setattr(Tidy, "look", look_and_tell)
    with trio.fail_after(10):
        async with supervise.open_supervisor(settings=settings):
            await trio.to_thread.run_sync(began.wait)
        assert not ended.is_set()
        go_on.set()
        await trio.to_thread.run_sync(ended.wait)
    assert len(list(world.jobs.glob("old*"))) == 49


async def test_a_second_supervisor_does_not_take_the_id_of_a_job_that_runs_or_waits(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "state", index=IndexSettings(mode="none"))

    def spec(name: str, agent: MockAgent) -> JobSpec:
        return JobSpec(prompt="go", workspace=tmp_path, job_id=name, agent=agent)

    async with (
        supervise.open_supervisor(max_concurrent=1, settings=settings) as first,
        supervise.open_supervisor(settings=settings) as second,
    ):
        runs = await first.start(spec("runs", MockAgent(hang=True)))
        async with first.open_job(spec("waits", MockAgent())):
            for name in ("runs", "waits"):
                with pytest.raises(supervise.SpecError, match="in another process"):
                    await second.start(spec(name, MockAgent()))
            assert second.jobs == ()
            runs.cancel()
        await runs.result()
        for name in ("runs", "waits"):
            assert (await second.run(spec(name, MockAgent()))).outcome is supervise.Outcome.COMPLETED


def test_a_ctrl_c_while_a_look_is_told_of_reaches_the_block_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trio raises it where the program is; in the code of ours it would look like a bug."""
    ended: list[str] = []

    class Interrupt(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            signal.raise_signal(signal.SIGINT)
            ended.append("told")

    def fail(self: Tidy) -> None:
        raise OSError(5, "Input/output error")

    def main() -> None:
        async def block() -> None:
            async with supervise.open_supervisor(settings=Settings(state_dir=tmp_path / "state")):
                try:
                    await trio.sleep(10)
                except BaseException as error:
                    ended.append(type(error).__name__)
                    raise

        trio.run(block)

    monkeypatch.setattr(Tidy, "look", fail)
    handler = Interrupt()
    logging.getLogger("supervise.job").addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            main()
    finally:
        logging.getLogger("supervise.job").removeHandler(handler)
    assert ended == ["told", "KeyboardInterrupt"]


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
