"""What a run of an agent came to, from its last result line and its exit. No Trio, no I/O.

Neither alone is to be believed. The CLI reports API failures as `subtype: success` with `is_error: true`, and
can end with exit code 0 without having said anything. So `is_error` decides; of an error, the first rule that
matches gives the kind: the API's status, then the fields in `_FIELDS`, then the words in `_WORDS`. A success
stands only where the exit does not contradict it.
"""

from __future__ import annotations

import re
import signal

from supervise.events import AgentResult, BadLine
from supervise.model import ExitStatus, FailureKind

__all__ = ["judge"]

Verdict = tuple[FailureKind | None, str | None]

_CLIP = 300  # characters of somebody else's text in an error

#: Lowest status, highest status, kind.
_STATUS: tuple[tuple[int, int, FailureKind], ...] = (
    (401, 401, FailureKind.AUTH),
    (403, 403, FailureKind.AUTH),
    (429, 429, FailureKind.QUOTA),
    (400, 499, FailureKind.REFUSED),
    (500, 599, FailureKind.OVERLOADED),
)

#: Field of the result, its value, kind. What was given up by rule or broken off is no API failure, whatever
#: words its text contains.
_FIELDS: tuple[tuple[str, str, FailureKind], ...] = (
    ("terminal_reason", "budget_exhausted", FailureKind.BUDGET),
    ("terminal_reason", "max_turns", FailureKind.MAX_TURNS),
    ("terminal_reason", "structured_output_retry_exhausted", FailureKind.AGENT_ERROR),
    ("terminal_reason", "aborted_tools", FailureKind.AGENT_ERROR),
    ("terminal_reason", "aborted_streaming", FailureKind.AGENT_ERROR),
    ("subtype", "error_max_budget_usd", FailureKind.BUDGET),
    ("subtype", "error_max_turns", FailureKind.MAX_TURNS),
    ("subtype", "error_max_structured_output_retries", FailureKind.AGENT_ERROR),
    ("stop_reason", "refusal", FailureKind.REFUSED),
    ("api_error", "connection_failed", FailureKind.NETWORK),
)

#: Words in the text of the error, kind.
_WORDS: tuple[tuple[re.Pattern[str], FailureKind], ...] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (
            r"ECONN(?:RESET|REFUSED|ABORTED)|ENOTFOUND|EAI_AGAIN|ETIMEDOUT|EHOSTUNREACH|ENETUNREACH"
            r"|\bConnection\b|[Tt]imed out|fetch failed|socket hang up",
            FailureKind.NETWORK,
        ),
        (r"Not logged in|Invalid API key|\bauthenticate\b", FailureKind.AUTH),
        (r"safeguards flagged|violate our Usage Policy", FailureKind.REFUSED),
        (r"(?i:(?:usage|rate|session|weekly|hour) limit|hit your limit)", FailureKind.QUOTA),
    )
)

_STATUS_IN_TEXT = re.compile(r"API Error: (\d{3})\b")

#: Signals by which a shell or a runtime says that a program died: exit code 128 and the signal's number. The CLI
#: itself answers SIGTERM so.
_FATAL: dict[int, str] = {
    128 + number: number.name
    for number in (
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGKILL,
        signal.SIGSEGV,
        signal.SIGTERM,
    )
}


def judge(
    result: AgentResult | None,
    exit: ExitStatus | None,
    *,
    bad_line: BadLine | None = None,
    stopped_by_us: bool = False,
    stderr_tail: str = "",
    program: str = "the agent",
) -> Verdict:
    """The kind of failure and one line about it; `(None, None)` for a completed run.

    Args:
        result: the last result line, if there was one.
        exit: how the process ended; `None` where that is not known, or there is no process.
        bad_line: a line that could not be read; it matters only if it was too long.
        stopped_by_us: the process was ended by its supervisor, so a success needs no good exit.
        stderr_tail: the end of its standard error; its last line explains an exit without a result.
        program: what the error calls it.
    """
    if bad_line is not None and bad_line.too_long:
        return FailureKind.BAD_OUTPUT, f"{program} printed a line {bad_line.reason}; raise agent.max_line to allow it"
    if result is None:
        return _without_result(exit, stderr_tail, program)
    if result.is_error:
        return _kind(result), f"{program} reported an error: {_said(result)}"
    if exit is None or exit.ok or stopped_by_us:
        return None, None
    kind = FailureKind.AGENT_ERROR if _death(exit) is None else FailureKind.KILLED
    return kind, f"{program} reported success, but ended with {_shown(exit)}"


def _without_result(exit: ExitStatus | None, stderr_tail: str, program: str) -> Verdict:
    if exit is None:
        return FailureKind.KILLED, f"{program} ended without a result, and how it ended is not known"
    error = f"{program} ended with {_shown(exit)} and no result"
    if exit.ok:
        return FailureKind.BAD_OUTPUT, error
    if _death(exit) is not None:
        return FailureKind.KILLED, error
    last = _last_line(stderr_tail)
    return FailureKind.AGENT_ERROR, f"{error}: {last}" if last else error


def _kind(result: AgentResult) -> FailureKind:
    if (kind := _status_kind(result.api_status)) is not None:
        return kind
    for name, value, kind in _FIELDS:
        if getattr(result, name) == value:
            return kind
    text = "\n".join((result.text, *result.errors))
    # Versions of the CLI that have no field for the status say it in the text.
    if (found := _STATUS_IN_TEXT.search(text)) and (kind := _status_kind(int(found[1]))) is not None:
        return kind
    for words, kind in _WORDS:
        if words.search(text):
            return kind
    return FailureKind.AGENT_ERROR


def _status_kind(status: int | None) -> FailureKind | None:
    if status is not None:
        for lowest, highest, kind in _STATUS:
            if lowest <= status <= highest:
                return kind
    return None


def _death(exit: ExitStatus) -> str | None:
    """The signal that ended the process, also where its exit code only tells of one."""
    return exit.signal if exit.code is None else _FATAL.get(exit.code)


def _shown(exit: ExitStatus) -> str:
    death = _death(exit)
    return f"{exit} ({death})" if exit.code is not None and death is not None else str(exit)


def _said(result: AgentResult) -> str:
    """The first line of what the result says of its error, or else what it calls it."""
    for text in (*result.errors, result.text):
        for line in text.splitlines():
            if line.strip():
                return _clipped(line)
    return result.terminal_reason or result.subtype or "it does not say which"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return _clipped(lines[-1]) if lines else ""


def _clipped(line: str) -> str:
    line = line.strip()
    return line if len(line) <= _CLIP else line[: _CLIP - 1] + "…"
