"""The parser on arbitrary input: cuts, broken lines, odd fields, long lines; then what no record shows."""

from __future__ import annotations

import gc
import itertools
import json
import math
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervise.agents.stream_json import StreamJsonParser
from supervise.events import (
    AgentEvent,
    AgentPartial,
    AgentResult,
    AgentText,
    AgentThinking,
    AgentToolResult,
    AgentToolUse,
    BadLine,
    UnknownEvent,
)
from supervise.model import Usage

MIB = 1024 * 1024

RECORDED = [
    json.dumps(line, ensure_ascii=False).encode()
    for run in (Path(__file__).parents[1] / "data/claude_runs.jsonl").read_bytes().splitlines()
    for line in json.loads(run)["lines"]
    if len(str(line)) < 1000
]


def parse(chunks: Iterable[bytes], **options: Any) -> list[AgentEvent]:
    parser = StreamJsonParser(**options)
    return [event for chunk in chunks for event in parser.feed(chunk)] + parser.close()


def seen(events: Iterable[AgentEvent]) -> list[tuple[str, str]]:
    """All of each event, `raw` too, in a form in which NaN equals itself."""
    return [(event.type, repr(attrs.astuple(event, recurse=False))) for event in events]


# --- any input ---------------------------------------------------------------------------------------------

LIMIT = 300  # below some lines and above others

line_ends = st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n"])
some_lines = st.one_of(
    st.sampled_from(RECORDED),
    st.binary(max_size=20),
    st.text(max_size=20).map(str.encode),
    st.integers(LIMIT - 2, LIMIT + 2).map(lambda size: b"x" * size),
    st.integers(LIMIT - 2, LIMIT + 2).map(lambda size: b'{"a":"' + b"x" * (size - 8) + b'"}'),
    st.sampled_from([b"", b"  ", b"\r", b"[1]", b"null", b'{"type":"result"', "é".encode()[:1], b"\xef\xbb\xbf{}"]),
)
streams = st.builds(
    lambda lines, last: b"".join(itertools.chain.from_iterable(lines)) + last,
    st.lists(st.tuples(some_lines, line_ends), max_size=8),
    some_lines,
)


@given(data=st.data(), stream=streams)
def test_any_cut_gives_the_same_events(data: st.DataObject, stream: bytes) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    chunks = [stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])]
    whole = seen(parse([stream], max_line=LIMIT))
    assert seen(parse(chunks, max_line=LIMIT)) == whole
    assert seen(parse((stream[i : i + 1] for i in range(len(stream))), max_line=LIMIT)) == whole


@given(stream=streams)
def test_each_line_that_is_not_blank_gives_its_events_whatever_surrounds_it(stream: bytes) -> None:
    alone = [event for line in stream.split(b"\n") for event in parse([line], max_line=LIMIT)]
    kinds = [event.type for event in parse([stream], max_line=LIMIT)]
    assert kinds == [event.type for event in alone]
    for line in stream.split(b"\n"):
        assert bool(parse([line], max_line=LIMIT)) == (len(line) > LIMIT or bool(line.strip()))


@given(st.lists(st.binary(max_size=200), max_size=10), st.integers(0, 100))
def test_arbitrary_bytes_never_raise(chunks: list[bytes], max_line: int) -> None:
    for event in parse(chunks, max_line=max_line):
        assert_typed(event)


