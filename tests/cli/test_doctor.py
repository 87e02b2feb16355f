"""`supervise doctor`: what the machine gives, and what killed supervisors have left."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import inotify_simple
import pytest
import trio
from rich.console import Console
from rich.text import Text

from supervise.cli import checks as examined
from supervise.cli import doctor
from supervise.cli.checks import Check, Findings
from supervise.cli.redis_server import RedisTrouble, address_of, secrets_of
from supervise.errors import MissingExtra
from supervise.processes import identity, machine
from supervise.secrets import Secret
from supervise.settings import AgentSettings, IndexSettings, RedisSettings, Settings, WorkerSettings
from tests.cli.conftest import LIMIT, Cli, Done

#: The agent says that it works, and does for as long as a test may take.
AGENT = """#!/bin/sh
echo '{"type":"system","subtype":"init","session_id":"s"}'
echo $$ > pid.new
mv pid.new pid
trap '' TERM
while :; do sleep 1; done
"""


def checks(done: Done, name: str) -> list[dict[str, Any]]:
    [told] = [json.loads(line) for line in done.out.splitlines()]
    return [check for check in told["checks"] if check["name"] == name]


def abandoned(cli: Cli) -> int:
    """A job on a bare process group whose supervisor was killed with -9. Returns the pid of its agent."""
    agent = cli.root / "bin" / "agent"
    agent.write_text(AGENT)
    agent.chmod(0o755)
    words = ("--set", f"agent.command={agent}", "--set", "containment=process-group", "--set", "index.mode=none")
    running = cli.start("run", "--json", *words, "work")
    pid = cli.workspace / "pid"
    deadline = time.monotonic() + LIMIT
    while not pid.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait(LIMIT)
    return int(pid.read_text())


def test_a_good_machine_has_no_error(cli: Cli) -> None:
    done = cli.do("doctor")
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    assert any(line.split()[:3] == ["ok", "containment", "guardian"] for line in lines)
    assert any(line.split()[:2] == ["ok", "leftovers"] for line in lines)
    assert any("cidx" in line and line.startswith("warning") for line in lines)  # it is not on this PATH
    assert "index.command" in done.out  # the mend
    assert not (cli.state / "run").exists() or list((cli.state / "run").iterdir()) == []


def test_json_is_one_object(cli: Cli) -> None:
    done = cli.do("doctor", "--json")
    told = json.loads(done.out)
    assert (told["type"], told["sweep"]) == ("doctor", None)
    assert told["containment"] in ("guardian", "guardian and cgroup")
    for check in told["checks"]:
        assert check["level"] in ("ok", "warning", "error")
        assert check["text"]
        assert check["mend"] or check["level"] == "ok"


def test_a_weaker_tier_is_a_warning_that_says_why(cli: Cli) -> None:
    done = cli.do("doctor", "--json", "--set", "containment=process-group")
    assert done.code == 0
    [tier, why] = checks(done, "containment")
    assert (tier["level"], tier["text"]) == ("warning", "process group")
    assert "until the next start" in tier["mend"]
    assert "asks for process-group" in why["text"]


def test_a_state_directory_that_cannot_be_made_is_an_error(cli: Cli) -> None:
    (cli.root / "file").touch()
    done = cli.do("doctor", "--json", "--set", f"state_dir={cli.root}/file/state")
    assert done.code == 1
    [check] = checks(done, "state")
    assert (check["level"], "SUPERVISE_STATE_DIR" in check["mend"]) == ("error", True)
    assert "Not a directory" in check["text"]


def test_few_descriptors_are_a_warning_that_says_how_many_are_enough(cli: Cli) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    done = cli.do("doctor", "--json", preexec_fn=few)
    [check] = checks(done, "descriptors")
    assert check["level"] == "warning"
    assert "128 open files" in check["text"]
    assert "ulimit -n" in check["mend"]


def test_an_agent_that_answers_is_told_with_its_version(cli: Cli) -> None:
    program = cli.root / "bin" / "claude"
    program.write_text("#!/bin/sh\necho 9.8.7 '(a fake)'\n")
    [check] = checks(cli.do("doctor", "--json"), "agent")
    assert check["level"] == "ok"
    assert check["text"].endswith("claude: 9.8.7 (a fake)")
    program.write_text("#!/bin/sh\nexit 3\n")
    [check] = checks(cli.do("doctor", "--json"), "agent")
    assert check["level"] == "warning"
    assert "3" in check["text"]


async def test_what_a_program_says_is_masked_before_it_is_cut(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nprintf '%s %s\\nmore  of it all' " + "x" * 65 + ' "$MY_TOKEN"\n')
    program.chmod(0o755)
    token = "hunter2  secret\nof many words"
    os.environ["MY_TOKEN"] = token
    try:
        [check] = await examined._program("agent", (str(program),), "agent.command", examined.masker_of(Settings()))
    finally:
        del os.environ["MY_TOKEN"]
    assert check.text == f"{program}: {'x' * 65} *** more of it"


async def test_a_program_that_is_there_and_no_program_is_told_as_that(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.touch()
    parts = ("agent.command", examined.masker_of(Settings()))
    [check] = await examined._program("agent", (str(program),), *parts)
    assert check.text == f"{str(program)!r} is not executable"
    [check] = await examined._program("agent", (str(tmp_path / "other"),), *parts)
    assert check.text == f"{str(tmp_path / 'other')!r} was not found"


async def test_a_program_that_does_not_answer_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setattr(examined, "VERSION_TIMEOUT", 0.1)
    [check] = await examined._program("agent", (str(program),), "agent.command", examined.masker_of(Settings()))
    assert (check.level, check.text) == ("warning", f"{program} --version did not answer within 0.1 s")


def test_a_limit_that_nobody_but_root_can_raise_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examined.resource, "getrlimit", lambda which: (128, 128))
    [check] = examined._descriptors()
    assert "LimitNOFILE=" in check.mend
    assert "ulimit" not in check.mend


def test_a_full_disk_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(examined.tempfile, "TemporaryFile", full)
    [check] = examined._state_directory(Settings(state_dir=tmp_path))
    assert (check.level, check.mend[:9]) == ("error", "make room")
    assert "No space left" in check.text


def test_leftovers_are_told_and_swept(cli: Cli) -> None:
    agent = abandoned(cli)
    before = identity.read(agent)
    assert before is not None
    assert before.alive
    done = cli.do("doctor", "--json")
    [check] = checks(done, "leftovers")
    assert check["level"] == "warning"
    assert "doctor --sweep" in check["mend"]
    assert identity.read(agent) is not None  # only told
    done = cli.do("doctor", "--sweep", "--json")
    assert done.code == 0
    told = json.loads(done.out)["sweep"]
    assert told["supervisors"] == 1
    assert agent in {each["pid"] for each in told["found"]}
    assert told["survivors"] == []
    assert cli.alive() == []
    assert list((cli.state / "run").iterdir()) == []
    done = cli.do("doctor", "--sweep")
    assert "no supervisor has left anything" in done.out


def test_the_next_job_sweeps_by_itself(cli: Cli) -> None:
    agent = abandoned(cli)
    done = cli.do("run", "--json", "--set", "index.mode=none", "say hello")
    assert done.code == 0
    assert f"{agent} (" in done.err
    assert "earlier supervisor had left were ended" in done.err
    assert cli.alive() == []


def test_limits_that_this_machine_cannot_keep_fail_the_job(cli: Cli) -> None:
    words = ("--json", "--set", "index.mode=none", "--set", "containment=guardian", "--max-memory", str(1 << 30))
    done = cli.do("run", *words, "--max-processes", "50", "say hello")
    assert done.code == 1
    assert done.result["failure_kind"] == "spawn"
    assert "not available here" in done.result["error"]


@pytest.mark.parametrize("words", [["--max-memory", "0"], ["--max-processes", "0"], ["--max-processes", "-1"]])
def test_a_limit_of_zero_is_wrong_use(cli: Cli, words: list[str]) -> None:
    done = cli.do("run", *words, "say hello")
    assert done.code == 2
    assert "or more" in done.err
    assert "Traceback" not in done.err


def test_a_python_that_cannot_be_started_is_told(cli: Cli) -> None:
    code = "import sys; sys.executable = ''; from supervise.cli.app import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        env=cli.env,
        cwd=cli.workspace,
        capture_output=True,
        check=False,
    )
    told = json.loads(done.stdout)
    assert told["containment"] in ("", "process group")
    assert "sys.executable" in done.stdout.decode()


# --- the machine -------------------------------------------------------------------------------------------


async def test_a_check_that_fails_by_itself_is_a_line_too() -> None:
    async def breaks() -> list[Check]:
        raise ZeroDivisionError("of all things")

    [check] = await examined.guarded("clock", breaks, 5.0)
    assert (check.name, check.level) == ("clock", "error")
    assert "ZeroDivisionError: of all things" in check.text


async def test_a_check_that_does_not_end_is_a_line_too() -> None:
    async def hangs() -> list[Check]:
        await trio.sleep_forever()
        raise AssertionError

    with trio.fail_after(3):
        [check] = await examined.guarded("root", hangs, 0.01)
    assert (check.level, check.text) == ("error", "no answer within 0.01 s")


async def test_checks_that_wait_do_so_together_and_are_told_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = trio.Event()

    async def program(name: str, *args: object) -> list[Check]:
        if name == "agent":
            await reached.wait()
        else:
            reached.set()
        return [Check(name, "ok", "fine")]

    async def trees(*args: object) -> list[Check]:
        return [Check("containment", "ok", "fine")]

    monkeypatch.setattr(examined, "_program", program)
    monkeypatch.setattr(examined, "_trees", trees)
    with trio.fail_after(LIMIT):
        findings = await examined.examine(Settings(state_dir=tmp_path / "state"), False)
    names = [check.name for check in findings.checks if check.name != "clock"]
    assert names == ["state", "containment", "descriptors", "inotify", "agent", "index", "git", "redis"]


@pytest.mark.parametrize("which", ["state_dir", "worker.root", "agent", "index"])
async def test_a_file_system_that_hangs_holds_up_its_own_check_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    hanging = tmp_path / "hanging"
    hanging.mkdir()
    released = threading.Event()
    loop = threading.get_ident()
    crimes = []

    def on(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(hanging)):
                if threading.get_ident() == loop:
                    crimes.append(f"{name} on Trio's thread")
                else:
                    released.wait(LIMIT)
            return real(path, *args, **kwargs)

        monkeypatch.setattr(module, name, call)

    async def trees(*args: object) -> list[Check]:
        return [Check("containment", "ok", "fine")]

    for name in ("is_dir", "mkdir", "exists", "stat"):
        on(Path, name)
    for name in ("access", "statvfs", "stat", "open", "readlink", "lstat"):
        on(os, name)
    monkeypatch.setattr(examined, "_trees", trees)
    monkeypatch.setattr(examined, "LONGEST", 0.7)
    settings = Settings(
        state_dir=hanging if which == "state_dir" else tmp_path,
        worker=WorkerSettings(root=hanging if which == "worker.root" else None),
        agent=AgentSettings(command=(str(hanging / "a") if which == "agent" else "/bin/true",)),
        index=IndexSettings(command=(str(hanging / "i") if which == "index" else "/bin/true",)),
    )
    monkeypatch.setattr(machine, "inotify_use", lambda seconds: machine.InotifyUse(0, 0, True))
    try:
        with trio.fail_after(LIMIT):
            findings = await examined.examine(settings, False)
    finally:
        released.set()
    own = {"state_dir": "state", "worker.root": "root"}.get(which, which)
    assert [(check.name, check.text) for check in findings.checks if check.level == "error"] == [
        (own, "no answer within 0.7 s")
    ]
    assert crimes == []


def test_little_space_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [check] = examined._state_directory(Settings(state_dir=tmp_path))
    monkeypatch.setattr(examined, "LITTLE_SPACE", 2**62)
    [other] = examined._state_directory(Settings(state_dir=tmp_path))
    assert (check.level, other.level) == ("ok", "warning")
    assert "GiB are free" in other.text
    assert "make room" in other.mend


# --- inotify


def test_the_limits_of_inotify_are_read(tmp_path: Path) -> None:
    for name, text in (("max_user_instances", "128\n"), ("max_user_watches", "many\n")):
        (tmp_path / name).write_text(text)
    assert machine.inotify_limits(tmp_path) == machine.InotifyLimits(128, None, None)
    instances = machine.inotify_limits().instances
    assert instances is None or instances > 0


def test_what_is_watched_is_counted(tmp_path: Path) -> None:
    (tmp_path / str(os.getpid())).symlink_to("/proc/self")  # a /proc of one process
    (tmp_path / "999999999").mkdir()
    (tmp_path / "sys").mkdir()
    before = machine.inotify_use(LIMIT, tmp_path)
    with inotify_simple.INotify() as inotify:
        inotify.add_watch("/", inotify_simple.flags.CREATE)
        inotify.add_watch(str(tmp_path), inotify_simple.flags.CREATE)
        after = machine.inotify_use(LIMIT, tmp_path)
    assert (after.instances - before.instances, after.watches - before.watches, after.whole) == (1, 2, True)
    assert not machine.inotify_use(-1, tmp_path).whole


def test_a_process_with_many_descriptors_is_not_looked_through_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / str(os.getpid())).symlink_to("/proc/self")
    now = itertools.count()  # each look at the clock takes a second
    monkeypatch.setattr(machine.time, "monotonic", lambda: float(next(now)))
    links = []
    monkeypatch.setattr(machine.os, "listdir", lambda path: [str(number) for number in range(1000)])
    monkeypatch.setattr(machine.os, "readlink", lambda path: links.append(path) or "socket:[1]")
    assert not machine.inotify_use(10, tmp_path).whole
    assert len(links) < 11


async def inotify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limits: tuple[Any, ...], *use: Any) -> Check:
    monkeypatch.setattr(machine, "inotify_limits", lambda: machine.InotifyLimits(*limits))
    monkeypatch.setattr(machine, "inotify_use", lambda seconds: machine.InotifyUse(*use))
    [check] = await examined._inotify(tmp_path, Settings())
    return check


async def test_inotify_is_told_with_its_limits_and_their_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = await inotify(monkeypatch, tmp_path, (128, 100_000, 16384), 3, 40, True)
    assert check.level == "ok"
    assert check.text == "3 of 128 instances used; 40 of 100000 watches used; 16384 events may wait"
    check = await inotify(monkeypatch, tmp_path, (128, 100_000, None), 3, 40, False)
    assert check.text == "at least 3 of 128 instances used; at least 40 of 100000 watches used"
    check = await inotify(monkeypatch, tmp_path, (None, None, None), 0, 0, True)
    assert (check.level, check.text) == ("ok", "the kernel does not tell its limits")


async def test_limits_that_are_nearly_used_up_are_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = await inotify(monkeypatch, tmp_path, (128, 100_000, 1), 126, 0, True)
    assert (check.level, "max_user_instances=512" in check.mend) == ("warning", True)
    check = await inotify(monkeypatch, tmp_path, (128, 8192, 1), 1, 100, True)
    assert (check.level, "max_user_watches=524288" in check.mend) == ("warning", True)


@pytest.mark.parametrize(
    ("error", "text", "mend"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "nothing can be watched: Too many open files", "sysctl"),
        (MissingExtra("watching a directory", "worker", "inotify-simple"), "has to poll", "pip install"),
    ],
)
async def test_where_nothing_can_be_watched_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, text: str, mend: str
) -> None:
    def refuse(directory: Path) -> None:
        raise error

    monkeypatch.setattr(examined, "Inotify", refuse)
    check = await inotify(monkeypatch, tmp_path, (128, 100_000, 1), 0, 0, True)
    assert check.level == "warning"
    assert text in check.text
    assert mend in check.mend


# --- the clock


class Library:
    """A C library whose adjtimex says what it is told to."""

    def __init__(self, state: int, microseconds: int = 0) -> None:
        self.state = state
        self.microseconds = microseconds

    def adjtimex(self, timex: Any) -> int:
        assert struct.unpack_from("I", timex) == (0,)  # nothing is set
        struct.pack_into("l", timex, 3 * struct.calcsize("l"), self.microseconds)
        return self.state


@pytest.mark.parametrize(
    ("library", "level", "text"),
    [
        (Library(0, 1500), "ok", "right to 0.002 s"),
        (Library(5, 16_000_000), "warning", "nothing keeps it right"),
        (Library(-1), "ok", "cannot be told here"),
        (object(), "ok", "cannot be told here"),
    ],
)
async def test_whether_the_clock_is_kept_right_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: object, level: str, text: str
) -> None:
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda *args, **kwargs: library)
    kernel, files = await examined._clocks(tmp_path)
    assert (kernel.level, text in kernel.text, bool(kernel.mend)) == (level, True, level != "ok")
    assert (files.level, files.text) == ("ok", "the file system of state_dir goes by the same time")


def test_the_real_clock_answers() -> None:
    wrong = machine.clock_error()
    assert wrong is None or wrong >= 0


def test_a_clock_of_another_year_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gmtime = time.gmtime
    monkeypatch.setattr(time, "gmtime", lambda *args: gmtime(1.0))
    [check] = examined._clock()
    assert check.level == "error"
    assert "1970-01-01" in check.text


async def test_a_file_system_with_another_clock_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.clock_skew
    assert abs(real(tmp_path)) < 1
    assert real(tmp_path, lambda: time.time() - 100) == pytest.approx(100, abs=2)
    assert real(tmp_path, lambda: time.time() + 100) == pytest.approx(-100, abs=2)
    assert list(tmp_path.iterdir()) == []
    for shift, text in ((100, "s behind our clock"), (-100, "s ahead of our clock")):
        monkeypatch.setattr(machine, "clock_skew", lambda path, s=shift: real(path, lambda: time.time() + s))
        assert len(await examined._clocks(tmp_path / "none")) == 1
        found = (await examined._roots(Settings(worker=WorkerSettings(root=tmp_path))))[1:]
        assert [(check.name, check.level) for check in found] == [("clock", "warning")]
        assert text in found[0].text
        assert f"worker.root ({tmp_path}) is 100.0" in found[0].text or "is 99." in found[0].text


# --- the root of a worker


def test_a_root_is_looked_at_where_one_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def root(path: Path | None) -> list[Check]:
        return examined._root(Settings(worker=WorkerSettings(root=path)))

    assert root(None) == []
    assert root(tmp_path) == [Check("root", "ok", f"{tmp_path} can be written")]
    assert [*tmp_path.iterdir()] == []
    [check] = root(tmp_path / "a" / "b")
    assert (check.level, check.text) == ("ok", f"{tmp_path}/a/b does not exist; a worker makes it")
    (tmp_path / "file").touch()
    [check] = root(tmp_path / "file")
    assert (check.level, "worker.root" in check.mend) == ("error", True)
    monkeypatch.setattr(examined, "sees_nothing", lambda path: "nfs4")
    [check] = root(tmp_path)
    assert (check.level, "on nfs4, nobody tells of changes" in check.text) == ("warning", True)
    assert "every 1 s" in check.mend


# --- Redis

PASSWORD = "s3cret/#@word"
INFO = b"# Server\r\nredis_version:7.2.4\r\nos:Linux\r\n"


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


def good(words: list[str], info: bytes = INFO) -> bytes:
    """A server that wants nothing."""
    return bulk(info) if words[0] == "INFO" else b"+PONG\r\n"


class Locked:
    """A server that wants a password, and repeats what it does not understand, as Redis does."""

    def __init__(self) -> None:
        self.open = False

    def __call__(self, words: list[str]) -> bytes:
        if words[0] == "AUTH":
            self.open = words[1:] in ([PASSWORD], ["user", PASSWORD])
            return b"+OK\r\n" if self.open else f"-WRONGPASS with args '{words[-1]}'\r\n".encode()
        return good(words) if self.open else b"-NOAUTH Authentication required.\r\n"


@asynccontextmanager
async def server(
    answer: Callable[[list[str]], bytes | None], path: Path | None = None, *, pieces: bool = True
) -> AsyncIterator[int]:
    """A server of Redis's protocol; its port. `answer` gets a command; `None` from it ends the connection."""

    async def serve(stream: trio.abc.Stream) -> None:
        data = b""
        try:
            async for chunk in stream:
                data += chunk
                while data.count(b"\r\n") > 0:  # commands come one at a time: the next one waits for our answer
                    lines = data.split(b"\r\n")
                    if not data.startswith(b"*") or len(lines) < 2 * int(lines[0][1:]) + 2:
                        break
                    data = b""
                    said = answer([line.decode() for line in lines[2::2]])
                    if said is None:
                        await stream.aclose()
                        return
                    size = 7 if pieces else len(said)
                    for at in range(0, len(said), size or 1):
                        await stream.send_all(said[at : at + size])
        except trio.BrokenResourceError:
            return

    async with trio.open_nursery() as nursery:
        if path is None:
            listener: Any = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
            port = listener.socket.getsockname()[1]
        else:
            sock = trio.socket.socket(trio.socket.AF_UNIX)
            await sock.bind(str(path))
            sock.listen()
            listener, port = trio.SocketListener(sock), 0
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield port
        nursery.cancel_scope.cancel()


