"""A scripted agent: no model behind it, but real edits, and stream-json as Claude Code speaks it.

    python -P -m supervise.demo.agent [--pace S] [any of Claude's flags] < prompt

It refactors the project that `supervise.demo.project` lays down, in the current directory, and refuses to
touch any other. Each step is a `tool_use` line, the real operation and a `tool_result` line.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from attrs import frozen

from supervise.demo.project import NAME

__all__ = ["main"]

_MODEL = "scripted-demo"
_LONGEST = 14  # seconds until the kernel ends this process, whatever it is doing
_LONGEST_PACES = 9.0  # seconds of these that may pass between steps
_PROMPT_WAIT = 3.0  # seconds for a prompt to arrive on stdin
_LARGEST_PROMPT = 10 * 1024 * 1024
_COMMAND_TIMEOUT = 5.0

_MONEY = '''"""Amounts of money, in cents."""


def to_cents(euros: str) -> int:
    whole, _, part = euros.partition(".")
    return int(whole) * 100 + int(part.ljust(2, "0")[:2])


def as_euros(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"
'''
_WORDS = '''"""Words for people."""


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
'''
_MONEY_TEST = """import unittest

from orchard.text.money import as_euros, to_cents


class MoneyTest(unittest.TestCase):
    def test_there_and_back(self) -> None:
        self.assertEqual(as_euros(to_cents("4.05")), "4.05")
"""
_PICTURE = (  # one pixel: a file that is no text
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@frozen
class _Step:
    """One tool call: what Claude would say first (if anything), the tool, its input."""

    tool: str
    input: dict[str, Any]
    remark: str = ""


_STEPS = (
    _Step("Read", {"file_path": "orchard/util.py"}, "`util.py` holds two unrelated things. I'll split it."),
    _Step("Write", {"file_path": "orchard/text/__init__.py", "content": ""}),
    _Step("Write", {"file_path": "orchard/text/money.py", "content": _MONEY}),
    _Step("Write", {"file_path": "orchard/text/words.py", "content": _WORDS}),
    _Step(
        "Edit",
        {
            "file_path": "orchard/prices.py",
            "old_string": "from orchard.util import to_cents",
            "new_string": "from orchard.text.money import to_cents",
        },
        "Now the imports.",
    ),
    _Step(
        "Edit",
        {
            "file_path": "orchard/report.py",
            "old_string": "from orchard.trees import Tree\nfrom orchard.util import as_euros, plural\n",
            "new_string": "from orchard.text.money import as_euros\n"
            "from orchard.text.words import plural\nfrom orchard.trees import Tree\n",
        },
    ),
    _Step(
        "Bash",
        {"command": "rm orchard/util.py", "description": "Remove the old module"},
        "Nothing uses `util.py` now.",
    ),
    _Step(
        "Bash",
        {"command": "mv tests/test_prices.py tests/test_price_list.py", "description": "Rename the test"},
    ),
    _Step("Write", {"file_path": "tests/text/test_money.py", "content": _MONEY_TEST}),
    _Step(
        "Bash",
        {
            "command": "touch tests/text/__init__.py && mkdir -p docs/pictures/trees"
            f" && echo {_PICTURE} | base64 -d > docs/pictures/trees/apple.png",
            "description": "Add a picture to the docs",
        },
    ),
    _Step("Bash", {"command": "mv docs manual", "description": "Rename the docs directory"}),
    _Step(
        "Edit",
        {"file_path": "README.md", "old_string": "`docs/usage.md`", "new_string": "`manual/usage.md`"},
        "And the README must follow.",
    ),
    _Step(
        "Bash",
        {
            "command": f"'{sys.executable}' -B -m unittest tests.test_price_list tests.test_report"
            " tests.text.test_money",
            "description": "Run the tests",
        },
        "Last, the tests.",
    ),
)
_SUMMARY = "Split `orchard/util.py` into `orchard/text`, renamed `docs` to `manual`; the tests pass."


class _Failed(Exception):
    """A tool call failed; the text is what the tool says."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the work. Returns the exit code: 0, or 1 for an error."""
    options = _parse(arguments)
    _bound()
    if not _prompt_given():
        # And no JSON, as Claude does it.
        print("Error: Input must be provided through stdin when using --print", file=sys.stderr)
        return 1
    try:
        return _Session(options.session_id or str(uuid.uuid4()), Path.cwd()).run(options.pace)
    except BrokenPipeError:  # nobody listens any more
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="supervise.demo.agent", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--version", "-v", action="version", version="1 (scripted demo agent)")
    parser.add_argument(
        "--pace",
        type=float,
        default=0.25,
        metavar="S",
        help=f"seconds between steps, at most {_LONGEST_PACES / len(_STEPS):.2f}; default 0.25",
    )
    parser.add_argument("--session-id", help="the rest of Claude's flags is accepted and not used")
    options, _ = parser.parse_known_args(arguments)
    # So that the pace alone cannot reach the bound of the whole run.
    options.pace = min(max(0.0, options.pace), _LONGEST_PACES / len(_STEPS))
    return options