# --- any fields of known lines -------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**9, 10**13),
    st.integers(min_value=2**53),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["text", "thinking", "tool_use", "tool_result", "text_delta", "refusal", "success", "allowed"]),
    st.sampled_from(["limit reached|1763712000", "resets at 2026-11-21T05:00:00Z", "0001-01-01T00:00:00+23:59"]),
)
NAMES = """
type subtype message content text thinking id name input tool_use_id is_error event delta result errors session_id
usage modelUsage input_tokens output_tokens inputTokens outputTokens cacheReadInputTokens total_cost_usd num_turns
duration_ms duration_api_ms permission_denials api_error_status api_error stop_reason terminal_reason attempt
max_retries retry_delay_ms error_status error tool_name model cwd permissionMode claude_code_version
rate_limit_info resetsAt reset_at status
"""
names = st.sampled_from(NAMES.split())
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5), max_leaves=12
)
blocks = st.lists(st.dictionaries(names, values, max_size=4) | values, max_size=4)
known_types = st.sampled_from(["system", "assistant", "user", "result", "stream_event", "rate_limit_event"])
known_subtypes = st.sampled_from(["init", "api_retry", "permission_denied", "success", "error_max_turns"])
known_lines = st.builds(
    lambda kind, subtype, content, rest: {"message": {"content": content}} | rest | {"type": kind, "subtype": subtype},
    known_types | scalars,
    known_subtypes | scalars,
    blocks,
    st.dictionaries(names, values, max_size=12),
)


@settings(max_examples=50)  # each holds many fields
@given(st.lists(known_lines, max_size=4))
def test_known_lines_with_any_fields_never_raise_and_lose_no_line(lines: list[dict[str, Any]]) -> None:
    parser = StreamJsonParser()
    for line in lines:
        text = json.dumps(line)  # lone surrogates, NaN and huge numbers included
        events = parser.feed(text.encode() + b"\n")
        assert events
        for event in events:
            assert_typed(event)
            assert isinstance(event.raw, dict)
            assert list(event.raw) == list(line)


def assert_typed(event: AgentEvent) -> None:
    """Each field holds what it is declared to hold, and each number is one that can be counted with."""
    hints = get_type_hints(type(event))
    for attribute in attrs.fields(type(event)):
        value = getattr(event, attribute.name)
        assert matches(value, hints[attribute.name]), (attribute.name, value)
        if attribute.name not in ("raw", "input") and isinstance(value, int | float):
            assert math.isfinite(value)
            assert value >= 0


def matches(value: object, hint: Any) -> bool:
    if hint is Any:
        return True
    if get_origin(hint) is UnionType or hint.__class__.__name__ == "_UnionGenericAlias":
        return any(matches(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if get_origin(hint) is Mapping:
        return isinstance(value, dict)
    if hint is Usage:
        return isinstance(value, Usage) and all(type(n) is int and n >= 0 for n in attrs.astuple(value))
    return type(value) is hint or (hint is float and type(value) is int)


# --- broken lines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"Hello from the stub.", "not JSON"),
        (b'{"type":"result"', "not JSON"),
        (b'{"type":"result"}}', "not JSON"),
        (b"{'type': 1}", "not JSON"),
        (b'{"n":' + b"1" * 5000 + b"}", ""),  # Python refuses such integers, orjson may not
        (b"\0", "not JSON"),
        (b'{"type":"\xff"}', "not UTF-8"),
        (b'{"type":"\xed\xa0\x80"}', "not UTF-8"),  # a surrogate as bytes
        ('{"type":"user"}'.encode("utf-16-le"), "not JSON"),
        ('{"type":"user"}'.encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"[]", "not an object"),
        (b'"text"', "not an object"),
        (b"17", "not an object"),
        (b"null", "not an object"),
    ],
)
def test_a_broken_line_is_one_bad_line(line: bytes, reason: str) -> None:
    good = b'{"type":"assistant","message":{"content":[{"type":"text","text":"hi"}]}}\n'
    before, *broken, after = parse([good + line + b"\n" + good])
    assert (before, after) == (AgentText(text="hi"), AgentText(text="hi"))
    if reason:
        (bad,) = broken
        assert isinstance(bad, BadLine)
        assert bad.reason.startswith(reason)
        assert (bad.size, bad.too_long) == (len(line), False)
        assert bad.excerpt == line[:200].decode(errors="replace")
        assert bad.raw is None


def test_a_lone_surrogate_is_no_broken_line() -> None:
    (event,) = parse([b'{"type":"assistant","message":{"content":[{"type":"text","text":"\\ud800"}]}}'])
    assert event == AgentText(text="\ud800")


@pytest.mark.parametrize("line", [b"", b"\n", b"\r\n", b" \t\r\n", b"\n\n\n"])
def test_blank_lines_are_nothing(line: bytes) -> None:
    assert parse([line]) == []