async def redis(url: str, seconds: float = LIMIT) -> Check:
    [check] = await examined._redis(Settings(redis=RedisSettings(url=url)), seconds)
    return check


async def test_without_an_address_redis_is_not_used() -> None:
    assert await examined._redis(Settings()) == [Check("redis", "ok", "not used (redis.url is unset)")]


async def test_a_redis_that_answers_is_told_with_its_version(tmp_path: Path) -> None:
    asked = []

    def answer(words: list[str]) -> bytes:
        asked.append(words)
        return good(words)

    async with server(answer) as port:
        assert await redis(f"redis://127.0.0.1:{port}/3") == Check("redis", "ok", f"127.0.0.1:{port}: version 7.2.4")
    assert asked == [["PING"], ["SELECT", "3"], ["INFO", "server"]]
    async with server(good, tmp_path / "socket"):
        assert (await redis(f"unix://{tmp_path}/socket")).text == f"{tmp_path}/socket: version 7.2.4"


@pytest.mark.parametrize(
    ("version", "level"),
    [
        (b"6.2.0", "ok"),
        (b"10.0", "ok"),
        (b"6.0.16", "error"),
        (b"5.9", "error"),
        (b"", "warning"),
        (b"x", "warning"),
        ("７.２".encode(), "warning"),
    ],
)
async def test_an_old_redis_is_an_error(version: bytes, level: str) -> None:
    async with server(lambda words: good(words, b"redis_version:" + version)) as port:
        check = await redis(f"redis://127.0.0.1:{port}")
    assert check.level == level
    assert ("6.2 or later" in check.mend) is (level != "ok")


