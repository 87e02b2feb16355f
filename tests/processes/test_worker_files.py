"""Hostile files in tasks/: each is set aside with a reason, its bytes intact, and the next good task is done."""

from __future__ import annotations

import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from supervise.dispatch.spool import Spool
from supervise.dispatch.task import MAX_BYTES
from supervise.dispatch.worker import open_worker
from supervise.events import Event, TaskBuried, TaskReceived
from supervise.settings import BreakerSettings
from tests.processes.lone import NOBODY, python_for_nobody
from tests.processes.lone_worker import lone_worker
from tests.processes.workers import WORKER, Files, Gate, eventually, playing, settings_of, status, task


async def refused(
    files: Files, root: Path, drops: dict[str, Callable[[Path], None]], *, lie: bool
) -> dict[str, dict[str, Any]]:
    """The dead letters of what these put at paths in tasks/, by name; then the next good task is done.

    Args:
        files, root: of the worker.
        drops: by name, what makes the file.
        lie: the files are there before the worker begins.
    """

    def drop() -> None:
        for name, make in drops.items():
            make(files.tasks / f"{name}.json")

    if lie:
        drop()
    async with open_worker(WORKER, settings=settings_of(root, sweep_interval=600.0), executor=playing()) as worker:
        await eventually(lambda: worker.status == "healthy", "it runs")
        if not lie:
            drop()
        await eventually(lambda: worker.stats.tasks_dlq == len(drops), f"{len(drops)} dead letters")
        files.drop("good")
        await files.ended("good")
        await status(worker, "healthy")
    assert files.left() == []
    letters = {letter["name"].removesuffix(".json"): letter for letter in files.letters()}
    assert letters.keys() == drops.keys()
    assert {letter["dlq_reason"] for letter in letters.values()} == {"invalid_format"}
    return letters


DEEP = b'{"task_id": "t", "description": "x", "deep": ' + b"[" * 200 + b"]" * 200 + b"}"
DEEPER = b"[" * 500_000 + b"]" * 500_000

