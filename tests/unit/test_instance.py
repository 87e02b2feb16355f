"""The lock of a single instance: its rule, and files of all kinds at its path."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from supervise.dispatch import instance
from supervise.dispatch.instance import Found, Holder, hold, may_take, parse, render, take
from supervise.errors import AlreadyRunning, SuperviseError
from supervise.processes import identity
from supervise.processes.records import boot_id, pid_namespace

NOBODY = 65534
GONE = (1 << 22) + 1  # above the kernel's greatest pid_max


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "worker.lock"


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """However it ends: no descriptor is left."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not instance._open_here


def refused(path: Path, message: str, **options: Any) -> SuperviseError:
    with pytest.raises(SuperviseError, match=message) as caught:
        take(path, **options)
    return caught.value


def taken(path: Path) -> None:
    """It can be, names us, and is gone after the end."""
    lock = take(path)
    assert parse(path.read_bytes()) == ourselves()
    assert lock.is_intact
    lock.release()
    assert not path.exists()


def ourselves() -> Holder:
    return Holder(os.getpid(), identity.start_of(os.getpid()), boot_id(), pid_namespace())


def first_process(**changes: Any) -> Holder:
    """Of a process that surely lives, and is another than ours."""
    return attrs.evolve(Holder(1, identity.start_of(1), boot_id(), pid_namespace()), **changes)


# --- the rule ----------------------------------------------------------------------------------------------

HOLDER = Holder(7, 500, "this", "here")
PLAIN = Holder(7)
LIVES = Found(
    own_pid=1000,
    boot="this",
    namespace="here",
    booted_at=1e9,
    written_at=1e9 + 100_000,
    clock_is_steady=True,
    alive=True,
    start=500,
)


def with_start_at(seconds: float) -> Found:
    return attrs.evolve(LIVES, start=int(seconds * identity.ticks()))


@pytest.mark.parametrize("holder", [HOLDER, PLAIN])
def test_whoever_may_be_the_writer_keeps_it(holder: Holder) -> None:
    assert not may_take(holder, LIVES)
    assert not may_take(holder, attrs.evolve(LIVES, start=None))
    assert not may_take(holder, attrs.evolve(LIVES, start=None, written_at=0.0))


@pytest.mark.parametrize("holder", [HOLDER, PLAIN])
def test_nobody_keeps_it_who_is_no_more(holder: Holder) -> None:
    assert may_take(holder, attrs.evolve(LIVES, alive=False))
    assert may_take(holder, attrs.evolve(LIVES, alive=False, start=None))


@pytest.mark.parametrize("holder", [HOLDER, PLAIN])
def test_our_own_pid_is_nobody_elses(holder: Holder) -> None:
    assert may_take(holder, attrs.evolve(LIVES, own_pid=7))


def test_another_boot_or_pid_namespace_is_proof() -> None:
    assert may_take(HOLDER, attrs.evolve(LIVES, boot="next"))
    assert may_take(HOLDER, attrs.evolve(LIVES, namespace="there"))
    assert not may_take(attrs.evolve(HOLDER, namespace=None), attrs.evolve(LIVES, namespace="there"))


def test_another_start_is_proof() -> None:
    assert may_take(HOLDER, attrs.evolve(LIVES, start=501))
    assert may_take(HOLDER, attrs.evolve(LIVES, start=499, clock_is_steady=False))


def test_a_plain_file_that_is_older_than_the_process_is_proof() -> None:
    assert may_take(PLAIN, with_start_at(100_000 + instance.SLACK + 1))
    assert not may_take(PLAIN, with_start_at(100_000 + instance.SLACK - 1))


def test_a_plain_file_that_is_older_than_the_boot_is_proof() -> None:
    assert may_take(PLAIN, attrs.evolve(LIVES, written_at=LIVES.booted_at - instance.SLACK - 1, start=0))
    assert not may_take(PLAIN, attrs.evolve(LIVES, written_at=LIVES.booted_at - instance.SLACK + 1, start=0))


def test_a_clock_that_was_set_proves_nothing() -> None:
    younger = attrs.evolve(with_start_at(200_000), clock_is_steady=False)
    assert not may_take(PLAIN, younger)
    assert not may_take(PLAIN, attrs.evolve(younger, written_at=0.0))
    in_the_future = attrs.evolve(with_start_at(200_000), written_at=LIVES.booted_at + 300_000)  # it was set back
    assert not may_take(PLAIN, in_the_future)