@pytest.mark.parametrize("user", ["", "user"])
async def test_a_redis_with_a_password_gets_it(user: str) -> None:
    async with server(Locked()) as port:
        check = await redis(f"redis://{user}:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/0")
        assert (check.level, "7.2.4" in check.text) == ("ok", True)


async def test_a_password_that_is_missing_or_wrong_is_told_and_not_shown() -> None:
    async with server(Locked()) as port:
        check = await redis(f"redis://127.0.0.1:{port}")
        assert (check.level, "it wants a password" in check.text) == ("error", True)
        check = await redis(f"redis://:wrong-{quote(PASSWORD, safe='')}@127.0.0.1:{port}")
    assert check.text == f"127.0.0.1:{port}: it refuses the password (WRONGPASS)"
    assert PASSWORD not in repr(check)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "answers, but not as a Redis does"),
        (b"$99999999999\r\n", "answers, but not as a Redis does"),
        (b"$-1\r\n", "answers, but not as a Redis does"),
        (b"$" + b"9" * 5000 + b"\r\n", "answers, but not as a Redis does"),
        (b"$" + b"9" * 4000 + b"\r\n", "answers, but not as a Redis does"),
        (b"$0000000004\r\nPONG\r\n", "answers, but not as a Redis does"),
        (b"$2\r\nPONG\r\n", "answers, but not as a Redis does"),
        (b"+" + b"x" * 10_000, "answers, but not as a Redis does"),
        (b"-UNHEARD of\r\n", "refuses PING, but not as a Redis does"),
        (b"$" + "²".encode() + b"\r\n", "answers, but not as a Redis does"),
        (b"\r\n", "answers, but not as a Redis does"),
        (
            b"-DENIED Redis is running in \x1b[31mprotected mode\r\n",
            "PING is refused: DENIED Redis is running in  [31m",
        ),
        (None, "closes the connection without an answer"),
    ],
)
async def test_a_server_that_is_no_redis_is_an_error(answer: bytes | None, text: str) -> None:
    async with server(lambda words: answer) as port:
        check = await redis(f"redis://127.0.0.1:{port}")
    assert check.level == "error"
    assert text in check.text
    assert check.mend