def test_lines_may_end_in_crlf() -> None:
    assert [event.type for event in parse([b'{"type":"a"}\r\n{"type":"b"}\r\nno\r\n'])] == [
        "agent_unknown",
        "agent_unknown",
        "agent_bad_line",
    ]


# --- long lines --------------------------------------------------------------------------------------------


def test_a_line_too_long_is_told_at_once_and_skipped_to_its_end() -> None:
    parser = StreamJsonParser(max_line=10)
    assert parser.feed(b"x" * 10) == []
    assert parser.feed(b"x") == [BadLine(reason="longer than 10 bytes", excerpt="x" * 11, size=11, too_long=True)]
    assert parser.feed(b"x" * 1000) == []
    assert parser.feed(b'xx\n{"a":1}\n') == [UnknownEvent()]
    assert parser.feed(b"y" * 11) != []
    assert parser.close() == []
    assert parser.feed(b"{}\n") == [UnknownEvent()]


def test_a_line_as_long_as_allowed_is_read() -> None:
    line = b'{"a":"' + b"x" * 92 + b'"}'
    assert len(line) == 100
    assert parse([line], max_line=100) == [UnknownEvent()]
    assert [event.type for event in parse([line + b"\n" + line], max_line=99)] == ["agent_bad_line"] * 2


