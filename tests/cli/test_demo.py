"""`supervise demo`: every fault takes the road that it promises, and nothing is left of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import LIMIT, Cli, Done
from tests.cli.terminals import Terminal, colours, plain

FAULTS = ["none", "watch-start", "watch-crash", "stubborn", "reconcile", "cancel"]

RESULT = {
    *("type", "job_id", "outcome", "failure_kind", "exit_code", "signal", "text", "session_id", "usage", "cost_usd"),
    *("num_turns", "index", "permission_denials", "stdout_tail", "stderr_tail", "survivors", "duration_seconds"),
    "error",
}
USAGE = {"input_tokens", "output_tokens", "cache_read_tokens", "cache_creation_tokens"}
INDEX = {"status", "reason", "watch_restarts", "stale"}


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Cli, Done]]]:
    """All faults, run side by side."""
    clis = {fault: Cli(tmp_path_factory.mktemp(fault)) for fault in (*FAULTS, "no-git", "kill")}
    no_git = clis["no-git"].root / "bin"
    for name in ("sh", "mkdir", "touch", "rm", "mv", "base64"):  # what the demo's agent needs, and no git
        os.symlink(str(shutil.which(name)), no_git / name)
    clis["no-git"].env["PATH"] = str(no_git)
    started = {}
    for fault, cli in clis.items():
        words = [] if fault in ("none", "no-git") else ["--fault", fault]
        out = (cli.root / "out").open("wb+")
        err = (cli.root / "err").open("wb+")
        started[fault] = cli.start("demo", *words, "--json", stdout=out, stderr=err)
        out.close()
        err.close()
    done = {}
    for fault, cli in clis.items():
        code = started[fault].process.wait(LIMIT)
        done[fault] = (cli, Done(code, (cli.root / "out").read_bytes(), (cli.root / "err").read_bytes()))
    yield done
    for cli in clis.values():
        cli.close()


def of_type(done: Done, kind: str) -> list[dict[str, Any]]:
    return [line for line in done.lines if line["type"] == kind]


@pytest.mark.parametrize("fault", [*FAULTS, "no-git"])
def test_standard_output_is_events_then_proof_then_result(demos: dict[str, tuple[Cli, Done]], fault: str) -> None:
    _, done = demos[fault]
    lines = done.lines
    assert lines[0]["type"] == "job_started"
    assert [line["type"] for line in lines[-2:]] == ["proof", "result"]
    assert [line["type"] for line in lines].count("result") == 1
    proof, result = lines[-2:]
    assert isinstance(proof["equal"], bool)
    assert proof["files"] > 8
    assert proof["equal"] == (not proof["differences"])
    assert result.keys() >= RESULT
    assert result["usage"].keys() == USAGE
    assert result["index"].keys() >= INDEX
    assert result["survivors"] == []
    assert {line["job_id"] for line in lines} == {result["job_id"]}
    assert done.code == 0
    assert done.err == ""


@pytest.mark.parametrize("fault", [*FAULTS, "no-git", "kill"])
def test_nothing_is_left(demos: dict[str, tuple[Cli, Done]], fault: str) -> None:
    cli, done = demos[fault]
    assert cli.alive() == []
    job = f"{done.result['job_id']}:".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert job not in environ.read_bytes(), environ
        except OSError:  # it is gone
            continue
    assert list(cli.scratch.iterdir()) == []
    assert not cli.state.exists()


def test_the_detector_finds_what_lives(cli: Cli) -> None:
    running = cli.start("demo", "--json")
    running.line_with('"agent_tool_use"')
    assert len(cli.alive()) >= 2  # watch and agent; the supervising process hides its environment
    assert list(cli.scratch.iterdir())
    running.process.send_signal(signal.SIGINT)
    assert running.end().code == 130
    assert cli.alive() == []


@pytest.mark.parametrize("fault", ["none", "no-git"])
def test_a_watch_that_sees_every_edit_is_trusted(demos: dict[str, tuple[Cli, Done]], fault: str) -> None:
    _, done = demos[fault]
    assert done.result["outcome"] == "completed"
    assert done.result["index"]["status"] == "watch_terminated"
    assert not done.result["index"]["stale"]
    assert of_type(done, "proof")[0]["equal"]
    assert of_type(done, "proof")[0]["stale_mark"] is False
    assert not of_type(done, "reconcile")[1:]  # the one at the start
    assert {event["status"] for event in of_type(done, "index")} >= {"watching", "watch_terminated"}
    assert done.result["text"]
    assert done.result["num_turns"] == 14


@pytest.mark.parametrize("fault", ["watch-start", "watch-crash", "stubborn"])
def test_a_watch_that_cannot_be_trusted_is_replaced_by_a_reconcile(
    demos: dict[str, tuple[Cli, Done]], fault: str
) -> None:
    _, done = demos[fault]
    assert done.result["outcome"] == "completed"
    assert done.result["index"]["status"] == "ready_via_fallback"
    assert done.result["index"]["reason"]
    assert not done.result["index"]["stale"]
    assert of_type(done, "proof")[0]["equal"]
    assert of_type(done, "proof")[0]["stale_mark"] is False
    assert of_type(done, "reconcile")[-1]["ok"]
    assert "reconciling_fallback" in {event["status"] for event in of_type(done, "index")}


def test_a_crashed_watch_is_started_again(demos: dict[str, tuple[Cli, Done]]) -> None:
    _, done = demos["watch-crash"]
    assert done.result["index"]["watch_restarts"] >= 1
    assert any(event["cause"] == "start" and "crash" in event["reason"] for event in of_type(done, "index"))


def test_a_stubborn_watch_is_killed_with_its_whole_tree(demos: dict[str, tuple[Cli, Done]]) -> None:
    _, done = demos["stubborn"]
    sent = [(event["signal"], event["count"]) for event in of_type(done, "signal_sent") if event["role"] == "watch"]
    assert [name for name, _ in sent] == ["SIGINT", "SIGTERM", "SIGKILL"]
    assert sent[-1][1] == 2  # also the child that has left the session
    assert of_type(done, "tree_empty")[-1]["survivors"] == 0


def test_an_index_that_cannot_be_mended_is_marked(demos: dict[str, tuple[Cli, Done]]) -> None:
    _, done = demos["reconcile"]
    assert done.result["outcome"] == "completed"
    assert done.result["index"]["status"] == "failed"
    assert done.result["index"]["stale"]
    proof = of_type(done, "proof")[0]
    assert (proof["equal"], proof["stale_mark"]) == (False, True)


def test_a_cancelled_job_leaves_a_good_index_or_a_mark(demos: dict[str, tuple[Cli, Done]]) -> None:
    _, done = demos["cancel"]
    assert done.result["outcome"] == "cancelled"
    assert of_type(done, "cancel")
    proof = of_type(done, "proof")[0]
    assert proof["equal"] or proof["stale_mark"]


def test_a_killed_supervisor_leaves_an_empty_tree_and_a_mark_that_the_next_job_settles(
    demos: dict[str, tuple[Cli, Done]],
) -> None:
    _, done = demos["kill"]
    assert (done.code, done.err) == (0, "")
    kinds = [line["type"] for line in done.lines]
    killed, emptied = of_type(done, "supervisor_killed")[0], of_type(done, "tree_emptied")[0]
    at = kinds.index("supervisor_killed")
    assert kinds[:at].count("agent_tool_use") >= 5
    assert "job_finished" not in kinds[:at]
    assert len(killed["processes"]) >= 2  # watch and agent, and what holds them
    assert {gone["pid"] for gone in of_type(done, "process_gone")} == {each["pid"] for each in killed["processes"]}
    assert emptied["left"] == []
    assert 0 < emptied["seconds"] <= emptied["bound"]
    assert emptied["stale_mark"] is True
    after = [line for line in done.lines if line.get("job_id") == done.result["job_id"]]
    assert next(line for line in after if line["type"] == "index")["reason"].startswith("the index was stale")
    assert [line["ok"] for line in after if line["type"] == "reconcile"] == [True]
    assert done.result["outcome"] == "completed"
    assert done.result["index"]["status"] == "watch_terminated"
    proof = of_type(done, "proof")[0]
    assert (proof["equal"], proof["stale_mark"]) == (True, False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_of_a_kill(cli: Cli, number: signal.Signals) -> None:
    running = cli.start("demo", "--fault", "kill", "--json")
    running.line_with('"agent_tool_use"')
    running.process.send_signal(number)
    assert running.end().code == 128 + number
    assert list(cli.scratch.iterdir()) == []
    wait_until(lambda: cli.alive() == [])  # the guardians of a supervisor that was ended take a moment


def test_a_kill_is_told_in_words(cli: Cli) -> None:
    done = cli.do("demo", "--fault", "kill")
    assert (done.code, done.err) == (0, "")
    said = " ".join(done.out.split())
    assert re.search(r"kill -9 \d+: the supervising process is gone\. Below it were alive: \d+ \S+, ", said)
    assert re.search(r"the tree is empty: all \d+ ended within [0-2]\.\d\d s \(at most 3 s\)", said)
    assert "the stale mark is on the disk" in said
    assert "the index was stale: job" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo(cli: Cli, number: signal.Signals) -> None:
    running = cli.start("demo", "--json")
    running.line_with('"agent_tool_use"')
    began = time.monotonic()
    running.process.send_signal(number)
    done = running.end()
    assert time.monotonic() - began < 8
    assert done.code == 128 + number
    assert done.result["outcome"] == "cancelled"
    assert number.name in done.result["error"]
    assert list(cli.scratch.iterdir()) == []
    assert cli.alive() == []


def test_a_signal_during_the_preparation_ends_the_demo(cli: Cli) -> None:
    running = cli.start("demo")
    wait_until(lambda: any(cli.scratch.iterdir()))
    running.process.send_signal(signal.SIGTERM)
    assert running.end().code == 143
    assert list(cli.scratch.iterdir()) == []


def test_a_second_ctrl_c_hurries(cli: Cli) -> None:
    running = cli.start("demo", "--fault", "stubborn", "--json")
    running.line_with('"agent_tool_use"')
    running.process.send_signal(signal.SIGINT)
    running.line_with('"signal":"SIGINT"')  # to the watch, which does not care
    began = time.monotonic()
    for _ in range(3):
        running.process.send_signal(signal.SIGINT)
        running.line_with('"type":"cancel"')
    done = running.end()
    assert time.monotonic() - began < 2.5  # flush and termination timeouts are 3 s
    assert done.code == 130


def test_without_json_there_is_a_line_for_each_event(cli: Cli) -> None:
    done = cli.do("demo", "--fault", "cancel", env={"PYTHONIOENCODING": "ascii", "COLUMNS": "40"})
    assert done.code == 0
    assert done.err == ""
    assert done.out.isascii()
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    assert lines[0].startswith("supervise demo - the job is cancelled while the agent works: the watch")
    assert any(re.fullmatch(r" +\d+\.\d{3}  agent      Write orchard/text/money.py", line) for line in lines)
    assert any(line.startswith(("proof: ", "stale mark: ")) for line in lines)
    assert lines[-1] == "survivors: 0"


def test_a_reader_who_goes_away_ends_the_demo(cli: Cli) -> None:
    for words in (["--json"], []):
        running = cli.start("demo", *words)
        running.line_with("job")
        assert running.process.stdout is not None
        running.process.stdout.close()
        running.process.stdout = None
        done = running.end()
        assert (done.code, done.err) == (141, "")
        assert list(cli.scratch.iterdir()) == []


def test_closed_standard_streams_are_no_reason_to_hang(cli: Cli) -> None:
    def close_all() -> None:
        for descriptor in range(3):
            os.close(descriptor)

    words = ("demo", "--fault", "cancel")
    running = cli.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=close_all)
    assert running.process.wait(LIMIT) == 0


def test_keep_keeps_the_scratch_directory(cli: Cli) -> None:
    done = cli.do("demo", "--keep", "--fault", "cancel", "--json")
    assert done.code == 0
    kept = done.err.strip().removeprefix("supervise: kept ")
    assert [str(path) for path in cli.scratch.iterdir()] == [kept]
    assert (Path(kept) / "state" / "jobs" / done.result["job_id"] / "result.json").exists()


def test_on_a_terminal_there_is_a_picture(cli: Cli) -> None:
    terminals = {columns: Terminal(columns, rows=24) for columns in (100, 40)}
    try:
        started = {
            columns: terminal.start(cli, "demo", "--fault", "reconcile", env={"NO_COLOR": "1"} if columns == 40 else {})
            for columns, terminal in terminals.items()
        }
        for columns, terminal in terminals.items():
            terminal.read_to_the_end()
            assert started[columns].process.wait(LIMIT) == 0
            shown = terminal.raw.decode()
            check_picture(shown, columns)
            assert bool(colours(shown)) == (columns == 100)
            assert not terminal.screen.cursor.hidden
            assert terminal.modes == terminal.modes_before
    finally:
        for terminal in terminals.values():
            terminal.close()


def test_ctrl_c_on_a_terminal_ends_the_demo_and_leaves_the_terminal_as_it_was(cli: Cli) -> None:
    terminal = Terminal(80)
    try:
        running = terminal.start(cli, "demo")
        terminal.until(lambda text: "Write orchard" in text, "an agent at work")
        assert terminal.screen.cursor.hidden
        terminal.type(b"\x03")
        shown = terminal.read_to_the_end()
        assert running.process.wait(LIMIT) == 130
        assert not terminal.screen.cursor.hidden
        assert terminal.modes == terminal.modes_before
    finally:
        terminal.close()
    assert "cancelled after" in shown
    assert shown.endswith("survivors: 0")
    assert list(cli.scratch.iterdir()) == []


def check_picture(shown: str, columns: int) -> None:
    assert "\x1b[1A" in shown  # drawn again and again in its place
    said = plain(shown).replace("\r", "").replace("╯╭", "╯\n╭")
    frames = said.split("╭─ the job's nursery")
    assert len(frames) > 5
    for frame in frames[1:-1]:
        assert len(frame.splitlines()) < 24
    for line in said.splitlines():
        if line.startswith(("│", "╭", "╰")):
            assert len(line) == columns - len("^C") - 1, line
    end = " ".join(frames[-1].split())
    assert "agent" in end
    assert "heartbeat" in end
    assert "proof: the index differs from the files" in end
    assert "stale mark: the reconcile failed" in end
    assert end.endswith("survivors: 0")
    assert "[warning" not in said  # the events say it


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
