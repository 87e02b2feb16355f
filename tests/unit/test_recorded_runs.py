"""Every recorded run of the real CLI, with what is to be read from it, written down by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from supervise.agents.stream_json import StreamJsonParser
from supervise.agents.verdict import judge
from supervise.events import AgentEvent, AgentInit, AgentResult, AgentText, AgentToolResult, BadLine, UnknownEvent
from supervise.model import ExitStatus, FailureKind, Usage

RUNS: list[dict[str, Any]] = [
    json.loads(line) for line in (Path(__file__).parents[1] / "data/claude_runs.jsonl").read_bytes().splitlines()
]

OK = ExitStatus(0)
ERROR = ExitStatus(1)
TERM = ExitStatus(143)
HUP = ExitStatus(129)
KILL = ExitStatus(signal="SIGKILL")

AGENT_ERROR = FailureKind.AGENT_ERROR
AUTH = FailureKind.AUTH
BAD_OUTPUT = FailureKind.BAD_OUTPUT
BUDGET = FailureKind.BUDGET
KILLED = FailureKind.KILLED
MAX_TURNS = FailureKind.MAX_TURNS
NETWORK = FailureKind.NETWORK
OVERLOADED = FailureKind.OVERLOADED
QUOTA = FailureKind.QUOTA
REFUSED = FailureKind.REFUSED

# Number, name, exit; failure (None: completed), session seen, turns, cost, input tokens, output tokens, denials.
TABLE = [
    (0, "bash default perms", OK, None, True, 2, 0.01, 2000, 100, 1),
    (1, "bash allowedTools", OK, None, True, 2, 0.01, 2000, 100, 0),
    (2, "write default perms", OK, None, True, 2, 0.01, 2000, 100, 1),
    (3, "write acceptEdits", OK, None, True, 2, 0.01, 2000, 100, 0),
    (4, "bash dontAsk", OK, None, True, 2, 0.01, 2000, 100, 1),
    (5, "bash plan", OK, None, True, 2, 0.01, 2000, 100, 1),
    (6, "root skip perms IS_SANDBOX=1", OK, None, True, 2, 0.01, 2000, 100, 0),
    (7, "bash failing", OK, None, True, 2, 0.01, 2000, 100, 0),
    (8, "partial", OK, None, True, 1, 0.005, 1000, 50, 0),
    (9, "max-turns 2 with tools", ERROR, MAX_TURNS, True, 3, 0.01, 2000, 100, 0),
    # `usage` is zeros where the budget is spent: the sums over `modelUsage` count.
    (10, "max-budget tiny", ERROR, BUDGET, True, 1, 1.2000000000000002, 200_000, 20_000, 0),
    (11, "max-budget single turn", ERROR, BUDGET, True, 1, 1.2000000000000002, 200_000, 20_000, 0),
    (12, "json-schema", OK, None, True, 2, 0.005, 1000, 50, 0),
    (13, "json-schema not obeyed", OK, None, True, 2, 0.01, 2000, 100, 0),
    # `usage` leaves the last of five calls out here; one result line, so it counts nevertheless.
    (14, "json-schema wrong", ERROR, AGENT_ERROR, True, 6, 0.025, 4000, 200, 0),
    (15, "refusal stop", ERROR, REFUSED, True, 2, 0.01, 2000, 100, 0),
    (16, "text", OK, BAD_OUTPUT, False, None, None, 0, 0, 0),
    (17, "resume unknown", ERROR, AGENT_ERROR, True, 0, 0.0, 0, 0, 0),
    (18, "continue", OK, None, True, 1, 0.02, 1000, 50, 0),
    (19, "no api key", ERROR, AUTH, True, 1, 0.0, 0, 0, 0),
    (20, "config dir readonly/nonexistent", OK, None, True, 1, 0.005, 1000, 50, 0),
    (21, "SIGTERM during delayed answer", TERM, KILLED, True, None, None, 0, 0, 0),
    (22, "SIGINT during Bash sleep", OK, AGENT_ERROR, True, 3, 0.005, 1000, 50, 0),
    (23, "SIGHUP during delayed answer", HUP, KILLED, True, None, None, 0, 0, 0),
    (24, "SIGHUP during Bash sleep", HUP, KILLED, True, None, None, 0, 0, 0),
    (25, "resume after SIGHUP in tool", OK, None, True, 1, 0.01, 1000, 50, 0),
    (26, "SIGKILL during delayed answer", KILL, KILLED, True, None, None, 0, 0, 0),
    (27, "resume after SIGKILL in tool", OK, None, True, 1, 0.005, 1000, 50, 0),
    (28, "401", ERROR, AUTH, True, 1, 0.0, 0, 0, 0),
    (29, "404", ERROR, REFUSED, True, 1, 0.0, 0, 0, 0),
    (30, "413", ERROR, REFUSED, True, 1, 0.0, 0, 0, 0),
    (31, "401 twice then ok", OK, None, True, 1, 0.005, 1000, 50, 0),
    (32, "429 ra=1 forever", ERROR, QUOTA, True, 1, 0.0, 0, 0, 0),
    (33, "529 fallback", OK, None, True, 1, 0.00375, 1000, 50, 0),
    (34, "500 forever default", ERROR, OVERLOADED, True, 1, 0.0, 0, 0, 0),
    # Two runs in one record: a good one, then one that failed. The last result counts.
    (35, "cut start forever R=2", ERROR, NETWORK, True, 1, 0.0, 0, 0, 0),
    (36, "cut rst x1", OK, None, True, 1, 0.005, 1000, 50, 0),
    (37, "conn refused R=2", ERROR, NETWORK, True, 1, 0.0, 0, 0, 0),
    (38, "delay 100 before headers", OK, None, True, 1, 0.005, 1000, 50, 0),
    (39, "API_TIMEOUT_MS=3000 delay 20 R=1", ERROR, NETWORK, True, 1, 0.0, 0, 0, 0),
    (40, "sse overloaded forever R=2", ERROR, OVERLOADED, True, 1, 0.0, 3000, 3, 0),
    (41, "sse api_error forever R=2", ERROR, OVERLOADED, True, 1, 0.0, 1000, 1, 0),
    # An interrupted turn, then a good one.
    (42, "E3", OK, None, True, 1, 0.005, 1000, 50, 0),
    (43, "E4", OK, None, True, 2, 0.01, 2000, 100, 0),
    (44, "E6", OK, None, True, 2, 0.01, 2000, 100, 1),
    (45, "E8", OK, None, True, 1, 0.005, 1000, 50, 0),
    (46, "E9", OK, None, True, 1, 0.005, 1000, 50, 0),
    # Two turns with 1000 + 50 tokens each, two result lines.
    (47, "E11", OK, None, True, 1, 0.01, 2000, 100, 0),
    (48, "cut mid forever default", ERROR, NETWORK, True, 1, 0.00402, 1000, 1, 0),
    (49, "401 x-should-retry false", ERROR, AUTH, True, 1, 0.0, 0, 0, 0),
    (50, "429 ra=70 x1", ERROR, QUOTA, True, 1, 0.0, 0, 0, 0),
    (51, "cut mid after tool", OK, None, True, 2, 0.01, 2000, 100, 0),
    (52, "529 fallback forever", ERROR, OVERLOADED, True, 1, 0.0, 0, 0, 0),
    (53, "MAX_RETRIES=0 529", ERROR, OVERLOADED, True, 1, 0.0, 0, 0, 0),
    (54, "F7 resume after 9", OK, None, True, 1, 0.005, 1000, 50, 0),
    (55, "F7 resume after 15", OK, None, True, 1, 0.01, 1000, 50, 0),
    (56, "F7 resume after 9 mid stream", OK, None, True, 1, 0.005, 1000, 50, 0),
    (57, "F7 resume after 9 at 0.2 s", ERROR, AGENT_ERROR, True, 0, 0.0, 0, 0, 0),
    (58, "F8 second --resume", OK, None, True, 1, 0.005, 1000, 50, 0),
    (59, "F8 first", OK, None, True, 1, 0.005, 1000, 50, 0),
    (60, "F8 resume after both", OK, None, True, 1, 0.01, 1000, 50, 0),
    (61, "F5", OK, None, True, 2, 0.01, 2000, 100, 0),
    (62, "F5b nohup", OK, None, True, 2, 0.01, 2000, 100, 0),
    (63, "stall 400 nothing", TERM, KILLED, True, None, None, 0, 0, 0),
    (64, "unified ratelimit headers on 200", OK, None, True, 1, 0.005, 1000, 50, 0),
    (65, "unified rejected on 429", ERROR, QUOTA, True, 1, 0.0, 0, 0, 0),
    (66, "unknown slash command", OK, None, True, 1, 0.005, 1000, 50, 0),
]


def printed(run: dict[str, Any]) -> bytes:
    """What the CLI printed; `NONJSON` stands for output that was no JSON."""
    return b"".join(
        line["raw"].encode() if line["type"] == "NONJSON" else json.dumps(line).encode() + b"\n"
        for line in run["lines"]
    )


def events_of(run: dict[str, Any]) -> list[AgentEvent]:
    parser = StreamJsonParser()
    return [*parser.feed(printed(run)), *parser.close()]


def test_the_table_names_every_run() -> None:
    assert [row[:2] for row in TABLE] == [(number, run["run"]) for number, run in enumerate(RUNS)]
    assert len(RUNS) == 67


@pytest.mark.parametrize(
    ("number", "name", "exit", "kind", "session", "turns", "cost", "input_tokens", "output_tokens", "denials"),
    TABLE,
    ids=[f"{row[0]}-{row[1]}" for row in TABLE],
)
def test_run(
    number: int,
    name: str,
    exit: ExitStatus,
    kind: FailureKind | None,
    session: bool,
    turns: int | None,
    cost: float | None,
    input_tokens: int,
    output_tokens: int,
    denials: int,
) -> None:
    events = events_of(RUNS[number])
    results = [event for event in events if isinstance(event, AgentResult)]
    last = results[-1] if results else None

    found, error = judge(last, exit)
    assert found is kind
    assert (error is None) == (kind is None)
    assert error is None or "\n" not in error

    sessions = [e.session_id for e in events if isinstance(e, AgentInit | AgentResult) and e.session_id]
    assert bool(sessions) == session

    seen = last or AgentResult()
    assert (seen.num_turns, seen.cost_usd) == (turns, cost)
    assert seen.usage == Usage(input_tokens, output_tokens)
    assert seen.permission_denials == denials
    assert seen.reset_at is None  # no recorded line says when a quota resets


def test_no_line_is_lost_and_none_is_doubled() -> None:
    for run in RUNS:
        expected = [line for line in run["lines"] if line["type"] != "NONJSON"]
        assert [event.raw for event in events_of(run) if event.raw is not None] == expected


def test_what_the_lines_are() -> None:
    """Counted by hand. Each assistant line of the records has one block."""
    assert Counter(event.type for run in RUNS for event in events_of(run)) == {
        "agent_init": 67,
        "agent_retry": 67,
        "agent_result": 64,
        "agent_text": 59,
        "agent_tool_use": 24,
        "agent_tool_result": 23,
        "agent_unknown": 22,
        "agent_partial": 8,
        "agent_permission_denied": 4,
        "agent_bad_line": 1,
    }


def test_unknown_lines_keep_kind_and_subtype() -> None:
    unknown = (event for run in RUNS for event in events_of(run) if isinstance(event, UnknownEvent))
    assert Counter((event.kind, event.subtype) for event in unknown) == {
        ("command_lifecycle", ""): 6,
        ("user", ""): 6,  # texts that the CLI itself put in, and replayed prompts
        ("control_response", ""): 3,
        ("control_request", ""): 1,
        ("system", "informational"): 2,
        ("system", "model_fallback"): 2,
        ("system", "status"): 1,
        ("system", "model_refusal_no_fallback"): 1,
    }


def test_one_run_in_full() -> None:
    init, use, denied, answer, text, result = events_of(RUNS[0])
    session = "792a34bb-b8cb-4374-991c-c972aa056166"
    call = "toolu_6d8bc44c6fd1066e0b"
    assert init == AgentInit(
        session_id=session,
        model="claude-opus-5-5",
        cwd="/workspace/a",
        permission_mode="default",
        version="2.1.329",
    )
    assert (use.type, getattr(use, "id", None), getattr(use, "name", None)) == ("agent_tool_use", call, "Bash")
    assert (denied.type, getattr(denied, "id", None)) == ("agent_permission_denied", call)
    assert isinstance(answer, AgentToolResult)
    assert (answer.id, answer.is_error, answer.text[:18]) == (call, True, "Output redirection")
    assert text == AgentText(text="done")
    assert result == AgentResult(
        subtype="success",
        text="done",
        session_id=session,
        usage=Usage(2000, 100),
        cost_usd=0.01,
        num_turns=2,
        duration=0.176,
        api_duration=0.061,
        stop_reason="end_turn",
        terminal_reason="completed",
        permission_denials=1,
    )


def test_an_error_keeps_its_reasons() -> None:
    (result,) = (event for event in events_of(RUNS[30]) if isinstance(event, AgentResult))
    assert (result.is_error, result.subtype) == (True, "success")
    assert (result.api_status, result.terminal_reason) == (413, "image_error")
    (result,) = (event for event in events_of(RUNS[9]) if isinstance(event, AgentResult))
    assert result.errors == ("Reached maximum number of turns (2)",)


def test_output_that_is_no_json() -> None:
    assert events_of(RUNS[16]) == [
        BadLine(reason="not JSON: Expecting value: line 1 column 1 (char 0)", excerpt="Hello from the stub.", size=20)
    ]
