"""Each command as a person has it: on terminals, wide and narrow, without colours, and without any terminal."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from attrs import frozen

from supervise.cli.reference import Command, commands
from supervise.dispatch.submit import job_id_of
from tests.cli.conftest import Cli, Root
from tests.cli.terminals import (
    ESCAPE,
    HIDE,
    SHOW,
    Seen,
    Terminal,
    by_a_shell,
    colours,
    one_after_the_other,
    plain,
    styled,
    wide,
)

COMMANDS: list[Command] = list(commands())
XTERM = {"TERM": "xterm-256color"}
VARIANTS: dict[str, dict[str, Any]] = {
    "wide": {"env": XTERM},
    "narrow": {"columns": 40, "env": XTERM},
    "NO_COLOR": {"env": {**XTERM, "NO_COLOR": "1"}},
    "dumb": {"env": {"TERM": "dumb"}},
    "off": {"stdout": "file", "env": XTERM},
    "gone": {"stdout": "gone", "env": XTERM},
    "full": {"stdout": "full", "env": XTERM},
}
EVERY = tuple(VARIANTS)
TERMINALS = ("wide", "narrow", "NO_COLOR", "dumb")


@frozen
class Case:
    """A command. `{v}` in its words becomes the number of the variant.

    Attributes:
        words: of the command line.
        told: what has to be read, in any width; white space does not count.
        code: the exit code.
        look: "colours", "styles" or "plain".
        whole: what it puts out is to be copied or read by programs: the terminal wraps it.
        off: what is in one line of its own output where no terminal bounds it.
        silent: it writes nothing on standard output.
        variants: in which it is run.
    """

    words: tuple[str, ...]
    told: tuple[str, ...]
    code: int = 0
    look: str = "plain"
    whole: bool = False
    off: str = ""
    silent: bool = False
    variants: tuple[str, ...] = EVERY


LONG = "it went wrong in a way that takes more words to tell than any narrow terminal has room for, and then some"
JOB = "text hello\nerror oh\ndone all is well"
CASES: dict[str, Case] = {
    "run": Case(
        ("run", "--job-id", "j1", JOB), ("started python", "hello", "completed", "all is well"), look="colours"
    ),
    "help": Case(("--help",), ("supervise demo", "worker", "timeline", "141 standard"), look="colours"),
    "version": Case(("--version",), ("0.",)),
    "timeline": Case(("timeline", "j1"), ("j1", "agent", "running"), look="colours"),
    "logs": Case(("logs", "j1"), ('"text": "hello"',), whole=True),
    "submit": Case(("submit", "w1", "--task-id", "new-{v}", "x"), ("new-",)),
    "dlq list": Case(
        ("dlq", "list"), ("buried", "w1", "auth", "no key", "it went", "dead letters"), look="styles", off=LONG
    ),
    "dlq show": Case(("dlq", "show", "buried"), ('"dlq_reason": "auth"',), whole=True),
    "dlq retry": Case(("dlq", "retry", "again-{v}"), ("again-", "waits again: /"), silent=True),
    "dlq drop": Case(("dlq", "drop", "gone-{v}"), ("is removed",), silent=True),
    "doctor": Case(("doctor",), ("ok", "state", "clock"), look="colours"),
    "config": Case(("config",), ("index.mode", "auto"), look="styles"),
    "config example": Case(("config", "--example"), ("[index]", "mode"), whole=True),
    "completion": Case(("completion", "bash"), ("complete -F",), whole=True),
    "scripts": Case(("scripts", "list"), ("name", "tidy", "script"), look="styles"),
    "scripts search": Case(("scripts", "search", "tidy"), ("tidy", "match"), look="colours"),
    "scripts show": Case(("scripts", "show", "tidy"), ("path", "Puts things"), whole=True),
    "scripts run": Case(
        ("scripts", "run", "tidy"), ("completed", "all tidy"), look="colours", variants=("narrow", "gone")
    ),
    "worker": Case(("worker", "w1", "--lock-file", "none/pid"), ("is not there; make it",), 1, silent=True),
    "mistake": Case(("rum",), ("Unknown command", "Did you mean 'run'?"), 2, silent=True),
    **{
        f"{' '.join(words[1:])} --help": Case(
            (*words[1:], "--help"), ("Example: supervise", "Exit codes: 0"), look="colours", variants=("wide", "narrow")
        )
        for words, _ in COMMANDS
    },
    # Logs of JSON.
    "json": Case(("run", "--log-format", "json", "--job-id", "json", JOB), (), variants=("off", "wide")),
    "json by setting": Case(
        ("run", "--set", "log.format=json", "--set", "index.mode=cidx", "--set", "index.command=no-such-cidx", JOB),
        (),
        variants=("off",),
    ),
    "warnings": Case(("run", "--set", "log.level=warning", "text hello\ndone all is well"), (), variants=("off",)),
    "json warnings": Case(
        ("run", "--set", "log.level=warning", "--log-format", "json", "fail no"), (), 1, variants=("off",)
    ),
    "errors": Case(("run", "--set", "log.level=error", "fail no"), (), 1, variants=("off",)),
}
#: Those that look the same every time; the last ones have tests of their own.
USUAL = [name for name, case in CASES.items() if case.told]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    """A root with dead letters, a catalogue of scripts, and a job that has been."""
    root = Root(Cli(tmp_path_factory.mktemp("terminal")))
    root.make()
    root.bury("buried", dlq_detail=LONG)
    for number in range(len(VARIANTS)):
        root.bury(f"again-{number}")
        root.bury(f"gone-{number}")
    scripts = root.cli.root / "scripts"
    scripts.mkdir()
    script = scripts / "tidy"
    script.write_text("#!/bin/sh\n# Description: Puts things where they belong\n# Tags: order, daily\necho all tidy\n")
    script.chmod(0o755)
    root.env["SUPERVISE_SCRIPT_DIRS"] = json.dumps([str(scripts)])
    yield root
    root.cli.close()


@pytest.fixture(scope="module")
def seen(root: Root) -> dict[tuple[str, str], Seen]:
    """All cases in all their variants, run by one process."""
    asked, given = [], []
    for number, (variant, options) in enumerate(VARIANTS.items()):
        for name, case in CASES.items():
            if variant in case.variants:
                asked.append((name, variant))
                given.append({"words": [word.replace("{v}", str(number)) for word in case.words], **options})
    return dict(zip(asked, one_after_the_other(root.cli, given, root.env), strict=True))


def squeezed(text: str) -> str:
    """Without white space and frames: a narrow terminal wraps words, also in the middle."""
    return re.sub(r"[\s│]+", "", plain(text))


# --- on a terminal -------------------------------------------------------------------------------------------


def test_every_command_is_here() -> None:
    here = {case.words for case in CASES.values()}
    for words, _ in COMMANDS:
        if words[1] != "demo":  # on a terminal in test_demo.py
            assert [each for each in here if each[: len(words) - 1] == words[1:] and "--help" not in each], words


@pytest.mark.parametrize("name", USUAL)
def test_on_a_terminal_it_fits_and_is_read(seen: dict[tuple[str, str], Seen], name: str) -> None:
    case = CASES[name]
    for variant in set(TERMINALS) & set(case.variants):
        columns = VARIANTS[variant].get("columns", 100)
        told = seen[name, variant]
        assert (told.code, told.out, told.err) == (case.code, "", ""), (variant, told.shown[-2000:])
        for word in case.told:
            assert squeezed(word) in squeezed(told.shown), (variant, word, plain(told.shown))
        if not case.whole:
            # A notice is left whole, for the paths in it to be copied; the terminal wraps it. So are events without
            # a picture.
            whole = re.compile(r"supervise: | +\d+\.\d{3}  " if variant == "dumb" else "supervise: ")
            assert [line for line in wide(told.shown, columns) if not whole.match(line)] == [], variant


@pytest.mark.parametrize("name", USUAL)
def test_colours_are_for_terminals_that_have_them(seen: dict[tuple[str, str], Seen], name: str) -> None:
    case = CASES[name]
    first = seen[name, case.variants[0]].shown
    assert case.look == "plain" or styled(first)
    assert bool(colours(first)) == (case.look == "colours")
    for variant in case.variants:
        told = seen[name, variant]
        if variant == "NO_COLOR":
            assert colours(told.shown) == set()
        elif variant == "dumb":
            assert "\x1b" not in told.shown
        elif variant not in TERMINALS:
            assert told.shown == ""
            assert "\x1b" not in told.out + told.err


@pytest.mark.parametrize("name", [name for name in USUAL if "off" in CASES[name].variants])
def test_off_a_terminal_nothing_is_cut(seen: dict[tuple[str, str], Seen], name: str) -> None:
    case, told = CASES[name], seen[name, "off"]
    assert told.code == case.code
    for word in case.told:
        assert " ".join(word.split()) in " ".join((told.out + told.err).split()), word
    assert "…" not in told.out.replace("results/ …", "").replace("dontAsk, …", "")
    assert bool(told.out) != case.silent
    assert [line for line in told.out.splitlines() if case.off in line] or case.silent


# --- a standard output that does not take it -----------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in USUAL if "gone" in CASES[name].variants])
def test_a_reader_who_has_gone_away_is_a_broken_pipe(seen: dict[tuple[str, str], Seen], name: str) -> None:
    case, told = CASES[name], seen[name, "gone"]
    assert told.code == (case.code if case.silent else 141)
    assert "Traceback" not in told.err
    if not case.silent and "run" not in case.words:
        assert told.err == ""


@pytest.mark.parametrize("name", [name for name in USUAL if "full" in CASES[name].variants])
def test_a_full_disk_is_told(seen: dict[tuple[str, str], Seen], name: str) -> None:
    case, told = CASES[name], seen[name, "full"]
    assert "Traceback" not in told.err
    if not case.silent:
        assert told.code == 1
        assert "supervise: standard output cannot be written to: No space left on device" in told.err


def test_a_pipe_into_head_breaks_without_a_word(root: Root) -> None:
    """In a real shell. What is put out is more than fits into a pipe."""
    many = f"text first\n{'text ' + 'x' * 500}\n" * 200
    (root.cli.state / "jobs" / "long").mkdir(parents=True, exist_ok=True)
    (root.cli.state / "jobs" / "long" / "agent.stdout.log").write_text(many)
    script = """
        set -o pipefail
        supervise logs long | head -1 >/dev/null; echo "logs ${PIPESTATUS[0]}" &
        supervise run --job-id piped "$TOLD" 2>run.err | head -c 1 >/dev/null; echo "run ${PIPESTATUS[0]}"
        wait
    """
    done = by_a_shell(root.cli, script, {**root.env, "TOLD": "done " + "y" * 100_000})
    assert sorted(done.stdout.split("\n"))[1:] == ["logs 141", "run 141"]
    assert done.stderr == ""
    assert "Traceback" not in (root.cli.workspace / "run.err").read_text()


def test_closed_standard_streams_are_nobodys_trouble(root: Root) -> None:
    script = """
        supervise --help >&- 2>help.err; echo "help $?" &
        supervise dlq list >&- 2>dlq.err; echo "dlq $?" &
        supervise rum 2>&- >rum.out; echo "rum $?" &
        supervise run "done well" <&- >&- 2>&-; echo "run $?" &
        wait
    """
    done = by_a_shell(root.cli, script, root.env)
    assert (sorted(done.stdout.split()), done.stderr) == (sorted(["help", "0", "dlq", "0", "rum", "2", "run", "0"]), "")
    left = {name: (root.cli.workspace / name).read_text() for name in ("help.err", "dlq.err", "rum.out")}
    assert (left["help.err"], left["rum.out"]) == ("", "")
    assert re.fullmatch(r"supervise: \d+ dead letters?\n", left["dlq.err"])


# --- logs ----------------------------------------------------------------------------------------------------


def objects(text: str) -> list[dict[str, Any]]:
    """Lines of JSON: each an object that says when, how bad, from whom, and what."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert {"timestamp", "level", "logger", "event"} <= line.keys(), line
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["timestamp"]), line
        assert line["level"] in ("debug", "info", "warning", "error", "critical"), line
        assert line["logger"].startswith("supervise."), line
    return lines


