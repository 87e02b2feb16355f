"""What `supervise scripts` does: in this process, its standard output in a file."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve
from rich.cells import cell_len
from rich.console import Console

from supervise import BadInput, IndexSettings, Settings, SpecError
from supervise.catalogue.catalogue import Catalogue
from supervise.cli import exit_codes, scripts
from supervise.cli.scripts import Wanted, draw
from supervise.processes.output import BoundedLog
from tests.cli.conftest import Root

LIMIT = 30.0
EVIL = "[/red] [bold]\x1b[2J\x07\u202e \u2028"
WIDE = "日本語のとても長い説明文がここにあります"


def put(path: Path, text: str = "#!/bin/sh\n", *, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


class Command:
    """Runs the commands, and keeps what they print."""

    def __init__(self, root: Path) -> None:
        self.scripts = root / "scripts"
        self.scripts.mkdir()
        self.settings = Settings(
            script_dirs=[self.scripts],
            state_dir=root / "state",
            index=IndexSettings(mode="none"),
            orphan_grace=0.2,
        )
        self.out = b""
        self.err = ""

    async def __call__(self, command: Callable[..., Awaitable[int]], *args: Any) -> int:
        people = Console(file=io.StringIO(), width=200)
        with tempfile.TemporaryFile() as file:
            before = os.dup(1)
            os.dup2(file.fileno(), 1)
            try:
                with trio.fail_after(LIMIT):
                    code = await command(self.settings, *args, console=people)
            finally:
                os.dup2(before, 1)
                os.close(before)
                file.seek(0)
                self.out = file.read()
                assert isinstance(people.file, io.StringIO)
                self.err = people.file.getvalue()
        return code

    @property
    def lines(self) -> list[str]:
        return self.out.decode().splitlines()

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.decode().split("\n")[:-1]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


# --- list and search ---------------------------------------------------------------------------------------


async def test_scripts_are_listed_for_people(command: Command) -> None:
    put(command.scripts / "b.sh", "#!/bin/sh\n# description: Dump it\n# tags: db, nightly\n")
    put(command.scripts / "a.sh")
    put(command.scripts / "c.sh", "#!/bin/sh\n# timeout: soon\n", mode=0o644)
    assert await command(scripts.list_all, False) == 0
    assert command.lines == [
        "name  description  tags",
        "a     —            —",
        "b     Dump it      db, nightly",
        "c !   —            —",
    ]
    assert command.err == "supervise: 3 scripts, 1 of them with problems (!): supervise scripts show NAME\n"


async def test_scripts_are_listed_for_programs(command: Command) -> None:
    text = "#!/bin/sh\n# description: Dump\n# inputs: i\n# outputs: o\n# tags: x, y\n# timeout: 2m\n"
    text += "# task_class: LLM_LITE\n"
    put(command.scripts / "b.sh", text)
    put(command.scripts / "a.sh", "#!/bin/sh\n# timeout: soon\n", mode=0o644)
    assert await command(scripts.list_all, True) == 0
    assert command.objects == [
        {
            "name": "a",
            "path": str(command.scripts / "a.sh"),
            "description": None,
            "inputs": None,
            "outputs": None,
            "tags": [],
            "timeout": None,
            "task_class": None,
            "executable": False,
            "problems": ["line 2: timeout is 'soon', but must be seconds above 0, as 90, 90s, 2m or 1h"],
        },
        {
            "name": "b",
            "path": str(command.scripts / "b.sh"),
            "description": "Dump",
            "inputs": "i",
            "outputs": "o",
            "tags": ["x", "y"],
            "timeout": 120.0,
            "task_class": "LLM_LITE",
            "executable": True,
            "problems": [],
        },
    ]
    assert await command(scripts.search, "DUMP", True) == 0
    assert [each["name"] for each in command.objects] == ["b"]


async def test_a_search_counts_and_finding_nothing_is_no_failure(command: Command) -> None:
    put(command.scripts / "a.sh", "#!/bin/sh\n# tags: Nightly\n")
    put(command.scripts / "b.sh")
    assert await command(scripts.search, "nightLY", False) == 0
    assert command.lines == ["name  description  tags", "a     —            Nightly"]
    assert command.err == "supervise: 1 of 2 scripts matches 'nightLY'\n"
    assert await command(scripts.search, "nothing", False) == 0
    assert (command.out, command.err) == (b"", "supervise: 0 of 2 scripts match 'nothing'\n")
    assert await command(scripts.search, "nothing", True) == 0
    assert command.out == b""
    assert await command(scripts.search, "\x1b[2J", False) == 0
    assert "\x1b" not in command.err


async def test_without_a_catalogue_people_are_told_what_to_do(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "scripts")
    command.settings = Settings()
    assert await command(scripts.list_all, False) == 0
    assert command.out == b""
    assert f"there is no directory {tmp_path}/scripts/scripts; make it" in command.err
    assert command.err.endswith("supervise: 0 scripts\n")


async def test_a_directory_that_is_missing_is_told_and_costs_nothing_else(command: Command, tmp_path: Path) -> None:
    put(command.scripts / "a.sh")
    command.settings = Settings(script_dirs=[tmp_path / "gone", command.scripts])
    assert await command(scripts.list_all, True) == 0
    assert [each["name"] for each in command.objects] == ["a"]
    assert f"supervise: the directory {tmp_path}/gone cannot be read: No such file or directory\n" in command.err


async def test_strangers_texts_steer_nobody(command: Command) -> None:
    put(command.scripts / f"{EVIL.replace('/', '')}\n.sh", f"#!/bin/sh\n# description: {EVIL}\n# tags: {EVIL},x\n")
    put(command.scripts / os.fsdecode(b"\xe4.sh"))
    for args in [(scripts.list_all, False), (scripts.search, "bold", False), (scripts.list_all, True)]:
        assert await command(*args) == 0
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", command.out.decode())
        if args != (scripts.list_all, True):
            assert all(line.isprintable() for line in command.lines)
            assert "[bold]" in command.out.decode()
    assert {each["name"] for each in command.objects} == {f"{EVIL.replace('/', '')}\n", "\udce4"}


async def test_a_long_text_is_whole_off_a_terminal_and_widens_no_other_line(command: Command) -> None:
    put(command.scripts / "a.sh", f"#!/bin/sh\n# description: {'long ' * 1000}\n# tags: t\n")
    put(command.scripts / "b.sh", "#!/bin/sh\n# tags: t\n")
    assert await command(scripts.list_all, False) == 0
    assert command.lines[1].count("long") == 1000
    assert len(command.lines[2]) < 120


# --- on a terminal -----------------------------------------------------------------------------------------


def drawn(catalogue: Path, width: int, query: str | None = None, **options: Any) -> list[str]:
    """The table as a terminal so wide gets it."""
    out = Console(file=io.StringIO(), force_terminal=True, width=width, color_system="truecolor", **options)
    return draw(Catalogue.read([catalogue]).search(query or ""), out).splitlines()


def bare(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    put(tmp_path / "1.sh", f"#!/bin/sh\n# name: translate-everything-at-once\n# description: {WIDE}\n# tags: 日本, x\n")
    put(tmp_path / "2.sh", "#!/bin/sh\n# name: backup\n# description: Dump the database and copy it, see above\n")
    put(tmp_path / "3.sh", "#!/bin/sh\n# tags: alpha, beta, gamma, delta, epsilon\n", mode=0o644)
    return tmp_path


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 300])
def test_the_table_fits_the_terminal(catalogue: Path, width: int) -> None:
    lines = [bare(line) for line in drawn(catalogue, width)]
    assert max(map(cell_len, lines)) <= width
    assert [line.split()[0] for line in lines[:3]] == ["name", "3", "backup"]
    assert lines[1].split()[1] == "!"
    assert lines[3].startswith("translat")
    at = lines[0].index("descr")
    assert lines[2][at:].startswith("Dump")
    assert lines[1][at] == "—"
    if width == 300:
        assert not any("…" in line for line in lines)
    if width <= 40:
        assert all("…" in line for line in lines[1:])


def test_what_was_found_is_highlighted_where_it_is_seen(catalogue: Path) -> None:
    (_, line) = drawn(catalogue, 80, "D")[:2]
    hit = "\x1b[1;33m{}\x1b[0m".format
    assert hit("d") + "elta" in line
    (_, line) = drawn(catalogue, 80, "DATABASE")
    assert f"Dump the {hit('database')} and" in line
    assert bare(line).startswith("backup  Dump the database and")
    (_, line) = drawn(catalogue, 40, "above")  # it is cut away
    assert hit("") not in line
    assert "\x1b" not in line
    (_, line) = drawn(catalogue, 40, "日本")
    assert line.count(hit("日本")) == 2
    (_, line) = drawn(catalogue, 40, "translate-everything")  # and here, its end is
    assert re.match(r"\x1b\[1;33mtranslat[a-z-]*\x1b\[0m…  \S", line)
    assert "33m" not in drawn(catalogue, 80, "D", no_color=True)[1]


def test_the_mark_is_seen_also_behind_a_name_that_is_cut(tmp_path: Path) -> None:
    text = f"#!/bin/sh\n# description: {'word ' * 50}\n# tags: {'t' * 50}\n"
    put(tmp_path / f"{'x' * 90}.sh", text, mode=0o644)
    line = bare(drawn(tmp_path, 40)[1])
    assert re.match(r"x+… !  ", line)
    assert cell_len(line) <= 40


async def test_a_real_terminal_gets_colours_and_its_width(
    command: Command, catalogue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb", buffering=0) as screen:
        monkeypatch.setattr("sys.stdout", terminal)  # what rich looks at
        before = os.dup(1)
        os.dup2(theirs, 1)
        try:
            command.settings = Settings(script_dirs=[catalogue])
            people = Console(file=io.StringIO())
            assert await scripts.search(command.settings, "backup", False, console=people) == 0
        finally:
            os.dup2(before, 1)
            os.close(before)
        seen = screen.read(65536).decode()
    assert "\x1b[1;33mbackup\x1b[0m" in seen
    assert max(cell_len(bare(line)) for line in seen.splitlines()) <= 50


# --- show --------------------------------------------------------------------------------------------------


async def test_all_of_a_script_is_shown(command: Command) -> None:
    text = "#!/bin/sh\n# name: dump\n# description: Dump\n# inputs: in\n# outputs: out\n# tags: x, y\n"
    text += "# task_class: LLM_LITE\n"
    path = put(command.scripts / "sub" / "d.sh", text)
    assert await command(scripts.show, "dump", False) == 0
    assert [line.split(maxsplit=1) for line in command.lines] == [
        ["name", "dump"],
        ["path", str(path)],
        ["description", "Dump"],
        ["inputs", "in"],
        ["outputs", "out"],
        ["tags", "x, y"],
        ["task_class", "LLM_LITE"],
        ["timeout", "480 s (its task class is LLM_LITE)"],
        ["can", "be run   yes"],
    ]
    assert await command(scripts.show, "sub/d.sh", True) == 0
    (told,) = command.objects
    assert (told["name"], told["seconds"], told["obstacle"], told["place"]) == ("dump", 480.0, None, "sub/d.sh")


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("timeout: 5", "5 s (its header says so)"),
        ("tags: x", "600 s (worker.task_timeout: its header does not say)"),
        ("timeout: soon", "not known, see its problems"),
    ],
)
async def test_how_long_a_script_may_run_is_shown_with_the_reason(command: Command, header: str, told: str) -> None:
    put(command.scripts / "x.sh", f"#!/bin/sh\n# {header}\n", mode=0o644)
    assert await command(scripts.show, "x", False) == 0
    lines = command.lines
    assert f"timeout      {told}" in lines
    assert f"can be run   no: it is not executable: chmod +x {command.scripts}/x.sh" in lines
    assert ("soon" in header) == any(line.startswith("problem      line 2: timeout is 'soon'") for line in lines)
    assert await command(scripts.show, "x", True) == 0
    assert "chmod" in command.objects[0]["obstacle"]


async def test_a_script_that_nobody_knows_is_not_shown(command: Command) -> None:
    put(command.scripts / "dump.sh")
    with pytest.raises(BadInput, match="did you mean 'dump'"):
        await command(scripts.show, "dumb", False)


# --- run ---------------------------------------------------------------------------------------------------


def wanted(name: str, *args: str, **fields: Any) -> Wanted:
    return Wanted(name=name, args=args, **{"workspace": Path(tempfile.gettempdir()), **fields})


async def test_a_script_runs_and_all_that_it_prints_comes_out(command: Command, tmp_path: Path) -> None:
    put(command.scripts / "x.sh", '#!/bin/sh\npwd; echo "$@"; cat; seq 1 15000; printf "\\377no newline"\n')
    code = await command(scripts.run, wanted("x", "a", "b", stdin="in\0put\n", workspace=tmp_path), False)
    assert code == exit_codes.COMPLETED
    numbers = "".join(f"{number}\n" for number in range(1, 15001)).encode()
    assert command.out == f"{tmp_path}\na b\nin\0put\n".encode() + numbers + b"\xffno newline"
    assert len(numbers) > command.settings.tail_bytes
    assert "supervise: logs in " in command.err


@pytest.mark.parametrize(
    ("body", "timeout", "code", "told"),
    [
        (
            "echo disk is full >&2; exit 7",
            None,
            exit_codes.FAILED,
            "supervise: the script 'x' ended with exit code 7: disk",
        ),
        ("kill -9 $$", None, exit_codes.FAILED, "supervise: the script 'x' ended with signal SIGKILL"),
        ("sleep 600", 0.2, exit_codes.TIMED_OUT, "did not end within 0.2 s"),
    ],
)
async def test_the_exit_code_tells_how_a_script_has_ended(
    command: Command, body: str, timeout: float | None, code: int, told: str
) -> None:
    put(command.scripts / "x.sh", f"#!/bin/sh\necho said\n{body}\n")
    assert await command(scripts.run, wanted("x", timeout=timeout), False) == code
    assert command.out == b"said\n"
    assert told in command.err
    assert not re.search(r"agent +said\n", command.err)  # once is enough
    assert ("full" in body) == bool(re.search(r"agent +disk is full\n", command.err))


async def test_the_limit_is_that_of_the_header_unless_another_is_wanted(command: Command) -> None:
    put(command.scripts / "x.sh", "#!/bin/sh\n# timeout: 0.2\nsleep 600\n")
    assert await command(scripts.run, wanted("x"), False) == exit_codes.TIMED_OUT
    put(command.scripts / "y.sh", "#!/bin/sh\n# timeout: soon\necho fine\n")
    assert await command(scripts.run, wanted("y", timeout=20.0), False) == exit_codes.COMPLETED


async def test_programs_get_events_and_then_the_result(command: Command) -> None:
    put(command.scripts / "x.sh", "#!/bin/sh\necho one\necho two >&2\n")
    assert await command(scripts.run, wanted("x", job_id="j1"), True) == exit_codes.COMPLETED
    said = [(each["stream"], each["line"]) for each in command.objects if each["type"] == "agent_output"]
    assert sorted(said) == [("stderr", "two"), ("stdout", "one")]
    assert command.objects[0]["agent"] == "x"
    result = command.objects[-1]
    assert (result["type"], result["job_id"], result["outcome"], result["text"]) == (
        "result",
        "j1",
        "completed",
        "one\n",
    )
    assert command.err == ""


async def test_a_signal_while_the_catalogue_is_read_starts_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()

    def slow(directories: object) -> Catalogue:
        os.kill(os.getpid(), signal.SIGTERM)
        may_end.wait(LIMIT)
        return Catalogue()

    monkeypatch.setattr(Catalogue, "read", slow)
    assert await command(scripts.run, wanted("x"), False) == 128 + signal.SIGTERM
    may_end.set()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mode", "chmod +x"),
        ("lineless", "no #! line"),
        ("twice", "there are 2 scripts 'twice'"),
        ("tice", "did you mean 'twice'?"),
        ("soon", "give a timeout"),
    ],
)
async def test_what_cannot_be_run_is_refused_before_anything_is_started(
    command: Command, tmp_path: Path, name: str, told: str
) -> None:
    put(command.scripts / "mode.sh", mode=0o644)
    put(command.scripts / "lineless.sh", "echo\n")
    put(command.scripts / "twice.sh")
    put(command.scripts / "twice.rb")
    put(command.scripts / "soon.sh", "#!/bin/sh\n# timeout: soon\n")
    with pytest.raises(BadInput, match=re.escape(told)):
        await command(scripts.run, wanted(name), False)
    assert (command.out, command.err) == (b"", "")
    assert not (tmp_path / "state").exists()


async def test_a_workspace_that_is_not_there_is_refused(command: Command, tmp_path: Path) -> None:
    put(command.scripts / "x.sh")
    with pytest.raises(SpecError, match="workspace"):
        await command(scripts.run, wanted("x", workspace=tmp_path / "gone"), False)


@pytest.mark.parametrize("plant", ["rm $LOG; mkfifo $LOG", "ln -sf /etc/passwd $LOG", "rm $LOG", "rm $LOG; mkdir $LOG"])
async def test_a_log_that_the_script_has_replaced_is_not_waited_for(
    command: Command, tmp_path: Path, plant: str
) -> None:
    log = tmp_path / "state" / "jobs" / "j1" / "agent.stdout.log"
    # The log is there with the first output.
    text = f'#!/bin/sh\nLOG={log}\necho 0\nwhile [ ! -s $LOG ]; do sleep 0.01; done\n{plant}\nseq 1 "$1"\n'
    put(command.scripts / "x.sh", text)
    assert await command(scripts.run, wanted("x", "3", job_id="j1"), False) == exit_codes.COMPLETED
    assert command.out == b"0\n1\n2\n3\n"  # so little is in the result, too
    command.settings = evolve(command.settings, tail_bytes=10)
    shutil.rmtree(log.parent)
    assert await command(scripts.run, wanted("x", "99", job_id="j1"), False) == exit_codes.FAILED
    assert command.out == b"\n97\n98\n99\n"
    assert f"supervise: the log {log} cannot be read: " in command.err
    assert "only the end is known" in command.err


async def test_a_log_that_does_not_answer_is_given_up(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    put(command.scripts / "x.sh", "#!/bin/sh\necho fine\n")
    may_end = threading.Event()
    monkeypatch.setattr(scripts, "READ_PATIENCE", 0.05)
    monkeypatch.setattr(scripts, "_open_log", lambda path: may_end.wait(LIMIT))
    command.settings = evolve(command.settings, tail_bytes=5)
    assert await command(scripts.run, wanted("x"), False) == exit_codes.FAILED
    may_end.set()
    assert command.out == b"fine\n"
    assert "cannot be read: it did not answer within 0.05 s" in command.err


@pytest.mark.parametrize(("count", "code"), [(3 * 65536, 1), (65537, 1), (65536, 0)])
async def test_what_is_too_much_for_the_log_is_told_with_its_size(command: Command, count: int, code: int) -> None:
    command.settings = evolve(command.settings, log_max_bytes=65536)
    put(command.scripts / "x.sh", f"#!/bin/sh\nyes abcdefghijklmno | head -c {count}\n")
    assert await command(scripts.run, wanted("x"), False) == code
    if not code:
        assert command.out == (b"abcdefghijklmno\n" * 5000)[:count]
        assert "log_max_bytes" not in command.err
        return
    told = re.search(
        r"supervise: what it printed is longer than log_max_bytes \(65536\): (\d+) bytes are missing; "
        r"raise log_max_bytes\n",
        command.err,
    )
    assert told is not None
    marker = f"\n[… {told[1]} bytes left out …]\n".encode()
    assert marker in command.out
    assert len(command.out) - len(marker) + int(told[1]) == count


async def test_a_disk_that_refuses_the_log_is_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(log: BoundedLog, data: bytes) -> None:
        log._tell("the disk is full")

    monkeypatch.setattr(BoundedLog, "write", refuse)
    put(command.scripts / "x.sh", "#!/bin/sh\necho fine\n")
    assert await command(scripts.run, wanted("x"), False) == exit_codes.FAILED
    assert command.out == b""
    assert "supervise: not all that it printed is in the log: the disk is full\n" in command.err


async def test_letters_that_are_cut_are_seen_on_a_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts, "CHUNK", 2)
    monkeypatch.setattr(scripts.os, "isatty", lambda descriptor: True)
    put(command.scripts / "x.sh", "#!/bin/sh\nprintf 'a\\303\\274\\033b\\303'\n")
    assert await command(scripts.run, wanted("x"), False) == exit_codes.COMPLETED
    assert command.out.decode() == "aü b\ufffd\n"  # and what comes next begins its own line


@contextmanager
def closed_output() -> Iterator[None]:
    """Standard output is a pipe that nobody reads."""
    before = os.dup(1)
    ours, theirs = os.pipe()
    os.dup2(theirs, 1)
    os.close(theirs)
    os.close(ours)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


async def test_a_reader_who_has_gone_away_is_noticed(command: Command) -> None:
    put(command.scripts / "x.sh", "#!/bin/sh\nexec sleep 600\n")
    put(command.scripts / "y.sh", "#!/bin/sh\necho done\n")
    people = Console(file=io.StringIO())
    with closed_output(), trio.fail_after(LIMIT):
        codes = [
            await scripts.list_all(command.settings, False, console=people),
            await scripts.list_all(command.settings, True, console=people),
            await scripts.show(command.settings, "x", False, console=people),
            await scripts.run(command.settings, wanted("x"), True, console=people),
            await scripts.run(command.settings, wanted("y"), False, console=people),
        ]
    assert codes == [exit_codes.BROKEN_PIPE] * 5


async def test_a_full_disk_behind_standard_output_is_told(command: Command) -> None:
    put(command.scripts / "y.sh", "#!/bin/sh\necho done\n")
    people = Console(file=io.StringIO(), width=300)
    with closed_output(), open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), 1)
        assert await scripts.run(command.settings, wanted("y"), False, console=people) == exit_codes.FAILED
    assert isinstance(people.file, io.StringIO)
    assert "No space left on device; what was printed is in" in people.file.getvalue()


async def test_thousands_of_scripts_are_drawn_without_rich(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table takes seconds for so many; what is measured is in the benchmarks."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("rich draws")

    put(command.scripts / "a.sh")
    monkeypatch.setattr("rich.table.Table.add_row", never)
    assert await command(scripts.list_all, False) == 0
    assert len(command.lines) == 2


# --- the whole command ---------------------------------------------------------------------------------------


def test_the_commands_do_all_this(root: Root) -> None:
    directory = root.cli.workspace / "scripts"
    put(directory / "say.sh", '#!/bin/sh\n# tags: Words\necho "$@"; cat; exit 0\n')
    put(directory / "mode.sh", mode=0o644)
    listed, nothing, unknown, closed, said = root.many(
        [
            ["scripts", "list"],
            ["scripts", "search", "no such thing", "--json"],
            ["scripts", "show", "sey"],
            ["scripts", "run", "mode"],
            ["scripts", "run", "say", "--input", "in", "--", "--fast", "a b"],
        ]
    )
    assert (listed.code, listed.out.splitlines()[2]) == (0, "say     —            Words")
    assert (nothing.code, nothing.out) == (0, "")
    assert (unknown.code, unknown.out) == (2, "")
    assert "did you mean 'say'?" in unknown.err
    assert (closed.code, closed.out) == (2, "")
    assert closed.err.count("\n") == 1
    assert "chmod +x" in closed.err
    assert (said.code, said.out) == (0, "--fast a b\nin")


async def test_where_no_script_could_be_read_that_is_a_failure(command: Command, tmp_path: Path) -> None:
    command.settings = evolve(command.settings, script_dirs=(tmp_path / "gone",))
    assert await command(scripts.list_all, False) == exit_codes.FAILED
    assert "gone cannot be read: No such file" in command.err
    assert await command(scripts.search, "x", True) == exit_codes.FAILED


@pytest.mark.parametrize(("width", "heads"), [(24, 3), (22, 2), (12, 1)])
def test_what_has_no_room_at_all_is_left_out(tmp_path: Path, width: int, heads: int) -> None:
    put(tmp_path / "a-rather-long-name.sh", "#!/bin/sh\n# description: one two three four\n# tags: first, second\n")
    lines = [bare(line) for line in drawn(tmp_path, width)]
    assert max(map(len, lines)) <= width
    assert len(lines[0].split()) == heads


async def test_bytes_reach_a_script_as_they_are(command: Command) -> None:
    put(command.scripts / "cat.sh", "#!/bin/sh\ncat\n")
    data = b"\xff\x00 \xc3\xbc\n"
    assert await command(scripts.run, wanted("cat", stdin=data.decode("utf-8", "surrogateescape")), False) == 0
    assert command.out == data


async def test_a_path_from_here_on_names_a_script_and_a_link_beside_it_is_no_second_one(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = put(command.scripts / "sub" / "a.sh", "#!/bin/sh\n# name: one\necho it\n")
    (command.scripts / "link.sh").symlink_to(file)
    monkeypatch.chdir(command.scripts.parent)
    for name in ("one", "sub/a.sh", "scripts/sub/a.sh", "./scripts/link.sh", str(file)):
        assert await command(scripts.run, wanted(name), False) == 0, name
        assert command.out == b"it\n"
