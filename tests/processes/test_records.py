"""What the disk knows of a supervisor's processes: whose record may be read, and what a damaged one leads to."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from supervise import JobSpec, Outcome, Settings, durable, open_supervisor
from supervise.model import SweepReport
from supervise.processes import identity, records
from supervise.processes.records import BEING_MADE, LOCK, NEW, OWNER, TREES, Record, leftovers
from supervise.processes.sweep import sweep
from tests.processes.lone import Programs
from tests.processes.test_child import LIMIT, as_root, is_alive, within

HOLDER = """
import sys, pathlib
from supervise.processes.records import Record
print(Record(pathlib.Path(sys.argv[1])).id, flush=True)
sys.stdin.read()
"""


def died(state_dir: Path) -> Path:
    """The record of a supervisor that is no more."""
    record = Record(state_dir)
    record.close(keep=True)
    return record.directory


def enter(directory: Path, *processes: tuple[int, int], keepers: tuple[tuple[int, int], ...] = ()) -> None:
    """An entry of a tree with these processes."""
    entry = {"token": "t", "processes": processes, "keepers": keepers}
    (directory / TREES).write_text(json.dumps(entry) + "\n")


def change_owner(directory: Path, **changes: Any) -> None:
    path = directory / OWNER
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def ids(state_dir: Path) -> list[str]:
    """Of the records that would be swept now."""
    found = leftovers(state_dir)
    for each in found:
        each.close(keep=True)
    return [each.id for each in found]


def swept(state_dir: Path) -> SweepReport:
    return trio.run(functools.partial(sweep, state_dir, grace=0.2, kill_wait=5.0))


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that no sweep may touch. It is in a session of its own, and has a child there."""
    shell = ["/bin/sh", "-c", "sleep 60 & echo; wait"]
    process = subprocess.Popen(shell, start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def start_of(pid: int) -> int:
    process = identity.read(pid)
    assert process is not None
    return process.start


# --- whose lock ------------------------------------------------------------------------------------------------


def test_a_record_that_this_process_holds_is_left_alone(tmp_path: Path) -> None:
    record = Record(tmp_path)
    assert ids(tmp_path) == []
    assert sorted(os.listdir(record.directory)) == [LOCK, OWNER, TREES]
    record.close(keep=True)
    assert ids(tmp_path) == [record.id]


def test_a_record_that_another_process_holds_is_left_alone_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        name = holder.stdout.readline().strip()
        assert ids(tmp_path) == []
        holder.kill()
        holder.wait()
    assert ids(tmp_path) == [name]


def test_a_child_that_the_host_forks_does_not_hold_the_lock_on(tmp_path: Path) -> None:
    script = """
import os, sys, pathlib, signal
from supervise.processes.records import Record
record = Record(pathlib.Path(sys.argv[1]))
if os.fork() == 0:
    signal.alarm(60)
    print(os.getpid(), record.id, flush=True)
    signal.pause()
os._exit(0)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        pid, name = host.stdout.readline().split()
        host.wait()
        try:
            assert ids(tmp_path) == [name]
        finally:
            os.kill(int(pid), signal.SIGKILL)


@within(LIMIT)
async def test_a_second_supervisor_in_this_process_leaves_the_first_alone(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, containment="process-group")
    async with open_supervisor(settings=settings) as first, open_supervisor(settings=settings) as second:
        assert (first.swept, second.swept) == (SweepReport(), SweepReport())
        assert len(os.listdir(tmp_path / "run")) == 2
    assert os.listdir(tmp_path / "run") == []


def test_a_record_that_is_removed_between_the_look_and_the_lock_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = died(tmp_path)
    real = records._locked

    def slow(path: Path) -> int:
        descriptor = real(path)
        if path.parent == directory:  # another sweep had the lock before, and is ready by now
            for file in (OWNER, TREES, LOCK):
                (directory / file).unlink()
            directory.rmdir()
        return descriptor

    monkeypatch.setattr(records, "_locked", slow)
    assert ids(tmp_path) == []


def test_a_record_in_which_nothing_was_ever_written_is_removed_and_not_counted(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "0123456789abcdef"
    directory.mkdir(parents=True)
    (directory / LOCK).touch()
    assert ids(tmp_path) == []
    assert not directory.exists()


# --- what is no record -----------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["mysqld", "0123456789abcde", "0123456789ABCDEF", "0123456789abcdef0", ".new-x"])
def test_what_is_not_named_as_a_record_is_left_alone(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "run" / name
    directory.mkdir(parents=True)
    for file in (LOCK, OWNER, "mysqld.pid"):
        (directory / file).write_text("{}")
    os.utime(directory, (0, 0))
    before = contents(tmp_path)
    assert swept(tmp_path) == SweepReport()
    assert contents(tmp_path) == before


def test_a_record_without_a_lock_is_left_alone(tmp_path: Path) -> None:
    directory = died(tmp_path)
    (directory / LOCK).unlink()
    before = contents(tmp_path)
    assert swept(tmp_path) == SweepReport()
    assert contents(tmp_path) == before


def test_a_strangers_file_keeps_the_directory_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = died(tmp_path)
    enter(directory)
    for name in (f".{OWNER}.1234", "mysqld.pid"):  # the first one is ours: a write that was not finished
        (directory / name).write_text("7")
    assert swept(tmp_path) == SweepReport(supervisors=1)
    assert swept(tmp_path) == SweepReport()
    assert contents(tmp_path) == {str(directory / "mysqld.pid"): "7"}
    assert warnings(caplog) == [f"the record {directory} cannot be removed: Directory not empty"]


def test_a_link_in_place_of_all_records_is_neither_followed_nor_changed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    target.chmod(0o755)
    (tmp_path / "run").symlink_to(target)
    with pytest.raises(NotADirectoryError, match="is a link; a directory has to be there"):
        Record(tmp_path)
    assert target.stat().st_mode & 0o777 == 0o755
    assert os.listdir(target) == []


def test_the_directory_of_all_records_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    Record(tmp_path).close()
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


# --- being made ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [(), (LOCK,), (LOCK, OWNER)])
def test_a_record_that_is_being_made_is_left_alone_and_swept_when_it_is_old(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    directory = tmp_path / "run" / f"{NEW}0123456789abcdef"
    directory.mkdir(parents=True)
    for file in files:
        (directory / file).write_text("{}" if file == OWNER else "")
    assert swept(tmp_path) == SweepReport()
    assert directory.is_dir()
    old = time.time() - BEING_MADE - 1
    os.utime(directory, (old, old))
    assert swept(tmp_path).supervisors == (OWNER in files)
    assert not directory.exists()


@pytest.mark.parametrize("place", [(durable, "replace"), (fcntl, "flock"), (records, "_locked")])
def test_a_record_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*place, full_disk)
        with pytest.raises(OSError, match="No space left"):
            Record(tmp_path)
    assert os.listdir(tmp_path / "run") == []


# --- whose processes -------------------------------------------------------------------------------------------


def test_of_another_boot_nothing_is_signalled(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    directory = died(tmp_path)
    change_owner(directory, boot_id="another")
    process = (bystander.pid, start_of(bystander.pid))
    enter(directory, process, keepers=(process,))
    assert swept(tmp_path) == SweepReport(supervisors=1)
    assert is_alive(bystander.pid)
    assert not directory.exists()


def test_of_another_pid_namespace_nothing_is_touched(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    directory = died(tmp_path)
    assert json.loads((directory / OWNER).read_text())["pid_namespace"] == os.readlink("/proc/self/ns/pid")
    change_owner(directory, pid_namespace="pid:[1]", since=0)
    process = (bystander.pid, start_of(bystander.pid))
    enter(directory, process, keepers=(process,))
    before = contents(tmp_path)
    assert swept(tmp_path) == SweepReport()
    assert contents(tmp_path) == before
    assert is_alive(bystander.pid)
    change_owner(directory, boot_id="another")  # no container of an earlier boot lives
    assert swept(tmp_path) == SweepReport(supervisors=1)
    assert not directory.exists()


@pytest.mark.parametrize("kind", ["process", "keeper"])
@pytest.mark.parametrize("later", [True, False])
def test_a_pid_that_is_somebody_elses_by_now_is_never_signalled(
    tmp_path: Path, bystander: subprocess.Popen[bytes], kind: str, later: bool
) -> None:
    directory = died(tmp_path)
    other = (bystander.pid, start_of(bystander.pid) + (-1 if later else 1))
    change_owner(directory, since=0)
    enter(directory, *([other] if kind == "process" else []), keepers=(other,) if kind == "keeper" else ())
    assert swept(tmp_path) == SweepReport(supervisors=1)
    assert bystander.poll() is None
    assert len(identity.descendants(bystander.pid)) == 1


def test_the_session_of_a_leader_that_has_ended_may_be_somebody_elses(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    (member,) = identity.descendants(bystander.pid)
    assert member.session == bystander.pid
    start = start_of(bystander.pid)
    bystander.kill()
    bystander.wait()
    directory = died(tmp_path)
    change_owner(directory, since=0)
    enter(directory, (bystander.pid, start))
    assert swept(tmp_path).found == ()
    assert is_alive(member.pid)


def test_the_recorded_process_itself_is_ended(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    """What the two tests before must not see would be seen."""
    directory = died(tmp_path)
    change_owner(directory, since=0)
    enter(directory, (bystander.pid, start_of(bystander.pid)))
    assert bystander.pid in [each.pid for each in swept(tmp_path).found]
    assert not is_alive(bystander.pid)


# --- damage ----------------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def no_owner(directory: Path) -> None:
    (directory / OWNER).unlink()
    enter(directory)


def a_directory(directory: Path) -> None:
    (directory / OWNER).unlink()
    (directory / OWNER).mkdir()


def written(name: str, text: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).write_text(text, errors="surrogateescape")

    return damage


def to_nowhere(directory: Path) -> None:
    (directory / TREES).unlink()
    (directory / TREES).symlink_to("/no/such")


DAMAGES: dict[str, Damage] = {
    "owner is missing": no_owner,
    "owner is no JSON": written(OWNER, "{"),
    "owner is empty": written(OWNER, ""),
    "owner is a list": written(OWNER, "[1]"),
    "owner is null": written(OWNER, "null"),
    "owner's times are texts": written(OWNER, '{"since": "x", "cgroup": 7}'),
    "owner is nested": written(OWNER, "[" * 100_000),
    "owner is a directory": a_directory,
    "owner is not text": written(OWNER, "\0\udcff"),
    "entry is no JSON": written(TREES, "nothing\n"),
    "entry is a list": written(TREES, "[]\n"),
    "entry lacks keepers": written(TREES, '{"token": "t", "processes": []}\n'),
    "entry has no pids": written(TREES, '{"token": "t", "processes": [5], "keepers": [["a", 1]]}\n'),
    "entry has huge pids": written(TREES, '{"token": "t", "processes": [], "keepers": [[1' + "0" * 40 + ", 1]]}\n"),
    "entry has negative pids": written(TREES, '{"token": "t", "processes": [[-1, 1]], "keepers": [[-1, 1], [0, 0]]}\n'),
    "entry points to nowhere": to_nowhere,
}
UNREMOVABLE = {"owner is a directory"}
SILENT = {"owner is missing", "owner's times are texts"}


@pytest.mark.parametrize("damage", DAMAGES)
@within(LIMIT)
async def test_a_damaged_record_is_told_and_its_processes_are_found_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    directory = died(tmp_path)
    DAMAGES[damage](directory)
    marked = {"SUPERVISE_MARK": f"{directory.name}:job:agent:0"}
    sleeper = await trio.to_thread.run_sync(functools.partial(subprocess.Popen, ["/bin/sleep", "60"], env=marked))
    try:
        async with open_supervisor(settings=Settings(state_dir=tmp_path, orphan_grace=0.2)) as supervisor:
            assert [each.pid for each in supervisor.swept.found] == [sleeper.pid]
    finally:
        sleeper.kill()
        sleeper.wait()
    assert sleeper.returncode == -signal.SIGTERM
    assert any("does not read" in text for text in warnings(caplog)) == (damage not in SILENT)
    assert directory.exists() == (damage in UNREMOVABLE)


@within(LIMIT)
async def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = died(tmp_path)
    target = tmp_path / "target"
    (directory / LOCK).unlink()
    (directory / LOCK).symlink_to(target)
    async with open_supervisor(settings=Settings(state_dir=tmp_path)) as supervisor:
        assert supervisor.swept == SweepReport()
    assert not target.exists()
    assert (directory / OWNER).exists()
    assert [text for text in warnings(caplog) if f"the record {directory} cannot be looked at" in text]


@pytest.mark.parametrize("kind", ["link", "file", pytest.param("stranger's", marks=as_root)])
@within(LIMIT)
async def test_what_is_no_directory_of_ours_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    directory = died(tmp_path / "elsewhere")
    place = tmp_path / "run" / directory.name
    place.parent.mkdir()
    if kind == "link":
        place.symlink_to(directory)
    elif kind == "file":
        place.write_text("")
    else:
        directory.rename(place)
        os.chown(place, 65534, 65534)
    async with open_supervisor(settings=Settings(state_dir=tmp_path)) as supervisor:
        assert supervisor.swept == SweepReport()
    assert os.path.lexists(place)
    assert kind == "file" or sorted(os.listdir(place)) == [LOCK, OWNER, TREES]
    assert [text for text in warnings(caplog) if f"the record {place} is passed over" in text]


def test_a_file_in_place_of_all_records_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("")
    assert ids(tmp_path) == []
    assert "is no directory of ours" in warnings(caplog)[0]


# --- a full disk -----------------------------------------------------------------------------------------------


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("tier", ["process-group", "guardian", "cgroup"])
@within(LIMIT)
async def test_a_full_disk_keeps_no_job_from_running_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tier: str
) -> None:
    real = os.write

    def sometimes(descriptor: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(TREES):
            full_disk()
        return real(descriptor, data)

    settings = Settings(state_dir=tmp_path, containment=tier)
    async with open_supervisor(settings=settings) as supervisor:
        monkeypatch.setattr(os, "write", sometimes)
        for _ in range(3):
            spec = JobSpec(prompt="go", workspace="/", index=None, agent=Programs([["/bin/true"]] * 2))
            assert (await supervisor.run(spec)).outcome is Outcome.COMPLETED
    (told,) = [text for text in warnings(caplog) if "the record" in text]
    assert told.endswith("cannot be written: No space left on device")
    assert os.listdir(tmp_path / "run") == []


def test_a_disk_that_cannot_be_written_keeps_the_record_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = Record(tmp_path)
    record.enter("tree", [os.getpid()])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        record.strike("tree")
        record.enter("other", [os.getpid()])
        assert record.has_entries()
        patch.setattr(os, "listdir", full_disk)
        record.close()
    assert len(list(record.directory.iterdir())) == 3
    assert warnings(caplog) == [
        f"the record of processes in {record.directory} cannot be written: No space left on device",
        f"the record {record.directory} cannot be removed: No space left on device",
    ]


def test_what_is_struck_out_is_dropped_from_a_long_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervise.processes.records.COMPACT_AT", 2000)
    record = Record(tmp_path)
    record.enter("stays", [os.getpid()])
    for number in range(200):
        record.enter(f"tree {number}", [os.getpid()])
        record.strike(f"tree {number}")
        assert (record.directory / TREES).stat().st_size < 2500
    record.enter("last", [1])
    record.close(keep=True)
    (left,) = leftovers(tmp_path)
    assert sorted(pid for pid, _ in left.processes) == [1, os.getpid()]
    left.close(keep=False)


def test_a_line_that_was_not_finished_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = Record(tmp_path)
    record.enter("one", [1])
    with (record.directory / TREES).open("a") as file:
        file.write('{"token": "two", "proc')
    record.close(keep=True)
    (left,) = leftovers(tmp_path)
    assert [pid for pid, _ in left.processes] == [1]
    assert warnings(caplog) == []
    left.close(keep=False)