def _bound() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel's own end: no code of ours can miss it
    signal.setitimer(signal.ITIMER_REAL, _LONGEST)
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM is exit code 143, SIGINT 0, neither with a result line, as Claude does it."""
    raise SystemExit(143 if number == signal.SIGTERM else 0)


def _prompt_given() -> bool:
    """Read stdin to its end, or as long as Claude waits for it; whether there was anything."""
    deadline = time.monotonic() + _PROMPT_WAIT
    size = 0
    while size <= _LARGEST_PROMPT:
        ready, _, _ = select.select([0], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(0, 65536) if ready else b""
        if not chunk:
            break
        size += len(chunk.strip())
    return size > 0


class _Session:
    """One conversation: what is said on stdout, and the tools."""

    def __init__(self, session_id: str, workspace: Path) -> None:
        self._id = session_id
        self._workspace = workspace
        self._started = time.monotonic()
        self._tools: dict[str, Callable[..., tuple[str, dict[str, Any]]]] = {
            "Bash": self._bash,
            "Edit": self._edit,
            "Read": self._read,
            "Write": self._write,
        }

    def run(self, pace: float) -> int:
        self._say_init()
        if not self._is_ours():
            return self._say_result(
                0,
                f"{self._workspace} is not the demo's project: nothing was touched. "
                "Lay it down with supervise.demo.project.lay_down() first.",
            )
        for number, step in enumerate(_STEPS):
            if number:
                time.sleep(pace)  # the pace of the show; nothing is waited for
            failure = self._do(step)
            if failure is not None:
                return self._say_result(number + 1, f"{step.tool} failed: {failure}")
        self._say_assistant({"type": "text", "text": _SUMMARY}, _new_id("msg_"))
        return self._say_result(len(_STEPS) + 1)

    def _is_ours(self) -> bool:
        try:
            return f'name = "{NAME}"' in (self._workspace / "pyproject.toml").read_text(errors="replace")
        except OSError:
            return False

    def _do(self, step: _Step) -> str | None:
        """One step; what went wrong, if anything."""
        values = dict(step.input)
        if "file_path" in values:
            values["file_path"] = str(self._workspace / values["file_path"])
        message = _new_id("msg_")
        call = _new_id("toolu_")
        if step.remark:
            self._say_assistant({"type": "text", "text": step.remark}, message)
        self._say_assistant({"type": "tool_use", "id": call, "name": step.tool, "input": values}, message)
        try:
            text, detail = self._tools[step.tool](**values)
        except (_Failed, OSError, subprocess.TimeoutExpired) as error:
            self._say_tool_result(call, str(error), f"Error: {error}", is_error=True)
            return str(error)
        self._say_tool_result(call, text, detail)
        return None

    # The tools.

    def _read(self, file_path: str) -> tuple[str, dict[str, Any]]:
        content = Path(file_path).read_text(encoding="utf-8")
        lines = content.splitlines()
        numbered = "\n".join(f"{number:6}\t{line}" for number, line in enumerate(lines, 1))
        file = {
            "filePath": file_path,
            "content": content,
            "numLines": len(lines),
            "startLine": 1,
            "totalLines": len(lines),
        }
        return numbered, {"type": "text", "file": file}

    def _write(self, file_path: str, content: str) -> tuple[str, dict[str, Any]]:
        file = Path(file_path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        return f"File created successfully at: {file_path}", {
            "type": "create",
            "filePath": file_path,
            "content": content,
            "structuredPatch": [],
            "originalFile": None,
            "userModified": False,
        }

    def _edit(self, file_path: str, old_string: str, new_string: str) -> tuple[str, dict[str, Any]]:
        file = Path(file_path)
        original = file.read_text(encoding="utf-8")
        if original.count(old_string) != 1:
            raise _Failed(f"String to replace was found {original.count(old_string)} times, not once: {old_string}")
        # As editors save: a new file takes the place of the old one.
        new = file.with_name(f".{file.name}.new")
        new.write_text(original.replace(old_string, new_string), encoding="utf-8")
        new.replace(file)
        return f"The file {file_path} has been updated successfully.", {
            "filePath": file_path,
            "oldString": old_string,
            "newString": new_string,
            "originalFile": original,
            "structuredPatch": [],
            "userModified": False,
            "replaceAll": False,
        }

    def _bash(self, command: str, description: str) -> tuple[str, dict[str, Any]]:
        done = subprocess.run(  # killed if SIGTERM ends us meanwhile: SystemExit leaves through it
            ["/bin/sh", "-c", command],
            cwd=self._workspace,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_TIMEOUT,
            check=False,
        )
        if done.returncode != 0:
            raise _Failed(f"Exit code {done.returncode}\n{(done.stdout + done.stderr).strip()}")
        detail = {
            "stdout": done.stdout.strip(),
            "stderr": done.stderr.strip(),
            "interrupted": False,
            "isImage": False,
            "noOutputExpected": False,
        }
        return (done.stdout + done.stderr).strip(), detail

    # The lines.

    def _say_init(self) -> None:
        self._say(
            {
                "type": "system",
                "subtype": "init",
                "cwd": str(self._workspace),
                "session_id": self._id,
                "tools": sorted(self._tools),
                "mcp_servers": [],
                "model": _MODEL,
                "permissionMode": "bypassPermissions",
                "slash_commands": [],
                "apiKeySource": "none",
                "claude_code_version": "scripted",
                "output_style": "default",
                "agents": [],
                "skills": [],
                "plugins": [],
            }
        )

    def _say_assistant(self, block: dict[str, Any], message: str) -> None:
        self._say(
            {
                "type": "assistant",
                "message": {
                    "id": message,
                    "type": "message",
                    "role": "assistant",
                    "model": _MODEL,
                    "content": [block],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": {
                        "input_tokens": 0,
                        "cache_creation_input_tokens": 0,
                        "cache_read_input_tokens": 0,
                        "output_tokens": 0,
                        "service_tier": "standard",
                    },
                },
                "parent_tool_use_id": None,
                "session_id": self._id,
                "timestamp": _now(),
            }
        )

    def _say_tool_result(
        self, call: str, content: str, detail: dict[str, Any] | str, *, is_error: bool = False
    ) -> None:
        block = {"tool_use_id": call, "type": "tool_result", "content": content, "is_error": is_error}
        self._say(
            {
                "type": "user",
                "message": {"role": "user", "content": [block]},
                "parent_tool_use_id": None,
                "session_id": self._id,
                "timestamp": _now(),
                "tool_use_result": detail,
            }
        )

    def _say_result(self, turns: int, failure: str | None = None) -> int:
        """The last line; returns the exit code. No model was asked, so all counts of tokens are 0."""
        milliseconds = round((time.monotonic() - self._started) * 1000)
        usage = {
            "input_tokens": 0,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
            "server_tool_use": {"web_search_requests": 0, "web_fetch_requests": 0},
            "service_tier": "standard",
        }
        model = {
            "inputTokens": 0,
            "outputTokens": 0,
            "cacheReadInputTokens": 0,
            "cacheCreationInputTokens": 0,
            "webSearchRequests": 0,
            "costUSD": 0,
            "contextWindow": 0,
        }
        line: dict[str, Any] = {
            "type": "result",
            "subtype": "success" if failure is None else "error_during_execution",
            "is_error": failure is not None,
            "duration_ms": milliseconds,
            "duration_api_ms": 0,
            "num_turns": turns,
            "stop_reason": "end_turn" if failure is None else "tool_use",
            "session_id": self._id,
            "total_cost_usd": 0,
            "usage": usage,
            "modelUsage": {_MODEL: model},
            "permission_denials": [],
        }
        if failure is None:
            line |= {"result": _SUMMARY, "terminal_reason": "completed"}
        else:
            line["errors"] = [failure]
        self._say(line)
        return 0 if failure is None else 1

    def _say(self, line: dict[str, Any]) -> None:
        # Straight to the descriptor: at exit there is no buffer left that could block on a full pipe.
        data = json.dumps(line | {"uuid": str(uuid.uuid4())}, separators=(",", ":")).encode() + b"\n"
        while data:
            data = data[os.write(1, data) :]


def _new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex[:18]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


if __name__ == "__main__":
    sys.exit(main())