def test_with_json_each_line_on_standard_error_is_an_object(seen: dict[tuple[str, str], Seen]) -> None:
    done = seen["json", "off"]
    assert (done.code, done.out) == (0, "all is well\n")
    lines = objects(done.err)
    events = [line for line in lines if line["logger"] == "supervise.events"]
    assert {line["job_id"] for line in lines} == {"json"}
    assert {"job_started", "agent_text", "job_finished"} <= {line["type"] for line in events}
    assert [line for line in events if (line["who"], line["event"]) == ("agent", "hello")]
    assert "logs in" in lines[-1]["event"]
    shown = seen["json", "wide"].shown  # no picture: a program reads it
    assert "\x1b" not in shown
    *logs, text = plain(shown).strip().split("\n")[:-1]
    assert (text, bool(objects("\n".join(logs)))) == ("all is well", True)


def test_what_goes_wrong_is_a_warning_of_its_job(seen: dict[tuple[str, str], Seen]) -> None:
    lines = objects(seen["json by setting", "off"].err)
    bad = [line for line in lines if line["level"] != "info"]
    assert [line for line in bad if line["logger"] == "supervise.index"]
    assert all(line["job_id"] for line in bad)
    assert [line for line in bad if "no-such-cidx" in line["event"]]


def test_a_level_leaves_out_what_is_less(seen: dict[tuple[str, str], Seen]) -> None:
    quiet, failed, only = (seen[name, "off"] for name in ("warnings", "json warnings", "errors"))
    assert (quiet.code, quiet.out, quiet.err) == (0, "all is well\n", "")
    lines = objects(failed.err)
    assert {line["level"] for line in lines} == {"error"}
    assert "reported an error: no" in lines[-1]["event"]
    told = ("error after 1 turn", "failed (agent_error) after", f"supervise: {sys.executable} reported an error: no")
    assert len(only.err.splitlines()) == len(told)
    assert all(words in line for words, line in zip(told, only.err.splitlines(), strict=True))