async def test_what_a_server_repeats_of_the_password_is_not_shown() -> None:
    def answer(words: list[str]) -> bytes:
        return b"+OK\r\n" if words[0] == "AUTH" else f"-ERR not after {PASSWORD}\r\n".encode()

    async with server(answer) as port:
        check = await redis(f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{port}")
    assert check.text == f"127.0.0.1:{port}: PING is refused: ERR not after ***"


@pytest.mark.parametrize("user", ["", "quoted/user"])
async def test_whatever_a_server_repeats_nothing_of_the_address_is_shown(user: str) -> None:
    quoted = quote(PASSWORD, safe="")
    answers: dict[str, bytes] = {}

    def answer(said: list[str]) -> bytes:
        return answers.get(said[0], b"+OK\r\n")

    async with server(answer, pieces=False) as port:
        url = f"redis://{quote(user, safe='')}:{quoted}@127.0.0.1:{port}/0"
        settings = Settings(redis=RedisSettings(url=url))
        masker = examined.masker_of(settings)
        repeated = (PASSWORD, quoted, quoted.lower(), quote(PASSWORD), url, f"{user}:{quoted}", user or PASSWORD)
        for command in ("AUTH", "PING", "SELECT", "INFO"):
            forms = (
                ["-{} x\r\n", "-ERR not {}\r\n"] if command != "INFO" else ["-ERR {}\r\n", "+redis_version:7.0{}\r\n"]
            )
            for words, form in itertools.product(repeated, forms):
                answers = {command: form.format(words).encode()}
                [check] = await examined._redis(settings)
                assert f"127.0.0.1:{port}" in check.text
                hidden = ("s3cret", "@word", "40word")
                assert not any(part in check.text + check.mend for part in (*hidden, "quoted"))
                assert not any(part in masker.text(words) for part in hidden)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h?password=s3cret",
        "redis://h/0?db=1&PassWord=s3cret",
        "unix:///s?username=u",
        "redis://h?pass%77ord=s3cret",
    ],
)
async def test_a_password_behind_the_question_mark_is_refused(url: str) -> None:
    check = await redis(url)
    assert (check.level, "redis://USER:PASSWORD@HOST:PORT/0" in check.mend) == ("error", True)
    assert "s3cret" not in repr(check)
    if "s3cret" in url:
        assert Secret("s3cret") in secrets_of(Secret(url))


