"""The demo's scripted agent as a real process: real edits, and lines as the real CLI prints them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervise.demo.project import FILES, lay_down

AGENT = [sys.executable, "-P", "-m", "supervise.demo.agent"]
FLAGS = ["-p", "--output-format", "stream-json", "--verbose", "--permission-mode", "acceptEdits"]
LIMIT = 20.0


def run(workspace: Path, *flags: str, prompt: str = "split util.py") -> tuple[int, list[dict[str, Any]], str]:
    done = subprocess.run(
        [*AGENT, *FLAGS, *flags], cwd=workspace, input=prompt, capture_output=True, text=True, timeout=LIMIT
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    lay_down(tmp_path)
    return tmp_path


@pytest.fixture
def slow_agent(workspace: Path) -> Iterator[subprocess.Popen[str]]:
    """An agent that has begun to work and has long pauses; ended with the test."""
    process = subprocess.Popen(
        [*AGENT, "--pace", "60", *FLAGS],
        cwd=workspace,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("go")
        process.stdin.close()
        assert '"init"' in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait(LIMIT)
        process.stdout.close()


def files(workspace: Path) -> set[str]:
    return {str(path.relative_to(workspace)) for path in workspace.rglob("*") if path.is_file()}


def test_the_project_is_small_and_its_tests_pass(workspace: Path) -> None:
    assert files(workspace) == set(FILES)
    assert 8 <= len(FILES) <= 12
    command = [sys.executable, "-B", "-m", "unittest", "tests.test_prices", "tests.test_report"]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert "Ran 2 tests" in done.stderr


def test_the_work_is_really_done(workspace: Path) -> None:
    code, lines, stderr = run(workspace, "--pace", "0")
    assert (code, stderr) == (0, "")
    after = files(workspace)
    assert after - set(FILES) == {
        "orchard/text/__init__.py",
        "orchard/text/money.py",
        "orchard/text/words.py",
        "tests/test_price_list.py",
        "tests/text/__init__.py",
        "tests/text/test_money.py",
        "manual/usage.md",
        "manual/history.md",
        "manual/pictures/trees/apple.png",
    }
    assert set(FILES) - after == {
        "orchard/util.py",
        "tests/test_prices.py",
        "docs/usage.md",
        "docs/history.md",
    }
    assert "orchard.text.money" in (workspace / "orchard/prices.py").read_text()
    assert (workspace / "manual/pictures/trees/apple.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    last_result = lines[-3]["tool_use_result"]
    assert "Ran 3 tests" in last_result["stderr"]  # the refactored project's own tests


def test_the_lines_are_those_of_the_real_cli(workspace: Path) -> None:
    session = "01234567-89ab-4def-8123-456789abcdef"
    _, lines, _ = run(workspace, "--pace", "0", "--session-id", session)
    assert (lines[0]["type"], lines[0]["subtype"], lines[0]["cwd"]) == ("system", "init", str(workspace))
    assert {line["session_id"] for line in lines} == {session}
    assert len({line["uuid"] for line in lines}) == len(lines)

    blocks = [(line["type"], block) for line in lines[1:-1] for block in line["message"]["content"]]
    calls = [block["id"] for _, block in blocks if block["type"] == "tool_use"]
    answered = [block["tool_use_id"] for kind, block in blocks if kind == "user"]
    assert calls == answered
    assert len(calls) == len(set(calls)) == 13
    assert {block["name"] for _, block in blocks if block["type"] == "tool_use"} == {"Bash", "Edit", "Read", "Write"}
    # Each call comes right before its result.
    for number, (kind, block) in enumerate(blocks):
        if kind == "user":
            assert blocks[number - 1][1]["id"] == block["tool_use_id"]

    result = lines[-1]
    assert [line["type"] for line in lines].count("result") == 1
    expected = {
        "type": "result",
        "subtype": "success",
        "is_error": False,
        "num_turns": 14,
        "total_cost_usd": 0,
        "permission_denials": [],
        "terminal_reason": "completed",
    }
    assert result | expected == result
    assert result["usage"]["output_tokens"] == 0
    assert set(result["modelUsage"]) == {lines[0]["model"]}
    assert result["result"] == lines[-2]["message"]["content"][0]["text"]


def test_no_project_but_the_demos_is_touched(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "precious"\n')
    code, lines, _ = run(tmp_path, "--pace", "0")
    assert code == 1
    assert (lines[-1]["subtype"], lines[-1]["is_error"]) == ("error_during_execution", True)
    assert "nothing was touched" in lines[-1]["errors"][0]
    assert files(tmp_path) == {"pyproject.toml"}


def test_a_step_that_fails_is_an_error_at_the_end(workspace: Path) -> None:
    (workspace / "orchard/prices.py").write_text("# somebody else was here\n")
    code, lines, _ = run(workspace, "--pace", "0")
    assert code == 1
    assert lines[-2]["message"]["content"][0]["is_error"] is True
    assert lines[-1]["is_error"] is True
    assert "Edit failed" in lines[-1]["errors"][0]


def test_without_a_prompt_there_is_no_json(workspace: Path) -> None:
    code, lines, stderr = run(workspace, prompt="  \n")
    assert (code, lines) == (1, [])
    assert "Input must be provided" in stderr


def test_sigterm_is_exit_code_143_at_once(slow_agent: subprocess.Popen[str]) -> None:
    started = time.monotonic()
    slow_agent.send_signal(signal.SIGTERM)
    assert slow_agent.wait(LIMIT) == 143
    assert time.monotonic() - started < 5  # far less than the pauses that were left
    assert slow_agent.stdout is not None
    assert '"type":"result"' not in slow_agent.stdout.read()


def test_sigint_is_exit_code_0_without_a_result(slow_agent: subprocess.Popen[str]) -> None:
    slow_agent.send_signal(signal.SIGINT)
    assert slow_agent.wait(LIMIT) == 0
    assert slow_agent.stdout is not None
    assert '"type":"result"' not in slow_agent.stdout.read()


def test_sigterm_ends_an_agent_whose_output_nobody_reads(workspace: Path) -> None:
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    with contextlib.suppress(BlockingIOError):  # the pipe is full from the start
        while True:
            os.write(writable, b"x" * 4096)
    os.set_blocking(writable, True)
    process = subprocess.Popen(
        [*AGENT, *FLAGS], cwd=workspace, stdin=subprocess.PIPE, stdout=writable, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdin is not None
        process.stdin.write(b"go")
        process.stdin.close()
        deadline = time.monotonic() + LIMIT
        while "pipe_write" not in Path(f"/proc/{process.pid}/wchan").read_text():
            assert time.monotonic() < deadline, "never blocked in write()"
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 143
    finally:
        process.kill()
        process.wait(LIMIT)
        os.close(readable)
        os.close(writable)