def test_a_worker_logs_of_task_job_and_worker(root: Root) -> None:
    no_index = ["--set", "index.mode=cidx", "--set", "index.command=no-such-cidx"]  # so that there is something to log
    worker = root.ready(root.start("worker", "w2", "--log-format", "json", *no_index), "w2")
    root.drop("t1", "done well", worker="w2")
    root.result("t1", "w2")
    worker.process.send_signal(signal.SIGTERM)
    done = worker.end()
    assert (done.code, done.out) == (0, "")
    lines = objects(done.err)
    told = [line for line in lines if line.get("task_id") == "t1"]
    [job] = {line["job_id"] for line in lines if line["logger"] == "supervise.index"}
    assert {line.get("type") for line in told} >= {"task_received", "task_claimed", "task_finished"}
    assert all(line["worker"] == "w2" for line in told)
    assert job == job_id_of("w2", "t1", 1, root.path)
    assert all(line["level"] == "warning" for line in lines if line["logger"] == "supervise.index")


# --- live pictures -------------------------------------------------------------------------------------------


def nothing_is_changed(terminal: Terminal) -> None:
    """As a person finds it afterwards: with a cursor, and with its modes."""
    assert terminal.raw.count(HIDE) == terminal.raw.count(SHOW) > 0
    assert terminal.raw.rindex(SHOW) > terminal.raw.rindex(HIDE)
    assert not terminal.screen.cursor.hidden
    assert terminal.modes == terminal.modes_before