async def test_port_zero_is_refused() -> None:
    check = await redis("redis://127.0.0.1:0")
    assert (check.level, "port 0" in check.text, "6379" in check.mend) == ("error", True, True)


@pytest.mark.parametrize(
    "url", ["redis://a..b/0", f"redis://{'a' * 70}.x", "rediss://.h", "unix:///tmp/a%00b", f"unix:///tmp/{'a' * 200}"]
)
async def test_what_can_be_no_host_or_path_is_told(url: str) -> None:
    check = await redis(url)
    assert check.level == "error"
    assert "redis" in check.mend


async def test_a_socket_on_a_file_system_that_hangs_does_not_hold_up_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    real = os.stat
    loop = threading.get_ident()

    def stat(path: Any, *args: Any, **kwargs: Any) -> Any:
        if path == "/hanging/socket" and threading.get_ident() != loop:
            released.wait(LIMIT)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    try:
        check = await redis("unix:///hanging/socket", seconds=0.1)
    finally:
        released.set()
    assert check.text == "/hanging/socket: no answer within 0.1 s"


async def test_a_server_that_never_stops_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervise.cli.redis_server.MOST", 1000)
    async with server(lambda words: b"x" * 5000) as port:
        assert "not as a Redis does" in (await redis(f"redis://127.0.0.1:{port}")).text


