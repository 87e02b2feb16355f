"""`supervise run`, with a stand-in for Claude Code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import LIMIT, Cli, Done, Running
from tests.cli.terminals import one_after_the_other


def seen_by_agent(done: Done) -> dict[str, Any]:
    """What the agent said of itself, asked with the prompt `ask`."""
    assert done.code == 0, done.err
    seen: dict[str, Any] = json.loads(done.out)
    return seen


@pytest.fixture(autouse=True, scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cli, dict[str, Running]]]:
    """Commands whose output nobody reads. They take seconds to give up, so they run beside the other tests."""
    cli = Cli(tmp_path_factory.mktemp("blocked"))
    started, pipes = {}, []
    for name, words in {"json": ["--json", "chatter 3000"], "plain": ["big 1000000"]}.items():
        read, write = os.pipe()
        started[name] = cli.start("run", "--job-id", name, *words, stdout=write)
        os.close(write)
        pipes.append(read)
    yield cli, started
    for read in pipes:
        os.close(read)
    cli.close()


# --- what is printed ---------------------------------------------------------------------------------------


def test_the_text_and_nothing_else_is_on_standard_output(cli: Cli) -> None:
    done = cli.run("say Grüße, Welt")
    assert (done.code, done.out) == (0, "Grüße, Welt\n")
    assert "started claude" in done.err
    assert "supervise: logs in" in done.err
    assert "\x1b" not in done.err


def test_json_is_on_standard_output_and_nothing_else(cli: Cli) -> None:
    done = cli.run("say hello", "--json", "--job-id", "mine")
    assert (done.code, done.err) == (0, "")
    assert [line["type"] for line in done.lines if line["type"].startswith("agent_")] == [
        "agent_init",
        "agent_text",
        "agent_result",
    ]
    result = done.result
    assert (result["job_id"], result["outcome"], result["failure_kind"]) == ("mine", "completed", None)
    assert (result["text"], result["num_turns"], result["cost_usd"]) == ("hello", 2, 0.25)
    assert (result["exit_code"], result["signal"]) == (0, None)
    assert result["usage"] == {
        "input_tokens": 11,
        "output_tokens": 22,
        "cache_read_tokens": 33,
        "cache_creation_tokens": 44,
    }
    assert result["index"]["status"] == "none"
    kept = json.loads((cli.state / "jobs" / "mine" / "result.json").read_text())
    assert kept["text"] == "hello"


def test_options_reach_the_agent(cli: Cli) -> None:
    options = ["--model", "opus", "--max-turns", "3", "--max-budget-usd", "0.5", "--permission-mode", "plan"]
    done = cli.run("ask", *options, "--allowed-tools", "Edit", "--allowed-tools", "Bash(git *)", "--resume", "s1")
    argv = " ".join(seen_by_agent(done)["argv"])
    assert "--model opus --max-turns 3 --max-budget-usd 0.5 --permission-mode plan --resume s1" in argv
    assert "--allowedTools Edit,Bash(git *)" in argv
    options = ["--session-id", "u1", "--system-prompt-file", "a", "--append-system-prompt-file", "b"]
    done = cli.run("ask", *options, "--agent-arg=--bare", "--agent-arg", "--verbose")
    argv = " ".join(seen_by_agent(done)["argv"])
    files = f"--system-prompt-file {cli.workspace}/a --append-system-prompt-file {cli.workspace}/b"
    assert argv.endswith(f"--session-id u1 {files} --bare --verbose")


def test_a_text_of_20_mb_arrives_whole(cli: Cli) -> None:
    size = 20_000_000
    done = cli.run(f"big {size}", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.result["text"] == "é" + "x" * (size - 1)


def test_many_lines_reach_a_reader_who_keeps_up(cli: Cli) -> None:
    done = cli.run("chatter 3000", "--json")
    lost = sum(line["count"] for line in done.lines if line["type"] == "events_dropped")
    assert lost + sum(line["type"] == "agent_text" for line in done.lines) >= 3000
    assert done.result["text"] == "done"


def test_the_prompt_may_come_from_standard_input(cli: Cli) -> None:
    prompt = cli.root / "prompt"
    prompt.write_text("say from a file\n")
    for words in (["-"], [], ["--", "-"]):
        with prompt.open("rb") as stdin:
            done = cli.do("run", *words, stdin=stdin)
        assert (done.code, done.out) == (0, "from a file\n")
    prompt.write_bytes(b"say caf\xe9")
    with prompt.open("rb") as stdin:
        done = cli.do("run", stdin=stdin)
    assert (done.code, done.out) == (2, "")
    assert done.err == "supervise: the prompt on standard input is not UTF-8 (byte 7); convert it\n"


# --- how it ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "kind", "error"),
    [
        ("fail API Error: 529 overloaded", "overloaded", "overloaded"),
        ("fail Not logged in · Please run /login", "auth", "Not logged in"),
        ("silent", "bad_output", "no result"),
    ],
)
def test_a_failure_is_exit_code_1(cli: Cli, prompt: str, kind: str, error: str) -> None:
    done = cli.run(prompt, "--json")
    assert done.code == 1
    assert (done.result["outcome"], done.result["failure_kind"]) == ("failed", kind)
    assert error in done.result["error"]


def test_a_failure_is_told_to_people(cli: Cli) -> None:
    done = cli.run("fail something \x1b[2J broke")
    assert done.code == 1
    assert "supervise: claude reported an error: something" in done.err
    assert "Traceback" not in done.err


def test_a_timeout_is_exit_code_124(cli: Cli) -> None:
    done = cli.run("hang", "--json", "--timeout", "0.3")
    assert done.code == 124
    assert done.result["outcome"] == "timed_out"
    assert "0.3 s" in done.result["error"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels(cli: Cli, number: signal.Signals) -> None:
    running = cli.start("run", "--json", "hang")
    running.line_with('"agent_text"')
    running.process.send_signal(number)
    done = running.end(10)
    assert done.code == 128 + number
    assert done.result["outcome"] == "cancelled"
    assert number.name in done.result["error"]


def test_what_nohup_ignores_stays_ignored(cli: Cli) -> None:
    running = cli.start("run", "--json", "hang", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    running.line_with('"agent_text"')
    running.process.send_signal(signal.SIGHUP)
    running.process.send_signal(signal.SIGTERM)
    done = running.end(10)
    assert done.code == 143
    assert "SIGHUP" not in done.out


def test_a_reader_who_goes_away_cancels(cli: Cli) -> None:
    running = cli.start("run", "--json", "--set", "heartbeat_interval=0.1", "hang")
    running.line_with('"agent_text"')
    assert running.process.stdout is not None
    running.process.stdout.close()
    running.process.stdout = None
    done = running.end(10)
    assert (done.code, done.err) == (141, "")


def test_a_blocked_standard_output_holds_up_nothing(blocked: tuple[Cli, dict[str, Running]]) -> None:
    cli, started = blocked
    for name, running in started.items():
        done = running.end(30)
        file = cli.state / "jobs" / name / "result.json"
        assert done.code == 0
        assert f"supervise: nobody reads standard output; the result is in {file}\n" in done.err
        assert json.loads(file.read_text())["outcome"] == "completed"


def test_a_non_blocking_standard_output_is_written_whole(cli: Cli) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    running = cli.start("run", "big 1000000", stdout=write)
    os.close(write)
    with open(read, "rb") as pipe:
        data = pipe.read()
    done = running.end()
    assert (done.code, len(data)) == (0, 1_000_002)


def test_a_reader_of_standard_error_who_goes_away_ends_nothing(cli: Cli) -> None:
    read, write = os.pipe()
    os.close(read)
    running = cli.start("run", "say hello", stderr=write)
    os.close(write)
    done = running.end()
    assert (done.code, done.out) == (0, "hello\n")


def test_a_missing_agent_is_named(cli: Cli) -> None:
    done = cli.run("say hello", "--json", "--set", "agent.command=no-such-agent")
    assert done.code == 1
    assert (done.result["outcome"], done.result["failure_kind"]) == ("failed", "spawn")
    assert "no-such-agent" in done.result["error"]
    done = cli.run("say hello", "--set", "agent.command=no-such-agent")
    assert (done.code, done.out) == (1, "")
    assert "supervise: the program 'no-such-agent' was not found" in done.err


def test_a_missing_indexer_fails_the_index_and_not_the_job(cli: Cli) -> None:
    words = ["--set", "index.mode=cidx", "--set", "index.command=no-such-cidx"]
    done = cli.run("say hello", "--json", *words)
    assert done.code == 0
    assert done.result["outcome"] == "completed"
    assert (done.result["index"]["status"], done.result["index"]["stale"]) == ("failed", True)
    assert "no-such-cidx" in done.result["index"]["reason"]
    done = cli.run("say hello", *words)
    assert (done.code, done.out) == (0, "hello\n")
    assert done.err.count("supervise: the index is marked stale (failed: ") == 1


# --- settings ----------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_settings_by_file_environment_and_command_line(cli: Cli) -> None:
    write(cli.root / "config/supervise/supervise.toml", 'agent.env = { WHO = "file" }\nagent.pass_env = ["FROM_US"]')
    named = write(cli.root / "named.toml", 'agent.env = { WHO = "named file" }')
    (cli.workspace / "supervise.toml").write_text('agent.env = { WHO = "workspace" }')
    ours = {"FROM_US": "passed", "NOT_FOR_YOU": "kept"}

    def who(words: list[str], **env: str) -> Any:
        mine = seen_by_agent(cli.run("ask", *words, env={**ours, **env}))["mine"]
        assert "NOT_FOR_YOU" not in mine
        return mine.get("WHO"), mine.get("FROM_US")

    assert who([]) == ("file", "passed")
    assert who(["--config", str(named)]) == ("named file", None)
    assert who([], SUPERVISE_AGENT__ENV="WHO=environment") == ("environment", "passed")
    command_line = ["--set", "agent.env=WHO=command line"]
    assert who(command_line, SUPERVISE_AGENT__ENV="WHO=environment") == ("command line", "passed")


def test_commands_and_modes_by_environment(cli: Cli) -> None:
    (cli.workspace / ".code-indexer").mkdir()
    agent = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_claude.py"))]
    env = {"SUPERVISE_AGENT__COMMAND": json.dumps(agent), "PATH": "/usr/bin:/bin", "SUPERVISE_INDEX__MODE": "none"}
    done = cli.run("say hello", "--json", env=env)
    assert (done.code, done.result["index"]["status"]) == (0, "none")
    env |= {"SUPERVISE_INDEX__MODE": "auto", "SUPERVISE_INDEX__COMMAND": "no-such-cidx"}
    done = cli.run("say hello", "--json", env=env)
    assert (done.code, done.result["index"]["status"]) == (0, "failed")


# --- mistakes ----------------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], dict[str, str], list[str]]] = [
    (["run", "--workspace", "/no/such/place", "hi"], {}, ["/no/such/place", "does not exist"]),
    (["run", "--workspace", "/etc/passwd", "hi"], {}, ["/etc/passwd", "no directory"]),
    (["run", "--timeout", "-1", "hi"], {}, ["timeout", "-1", "above 0"]),
    (["run", "--timeout", "soon", "hi"], {}, ["--timeout", "soon"]),
    (["run", "  \n "], {}, ["PROMPT", "not empty"]),
    (["run"], {}, ["prompt"]),
    (["run", "--job-id", "../x", "hi"], {}, ["--job-id", "../x"]),
    (["run", "--max-turns", "0", "hi"], {}, ["--max-turns", "1 or more"]),
    (["run", "--set", "index.mode", "hi"], {}, ["index.mode", "name=value"]),
    (["run", "--set", "index.mod=none", "hi"], {}, ["index.mod", "did you mean 'index.mode'?"]),
    (["run", "--set", "index.mode=no\nne", "hi"], {}, ["index.mode"]),
    (["run", "hi"], {"SUPERVISE_INDEX__STARTUP_TIMOUT": "5"}, ["SUPERVISE_INDEX__STARTUP_TIMEOUT"]),
    (["run", "hi"], {"SUPERVISE_INDEX__STARTUP_TIMEOUT": "soon"}, ["startup_timeout", "soon"]),
    (["run", "--config", "/no/such.toml", "hi"], {}, ["/no/such.toml does not exist"]),
    (["run", "--config", "{root}/bad.toml", "hi"], {}, ["bad.toml", "line 2, column 7"]),
    (["run", "hi"], {"SUPERVISE_STATE_DIR": "/proc/nowhere"}, ["/proc/nowhere", "cannot be written"]),
    (["run", "hi", "there"], {}, ["there"]),
    (["run", "--no-such-option", "hi"], {}, ["--no-such-option"]),
    (["rum", "hi"], {}, ["rum"]),
    (["demo", "--fault", "meteor"], {}, ["meteor", "watch-crash"]),
]


def test_a_mistake_is_one_line(cli: Cli) -> None:
    (cli.root / "bad.toml").write_text("kill_wait = 5\n[index\nmode = 1\n")
    commands = [
        {"words": [word.replace("{root}", str(cli.root)) for word in words], "env": env, "stdout": "file"}
        for words, env, _ in MISTAKES
    ]
    for done, (words, _, told) in zip(one_after_the_other(cli, commands, {}), MISTAKES, strict=True):
        assert (words, done.code, done.out) == (words, 2, ""), done.err
        assert done.err.startswith("supervise: "), words
        assert done.err.count("\n") == 1, words
        assert "Traceback" not in done.err, words
        for part in told:
            assert part in done.err, words
    assert not cli.state.exists()


def test_no_prompt_on_a_terminal_is_a_mistake_and_no_wait(cli: Cli) -> None:
    ours, theirs = os.openpty()
    try:
        running = cli.start("run", stdin=theirs)
        done = running.end(10)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("supervise: no prompt was given; write one")


def test_the_text_cannot_steer_a_terminal(cli: Cli) -> None:
    ours, theirs = os.openpty()
    try:
        running = cli.start("run", "say \x1b]0;owned\x07hello", stdout=theirs, stderr=subprocess.DEVNULL)
        assert running.process.wait(LIMIT) == 0
        shown = os.read(ours, 1000)
    finally:
        os.close(ours)
        os.close(theirs)
    assert shown == b" ]0;owned hello\r\n"
    assert cli.run("say \x1b]0;owned\x07hello").out == "\x1b]0;owned\x07hello\n"