CONTENTS = {
    "up": (task("../x"), "task_id is '../x'"),
    "absolute": (task("/etc/passwd"), "task_id is '/etc/passwd'"),
    "hidden": (task(".x"), "task_id is '.x'"),
    "a newline": (task("x\n"), "task_id is 'x\\n'"),
    "a nul": (task("x\0y"), "task_id is 'x\\x00y'"),
    "too long": (task("x" * 129), "task_id is 'xxx"),
    "our own mark": (task("t~retry"), "task_id is 't~retry'"),
    "a list": (b"[1, 2]", "it is a list"),
    "no description": (b'{"task_id": "t"}', "description is missing"),
    "a key twice": (b'{"task_id": "t", "description": "a", "description": "b"}', "'description' is there twice"),
    "deep": (DEEP, "nested more than 100 deep"),
    "deeper": (DEEPER, "nested too deep"),
    "large": (task("t", "x" * MAX_BYTES), f"larger than {MAX_BYTES} bytes"),
    "not a number": (b'{"task_id": "t", "description": "x", "timeout": NaN}', "NaN is no number"),
    "a forged past": (task("t", _supervise={"attempts": 3}), "_supervise is not what a worker writes"),
    "itself": (task("t", dependencies=["t"]), "names the task 't' itself"),
    "huge digits": (b'{"task_id": "t", "description": "x", "n": ' + b"9" * 5000 + b"}", "4300"),
    "empty": (b"", "not JSON"),
    "only zeros": (bytes(1000), "not JSON"),
    "not UTF-8": (b'{"task_id": "\xff"}', "not UTF-8"),
    "UTF-16": (task("t").decode().encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize("lie", [True, False], ids=["lie there", "come"])
async def test_what_is_no_task_is_set_aside_with_its_bytes(files: Files, root: Path, lie: bool) -> None:
    def writes(data: bytes) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_bytes(data)

        return write

    drops = {name: writes(data) for name, (data, _) in CONTENTS.items()}
    letters = await refused(files, root, drops, lie=lie)
    for name, (data, words) in CONTENTS.items():
        assert words in letters[name]["dlq_detail"], name
        assert (files.spool.dlq / letters[name]["file"]).read_bytes() == data, name
    assert list(root.rglob("x*")) == [], "nothing was written outside"


def a_socket(path: Path) -> None:
    """The name of a path in a deep directory is too long for one."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def a_directory(path: Path) -> None:
    path.mkdir()
    (path / "inner").write_text("x")


def a_device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # zeros without an end


def a_sparse_file(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2 << 30)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link to a task": (lambda path: path.symlink_to("../../elsewhere.json"), "a symbolic link"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "a symbolic link"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "a symbolic link"),
    "a link to what has no end": (lambda path: path.symlink_to("/dev/zero"), "a symbolic link"),
    "a pipe": (lambda path: os.mkfifo(path), "a pipe"),
    "a directory": (a_directory, "a directory"),
    "a socket": (a_socket, "a socket"),
    "2 GiB of nothing": (a_sparse_file, f"larger than {MAX_BYTES} bytes"),
}
if os.geteuid() == 0:  # nobody else may make one
    KINDS["a device"] = (a_device, "a device")


@pytest.mark.parametrize("lie", [True, False], ids=["lie there", "come"])
async def test_what_is_no_plain_file_is_set_aside_as_it_is(files: Files, root: Path, lie: bool) -> None:
    elsewhere = root / "elsewhere.json"
    elsewhere.write_bytes(task("linked"))
    seen: dict[str, os.stat_result] = {}

    def told(name: str, drop: Callable[[Path], None]) -> Callable[[Path], None]:
        def dropped(path: Path) -> None:
            drop(path)
            seen[name] = path.lstat()

        return dropped

    drops = {name: told(name, drop) for name, (drop, _) in KINDS.items()}
    with trio.fail_after(20):
        letters = await refused(files, root, drops, lie=lie)
    for name, (_, words) in KINDS.items():
        assert words in letters[name]["dlq_detail"], name
        there, was = (files.spool.dlq / letters[name]["file"]).lstat(), seen[name]
        assert (there.st_ino, there.st_mode, there.st_size) == (was.st_ino, was.st_mode, was.st_size), name
    assert elsewhere.read_bytes() == task("linked")


def test_the_kinds_of_files_cover_devices_where_they_may_be_made(tmp_path: Path) -> None:
    """Their absence from the table above would be silent."""
    if "a device" not in KINDS:
        pytest.skip("this user may make no devices")
    KINDS["a device"][0](tmp_path / "device")
    assert stat.S_ISCHR((tmp_path / "device").lstat().st_mode)


NAMES = {
    "a newline": b"new\nline.json",
    "no text": b"\xff\xfe\x80.json",
    "as long as can be": b"x" * 250 + b".json",
    "as long as can be, and no text": b"\xff" * 250 + b".json",
    "as long as can be, of wide letters": "𝒳".encode() * 62 + b".json",
    "dots": b"x....json",
    "spaces": b"  .json",
    "an escape": b"\x1b[31mred.json",
    "a backslash": b"a\\..\\x.json",
    "a retry's": b"t~retry.json",
}


@pytest.mark.parametrize("case", NAMES)
async def test_a_name_may_be_any(files: Files, root: Path, case: str) -> None:
    """A task does not depend on its file's name, and a file that is none is set aside under a name of our making."""
    name = os.fsdecode(NAMES[case])
    async with open_worker(WORKER, settings=settings_of(root, sweep_interval=600.0), executor=playing()) as worker:
        await status(worker, "healthy")
        files.drop("t", name=name)
        await files.ended("t")
        files.drop_bytes(b"{}", name)
        await eventually(files.letters, "a dead letter")
        await status(worker, "healthy")
    (letter,) = files.letters()
    assert letter["name"] == name.encode("utf-8", "backslashreplace").decode()
    raw: Path = files.spool.dlq / letter["file"]
    assert raw.read_bytes() == b"{}"
    assert raw.name.isprintable()
    assert not raw.name.startswith(".")
    assert files.left() == []


async def test_files_of_other_names_are_nobodys(files: Files, root: Path) -> None:
    others = [".hidden.json", "...json", ".json", "notes.txt", "task.json.part", "task.JSON"]
    for name in others:
        (files.tasks / name).write_bytes(task("t"))
    async with open_worker(WORKER, settings=settings_of(root, sweep_interval=0.1), executor=playing()):
        for name in others:
            (files.tasks / name).write_bytes(task("t"))
        files.drop("good")
        await files.ended("good")
    assert sorted(path.name for path in files.tasks.iterdir()) == sorted(others)
    assert files.letters() == []


async def test_what_others_hide_beside_the_results_stays(files: Files, root: Path) -> None:
    """Only unfinished writes of our own are cleared away."""
    for directory in (files.spool.results, files.spool.dlq, files.spool.running):
        (directory / ".snapshots").mkdir()
        (directory / ".directory.0123abcd").mkdir()
        (directory / ".t.json.0123abcd").write_bytes(b"half")
    async with open_worker(WORKER, settings=settings_of(root), executor=playing()):
        files.drop("good")
        await files.ended("good")
    for directory in (files.spool.results, files.spool.dlq):
        assert (directory / ".snapshots").is_dir()
        assert not (directory / ".t.json.0123abcd").exists()


# --- ids that are taken ------------------------------------------------------------------------------------


async def test_the_id_of_a_task_that_waits_runs_or_has_a_result_is_taken(files: Files, root: Path) -> None:
    gate = Gate()
    settings = settings_of(root, max_concurrent=1, sweep_interval=0.1)
    async with open_worker(WORKER, settings=settings, executor=gate.executor()) as worker:
        files.drop("t", name="first.json")
        await eventually(lambda: gate.begun == ["t"], "it runs")
        files.drop("t", "another", name="second.json")
        assert "it is running" in (await files.buried("t"))["dlq_detail"]
        files.drop("u", name="third.json")
        await eventually(lambda: worker.queue_size == 1, "u waits")
        files.drop("u", "another", name="fourth.json")
        letter = await files.buried("u")
        assert "'third.json' waits under it" in letter["dlq_detail"]
        assert (files.spool.dlq / letter["file"]).read_bytes() == task("u", "another")
        gate.let_go()
        await files.ended("u")
        files.drop("t", "another", name="fifth.json")
        assert "there is a result" in (await files.buried("t~2"))["dlq_detail"]
    assert gate.begun == ["t", "u"]
    assert len(files.letters()) == 3


async def test_two_names_of_one_file_are_one_task(files: Files, root: Path) -> None:
    elsewhere = root / "elsewhere"
    elsewhere.write_bytes(task("t"))
    for name in "ab":
        os.link(elsewhere, files.tasks / f"{name}.json")
    gate = Gate()
    gate.let_go()
    async with open_worker(WORKER, settings=settings_of(root, sweep_interval=0.1), executor=gate.executor()):
        await files.ended("t")
        await files.buried("t")
    assert gate.begun == ["t"]
    assert files.left() == []


async def test_a_task_that_is_claimed_while_it_is_looked_at_is_no_second_one(
    files: Files, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow look reads the file, which runs by the time it asks whether the id is taken."""
    gate, events = Gate(), list[Event]()
    read, go_on = threading.Event(), threading.Event()
    taken = Spool._taken
    looks: list[str] = []

    def slowly(self: Spool, task_id: str, claim: str) -> str:
        looks.append(task_id)
        if len(looks) == 2:
            read.set()
            go_on.wait(20.0)
        return taken(self, task_id, claim)

    monkeypatch.setattr(Spool, "_taken", slowly)
    settings = settings_of(root, sweep_interval=600.0)
    async with open_worker(WORKER, settings=settings, executor=gate.executor(), emit=events.append) as worker:
        moment = _soon(0.5)
        path = files.drop("t", not_before=moment)
        await eventually(lambda: worker.queue_size == 1, "it waits")
        os.close(os.open(path, os.O_WRONLY))  # a hint, and so the second look
        await eventually(read.is_set, "the second look has read the file")
        await eventually(lambda: gate.begun, "it runs")
        go_on.set()
        gate.let_go()
        await files.ended("t")
    assert [event for event in events if isinstance(event, TaskBuried)] == []
    assert files.letters() == []


def _soon(seconds: float) -> float:
    return time.time() + seconds


# --- files that change -------------------------------------------------------------------------------------


async def test_a_file_that_goes_between_hint_and_look_is_gone(files: Files, root: Path) -> None:
    async with open_worker(WORKER, settings=settings_of(root, sweep_interval=0.1), executor=playing()) as worker:
        for number in range(200):
            path = files.drop(f"t{number}", not_before=_soon(600.0))
            path.unlink()
        await eventually(lambda: worker.queue_size == 0, "all are gone")
        files.drop("good")
        await files.ended("good")
        await status(worker, "healthy")
    assert files.letters() == []
    assert files.left() == []


async def test_a_file_that_grows_while_it_is_read_is_read_to_a_limit(files: Files, root: Path) -> None:
    """A writer without an end keeps nobody else from being served."""
    stop = threading.Event()

    def grow() -> None:
        with open(files.tasks / "grows.json", "wb", buffering=0) as file:
            file.write(b'{"task_id": "grows", "description": "')
            while not stop.is_set() and file.tell() < 64 * MAX_BYTES:
                file.write(b"x" * 65536)

    settings = settings_of(root, sweep_interval=0.05)
    async with open_worker(WORKER, settings=settings, executor=playing()), trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, grow)
        letter = await files.buried("grows")
        files.drop("good")
        await files.ended("good")
        stop.set()
    assert "larger than" in letter["dlq_detail"]


async def test_a_file_that_is_another_task_by_the_time_it_is_claimed_is_looked_at_again(
    files: Files, root: Path
) -> None:
    gate = Gate()
    gate.let_go()
    settings = settings_of(root, sweep_interval=600.0)
    async with open_worker(WORKER, settings=settings, executor=gate.executor()) as worker:
        files.drop("old", name="task.json", not_before=_soon(600.0))
        await eventually(lambda: worker.queue_size == 1, "it waits")
        files.drop("new", name="task.json")
        await files.ended("new")
        await eventually(lambda: worker.queue_size == 0, "nobody waits for the old one")
    assert gate.begun == ["new"]
    assert files.left() == []


async def test_a_pipe_among_the_results_keeps_nobody_waiting(files: Files, root: Path) -> None:
    others = Files(root, "w2")
    os.mkfifo(others.spool.results / "dep.json")
    (others.spool.results / "dep2.json").mkdir()
    async with open_worker(WORKER, settings=settings_of(root, sweep_interval=0.1), executor=playing()) as worker:
        files.drop("waits", dependencies=["dep", "dep2"])
        files.drop("good")
        await files.ended("good")
        await status(worker, "healthy")
        await eventually(lambda: files.heartbeat()["blocked"] == {"waits": ["dep", "dep2"]}, "it stays blocked")


async def test_ten_thousand_at_once_are_all_received_and_the_urgent_one_is_not_the_last(
    files: Files, root: Path
) -> None:
    gate, events = Gate(), list[Event]()
    count = 10_000
    settings = settings_of(root, sweep_interval=600.0, max_concurrent=1, breaker=BreakerSettings(failures=5))
    async with open_worker(WORKER, settings=settings, executor=gate.executor(), emit=events.append) as worker:
        files.drop("first")
        await eventually(lambda: gate.begun == ["first"], "the first one runs")
        await trio.to_thread.run_sync(_drop_many, files.tasks, count)
        files.drop("urgent", priority="urgent")
        await eventually(lambda: worker.queue_size == count + 1, "all of them wait")
        gate.let_go()
        await eventually(lambda: len(gate.begun) > 20, "some of them are done")
        assert gate.begun[1] == "urgent"
        worker.drain()
    assert sum(isinstance(event, TaskReceived) for event in events) == count + 2
    assert len(list(files.tasks.iterdir())) + worker.stats.tasks_processed == count + 2
    assert files.letters() == []


def _drop_many(tasks: Path, count: int) -> None:
    for number in range(count):
        (tasks / f"t{number}.json").write_bytes(task(f"t{number}"))


# --- as somebody who may not read all ----------------------------------------------------------------------


async def test_a_file_that_the_worker_may_not_read_is_set_aside(files: Files, root: Path) -> None:
    """Run as another user: nothing is unreadable to root."""
    settings_of(root)
    root.chmod(0o755)
    if os.geteuid() == 0:
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    python = python_for_nobody() if os.geteuid() == 0 else sys.executable
    if python is None:
        pytest.skip("no Python here that another user may run; root may read every file")
    who = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    with lone_worker(root, python=(python,), popen=who, sweep_interval=0.1):
        new = files.tasks / ".secret"
        new.write_bytes(task("secret"))
        new.chmod(0)
        new.rename(files.tasks / "secret.json")
        letter = await files.buried("secret")
        files.drop("good")
        await files.ended("good")
    assert "Permission denied" in letter["dlq_detail"]
    raw = files.spool.dlq / letter["file"]
    if os.geteuid() == 0:
        assert raw.read_bytes() == task("secret")
    else:
        raw.chmod(0o600)