async def test_a_server_that_says_nothing_is_not_waited_for_long() -> None:
    async with server(lambda words: b"") as port:
        check = await redis(f"redis://:{PASSWORD[:6]}@127.0.0.1:{port}", seconds=0.1)
    assert (check.level, check.text) == ("error", f"127.0.0.1:{port}: no answer within 0.1 s")


async def test_nobody_at_the_address_is_an_error(tmp_path: Path) -> None:
    sock = trio.socket.socket()
    await sock.bind(("127.0.0.1", 0))  # bound, but nobody listens
    port = sock.getsockname()[1]
    check = await redis(f"redis://127.0.0.1:{port}")
    of_name = await redis(f"redis://localhost:{port}")  # which has two addresses, perhaps
    sock.close()
    assert of_name.text == f"localhost:{port}: Connection refused"
    assert (check.level, check.text) == ("error", f"127.0.0.1:{port}: Connection refused")
    assert "SUPERVISE_REDIS__URL" in check.mend
    assert "No such file" in (await redis(f"unix://{tmp_path}/none")).text


async def test_tls_towards_a_server_without_it_is_an_error() -> None:
    async def plain(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(b"-ERR unknown command\r\n")

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, plain, [listener])
        check = await redis(f"rediss://127.0.0.1:{listener.socket.getsockname()[1]}")
        nursery.cancel_scope.cancel()
    assert check.level == "error"
    assert "rediss://" in check.mend


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{PASSWORD}@host:6379/0",
        "redis://:pass/word@host",
        "redis://:pass#word@host",
        "redis://:123/45@host",
        "redis://:p@[host",
        "http://s3cret",
        "s3cret",
        "redis://host:s3cret",
        "redis://host:70000",
    ],
)
async def test_what_is_no_address_is_told_without_it(url: str) -> None:
    check = await redis(url)
    assert (check.level, check.text) == ("error", "redis.url is no address of a Redis")
    assert "redis://HOST:PORT/0" in check.mend
    with pytest.raises(RedisTrouble):
        address_of(Secret(url))


