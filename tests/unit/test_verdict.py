"""The table of verdicts: what a last result line and an exit come to."""

from __future__ import annotations

from typing import Any

import pytest

from supervise.agents.verdict import judge
from supervise.events import AgentResult, BadLine
from supervise.model import ExitStatus, FailureKind

F = FailureKind
GOOD = AgentResult(subtype="success", text="done")
TOO_LONG = BadLine(reason="longer than 100 bytes", size=101, too_long=True)


def code(number: int) -> ExitStatus:
    return ExitStatus(code=number)


def death(name: str) -> ExitStatus:
    return ExitStatus(signal=name)


@pytest.mark.parametrize(
    ("exit", "kind"),
    [
        (code(0), F.BAD_OUTPUT),
        (code(1), F.AGENT_ERROR),
        (code(2), F.AGENT_ERROR),
        (code(124), F.AGENT_ERROR),
        (code(126), F.AGENT_ERROR),
        (code(127), F.AGENT_ERROR),
        (code(128), F.AGENT_ERROR),
        (code(129), F.KILLED),  # SIGHUP
        (code(130), F.KILLED),  # SIGINT
        (code(131), F.KILLED),  # SIGQUIT
        (code(132), F.KILLED),  # SIGILL
        (code(133), F.KILLED),  # SIGTRAP
        (code(134), F.KILLED),  # SIGABRT
        (code(135), F.KILLED),  # SIGBUS
        (code(136), F.KILLED),  # SIGFPE
        (code(137), F.KILLED),  # SIGKILL
        (code(138), F.AGENT_ERROR),
        (code(139), F.KILLED),  # SIGSEGV
        (code(143), F.KILLED),  # SIGTERM
        (code(144), F.AGENT_ERROR),
        (code(255), F.AGENT_ERROR),
        (death("SIGKILL"), F.KILLED),
        (death("SIG40"), F.KILLED),
        (None, F.KILLED),
    ],
)
@pytest.mark.parametrize("stopped_by_us", [False, True])
def test_without_a_result(exit: ExitStatus | None, kind: FailureKind, stopped_by_us: bool) -> None:
    found, error = judge(None, exit, stopped_by_us=stopped_by_us)
    assert found is kind
    assert error


@pytest.mark.parametrize(
    ("exit", "stopped_by_us", "kind"),
    [
        (code(0), False, None),
        (code(0), True, None),
        (None, False, None),
        (None, True, None),
        (code(1), True, None),
        (code(143), True, None),
        (death("SIGKILL"), True, None),
        (code(1), False, F.AGENT_ERROR),
        (code(143), False, F.KILLED),
        (death("SIGKILL"), False, F.KILLED),
    ],
)
def test_with_a_good_result(exit: ExitStatus | None, stopped_by_us: bool, kind: FailureKind | None) -> None:
    found, error = judge(GOOD, exit, stopped_by_us=stopped_by_us)
    assert found is kind
    assert (error is None) == (kind is None)


