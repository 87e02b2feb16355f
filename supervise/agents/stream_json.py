"""The stream-json lines of the Claude CLI: bytes in, events out. No Trio, no I/O.

The CLI prints one JSON object a line and adds kinds and fields with every version. So the tables of readers
are short on purpose: a line of another kind passes through as an `UnknownEvent`, a field of an odd type counts as
missing, and the first event of a line carries the whole line in `raw`.

One rule is not visible in a single line. `usage` of a result counts its own turn, `modelUsage` counts the
whole process, as the cost does. So the sums over `modelUsage` count from the second result line on, and where
`usage` says nothing at all (the CLI reports zeros when its budget is spent).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, final

import orjson

from supervise.events import (
    AgentEvent,
    AgentInit,
    AgentPartial,
    AgentPermissionDenied,
    AgentResult,
    AgentRetry,
    AgentText,
    AgentThinking,
    AgentToolResult,
    AgentToolUse,
    BadLine,
    UnknownEvent,
)
from supervise.model import Usage

__all__ = ["MAX_LINE", "StreamJsonParser"]

MAX_LINE = 64 * 1024 * 1024

_BLOCKS = 1000  # of one line, that become events
_EXCERPT = 200  # bytes of a bad line that its event shows
_COUNT_LIMIT = 2**53  # above it JSON numbers are not exact, and no honest count gets there
_NUMBER_LIMIT = 1e12
_MS = 1000.0  # a second

Raw = dict[str, Any]


@final
class StreamJsonParser:
    """Turns the output of one agent process into events, however the bytes are cut.

    Memory is bounded by `max_line` (bytes of one line, its newline not counted): a longer line is reported
    as soon as it passes the limit, and the rest of it is skipped.
    """

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max_line = max_line
        self._held = bytearray()  # the line that has begun; a bytearray grows in place, so no copying twice
        self._skipping = False  # the line that has begun is too long, and was reported
        self._results = 0
        self._reset_at: float | None = None  # from a line before the result

    def feed(self, data: bytes) -> list[AgentEvent]:
        """The events of all lines that end within `data`. Never raises, whatever the bytes."""
        events: list[AgentEvent] = []
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            if self._held or self._skipping or end - start > self._max_line:
                self._hold(data, start, end, events)
                self._end_line(events)
            else:
                self._read(data[start:end], events)
            start = end + 1
        if start < len(data):
            self._hold(data, start, len(data), events)
        return events

    def close(self) -> list[AgentEvent]:
        """The events of a last line without a newline."""
        events: list[AgentEvent] = []
        self._end_line(events)
        return events

    def _hold(self, data: bytes, start: int, end: int, events: list[AgentEvent]) -> None:
        """Add `data[start:end]` to the line that has begun."""
        if self._skipping:
            return
        if len(self._held) + end - start <= self._max_line:
            self._held += memoryview(data)[start:end]
            return
        begin = bytes(self._held[:_EXCERPT]) + data[start : min(end, start + _EXCERPT)]
        # The size is where the limit was passed, so that it does not depend on how the bytes were cut.
        size = self._max_line + 1
        reason = f"longer than {self._max_line} bytes"
        events.append(BadLine(reason=reason, excerpt=_excerpt(begin[:size]), size=size, too_long=True))
        self._held = bytearray()
        self._skipping = True

    def _end_line(self, events: list[AgentEvent]) -> None:
        line, self._held = self._held, bytearray()
        self._skipping = False
        self._read(line, events)

    def _read(self, line: bytes | bytearray, events: list[AgentEvent]) -> None:
        try:
            raw = orjson.loads(line)
        except orjson.JSONDecodeError:
            if not line or line.isspace():
                return
            try:
                # orjson refuses lone surrogates, json does not. Decoded here: json would take UTF-16, too.
                raw = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                events.append(_bad(line, _why(error)))
                return
        if type(raw) is not dict:
            events.append(_bad(line, "not an object"))
            return
        kind = _text(raw, "type")
        if kind == "result":
            events.append(self._result(raw))
            return
        reader = _SYSTEM_READERS.get(_text(raw, "subtype")) if kind == "system" else _READERS.get(kind)
        if reader is not None and (found := reader(raw)):
            events += found
            return
        subtype = _text(raw, "subtype")
        if "rate_limit" in kind or "rate_limit" in subtype:
            self._reset_at = _reset_field(raw) or self._reset_at
        events.append(UnknownEvent(raw=raw, kind=kind, subtype=subtype))

    def _result(self, raw: Raw) -> AgentResult:
        self._results += 1
        subtype = _text(raw, "subtype")
        is_error = raw.get("is_error")
        if type(is_error) is not bool:
            is_error = subtype != "success"  # success is to be said, not to be assumed
        text = _text(raw, "result")
        errors = tuple([error for error in _list(raw, "errors") if type(error) is str])
        reset_at = None
        if is_error:  # the text of a success is the agent's own, whatever it quotes
            reset_at = _reset_field(raw) or _reset_text(text, *errors) or self._reset_at
        return AgentResult(
            raw=raw,
            is_error=is_error,
            subtype=subtype,
            text=text,
            errors=errors,
            session_id=_text_or_none(raw, "session_id"),
            usage=_usage(raw, several=self._results > 1),
            cost_usd=_number(raw, "total_cost_usd"),
            num_turns=_count(raw, "num_turns"),
            duration=_number(raw, "duration_ms", _MS),
            api_duration=_number(raw, "duration_api_ms", _MS),
            stop_reason=_text_or_none(raw, "stop_reason"),
            terminal_reason=_text_or_none(raw, "terminal_reason"),
            api_status=_count(raw, "api_error_status"),
            api_error=_text_or_none(raw, "api_error"),
            permission_denials=len(_list(raw, "permission_denials")),
            reset_at=reset_at,
        )


# --- lines -------------------------------------------------------------------------------------------------


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not JSON: {error}"


def _bad(line: bytes | bytearray, reason: str) -> BadLine:
    return BadLine(reason=reason, excerpt=_excerpt(line), size=len(line))


def _excerpt(line: bytes | bytearray) -> str:
    return line[:_EXCERPT].decode(errors="replace").rstrip("\r")


# --- readers: the events of one line; none where nothing in it was understood --------------------------------


def _init(raw: Raw) -> list[AgentEvent]:
    return [
        AgentInit(
            raw=raw,
            session_id=_text_or_none(raw, "session_id"),
            model=_text_or_none(raw, "model"),
            cwd=_text_or_none(raw, "cwd"),
            permission_mode=_text_or_none(raw, "permissionMode"),
            version=_text_or_none(raw, "claude_code_version"),
        )
    ]


def _retry(raw: Raw) -> list[AgentEvent]:
    return [
        AgentRetry(
            raw=raw,
            attempt=_count(raw, "attempt"),
            max_retries=_count(raw, "max_retries"),
            delay=_number(raw, "retry_delay_ms", _MS),
            status=_count(raw, "error_status"),
            error=_text_or_none(raw, "error"),
        )
    ]


def _permission_denied(raw: Raw) -> list[AgentEvent]:
    return [
        AgentPermissionDenied(
            raw=raw,
            tool=_text(raw, "tool_name"),
            id=_text(raw, "tool_use_id"),
            message=_text(raw, "message"),
        )
    ]


def _assistant(raw: Raw) -> list[AgentEvent]:
    events: list[AgentEvent] = []
    blocks = _list(_table(raw, "message"), "content")
    for block in blocks[:_BLOCKS]:
        kind = _text(block, "type") if type(block) is dict else ""
        line = None if events else raw
        if kind == "text":
            events.append(AgentText(raw=line, text=_text(block, "text")))
        elif kind == "thinking":
            events.append(AgentThinking(raw=line, text=_text(block, "thinking")))
        elif kind == "tool_use":
            name = _text(block, "name")
            events.append(AgentToolUse(raw=line, id=_text(block, "id"), name=name, input=block.get("input")))
    return _with_rest(events, blocks, "assistant")


def _user(raw: Raw) -> list[AgentEvent]:
    events: list[AgentEvent] = []
    blocks = _list(_table(raw, "message"), "content")
    for block in blocks[:_BLOCKS]:
        if type(block) is dict and block.get("type") == "tool_result":
            events.append(
                AgentToolResult(
                    raw=None if events else raw,
                    id=_text(block, "tool_use_id"),
                    text=_joined(block.get("content")),
                    is_error=block.get("is_error") is True,
                )
            )
    return _with_rest(events, blocks, "user")


def _with_rest(events: list[AgentEvent], blocks: list[Any], kind: str) -> list[AgentEvent]:
    """A line of very many blocks would hold up whoever reads the events: the rest of it becomes one event."""
    if events and len(blocks) > _BLOCKS:
        events.append(UnknownEvent(kind=kind, subtype=f"{len(blocks) - _BLOCKS} further blocks"))
    return events


def _partial(raw: Raw) -> list[AgentEvent]:
    delta = _table(_table(raw, "event"), "delta")
    return [AgentPartial(raw=raw, text=_text(delta, "text") if delta.get("type") == "text_delta" else "")]


_Reader = Callable[[Raw], list[AgentEvent]]

_READERS: dict[str, _Reader] = {
    "assistant": _assistant,
    "user": _user,
    "stream_event": _partial,
}
_SYSTEM_READERS: dict[str, _Reader] = {
    "init": _init,
    "api_retry": _retry,
    "permission_denied": _permission_denied,
}


# --- fields: one of an odd type counts as missing ------------------------------------------------------------
# Parsed JSON holds exact types only, so `type(value) is int` is the short and fast way to leave bool out.


def _text(table: Raw, key: str) -> str:
    value = table.get(key)
    return value if type(value) is str else ""


def _text_or_none(table: Raw, key: str) -> str | None:
    value = table.get(key)
    return value if type(value) is str else None


def _table(table: Raw, key: str) -> Raw:
    value = table.get(key)
    return value if type(value) is dict else {}


def _list(table: Raw, key: str) -> list[Any]:
    value = table.get(key)
    return value if type(value) is list else []


def _count(table: Raw, key: str) -> int | None:
    value = table.get(key)
    return value if type(value) is int and 0 <= value < _COUNT_LIMIT else None


def _number(table: Raw, key: str, unit: float = 1.0) -> float | None:
    value = table.get(key)
    # The comparison comes before the arithmetic: NaN fails it, and a huge integer never becomes a float.
    if (type(value) is float or type(value) is int) and 0 <= value < _NUMBER_LIMIT:
        return value / unit
    return None


def _joined(content: object) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return "\n".join(_text(block, "text") for block in blocks if type(block) is dict and "text" in block)


def _usage(raw: Raw, *, several: bool) -> Usage:
    models = [model for model in _table(raw, "modelUsage").values() if type(model) is dict]
    if not models or not several:
        turn = _tokens(_table(raw, "usage"), _TURN_COUNTS)
        if any(turn) or not models:
            return Usage(*turn)
    if len(models) == 1:
        return Usage(*_tokens(models[0], _MODEL_COUNTS))
    return Usage(*map(sum, zip(*(_tokens(model, _MODEL_COUNTS) for model in models), strict=True)))


def _tokens(table: Raw, names: tuple[str, ...]) -> list[int]:
    return [n if type(n) is int and 0 <= n < _COUNT_LIMIT else 0 for n in map(table.get, names)]


# In the order of the fields of `Usage`.
_TURN_COUNTS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
_MODEL_COUNTS = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")


# --- when a quota resets: only where it is clearly said ------------------------------------------------------

_RESET_FIELDS = ("resetsAt", "resetAt", "resets_at", "reset_at")
_RESET_TEXTS = (  # each begins with a literal, which is what makes a search fast
    re.compile(r"limit reached\|(\d{13}|\d{10})\b", re.ASCII),
    re.compile(r"resets? at:? (\d{13}|\d{10}|\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:\d\d))\b", re.ASCII),
)


def _reset_field(raw: Raw) -> float | None:
    """The reset time in a field of the line, or of its table about the limit."""
    for table in (raw, _table(raw, "rate_limit_info")):
        # A window that still lets requests pass says when it ends, too; that is no reset to wait for.
        if not _text(table, "status").startswith("allowed"):
            for name in _RESET_FIELDS:
                if name in table and (at := _epoch(table[name])) is not None:
                    return at
    return None


def _reset_text(*texts: str) -> float | None:
    for text in texts:
        for pattern in _RESET_TEXTS:
            if found := pattern.search(text):
                return _epoch(int(found[1]) if found[1].isdecimal() else found[1])
    return None


def _epoch(value: object) -> float | None:
    """Seconds since the epoch from seconds, milliseconds or ISO 8601 with a zone; `None` if that is unclear."""
    if type(value) is str:
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            return None
        value = None if at.tzinfo is None else at.timestamp()
    if type(value) is int or type(value) is float:
        # Years 2001 to 2286 in either unit, so that the number itself tells its unit.
        if 1e9 <= value < 1e10:
            return float(value)
        if 1e12 <= value < 1e13:
            return value / 1000
    return None