def memory(work: Callable[[], None]) -> tuple[int, int]:
    """By how much `work` raised the traced memory: at its peak, and for good."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        work()
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - before, after - before


@pytest.mark.parametrize("chunk", [1000, 64 * 1024, 21 * MIB])
def test_a_line_too_long_takes_no_more_memory_than_a_line_allowed(chunk: int) -> None:
    data = b'{"a":"' + b"x" * (20 * MIB) + b'"}\n'
    chunks = [data[at : at + chunk] for at in range(0, len(data), chunk)]
    parser = StreamJsonParser(max_line=MIB)
    found: list[AgentEvent] = []

    def work() -> None:
        for piece in chunks:
            found.extend(parser.feed(piece))

    peak, after = memory(work)
    assert [(event.type, getattr(event, "size", 0)) for event in found] == [("agent_bad_line", MIB + 1)]
    assert peak < MIB * 5 // 4 + 64 * 1024
    assert after < 64 * 1024


def test_many_small_pieces_of_one_line_take_no_more_memory_than_it() -> None:
    parser = StreamJsonParser()
    size = MIB // 4

    def work() -> None:
        for _ in range(size // 2):
            parser.feed(b"xy")

    peak, _ = memory(work)
    assert peak < size * 5 // 4 + 64 * 1024


def test_a_long_line_below_the_limit_is_one_event_and_leaves_nothing_behind() -> None:
    size = 32 * MIB
    line = b'{"type":"result","is_error":false,"result":"' + b"x" * size + b'"}\n'
    parser = StreamJsonParser()
    # Only what stays is checked: orjson reserves a dozen times the line, and touches little of it.
    kept: list[AgentEvent] = []

    def work() -> None:
        kept[:] = (event for at in range(0, len(line), 64 * 1024) for event in parser.feed(line[at : at + 64 * 1024]))

    _, after = memory(work)
    (event,) = kept
    assert isinstance(event, AgentResult)
    assert len(event.text) == size
    assert after < size + MIB
    del event
    kept.clear()

    def once_more() -> None:
        work()
        kept.clear()

    _, after = memory(once_more)
    assert after < 64 * 1024


def test_memory_does_not_grow_with_the_number_of_lines() -> None:
    stream = b"\n".join(RECORDED) + b"\n" + b"x" * 2000 + b"\n"
    parser = StreamJsonParser(max_line=1500)
    parser.feed(stream)

    def work() -> None:
        for _ in range(40):
            parser.feed(stream)

    _, after = memory(work)
    assert after < 16 * 1024


# --- what no record shows ----------------------------------------------------------------------------------


def one(line: Mapping[str, Any]) -> AgentEvent:
    (event,) = parse([json.dumps(line).encode()])
    return event


def result(**fields: Any) -> AgentResult:
    event = one({"type": "result", "subtype": "success", "is_error": False} | fields)
    assert isinstance(event, AgentResult)
    return event


def test_blocks_of_one_message_are_events_of_their_own() -> None:
    content = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "a"},
        {"type": "image"},
        "odd",
        {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}},
        {"type": "text", "text": 5},
    ]
    line = {"type": "assistant", "message": {"content": content}}
    events = parse([json.dumps(line).encode()])
    assert events == [
        AgentThinking(text="hm"),
        AgentText(text="a"),
        AgentToolUse(id="t1", name="Bash", input={"command": "ls"}),
        AgentText(text=""),
    ]
    assert [event.raw for event in events] == [line, None, None, None]  # once is enough


def test_a_line_of_very_many_blocks_does_not_become_as_many_events() -> None:
    blocks = [{"type": "text", "text": "x"}] * 300_000
    for kind, block in (("assistant", blocks[0]), ("user", {"type": "tool_result", "content": "x"})):
        line = {"type": kind, "message": {"content": [block] * len(blocks)}}
        events = parse([json.dumps(line).encode()])
        assert len(events) == 1001
        assert events[-1] == UnknownEvent(kind=kind, subtype="299000 further blocks")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("out", "out"),
        ([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}], "a\nb"),
        ([], ""),
        (None, ""),
        (7, ""),
    ],
)
def test_the_texts_of_a_tool_result_are_joined(content: object, text: str) -> None:
    blocks = [{"type": "tool_result", "tool_use_id": "t1", "content": content, "is_error": True}]
    assert one({"type": "user", "message": {"content": blocks}}) == AgentToolResult(id="t1", text=text, is_error=True)


@pytest.mark.parametrize("message", [None, [], {}, {"content": "text"}, {"content": []}, {"content": [{"type": "x"}]}])
@pytest.mark.parametrize("kind", ["assistant", "user"])
def test_a_message_with_nothing_known_in_it_is_unknown(kind: str, message: object) -> None:
    event = one({"type": kind, "message": message})
    assert event == UnknownEvent(kind=kind)
    assert event.raw == {"type": kind, "message": message}


def test_a_piece_of_anything_but_text_is_an_empty_piece() -> None:
    delta = {"type": "text_delta", "text": "a"}
    assert one({"type": "stream_event", "event": {"delta": delta}}) == AgentPartial(text="a")
    assert one({"type": "stream_event", "event": {"delta": delta | {"type": "thinking_delta"}}}) == AgentPartial()
    assert one({"type": "stream_event"}) == AgentPartial()


@pytest.mark.parametrize(
    ("subtype", "is_error", "expected"),
    [
        ("success", False, False),
        ("success", True, True),
        ("error_max_turns", False, False),
        ("success", None, False),
        ("success", "false", False),
        ("error_max_turns", None, True),
        (None, None, True),
    ],
)
def test_success_is_never_assumed(subtype: object, is_error: object, expected: bool) -> None:
    assert result(subtype=subtype, is_error=is_error).is_error is expected


MODELS = {
    "a": {"inputTokens": 1, "outputTokens": 2, "cacheReadInputTokens": 3, "cacheCreationInputTokens": 4},
    "b": {"inputTokens": 10, "outputTokens": 20, "cacheReadInputTokens": 30, "cacheCreationInputTokens": 40},
    "c": "odd",
}
TURN = {"input_tokens": 5, "output_tokens": 6, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 8}


@pytest.mark.parametrize(
    ("usage", "models", "first", "later"),
    [
        (TURN, MODELS, Usage(5, 6, 7, 8), Usage(11, 22, 33, 44)),
        (TURN, {}, Usage(5, 6, 7, 8), Usage(5, 6, 7, 8)),
        (TURN, {"c": "odd"}, Usage(5, 6, 7, 8), Usage(5, 6, 7, 8)),
        (dict.fromkeys(TURN, 0), MODELS, Usage(11, 22, 33, 44), Usage(11, 22, 33, 44)),
        (None, MODELS, Usage(11, 22, 33, 44), Usage(11, 22, 33, 44)),
        (None, None, Usage(), Usage()),
        ({"input_tokens": -1, "output_tokens": 2**60, "cache_read_input_tokens": True}, None, Usage(), Usage()),
    ],
)
def test_usage_of_a_turn_and_of_the_process(usage: object, models: object, first: Usage, later: Usage) -> None:
    line = json.dumps({"type": "result", "usage": usage, "modelUsage": models}).encode() + b"\n"
    found = [event.usage for event in parse([line * 3]) if isinstance(event, AgentResult)]
    assert found == [first, later, later]


@pytest.mark.parametrize("number", [-1, -0.5, 1e12, 1e300, math.inf, math.nan, 2**60, 10**30, True, "1", None, [1]])
def test_odd_numbers_are_no_numbers(number: object) -> None:
    odd = result(total_cost_usd=number, num_turns=number, duration_ms=number, api_error_status=number)
    assert (odd.cost_usd, odd.duration) == (None, None)
    assert odd.num_turns == odd.api_status
    assert odd.num_turns is None or (type(odd.num_turns) is int and 0 <= odd.num_turns < 2**53)


def test_a_cost_of_nothing_is_a_cost_and_a_missing_one_is_none() -> None:
    assert result(total_cost_usd=0).cost_usd == 0.0
    assert result().cost_usd is None


AT = 1763712000.0


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        ({"resetsAt": 1763712000}, AT),
        ({"resets_at": 1763712000.5}, AT + 0.5),
        ({"reset_at": 1763712000000}, AT),
        ({"resetAt": "2025-11-21T08:00:00Z"}, AT),
        ({"resetsAt": "2025-11-21T10:00:00+02:00"}, AT),
        ({"rate_limit_info": {"status": "rejected", "resetsAt": 1763712000}}, AT),
        ({"result": "Claude AI usage limit reached|1763712000"}, AT),
        ({"result": "Your limit resets at 1763712000."}, AT),
        ({"errors": ["x", "It will reset at 2025-11-21T08:00:00Z."]}, AT),
        # not clearly given
        ({"rate_limit_info": {"status": "allowed_warning", "resetsAt": 1763712000}}, None),
        ({"resetsAt": "2025-11-21T08:00:00"}, None),  # in which zone?
        ({"resetsAt": "3pm"}, None),
        ({"resetsAt": "0001-01-01T00:00:00+23:59"}, None),
        ({"resetsAt": 3600}, None),
        ({"resetsAt": -1763712000}, None),
        ({"resetsAt": 1e300}, None),
        ({"resetsAt": math.nan}, None),
        ({"resetsAt": 10**40}, None),
        ({"resetsAt": True}, None),
        ({"resetsAt": [1763712000]}, None),
        ({"result": "resets 3pm"}, None),
        ({"result": "limit reached|17637120001"}, None),
        ({"result": "resets at 2025-99-99T08:00:00Z"}, None),
        ({}, None),
    ],
)
def test_when_a_quota_resets(fields: dict[str, Any], at: float | None) -> None:
    assert result(is_error=True, **fields).reset_at == at
    assert result(is_error=False, **fields).reset_at is None


@pytest.mark.parametrize(
    ("line", "at"),
    [
        ({"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": 1763712000}}, AT),
        ({"type": "rate_limit_event", "resetsAt": 1763712000}, AT),
        ({"type": "system", "subtype": "rate_limit", "reset_at": "2025-11-21T08:00:00Z"}, AT),
        ({"type": "rate_limit_event", "rate_limit_info": {"status": "allowed", "resetsAt": 1763712000}}, None),
        ({"type": "something_else", "resetsAt": 1763712000}, None),
    ],
)
def test_an_earlier_line_may_say_when_a_quota_resets(line: dict[str, Any], at: float | None) -> None:
    failure = {"type": "result", "is_error": True, "api_error_status": 429}
    stream = b"\n".join(json.dumps(each).encode() for each in (line, {"type": "rate_limit_event"}, failure))
    *_, event = parse([stream])
    assert isinstance(event, AgentResult)
    assert event.reset_at == at