CONNECTION = "API Error: Connection dropped (ECONNRESET). Check the gateway."


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        # the status decides, whatever else is said
        ({"api_status": 401}, F.AUTH),
        ({"api_status": 403}, F.AUTH),
        ({"api_status": 429}, F.QUOTA),
        ({"api_status": 529}, F.OVERLOADED),
        ({"api_status": 500}, F.OVERLOADED),
        ({"api_status": 502}, F.OVERLOADED),
        ({"api_status": 599}, F.OVERLOADED),
        ({"api_status": 400}, F.REFUSED),
        ({"api_status": 402}, F.REFUSED),
        ({"api_status": 404}, F.REFUSED),
        ({"api_status": 413}, F.REFUSED),
        ({"api_status": 413, "terminal_reason": "image_error"}, F.REFUSED),
        ({"api_status": 429, "stop_reason": "refusal", "text": CONNECTION}, F.QUOTA),
        ({"api_status": 401, "api_error": "connection_failed"}, F.AUTH),
        ({"api_status": 200, "terminal_reason": "max_turns"}, F.MAX_TURNS),
        # then the reasons
        ({"terminal_reason": "budget_exhausted"}, F.BUDGET),
        ({"subtype": "error_max_budget_usd"}, F.BUDGET),
        ({"terminal_reason": "max_turns"}, F.MAX_TURNS),
        ({"subtype": "error_max_turns"}, F.MAX_TURNS),
        ({"stop_reason": "refusal", "terminal_reason": "api_error"}, F.REFUSED),
        ({"stop_reason": "refusal", "text": CONNECTION}, F.REFUSED),
        ({"subtype": "error_max_turns", "errors": (CONNECTION,)}, F.MAX_TURNS),
        ({"terminal_reason": "structured_output_retry_exhausted", "errors": (CONNECTION,)}, F.AGENT_ERROR),
        ({"subtype": "error_max_structured_output_retries", "errors": (CONNECTION,)}, F.AGENT_ERROR),
        ({"terminal_reason": "aborted_tools", "errors": ("Not logged in",)}, F.AGENT_ERROR),
        ({"terminal_reason": "aborted_streaming"}, F.AGENT_ERROR),
        ({"api_error": "connection_failed", "text": "Not logged in"}, F.NETWORK),
        # then a status in the text
        ({"text": "API Error: 529 Overloaded"}, F.OVERLOADED),
        ({"text": "Failed to authenticate. API Error: 401 no"}, F.AUTH),
        ({"errors": ("API Error: 400 bad Connection header",)}, F.REFUSED),
        # then the words
        ({"text": CONNECTION}, F.NETWORK),
        ({"text": "connect ECONNREFUSED 127.0.0.1:9"}, F.NETWORK),
        ({"text": "getaddrinfo ENOTFOUND api.anthropic.com"}, F.NETWORK),
        ({"text": "getaddrinfo EAI_AGAIN api.anthropic.com"}, F.NETWORK),
        ({"text": "read ETIMEDOUT"}, F.NETWORK),
        ({"text": "API Error: Connection error."}, F.NETWORK),
        ({"text": "Request timed out. If the API is slow, set API_TIMEOUT_MS above 3000."}, F.NETWORK),
        ({"text": "TypeError: fetch failed"}, F.NETWORK),
        ({"errors": ("x", "socket hang up")}, F.NETWORK),
        ({"text": "Not logged in · Please run /login"}, F.AUTH),
        ({"text": "Invalid API key · Fix external API key"}, F.AUTH),
        ({"text": "Failed to authenticate."}, F.AUTH),
        ({"text": "API Error: Opus 5.5's safeguards flagged this message"}, F.REFUSED),
        ({"text": "Claude AI usage limit reached|1763712000"}, F.QUOTA),
        ({"text": "API Error: Rate limit reached"}, F.QUOTA),
        ({"text": "5-hour limit reached ∙ resets 3pm"}, F.QUOTA),
        ({"text": "You've hit your limit · resets 3pm"}, F.QUOTA),
        # and what nothing matches
        ({"subtype": "error_during_execution", "errors": ("No conversation found",)}, F.AGENT_ERROR),
        ({"terminal_reason": "api_error"}, F.AGENT_ERROR),
        ({"text": "the connections pool is a fine thing"}, F.AGENT_ERROR),
        ({}, F.AGENT_ERROR),
    ],
)
@pytest.mark.parametrize("exit", [code(0), code(1), death("SIGTERM"), None])
def test_with_an_error(fields: dict[str, Any], kind: FailureKind, exit: ExitStatus | None) -> None:
    found, error = judge(AgentResult(**({"subtype": "success"} | fields), is_error=True), exit, stopped_by_us=True)
    assert found is kind
    assert error


@pytest.mark.parametrize("result", [None, GOOD, AgentResult(is_error=True, api_status=429)])
@pytest.mark.parametrize("exit", [None, code(0), death("SIGTERM")])
def test_a_line_too_long_is_bad_output_whatever_else_happened(
    result: AgentResult | None, exit: ExitStatus | None
) -> None:
    kind, error = judge(result, exit, bad_line=TOO_LONG, stopped_by_us=True)
    assert kind is F.BAD_OUTPUT
    assert error == "the agent printed a line longer than 100 bytes; raise agent.max_line to allow it"


def test_any_other_bad_line_does_not_matter() -> None:
    assert judge(GOOD, code(0), bad_line=BadLine(reason="not JSON", size=3)) == (None, None)


@pytest.mark.parametrize(
    ("exit", "stderr", "error"),
    [
        (code(1), "", "claude ended with exit code 1 and no result"),
        (code(1), "one\n  two \n \n", "claude ended with exit code 1 and no result: two"),
        (code(1), "x" * 301, "claude ended with exit code 1 and no result: " + "x" * 299 + "…"),
        (code(0), "two", "claude ended with exit code 0 and no result"),
        (code(143), "two", "claude ended with exit code 143 (SIGTERM) and no result"),
        (death("SIGKILL"), "two", "claude ended with signal SIGKILL and no result"),
        (None, "two", "claude ended without a result, and how it ended is not known"),
    ],
)
def test_the_error_without_a_result(exit: ExitStatus | None, stderr: str, error: str) -> None:
    assert judge(None, exit, stderr_tail=stderr, program="claude")[1] == error


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": "first\nsecond"}, "first"),
        ({"text": "\n \n first "}, "first"),
        ({"text": "text", "errors": ("", "error\nmore")}, "error"),
        ({"text": "y" * 301}, "y" * 299 + "…"),
        ({"terminal_reason": "model_error"}, "model_error"),
        ({"subtype": "error_during_execution"}, "error_during_execution"),
        ({}, "it does not say which"),
    ],
)
def test_the_error_of_a_result(fields: dict[str, Any], said: str) -> None:
    error = judge(AgentResult(**fields, is_error=True), code(1))[1]
    assert error == f"the agent reported an error: {said}"


def test_the_error_of_a_contradicted_success() -> None:
    assert judge(GOOD, code(7))[1] == "the agent reported success, but ended with exit code 7"
    assert judge(GOOD, code(137))[1] == "the agent reported success, but ended with exit code 137 (SIGKILL)"