def test_a_step_of_the_clock_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity.read(1)
    assert first is not None
    mounted_at = os.stat("/proc").st_mtime
    steady = mounted_at - first.start / identity.ticks()
    assert instance._clock_is_steady(steady)
    assert instance._clock_is_steady(steady - instance.MOUNTED_WITHIN + 1)
    assert not instance._clock_is_steady(steady + instance.MOUNTED_WITHIN + 1)
    assert not instance._clock_is_steady(steady - instance.MOUNTED_WITHIN - 1)
    monkeypatch.setattr(identity, "read", lambda pid: None)  # /proc hides it
    assert not instance._clock_is_steady(steady)


# --- contents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"12",
        b"12\n",
        b"  12  \n",  # as the Filesystem Hierarchy Standard wants it: ten characters
        b"12\r\n",
        b"12\n\n\n",
        b"12\0\0",
        b"12\n{",
        b'12\n{"start": 5',
        b'12\n{"start": 5, "boot": "b"',
        b'12\n{"start": -5, "boot": "b"}',
        b'12\n{"start": true, "boot": "b"}',
        b'12\n{"start": 5.0, "boot": "b"}',
        b'12\n{"start": 5, "boot": null}',
        b'12\n{"start": 5, "boot": "b", "pid_namespace": 4}',
        b'12\n{"boot": "b"}',
        b"12\n{\xff}",
        b'12\n{"a":' + b"[" * 4000,
    ],
)
def test_a_pid_alone(data: bytes) -> None:
    assert parse(data) == Holder(12)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 80,
        b"\n\n",
        b"0\n",
        b"-1\n",
        b"-12\n",
        b"+12\n",
        b"1_2\n",
        b"12 13\n",
        b"12abc\n",
        b"0x12\n",
        b"2147483648\n",
        b"99999999999999999999\n",
        "١٢\n".encode(),
        b"\xff\xfe",
        b"host:12\n",
        b"12\n/var/lib/postgresql\n",
        b"12\n\nBuy milk\n",
        b"12\n" + b"\n" * instance.MOST,
        b"12" * instance.MOST,
    ],
)
def test_a_content_that_names_nobody(data: bytes) -> None:
    assert parse(data) is None


def test_the_second_line_counts_without_the_namespace_and_with_what_follows() -> None:
    assert parse(b'12\n{"start": 5, "boot": "b"}') == Holder(12, 5, "b")
    assert parse(b'12\n{"start": 5, "boot": "b", "more": 1}\n7}\n') == Holder(12, 5, "b")


def test_the_first_line_is_the_pid_alone(path: Path) -> None:
    lock = take(path)
    first, second, end = path.read_text().split("\n")
    assert (first, end) == (str(os.getpid()), "")
    assert json.loads(second) == {
        "start": identity.start_of(os.getpid()),
        "boot": boot_id(),
        "pid_namespace": pid_namespace(),
    }
    assert path.stat().st_mode & 0o777 == 0o600
    lock.release()


def test_a_plain_file_reads_as_a_pid_in_any_shell(path: Path) -> None:
    lock = take(path, plain=True)
    assert path.read_bytes() == b"%d\n" % os.getpid()
    subprocess.run(["sh", "-c", 'kill -0 $(cat "$0")', path], check=True)
    lock.release()


def test_who_cannot_learn_its_own_start_writes_the_pid_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "start_of", lambda pid: -1)
    lock = take(path)
    assert path.read_bytes() == b"%d\n" % os.getpid()
    lock.release()


# --- taking and giving up ----------------------------------------------------------------------------------


def test_a_second_one_is_told_who_has_it(path: Path) -> None:
    lock = take(path)
    error = refused(path, rf"^already running \(PID {os.getpid()}\): .* is locked")
    assert isinstance(error, AlreadyRunning)
    assert (error.path, error.pid, error.locked) == (path, os.getpid(), True)
    assert lock.is_intact
    lock.release()
    taken(path)


def test_release_again_does_nothing(path: Path) -> None:
    lock = take(path)
    lock.release()
    other = take(path)
    lock.release()
    assert other.is_intact
    assert not lock.is_intact
    other.release()


