"""JSON in and out: times, places of errors, what does not leave, and what is hard to encode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from supervise import codec
from supervise.codec import (
    event_from_json,
    event_to_json,
    from_json,
    loads,
    register_agent,
    rfc3339,
    to_json,
    to_line,
)
from supervise.errors import BadInput
from supervise.events import AgentText, AgentToolUse, UnknownEvent
from supervise.model import IndexReport, JobResult, JobSpec, Outcome, StopPolicy, Usage
from supervise.secrets import Secret
from supervise.settings import HttpSettings, IndexSettings, RedisSettings, Settings

KEY = "pa-TopSecret-0123456789"


@frozen
class Doer:
    """An agent that can be written as JSON."""

    name: str = "doer"
    model: str | None = None

    async def run(self, run: Any) -> None:
        raise NotImplementedError


@pytest.fixture
def doer(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Doer]]:
    monkeypatch.setattr(codec, "_agents", {})
    register_agent(Doer, "doer")
    yield Doer
    codec._converter.cache_clear()


# --- times -------------------------------------------------------------------------------------------------


def test_times_are_rfc3339_in_utc() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00.000000Z"
    assert rfc3339(1_700_000_000.123456) == "2023-11-14T22:13:20.123456Z"


def test_an_event_carries_its_time() -> None:
    data = event_to_json(AgentText(text="hi", time=1_700_000_000.5, job_id="j", raw={"a": 1}))
    assert data == {
        "type": "agent_text",
        "time": "2023-11-14T22:13:20.500000Z",
        "job_id": "j",
        "text": "hi",
    }
    assert [*data][:2] == ["type", "time"]
    assert event_to_json(AgentText())["time"] is None


@pytest.mark.parametrize("time", ["2023-11-14T22:13:20.5Z", "2023-11-14T23:13:20.5+01:00"])
def test_a_time_may_come_from_any_zone(time: str) -> None:
    assert event_from_json({"type": "agent_text", "time": time}).time == 1_700_000_000.5


@pytest.mark.parametrize("time", ["yesterday", "2023-11-14T22:13:20", "2023-11-14", ""])
def test_a_time_without_a_zone_is_refused(time: str) -> None:
    with pytest.raises(BadInput, match="RFC 3339"):
        event_from_json({"type": "agent_text", "time": time})


# --- what comes in -----------------------------------------------------------------------------------------


def refusal(kind: type[Any], data: Any) -> str:
    with pytest.raises(BadInput) as caught:
        from_json(kind, data)
    assert caught.value.__context__ is None
    return str(caught.value)


def test_errors_name_their_places() -> None:
    message = refusal(
        JobResult,
        {
            "outcome": "done",
            "usage": {"input_tokens": "5"},
            "survivors": [{"pid": 1, "start_time": 0, "command": "a", "role": "agent", "reason": 5}],
            "index": {"stale": "false", "metrics": {"extra": 1}},
        },
    )
    assert message.startswith("this is no JobResult: ")
    assert "required field missing @ $.job_id" in message
    assert "one of these is wanted: completed, failed, timed_out, cancelled @ $.outcome" in message
    assert "a whole number is wanted @ $.usage.input_tokens" in message
    assert "a text is wanted @ $.survivors[0].reason" in message
    assert "true or false is wanted @ $.index.stale" in message
    assert "extra fields found (extra) @ $.index.metrics" in message


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"prompt": None}, "a text is wanted @ $.prompt"),
        ({"prompt": 5}, "a text is wanted @ $.prompt"),
        ({"timeout": "600"}, "a number is wanted @ $.timeout"),
        ({"timeout": True}, "a number is wanted @ $.timeout"),
        ({"timeout": 10**400}, "a number that a float can hold is wanted @ $.timeout"),
        ({"timeout": -1}, "JobSpec.timeout is -1.0, but must be a number of seconds above 0 @ $"),
        ({"env": {"A": 1}}, "a text is wanted @ $.env['A']"),
        ({"env": ["A"]}, "an object is wanted @ $.env"),
        ({"workspace": None}, "a path is wanted @ $.workspace"),
        ({"workspace": "/no/such/place"}, "'/no/such/place', which does not exist"),
        ({"index": {"command": "cidx"}}, "a list is wanted @ $.index.command"),
        ({"index": {"mode": "x"}}, "one of these is wanted: auto, cidx, none @ $.index.mode"),
        ({"index": {"flush_timeout": -1}}, "index.flush_timeout is -1.0, but must be a number of seconds, 0 or"),
        ({"agent": "claude"}, "an object is wanted @ $.agent"),
        ({"agent": {"kind": ["x"]}}, "the agent ['x'] is not known here"),
        ({"agent": {"kind": "nobody"}}, "the agent 'nobody' is not known here"),
        ({"promt": "x"}, "extra fields found (promt) @ $"),
    ],
)
def test_specs_are_taken_at_their_word(tmp_path: Path, fields: dict[str, Any], place: str) -> None:
    message = refusal(JobSpec, {"prompt": "do it", "workspace": str(tmp_path), **fields})
    assert place in message
    assert "\n" not in message


@pytest.mark.parametrize("data", [None, 5, "text", [], [1]])
def test_what_is_no_object_is_refused(data: Any) -> None:
    for kind in (JobResult, JobSpec, Usage, StopPolicy, IndexReport):
        assert refusal(kind, data).startswith(f"this is no {kind.__name__}: ")
    with pytest.raises(BadInput):
        event_from_json(data)


@pytest.mark.parametrize("name", [None, 5, ["agent_text"], "no_such", "event"])
def test_events_of_unknown_type_are_refused(name: Any) -> None:
    with pytest.raises(BadInput, match="no event has the type"):
        event_from_json({"type": name})
    with pytest.raises(BadInput, match="no event has the type None"):
        event_from_json({})


def test_the_data_of_an_event_is_left_alone() -> None:
    data = {"type": "agent_text", "time": None, "text": "a"}
    event_from_json(data)
    assert data == {"type": "agent_text", "time": None, "text": "a"}


# --- agents ------------------------------------------------------------------------------------------------


def test_a_registered_agent_goes_through_json(tmp_path: Path, doer: type[Doer]) -> None:
    spec = JobSpec(prompt="x", workspace=tmp_path, agent=doer(model="m"))
    data = to_json(spec)
    assert data["agent"] == {"kind": "doer", "name": "doer", "model": "m"}
    assert from_json(JobSpec, loads(to_line(data))) == spec


def test_a_tag_has_one_class(doer: type[Doer]) -> None:
    register_agent(doer, "doer")
    with pytest.raises(BadInput, match="'doer' is taken"):
        register_agent(Usage, "doer")


def test_an_agent_that_is_not_registered_stays_here(tmp_path: Path) -> None:
    @frozen
    class Stranger(Doer):
        pass

    with pytest.raises(BadInput, match="register_agent"):
        to_json(JobSpec(prompt="x", workspace=tmp_path, agent=Stranger()))


# --- secrets -----------------------------------------------------------------------------------------------


def test_secrets_do_not_leave(tmp_path: Path) -> None:
    settings = Settings(
        index=IndexSettings(voyage_api_key=Secret(KEY)),
        redis=RedisSettings(url=Secret(KEY)),
        http=HttpSettings(token=Secret(KEY)),
    )
    spec = JobSpec(prompt="x", workspace=tmp_path, index=settings.index)
    for value in (settings, spec, Secret(KEY), {"a": [Secret(KEY)]}):
        assert KEY.encode() not in to_line(to_json(value))
    assert to_json(spec)["index"]["voyage_api_key"] is None
    assert from_json(JobSpec, to_json(spec)).index == IndexSettings()


def test_secrets_that_come_in_wrong_are_not_told() -> None:
    assert KEY not in refusal(IndexSettings, {"voyage_api_key": [KEY]})
    assert KEY not in refusal(IndexSettings, {"voyage_api_key": KEY + "\0"})
    assert from_json(IndexSettings, {"voyage_api_key": KEY}).voyage_api_key == Secret(KEY)


# --- lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        {"lone": "\ud800 and \udcff", "\ud800": 1},
        {"huge": 2**63, "negative": -(2**63)},
        {"é": "☃🔑", "nested": [[], {}, None, True]},
        "line\nbreak",
        [],
    ],
)
def test_lines_come_back(data: Any) -> None:
    line = to_line(data)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert loads(line) == data


@pytest.mark.parametrize("number", [2**64 + 1, -(2**64), 2**200, 10**400])
def test_huge_integers_go_through(number: int) -> None:
    line = to_line({"n": number})
    assert json.loads(line) == {"n": number}  # written exactly
    assert loads(line)["n"] == pytest.approx(number) if number < 10**300 else loads(line)["n"] == number


@pytest.mark.parametrize(
    "data", [{"x": float("nan")}, {"x": float("inf"), "huge": 2**70}, ["NaN", float("nan"), "\ud800"]]
)
def test_what_is_not_finite_is_null(data: Any) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = to_line(data)
    assert b"null" in text
    assert json.loads(text, parse_constant=refuse)
    assert (b"NaN" in text) == (isinstance(data, list))


def test_what_json_does_not_know_is_written_as_text() -> None:
    assert loads(to_line({1: Path("/a"), "s": {1}})) == {"1": "/a", "s": "{1}"}


@pytest.mark.parametrize("depth", [200, 300, 900, 5000])
def test_deep_nesting_goes_through(depth: int) -> None:
    deep: Any = {}
    for _ in range(depth):
        deep = {"a": [deep]}
    for event in (UnknownEvent(raw=deep), AgentToolUse(input=deep), AgentText(raw=deep, text="x")):
        line = to_line(event_to_json(event))
        event_from_json(loads(line))
    if depth > 1000:
        assert "…" in json.dumps(loads(to_line(deep)), ensure_ascii=False)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"", "nul", b'{"a": "\xff"}'])
def test_what_is_no_json_is_a_value_error(text: bytes | str) -> None:
    with pytest.raises(ValueError):
        loads(text)


def test_what_is_nested_too_deep_is_a_recursion_error() -> None:
    with pytest.raises(RecursionError):
        loads(b"[" * 100_000)


def test_outcomes_are_plain_texts() -> None:
    data = to_json(JobResult(job_id="j", outcome=Outcome.FAILED))
    assert type(data["outcome"]) is str
    assert from_json(JobResult, data).outcome is Outcome.FAILED