def test_addresses_are_told_without_passwords() -> None:
    address = address_of(Secret("redis://u:s3cret@[::1]:7000/2"))
    assert (str(address), address.user, address.database) == ("[::1]:7000", "u", "2")
    assert "s3cret" not in repr(address)
    assert str(address_of(Secret("redis://"))) == "127.0.0.1:6379"
    assert address_of(Secret("rediss://host")).tls


# --- what is shown


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Check]], None]:
    def says(checks: list[Check]) -> None:
        async def examine(settings: Settings, clean: bool) -> Findings:
            return Findings(checks)

        monkeypatch.setattr(doctor, "examine", examine)

    return says


@pytest.mark.parametrize("width", [40, 80])
async def test_a_narrow_terminal_shows_the_whole_text(
    found: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", str(width))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("supervise.cli.tables.on_terminal", lambda stream: True)
    found([Check("containment", "warning", "x" * 100 + " and more", "do " + "y" * 50), Check("git", "ok", "fine")])
    assert await doctor.run(Settings(), False, False, console=Console(file=io.StringIO())) == 0
    lines = [Text.from_ansi(line) for line in capfd.readouterr().out.splitlines()]
    assert max(line.cell_len for line in lines) <= width
    shown = "".join(line.plain.replace("warning", "").replace("containment", "") for line in lines)
    assert (shown.count("x"), shown.count("y")) == (100, 50)
    assert " and more → do " in " ".join(shown.split())


async def test_off_a_terminal_lines_are_whole_and_nothing_steers_who_reads(
    found: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("SOME_API_KEY", "pa-0123456789")
    found([Check("agent", "error", "z" * 150 + " \x1b[31m[red]pa-0123456789")])
    assert await doctor.run(Settings(), False, False, console=Console(file=io.StringIO())) == 1
    out = capfd.readouterr().out
    assert "z" * 150 + "  [31m[red]***" in out
    assert "\x1b" not in out
    assert await doctor.run(Settings(), False, True, console=Console(file=io.StringIO())) == 1
    assert "pa-0123456789" not in capfd.readouterr().out


async def test_a_reader_of_the_doctor_who_has_gone_away_is_no_error(found: Any) -> None:
    found([Check("git", "ok", "fine")])
    reading, writing = os.pipe()
    os.close(reading)
    saved = os.dup(1)
    os.dup2(writing, 1)
    try:
        codes = [
            await doctor.run(Settings(), False, json, console=Console(file=io.StringIO())) for json in (False, True)
        ]
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(writing)
    assert codes == [141, 141]