def test_release_leaves_alone_what_somebody_else_has_put_there(path: Path) -> None:
    lock = take(path)
    path.unlink()
    assert not lock.is_intact
    path.write_bytes(b"7\n")
    assert not lock.is_intact
    lock.release()
    assert path.read_bytes() == b"7\n"


def test_the_file_is_removed_under_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Path] = []
    remove = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        with self.open("r+b") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(self, missing_ok)
        removed.append(self)

    lock = take(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        lock.release()
    assert removed == [path]
    taken(path)


def test_release_of_a_file_that_somebody_has_removed(path: Path) -> None:
    lock = take(path)
    path.unlink()
    lock.release()
    taken(path)


def test_release_of_a_file_that_cannot_be_removed_empties_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    lock = take(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        lock.release()
    assert path.read_bytes() == b""
    assert "cannot be removed: Permission denied" in caplog.text
    taken(path)


def test_a_copy_of_the_descriptor_does_not_keep_the_lock(path: Path) -> None:
    lock = take(path)
    copy = os.dup(lock._descriptor)  # as a child has that was forked past Python
    other = path.with_name("other")
    other.hardlink_to(path)
    lock.release()
    other.rename(path)  # the same file
    taken(path)
    os.close(copy)


def test_a_forked_child_neither_has_the_lock_nor_ends_it(path: Path) -> None:
    lock = take(path)
    child_reads, write = os.pipe()
    read, child_writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(20)
            lock.release()
            os.write(child_writes, bytes([lock._descriptor < 0 and path.exists()]))
            os.close(write)
            os.read(child_reads, 1)
        finally:
            os._exit(0)
    try:
        os.close(child_writes)
        assert os.read(read, 1) == b"\1"
        assert lock.is_intact
        refused(path, "already running")
        os.close(lock._descriptor)  # the kernel does that when we are killed; the child lives
        lock._descriptor = -1
        instance._open_here.discard(lock)
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for end in (child_reads, write, read):
            os.close(end)
        os.waitpid(pid, 0)
        lock.release()


def test_the_descriptor_is_close_on_exec(path: Path) -> None:
    lock = take(path)
    assert fcntl.fcntl(lock._descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    lock.release()


@pytest.mark.parametrize("plain", [False, True])
def test_who_is_killed_before_the_rest_is_cut_off_is_still_named(
    path: Path, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    between: list[Holder | None] = []
    cut = os.ftruncate

    def ftruncate(descriptor: int, length: int) -> None:
        between.append(parse(path.read_bytes()))
        cut(descriptor, length)

    path.write_bytes(render(Holder(GONE, 1 << 60, "x" * 200)))
    monkeypatch.setattr(os, "ftruncate", ftruncate)
    lock = take(path, plain=plain)
    assert between == [Holder(os.getpid()) if plain else ourselves()]
    lock.release()


def test_writes_that_are_short_are_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: write(descriptor, data[:3], offset))
    taken(path)


def test_a_relative_path_is_meant_from_where_we_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lock = take(Path("worker.lock"))
    monkeypatch.chdir("/")
    assert lock.is_intact
    lock.release()
    assert not (tmp_path / "worker.lock").exists()


def test_a_file_that_is_removed_between_open_and_lock_is_opened_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_it = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if operation != fcntl.LOCK_UN and removals:
            removals.pop()
            path.unlink()
        lock_it(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    removals = [1, 2, 3]
    taken(path)
    assert not removals
    removals = [1] * instance.ATTEMPTS
    refused(path, "removed again and again")


# --- who is named ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", [first_process(), Holder(1)])
def test_a_living_process_that_takes_no_lock_keeps_it(path: Path, holder: Holder) -> None:
    path.write_bytes(render(holder))
    error = refused(path, r"^already running \(PID 1\): .* is not locked, but names this living process")
    assert isinstance(error, AlreadyRunning)
    assert (error.pid, error.locked) == (1, False)
    assert path.read_bytes() == render(holder)


def test_a_process_that_is_hidden_from_us_lives(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "read", lambda pid: None)
    path.write_bytes(b"1\n")
    refused(path, r"already running \(PID 1\)")

    def kill(pid: int, number: int) -> None:
        assert number == 0
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    refused(path, r"already running \(PID 1\)")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 90,
        render(Holder(GONE)),
        render(first_process(pid=GONE)),
        render(first_process(boot="another")),
        render(first_process(namespace="pid:[4711]")),
        render(first_process(start=identity.start_of(1) + 1)),
        render(Holder(os.getpid())),
        render(attrs.evolve(ourselves(), start=3)),
        render(ourselves()),
    ],
    # Fixed: two processes that collect the tests must name them alike, and there are pids in the data.
    ids=["empty", "zeros", "gone, plain", "gone", "boot", "namespace", "start", "us, plain", "us before", "us"],
)
def test_a_stale_file_is_taken_over(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    taken(path)


def test_a_zombie_is_dead(path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    path.write_bytes(b"%d\n" % pid)
    taken(path)
    os.waitpid(pid, 0)


def test_who_has_just_locked_a_stale_file_is_not_taken_for_the_dead(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"%d\n" % GONE)
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(path, rf"already running \(PID {os.getpid()}\)")  # as the kernel says
        monkeypatch.setattr(instance, "_locker", lambda status: None)
        refused(path, r"already running \(PID unknown\)")
        file.truncate(0)
        refused(path, r"already running \(PID unknown\)")
        path.write_bytes(b"1\n")
        refused(path, r"already running \(PID 1\)")
        path.write_bytes(render(first_process(pid=GONE, namespace="pid:[4711]")))  # it lives in a container
        refused(path, rf"already running \(PID {GONE}\)")


# --- what may be at the path -------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.with_name("target").write_bytes(b"")
    path.symlink_to("target")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def hard_link(path: Path) -> None:
    path.with_name("target").write_bytes(b"")
    path.hardlink_to(path.with_name("target"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "is no regular file"),
        (fifo, "is no regular file"),
        (link, "is a symbolic link"),
        (dangling, "is a symbolic link"),
        (hard_link, "has hard links"),
    ],
)
def test_what_is_no_file_of_its_own_is_refused(path: Path, make: Callable[[Path], None], message: str) -> None:
    make(path)
    before = sorted(path.parent.iterdir())
    refused(path, message)
    assert sorted(path.parent.iterdir()) == before
    assert not path.with_name("nowhere").exists()


def test_what_is_put_there_while_we_look_is_refused_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"")
    look = os.lstat

    def lstat(name: Path) -> os.stat_result:
        status = look(name)
        path.unlink()
        make(path)
        return status

    monkeypatch.setattr(os, "lstat", lstat)
    make: Callable[[Path], None] = fifo
    refused(path, "is no regular file")
    path.unlink()
    path.write_bytes(b"")
    make = link
    refused(path, "Too many levels of symbolic links")


def test_a_device_is_refused_and_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", None)
    refused(Path("/dev/null"), "is no regular file")


@pytest.mark.parametrize("content", [b"", render(Holder(GONE))])
def test_a_file_of_another_user_is_refused(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(content)
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    refused(path, rf"belongs to another user \(uid {path.stat().st_uid}\).*name another \(--lock-file\)")
    assert path.read_bytes() == content


def test_a_file_is_never_both_made_and_opened_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fs.protected_regular, that fails on another user's file in /tmp, and the message would be of no use."""
    open_it = os.open
    made: list[int] = []

    def opened(name: Any, flags: int, *args: Any, **options: Any) -> int:
        if name == path:
            made.append(flags & (os.O_CREAT | os.O_EXCL))
        return open_it(name, flags, *args, **options)

    monkeypatch.setattr(os, "open", opened)
    taken(path)
    path.write_bytes(b"")
    taken(path)
    assert made == [os.O_CREAT | os.O_EXCL, 0]


@pytest.mark.parametrize(
    "data",
    [
        b"0\n",
        b"-1\n",
        b"host:12\n",
        b"\x7fELF",
        b"12\n\nBuy milk\n",
        b"99999999999999999999\n",
        b"\0" * (instance.MOST + 1),
        b"x" * (1 << 20),
    ],
)
def test_a_file_that_is_no_lock_file_is_left_as_it_is(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused(path, "is no lock file")
    assert path.read_bytes() == data


def test_a_huge_file_is_not_read(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)
    refused(path, "is no lock file")


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "no" / "worker.lock", "the directory of the lock file .* is not there; make it, or name another")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "worker.lock", "cannot be used: Not a directory")


def test_a_file_system_without_locks_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        if operation != fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    refused(path, "cannot be used: No locks available")


# --- what goes wrong on the way ----------------------------------------------------------------------------


@pytest.mark.parametrize("stale", [None, b"", render(Holder(GONE))])
def test_of_a_pid_that_cannot_be_written_nothing_is_left(path: Path, stale: bytes | None) -> None:
    if stale is not None:
        path.write_bytes(stale)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, hard))  # three bytes are written, as on a disk that fills up
    try:
        refused(path, "cannot be used: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
    taken(path)


@pytest.mark.parametrize("name", ["flock", "pread", "pwrite", "ftruncate", "fstat", "lstat"])
def test_ctrl_c_in_any_call_leaves_no_lock(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fcntl if name == "flock" else os
    call = getattr(module, name)

    def interrupted(*args: Any) -> Any:
        result = call(*args)
        if not interruptions:
            interruptions.append(1)
            raise KeyboardInterrupt
        return result

    interruptions: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            take(path)
    taken(path)


# --- hold --------------------------------------------------------------------------------------------------


async def test_hold_has_it_in_the_block(path: Path) -> None:
    async with hold(path) as lock:
        assert lock.is_intact
        with pytest.raises(AlreadyRunning):
            async with hold(path):
                pass
    assert not path.exists()


async def test_hold_releases_when_the_block_fails(path: Path) -> None:
    async def fail() -> None:
        async with hold(path, plain=True):
            assert path.read_text() == f"{os.getpid()}\n"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert not path.exists()


async def test_hold_waits_until_it_is_free(path: Path, autojump_clock: MockClock) -> None:
    lock = take(path)

    async def release() -> None:
        await trio.sleep(7)
        lock.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(release)
        async with hold(path, timeout=60):
            assert 7 <= trio.current_time() <= 7 + 2 * instance.TRY_AGAIN


@pytest.mark.parametrize(("timeout", "waited"), [(0, 0), (-1, 0), (3, 3), (3.01, 3.01), (float("nan"), 0)])
async def test_hold_gives_up_in_time(path: Path, timeout: float, waited: float, autojump_clock: MockClock) -> None:
    lock = take(path)
    began = trio.current_time()
    with pytest.raises(AlreadyRunning, match=rf"\(PID {os.getpid()}\)"):
        async with hold(path, timeout=timeout):
            pass
    assert trio.current_time() - began == pytest.approx(waited)
    lock.release()


async def test_hold_waits_for_the_name_of_who_was_faster(
    path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "_locker", lambda status: None)

    async def write() -> None:
        await trio.sleep(0.2)
        path.write_bytes(b"1\n")

    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        began = trio.current_time()
        with pytest.raises(AlreadyRunning, match="PID unknown"):
            async with hold(path):
                pass
        assert trio.current_time() - began == pytest.approx(instance.NAMED_WITHIN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            with pytest.raises(AlreadyRunning, match=r"PID 1\b"):
                async with hold(path):
                    pass


async def test_cancelling_ends_the_wait_and_takes_nothing(path: Path, autojump_clock: MockClock) -> None:
    lock = take(path)
    with trio.move_on_after(5) as scope:
        async with hold(path, timeout=60):
            pass
    assert scope.cancelled_caught
    lock.release()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with hold(path):
            pytest.fail("it was cancelled before")
    assert not path.exists()
    with trio.CancelScope() as scope:
        async with hold(path):
            scope.cancel()
            await trio.sleep_forever()
    assert not path.exists()


def test_ctrl_c_ends_the_wait_or_the_block_and_leaves_no_lock(path: Path) -> None:
    async def hold_on(timeout: float) -> None:
        async with hold(path, timeout=timeout):
            signal.raise_signal(signal.SIGINT)
            await trio.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        trio.run(hold_on, 0)
    assert not path.exists()

    async def wait() -> None:
        lock = take(path)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hold_on, 60)
                await trio.testing.wait_all_tasks_blocked()
                signal.raise_signal(signal.SIGINT)
                await trio.sleep(60)
        finally:
            lock.release()

    interrupted = False
    try:
        trio.run(wait)
    except* KeyboardInterrupt:
        interrupted = True
    assert interrupted
    assert not path.exists()


def test_ctrl_c_while_it_is_taken_comes_in_the_block(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    write = os.pwrite

    def interrupted(*args: Any) -> int:
        signal.raise_signal(signal.SIGINT)
        return write(*args)

    async def main() -> None:
        async with hold(path) as lock:
            seen.append(lock.is_intact)
            await trio.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trio.run(main)
    assert seen == [True]
    assert not path.exists()
