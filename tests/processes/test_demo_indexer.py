"""The demo's indexer as real processes: what a supervisor of cidx relies on, and that the index is right."""

from __future__ import annotations

import os
import platform
import queue
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from supervise.demo.indexer_files import Changed, Stamp, read_file
from supervise.demo.indexer_store import DATABASE
from supervise.demo.project import lay_down
from supervise.demo.proof import Proof, proof

# -P: a module that the agent writes into the workspace must not shadow the standard library's.
INDEXER = [sys.executable, "-P", "-m", "supervise.demo.indexer"]
LIMIT = 20.0  # seconds for anything; nothing here takes that long
NEVER = "600"  # a debounce that does not end within a test
READY = "Watchdog observer started monitoring: "


def run(workspace: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *INDEXER, *arguments],
        cwd=workspace,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for `condition`, asked again and again, at most LIMIT."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.01)


class Running:
    """A command that runs, and its lines."""

    def __init__(self, workspace: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*INDEXER, *arguments],
            cwd=workspace,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self.process.pid
        self.lines: list[str] = []
        self.ready = threading.Event()
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(READY):
                self.ready.set()
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def line(self, beginning: str) -> str:
        """The next line that begins so."""
        deadline = time.monotonic() + LIMIT
        while True:
            line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            assert line is not None, f"ended without {beginning!r}: {self.lines}"
            self.lines.append(line)
            if line.startswith(beginning):
                return line

    def kill(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for the end; the exit code, negative for a signal. All lines are in `lines` then."""
        code = self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        while (line := self._queue.get(timeout=LIMIT)) is not None:
            self.lines.append(line)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """The sample project with an empty index."""
    lay_down(tmp_path)
    assert run(tmp_path, "init").returncode == 0
    return tmp_path


@pytest.fixture
def start(workspace: Path) -> Iterator[Callable[..., Running]]:
    """Starts commands; whatever still runs at the end of the test is ended."""
    started: list[Running] = []

    def begin(*arguments: str) -> Running:
        started.append(Running(workspace, *arguments))
        return started[-1]

    yield begin
    for running in started:
        running.close()


@pytest.fixture
def watch(start: Callable[..., Running]) -> Callable[..., Running]:
    """Starts a watch and waits for its readiness."""

    def begin(debounce: str = "0.2", *options: str) -> Running:
        running = start(*options, "watch", "--debounce", debounce)
        running.line(READY)
        return running

    return begin


def equal(workspace: Path) -> Callable[[], bool]:
    return lambda: proof(workspace).equal


# ---- one command


def test_index_of_a_fresh_workspace(workspace: Path) -> None:
    assert not proof(workspace).equal
    done = run(workspace, "index")
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["indexing 12 files", "Files removed: 0", "Files processed: 12"]
    assert proof(workspace) == Proof(equal=True, files=12, differences=())


def test_init_makes_a_directory_that_git_ignores(workspace: Path) -> None:
    assert (workspace / ".code-indexer/.gitignore").read_text() == "*\n"
    assert run(workspace, "init").stdout == "Already initialised\n"


def test_not_initialised(tmp_path: Path) -> None:
    for command in (["index"], ["index", "--reconcile"], ["watch"], ["fix-config", "--force"], ["query", "x"]):
        done = run(tmp_path, *command)
        assert (done.returncode, done.stdout[:15]) == (1, "Not initialised"), command
    assert run(tmp_path, "status").returncode == 0
    assert not (tmp_path / ".code-indexer").exists()


def test_there_is_no_daemon(workspace: Path) -> None:
    for command in ("start", "stop"):
        done = run(workspace, command)
        assert (done.returncode, done.stdout) == (1, "Daemon mode not enabled\n")


def test_unknown_arguments(workspace: Path) -> None:
    for arguments in (["dance"], ["watch", "--loud"], [], ["--fault", "none", "watch"], ["watch", "--debounce", "nan"]):
        assert run(workspace, *arguments).returncode == 2, arguments


def test_query_finds_words_and_takes_no_syntax(workspace: Path) -> None:
    run(workspace, "index")
    lines = run(workspace, "query", "to_cents PRICES").stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["orchard/prices.py"]
    assert len(run(workspace, "query", "orchard", "--limit", "2").stdout.splitlines()) == 2
    for odd in ('"', "NEAR(", "a AND", "*", "", "-x ^y"):
        done = run(workspace, "query", odd)
        assert (done.returncode, done.stderr) == (0, ""), odd


def test_fix_config_puts_a_broken_database_right(workspace: Path) -> None:
    run(workspace, "index")
    assert run(workspace, "fix-config", "--force").stdout == "Configuration is valid\n"
    (workspace / DATABASE).write_bytes(b"this is no database" * 1000)
    (workspace / ".code-indexer/.gitignore").unlink()
    for suffix in ("-wal", "-shm"):
        (workspace / (DATABASE + suffix)).unlink(missing_ok=True)
    assert not proof(workspace).equal
    broken = run(workspace, "index", "--reconcile")
    assert broken.returncode == 1
    assert "fix-config --force" in broken.stdout
    assert run(workspace, "fix-config").returncode == 1
    fixed = run(workspace, "fix-config", "--force")
    assert (fixed.returncode, fixed.stdout.count("Repaired")) == (0, 2)
    run(workspace, "index", "--reconcile")
    assert proof(workspace).equal


def test_reconcile_repairs_whatever_happened(workspace: Path) -> None:
    run(workspace, "index")
    until(lambda: "indexing 0 " in run(workspace, "index", "--reconcile").stdout, "all stamps are trusted")
    (workspace / "orchard/trees.py").write_text("changed = True\n")
    (workspace / "new/deep").mkdir(parents=True)
    (workspace / "new/deep/file.txt").write_text("fresh\n")
    (workspace / "README.md").unlink()
    shutil.rmtree(workspace / "docs")
    assert len(proof(workspace).differences) == 5
    done = run(workspace, "index", "--reconcile")
    assert done.stdout.splitlines() == ["indexing 2 files", "Files removed: 3", "Files processed: 2"]
    assert proof(workspace).equal


def test_a_change_that_keeps_size_and_time_is_seen(workspace: Path) -> None:
    file = workspace / "orchard/prices.py"
    run(workspace, "index")
    until(lambda: "indexing 0 " in run(workspace, "index", "--reconcile").stdout, "all stamps are trusted")
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"2.40", b"2.41"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not proof(workspace).equal
    run(workspace, "index", "--reconcile")
    assert proof(workspace).equal


def test_files_of_every_kind(workspace: Path) -> None:
    outside = workspace.parent / f"{workspace.name}-outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("elsewhere")
    (workspace / "binary").write_bytes(bytes(range(256)) * 40)
    (workspace / "latin1.txt").write_bytes("Äpfel".encode("latin-1"))
    (workspace / "large").write_bytes(b"large words " * 1_000_000)
    (workspace / "empty").touch()
    (workspace / os.fsdecode(b"not-utf8-\xff\xfe")).write_text("odd name\n")
    (workspace / "line\nend").write_text("odd name\n")
    (workspace / "link").symlink_to(outside / "secret.txt")
    (workspace / "directory-link").symlink_to(outside)
    os.mkfifo(workspace / "fifo")
    (workspace / ".git").mkdir()
    (workspace / ".git/HEAD").write_text("ref: refs/heads/main\n")
    assert "indexing 18 files" in run(workspace, "index").stdout
    assert proof(workspace) == Proof(equal=True, files=18, differences=())
    assert run(workspace, "query", "elsewhere").stdout == ""
    assert run(workspace, "query", "large").stdout == ""
    odd = run(workspace, "query", "odd name").stdout.splitlines()
    assert sorted(odd) == ["line\\nend: odd name", "not-utf8-\\xff\\xfe: odd name"]


def test_files_that_fail_are_errors_and_exit_0(workspace: Path) -> None:
    run(workspace, "index")
    for path in ("orchard/trees.py", "docs"):
        (workspace / path).chmod(0)
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root reads everything, unless these capabilities are taken away
        if shutil.which("setpriv") is None:
            pytest.skip("as root, this needs setpriv")
        prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    try:
        done = run(workspace, "index", "--reconcile", prefix=prefix)
    finally:
        (workspace / "orchard/trees.py").chmod(0o644)
        (workspace / "docs").chmod(0o755)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert "ERROR orchard/trees.py: Permission denied" in lines
    assert "ERROR docs: Permission denied" in lines
    assert sum("ERROR" in line for line in lines) == 2
    planned = int(next(line for line in lines if line.startswith("indexing")).split()[1])
    assert lines[-2:] == ["Files removed: 0", f"Files processed: {planned - 1}"]
    assert proof(workspace).equal  # what could not be read was kept as it was


def test_sigint_cancels_an_index(workspace: Path, start: Callable[..., Running]) -> None:
    with open(workspace / "huge", "wb") as file:
        file.truncate(8 * 1024**3)  # a hole, which takes many seconds to hash
    index = start("index")
    index.line("indexing")
    index.kill(signal.SIGINT)
    assert index.end() == 0
    assert index.lines[-1] == "cancelled"
    (workspace / "huge").unlink()  # pytest keeps the directory: whoever copies it would copy 8 GiB


def test_kill_9_during_an_index_leaves_what_a_reconcile_repairs(workspace: Path, start: Callable[..., Running]) -> None:
    for directory in range(20):
        (workspace / f"many{directory}").mkdir()
        for number in range(100):
            (workspace / f"many{directory}/{number}.txt").write_text(f"file {directory} {number}\n" * 20)
    index = start("index")
    index.line("indexing")
    database = sqlite3.connect(f"file:{workspace / DATABASE}?mode=rw", uri=True)
    try:
        until(lambda: database.execute("SELECT count(*) FROM files").fetchone()[0] > 0, "a first batch is written")
    finally:
        database.close()
    index.kill(signal.SIGKILL)
    assert index.end() == -signal.SIGKILL
    assert not proof(workspace).equal
    run(workspace, "index", "--reconcile")
    assert proof(workspace) == Proof(equal=True, files=2012, differences=())


def test_a_file_that_changes_while_it_is_read_is_not_indexed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(Changed):
            read_file(root, "file", lambda: file.write_text("another"))  # type: ignore[arg-type, return-value]
        content = read_file(root, "file", lambda: None)
    finally:
        os.close(root)
    assert content is not None
    assert content.text == "another"


def test_a_young_stamp_is_not_trusted_later() -> None:
    now = time.time_ns()
    young = Stamp(size=1, mtime_ns=now, ctime_ns=now, inode=1)
    old = young._replace(ctime_ns=now - 10**9)
    assert young.lasting() != young
    assert old.lasting() == old


# ---- the watch


def test_ready_line_and_initial_sync(workspace: Path, start: Callable[..., Running]) -> None:
    running = start("watch")
    assert running.line(READY) == f"{READY}{workspace}"
    assert proof(workspace).equal  # by the time of that line
    running.kill(signal.SIGINT)
    assert running.end() == 0


def test_edits_are_indexed_after_the_debounce(workspace: Path, watch: Callable[..., Running]) -> None:
    running = watch()
    (workspace / "orchard/trees.py").write_text("edited = True\n")
    (workspace / "added.txt").write_text("added\n")
    (workspace / "README.md").unlink()
    (workspace / "docs/usage.md").rename(workspace / "docs/manual.md")
    assert not proof(workspace).equal
    running.line("Indexed")
    until(equal(workspace), "the index equals the files")
    assert run(workspace, "query", "added").stdout == "added.txt: added\n"


def test_new_and_moved_directories(workspace: Path, watch: Callable[..., Running]) -> None:
    running = watch()
    # Faster than anyone can add watches: files are there before their directories are watched.
    (workspace / "a/b/c/d").mkdir(parents=True)
    for directory in ("a", "a/b", "a/b/c", "a/b/c/d"):
        (workspace / directory / "file.txt").write_text(directory)
    until(equal(workspace), "files in new directories are indexed")
    (workspace / "a/b").rename(workspace / "moved")
    until(equal(workspace), "a moved directory is indexed under its new name")
    # The watches must have moved with it, in its depth too.
    (workspace / "moved/c/d/file.txt").write_text("after the move")
    (workspace / "moved/c/new.txt").write_text("after the move")
    until(equal(workspace), "edits in a moved directory are indexed")
    # Two directories change places, and one comes from elsewhere.
    outside = workspace.parent / f"{workspace.name}-outside"
    shutil.copytree(workspace / "docs", outside)
    (workspace / "moved").rename(workspace / "spare")
    (workspace / "docs").rename(workspace / "moved")
    (workspace / "spare").rename(workspace / "docs")
    outside.rename(workspace / "orchard/docs")
    until(equal(workspace), "swapped directories are indexed")
    (workspace / "docs/c/d/file.txt").write_text("after the swap")
    (workspace / "docs").rename(workspace.parent / f"{workspace.name}-gone")
    shutil.rmtree(workspace / "moved")
    until(equal(workspace), "directories that went away leave nothing")
    directories = sum(path.is_dir() for path in workspace.rglob("*"))  # the index's is not watched, the top is
    until(lambda: watches(running.pid) == directories, "what is watched is the workspace's directories")
    running.kill(signal.SIGINT)
    assert running.end() == 0
    assert not [line for line in running.lines if "ERROR" in line]


def test_a_directory_replaced_by_a_link_leaves_the_index(workspace: Path, watch: Callable[..., Running]) -> None:
    running = watch(NEVER)
    elsewhere = workspace.parent / f"{workspace.name}-elsewhere"
    shutil.copytree(workspace / "docs", elsewhere)
    (workspace / "docs/usage.md").write_text("pending when its directory is replaced\n")
    shutil.rmtree(workspace / "docs")
    (workspace / "docs").symlink_to(elsewhere)
    running.kill(signal.SIGINT)
    assert running.end() == 0
    assert proof(workspace).equal


def test_sigint_flushes_pending_edits(workspace: Path, watch: Callable[..., Running]) -> None:
    running = watch(NEVER)
    (workspace / "pending/deep").mkdir(parents=True)
    (workspace / "pending/deep/file.txt").write_text("pending\n")
    (workspace / "README.md").unlink()
    assert not proof(workspace).equal
    running.kill(signal.SIGINT)
    assert running.end() == 0
    assert proof(workspace).equal


def test_sigterm_loses_pending_edits(workspace: Path, watch: Callable[..., Running]) -> None:
    running = watch(NEVER)
    (workspace / "README.md").write_text("pending\n")
    (workspace / "new.txt").write_text("pending\n")
    running.kill(signal.SIGTERM)
    assert running.end() == -signal.SIGTERM
    assert set(proof(workspace).differences) == {
        "README.md: the index has an older content",
        "new.txt: not in the index",
    }
    run(workspace, "index", "--reconcile")
    assert proof(workspace).equal


def test_a_second_sigint_forces_the_end_and_still_exits_0(workspace: Path, watch: Callable[..., Running]) -> None:
    running = watch(NEVER)
    database = sqlite3.connect(workspace / DATABASE, isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")  # the flush has to wait for us
        (workspace / "README.md").write_text("pending\n")
        running.kill(signal.SIGINT)
        running.line("Stopping")
        until(lambda: "nanosleep" in Path(f"/proc/{running.pid}/wchan").read_text(), "SQLite waits for the lock")
        running.kill(signal.SIGINT)
        running.line("FORCE QUIT")
        assert running.end() == 0
    finally:
        database.close()
    assert not proof(workspace).equal


def test_edits_while_no_watch_runs_are_found_at_its_start(workspace: Path, watch: Callable[..., Running]) -> None:
    run(workspace, "index")
    (workspace / "README.md").write_text("nobody watched\n")
    watch(NEVER)
    assert proof(workspace).equal


def rummage(workspace: Path, seed: int, steps: int) -> None:
    """Create, edit, move and remove files and directories at random, as fast as possible."""
    dice = random.Random(seed)
    names = ["a", "b", "c"]

    def somewhere() -> Path:
        return workspace.joinpath(*(dice.choice(names) for _ in range(dice.randint(1, 4))))

    for step in range(steps):
        one, other = somewhere(), somewhere()
        try:
            match dice.randrange(6):
                case 0 | 1:
                    one.mkdir(parents=True, exist_ok=True)
                case 2 | 3:
                    (one / f"file{dice.randrange(3)}").write_text(f"{step:06}")
                case 4:
                    one.rename(other)
                case _:
                    shutil.rmtree(one)
        except OSError:
            continue  # a random step that is not possible


@pytest.mark.parametrize("seed", range(4))
def test_random_edits_while_the_watch_starts_and_works(
    workspace: Path, start: Callable[..., Running], seed: int
) -> None:
    rummage(workspace, seed, 1000)
    running = start("watch", "--debounce", "0.01")
    for more in range(100_000):
        if running.ready.is_set():
            break
        rummage(workspace, 1000 * seed + more, 10)
    running.line(READY)
    if seed % 2:  # else nothing comes later that could make up for what was missed
        rummage(workspace, seed + 100, 1500)
    running.kill(signal.SIGINT)
    assert running.end() == 0
    assert not [line for line in running.lines if "ERROR" in line]
    found = proof(workspace)
    assert found.equal, found


def watches(pid: int) -> int:
    """How many inotify watches a process has."""
    infos = (file.read_text() for file in Path(f"/proc/{pid}/fdinfo").iterdir())
    return sum(line.startswith("inotify ") for info in infos for line in info.splitlines())


def test_an_overflow_of_the_event_queue_means_a_full_rescan(workspace: Path, watch: Callable[..., Running]) -> None:
    queued = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if queued > 32768:
        pytest.skip(f"max_queued_events is {queued}: too many events to make in a test")
    running = watch()
    running.kill(signal.SIGSTOP)
    try:
        names = [workspace / "one.txt", workspace / "two.txt"]
        for name in names:
            name.touch()
        # Two events that do not merge, each time.
        for _ in range(queued // 2 + 1):
            os.utime(names[0])
            os.utime(names[1])
        # These have no event any more.
        (workspace / "lost/deep").mkdir(parents=True)
        (workspace / "lost/deep/file.txt").write_text("lost\n")
        (workspace / "docs").rename(workspace / "manual")
    finally:
        running.kill(signal.SIGCONT)
    until(equal(workspace), "the index equals the files after an overflow")
    (workspace / "lost/deep/file.txt").write_text("watched again\n")
    (workspace / "manual/usage.md").write_text("watched again\n")
    until(equal(workspace), "the new directories are watched")


def test_an_index_that_is_removed_ends_the_watch(workspace: Path, watch: Callable[..., Running]) -> None:
    running = watch(NEVER)
    shutil.rmtree(workspace / ".code-indexer")
    assert running.end() == 1
    assert running.lines[-1].startswith("ERROR the index is lost")


def test_a_flush_into_an_index_that_is_gone_is_no_success(workspace: Path, watch: Callable[..., Running]) -> None:
    running = watch(NEVER)
    (workspace / DATABASE).unlink()
    running.kill(signal.SIGINT)
    assert running.end() == 1
    assert running.lines[-1].startswith("ERROR the index is lost")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="knows the number of poll() there")
def test_an_idle_watch_sleeps_without_a_timeout(workspace: Path, watch: Callable[..., Running]) -> None:
    running = watch()

    def call() -> list[str]:
        try:
            return (Path(f"/proc/{running.pid}/syscall")).read_text().split()
        except PermissionError:
            pytest.skip("may not see what a process waits for")

    def sleeps_for_ever() -> bool:
        number, *arguments = call()
        return number == "7" and int(arguments[2], 16) & 0xFFFFFFFF == 0xFFFFFFFF

    until(sleeps_for_ever, "poll() without a timeout after the start")
    (workspace / "README.md").write_text("an edit\n")
    running.line("Indexed")
    until(sleeps_for_ever, "poll() without a timeout after an edit")


# ---- faults


def test_fault_watch_start(workspace: Path) -> None:
    run(workspace, "index")
    done = run(workspace, "--fault", "watch-start", "watch")
    assert (done.returncode, done.stdout) == (1, "No indexes found. Run 'cidx index' first.\n")
    (workspace / "README.md").write_text("changed\n")
    assert run(workspace, "--fault", "watch-start", "index", "--reconcile").returncode == 0
    assert proof(workspace).equal


def test_fault_watch_crash_each_time(workspace: Path, watch: Callable[..., Running]) -> None:
    for attempt in range(2):
        running = watch(NEVER, "--fault", "watch-crash")
        assert proof(workspace).equal
        (workspace / "README.md").write_text(f"edit {attempt}\n")
        assert running.end() == -signal.SIGKILL
        assert not proof(workspace).equal


def test_fault_stubborn(workspace: Path, start: Callable[..., Running]) -> None:
    running = start("--fault", "stubborn", "watch", "--debounce", "0.2")
    child = psutil.Process(int(running.line("Stubborn child: ").split()[-1]))
    try:
        running.line(READY)
        until(lambda: os.getsid(child.pid) == child.pid, "the child has its own session")
        for number in (signal.SIGINT, signal.SIGTERM):
            running.kill(number)
            child.send_signal(number)
        (workspace / "README.md").write_text("still at work\n")
        running.line("Indexed")  # after the signals: they were delivered and ignored
        assert running.process.poll() is None
        assert child.is_running()
        assert child.status() == psutil.STATUS_SLEEPING
        running.process.kill()
        assert running.process.wait(LIMIT) == -signal.SIGKILL
        assert child.is_running()
    finally:
        child.kill()
        child.wait(LIMIT)


def test_fault_reconcile(workspace: Path) -> None:
    assert run(workspace, "--fault", "reconcile", "watch").returncode == 1
    done = run(workspace, "--fault", "reconcile", "index", "--reconcile")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0] == "indexing 12 files"
    assert lines[-1] == "Files processed: 0"
    assert sum(line.startswith("ERROR ") for line in lines) == 12
    assert not proof(workspace).equal


# ---- the proof


def plant(workspace: Path, statements: str) -> None:
    database = sqlite3.connect(workspace / DATABASE)
    with database:
        for statement in statements.split(";"):
            assert database.execute(statement).rowcount == 1
    database.close()


@pytest.mark.parametrize(
    ("statement", "difference"),
    [
        (
            "DELETE FROM texts WHERE rowid = (SELECT id FROM files WHERE path = CAST('README.md' AS BLOB));"
            "DELETE FROM files WHERE path = CAST('README.md' AS BLOB)",
            "README.md: not in the index",
        ),
        (
            "UPDATE files SET digest = 'x' WHERE path = CAST('README.md' AS BLOB)",
            "README.md: the index has an older content",
        ),
        (
            "UPDATE texts SET body = 'x' WHERE rowid = (SELECT id FROM files WHERE path = CAST('README.md' AS BLOB))",
            "README.md: the full text is not that of the file",
        ),
        (
            "INSERT INTO files SELECT 1000, CAST('ghost' AS BLOB), digest, size, mtime_ns, ctime_ns, inode"
            " FROM files LIMIT 1",
            "ghost: in the index, but no such file",
        ),
        (
            "INSERT INTO texts (rowid, body) VALUES (1000, 'x')",
            "the full text holds an entry 1000 that belongs to no file",
        ),
    ],
    ids=["missing", "old", "text", "ghost", "orphan"],
)
def test_proof_finds_a_difference_in_the_index(workspace: Path, statement: str, difference: str) -> None:
    run(workspace, "index")
    assert proof(workspace).equal
    plant(workspace, statement)
    assert proof(workspace) == Proof(equal=False, files=12, differences=(difference,))


def test_proof_is_not_fooled_by_stamps(workspace: Path) -> None:
    run(workspace, "index")
    file = workspace / "README.md"
    status = file.stat()
    file.write_bytes(file.read_bytes().replace(b"small", b"large"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert proof(workspace).differences == ("README.md: the index has an older content",)


def test_proof_bounds_its_differences(workspace: Path) -> None:
    for number in range(150):
        (workspace / f"{number}.txt").touch()
    found = proof(workspace)
    assert (found.equal, found.files, len(found.differences)) == (False, 162, 101)
    assert found.differences[-1] == "and 62 more"


def test_proof_without_an_index(tmp_path: Path) -> None:
    found = proof(tmp_path)
    assert not found.equal
    assert found.differences[0].startswith("the index cannot be read")