def frames(text: str, columns: int) -> bool:
    """Whether there is a picture for a terminal so wide, and none that was torn by a wrap."""
    drawn = [line for line in text.splitlines() if line.startswith(("╭", "╰"))]
    return bool(drawn) and len(drawn[-1]) == columns - len("^C") - 1 and drawn[-1].endswith(("╮", "╯"))


@pytest.mark.parametrize(("how", "code", "env"), [("keys", 130, {}), ("SIGTERM", 143, {"NO_COLOR": "1"})])
def test_run_draws_its_job_and_leaves_the_terminal_as_it_was(
    root: Root, how: str, code: int, env: dict[str, str]
) -> None:
    terminal = Terminal(100)
    job = ["run", "--job-id", how, "--set", "heartbeat_interval=0.1", "text hanging\nhang"]
    try:
        running = terminal.start(root.cli, *job, env={**on_terminals(root), **env})
        at_work = re.compile(r"heartbeat +\d+ s ago: 1 process[^╭]*agent +hanging")
        shown = terminal.until(lambda text: at_work.search(text) and frames(text, 100), "a job at work")
        assert re.search(r"agent +pid \d+", shown)
        assert "index" not in shown  # it has none
        assert f"supervise run · {how}" in shown
        assert terminal.screen.cursor.hidden
        terminal.resize(50)
        terminal.until(lambda text: frames(text, 50), "a picture for the narrow terminal")
        if how == "keys":
            terminal.type(b"\x03")
        else:
            running.process.send_signal(signal.SIGTERM)
        shown = terminal.read_to_the_end()
        assert running.process.wait(20) == code
        nothing_is_changed(terminal)
    finally:
        terminal.close()
    end = shown[shown.rindex("╭─ supervise run") :]
    assert re.search(r"job  *done", end)
    assert re.search(r"agent +ended: SIGTERM", end)
    assert "heartbeat  ended with the job" in end
    assert "was received" in " ".join(end.replace("│", " ").split())
    assert squeezed(f"supervise: logs in {root.cli.state}/jobs/{how}") in squeezed(end)
    assert bool(colours(terminal.raw.decode())) == (not env)


def test_a_worker_draws_a_tree_of_its_jobs(root: Root) -> None:
    terminal = Terminal(100)
    try:
        running = terminal.start(root.cli, "worker", "w3", env=on_terminals(root))
        terminal.until(lambda text: "healthy" in text, "a worker that is ready")
        root.drop("t1", "text looking around", "wait gate", "done well", worker="w3")
        at_work = re.compile(r"(├──|└──) t1 +running +\d+\.\d s +\d+ MiB +looking around")
        shown = terminal.until(lambda text: at_work.search(text) and frames(text, 100), "a task at work")
        assert re.search(r"w3 +healthy +1 at work, \d+ waits?, none ended yet", shown)
        terminal.resize(50)
        terminal.until(lambda text: frames(text, 50), "a picture for the narrow terminal")
        root.go("gate")
        terminal.until(lambda text: "1 completed" in text, "a task that is done")
        terminal.type(b"\x03")
        shown = terminal.read_to_the_end()
        assert running.process.wait(20) == 0
        nothing_is_changed(terminal)
    finally:
        terminal.close()
    end = shown[shown.rindex("╭─ supervise worker") :]
    assert re.search(r"w3 +stopped +0 at work", end)
    assert frames(end, 50)
    assert colours(terminal.raw.decode())


def on_terminals(root: Root) -> dict[str, str]:
    """The terminal says itself how wide it is."""
    return {name: value for name, value in root.env.items() if name != "COLUMNS"}


# --- the checks ----------------------------------------------------------------------------------------------


def test_the_checks_see_what_is_bad() -> None:
    assert wide("short\r\n\x1b[1mlonger\x1b[0m\r\n", 5) == ["longer"]
    assert wide("日本語\n", 5) == ["日本語"]  # two cells each
    assert wide("12345\r\n", 5) == []
    assert wide("123\rlonger\r\n", 5) == ["longer"]  # drawn over what was there
    for bad in ("\x1b[31m", "\x1b[1;38;5;9m", "\x1b[0;97m", "\x1b[38;2;1;2;3m", "\x1b[48;5;1m", "\x1b[39m"):
        assert colours(f"a{bad}b"), repr(bad)
        assert ESCAPE.sub("", f"a{bad}b") == "ab"
    assert colours("\x1b[1m\x1b[2mx\x1b[0m\x1b[?25l\x1b[2K\x1b[1A") == set()
    assert styled("\x1b[1mx")
    assert not styled("\x1b[0mx\x1b[2K")
    assert plain("\x1b]0;title\x07a\x1b[?25hb\r\n") == "ab\n"
    for bad_line in ("no JSON", '{"event":"x"}', '{"timestamp":"x","level":"info","logger":"supervise.x","event":"x"}'):
        with pytest.raises((AssertionError, ValueError)):
            objects(bad_line)
    assert not frames("╭─ title ──", 15)
    assert not frames("╭─ title ──╮", 14)
    assert frames("╭─ title ──╮", 15)


def test_a_terminal_that_is_left_changed_is_noticed() -> None:
    for script in ("printf '\\033[?25l\\033[?25h\\033[?25l'", "printf '\\033[?25l\\033[?25h'; stty -echo"):
        terminal = Terminal()
        try:
            with terminal.popen(["sh", "-c", script]) as process:
                terminal.read_to_the_end()
                assert process.wait(20) == 0
            with pytest.raises(AssertionError):
                nothing_is_changed(terminal)
        finally:
            terminal.close()


LISTENS = """
import os, signal
signal.signal(signal.SIGWINCH, lambda *_: print("resized to", os.get_terminal_size().columns))
signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(1, b"stopped")))
print(*range(1, 101), sep="\\n")
while True:
    signal.pause()
"""


def test_what_is_typed_and_told_reaches_a_command_on_a_terminal() -> None:
    """The harness: Ctrl-C is a signal, a new width is one, and what moved out at the top is kept."""
    terminal = Terminal(80)
    try:
        with terminal.popen([sys.executable, "-I", "-S", "-c", LISTENS]) as process:
            terminal.until(lambda text: "\n100" in text, "numbers")
            terminal.resize(60)
            terminal.until(lambda text: "resized to 60" in text, "a word of it")
            terminal.type(b"\x03")
            shown = terminal.read_to_the_end()
            assert process.wait(20) == len("stopped")
        assert shown.startswith("1\n2\n")
        assert "stopped" in shown
    finally:
        terminal.close()
