"""What a task may say, and each way to say it wrongly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from supervise.dispatch.task import (
    MAX_BYTES,
    MAX_DEPTH,
    MOST_ATTEMPTS,
    STATE_KEY,
    Attempt,
    Unfinished,
    Waited,
    fields_of,
    parse,
    waited,
)
from supervise.errors import BadInput

ATTEMPT = {
    "attempt": 1,
    "job_id": "j",
    "started": "2026-01-01T00:00:00Z",
    "ended": "2026-01-01T00:00:01Z",
    "failure_kind": "network",
    "error": "e",
}


def data(**fields: Any) -> bytes:
    return json.dumps({"task_id": "a", "description": "d", **fields}).encode()


def test_two_fields_are_enough() -> None:
    task = parse(data())
    assert (task.task_id, task.description, task.priority, task.not_before) == ("a", "d", 0, 0.0)
    assert (task.worker, task.timeout, task.max_attempts, task.dependencies) == (None, None, None, ())


def test_unknown_fields_are_kept() -> None:
    assert parse(data(colour={"deep": [1]})).fields["colour"] == {"deep": [1]}


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse(b"\xef\xbb\xbf" + data()).task_id == "a"


@pytest.mark.parametrize("length", range(len(data(colour="\u00fc"))))
def test_a_file_that_is_being_written_is_unfinished_at_every_length(length: int) -> None:
    with pytest.raises(Unfinished):
        parse(data(colour="\u00fc")[:length])


@pytest.mark.parametrize("bad", [b"\xff\xfe{", '{"task_id": "ü'.encode()[:-1], data().decode().encode("utf-16"), b"\0"])
def test_what_is_no_json_may_yet_become_some(bad: bytes) -> None:
    with pytest.raises(Unfinished):
        parse(bad)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (b"[]", "a list"),
        (b'"text"', "a text"),
        (b"null", "null"),
        (b"true", "true or false"),
        (b"12", "a number"),
        (b'{"task_id": "a", "description": "d", "task_id": "b"}', "the key 'task_id' is there twice"),
        (b'{"task_id": "a", "description": "d", "x": {"y": 1, "y": 1}}', "the key 'y' is there twice"),
        (b'{"task_id": "a", "description": "d", "x": NaN}', "NaN is no number of JSON"),
        (b'{"task_id": "a", "description": "d", "x": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"task_id": "a", "description": "d", "x": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"task_id": "a", "description": "d", "x": ' + b"[" * 101 + b"]" * 101 + b"}", "nested more than 100"),
        (b'{"task_id": "a", "description": "d", "x": ' + b"[" * 99999 + b"]" * 99999 + b"}", "nested too deep"),
        (data(x="y" * MAX_BYTES), "larger than"),
    ],
)
def test_json_that_is_no_task_is_refused_for_good(bad: bytes, told: str) -> None:
    with pytest.raises(BadInput, match=told) as caught:
        parse(bad)
    assert not isinstance(caught.value, Unfinished)
    assert len(str(caught.value)) < 400


def test_the_limits_themselves_are_allowed() -> None:
    room = MAX_BYTES - len(data(x=""))
    assert len(data(x="y" * room)) == MAX_BYTES
    parse(data(x="y" * room))
    deep: Any = 1
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    parse(data(x=deep))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("task_id", value) for value in (None, "", 1, "../a", ".a", "a/b", "a b", "a\n", "ü", "a" * 129, ["a"])],
        *[("description", value) for value in (None, "", " \n", 1, [], "a\0b", "\ud800")],
        *[("worker", value) for value in ("", 1, "\ud800")],
        *[("timeout", value) for value in (0, -1, True, "5", [], 10**400)],
        *[("priority", value) for value in (1.0, True, "soon", "HIGH", 1001, -1001, 10**400, [])],
        *[("dependencies", value) for value in ("b", {"b": 1}, [1], ["../b"], ["b"] * 1001, 5)],
        *[("workspace", value) for value in ("", 1, "\0")],
        *[("script", value) for value in ("", 1, [])],
        *[("not_before", value) for value in ("soon", "2026-11-21T12:00:00", "12:00", "", True, [], 10**400)],
        *[("max_attempts", value) for value in (0, -1, 1.0, True, "3", MOST_ATTEMPTS + 1)],
    ],
)
def test_each_field_is_refused_by_name_and_rule(name: str, value: Any) -> None:
    with pytest.raises(BadInput, match=f"^{name} is .*, but must be ") as caught:
        parse(data(**{name: value}))
    assert len(str(caught.value)) < 400
    str(caught.value).encode()  # can be written anywhere


def test_a_number_past_every_float_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^timeout is inf"):
        parse(b'{"task_id": "a", "description": "d", "timeout": 1e999}')


@pytest.mark.parametrize(
    ("value", "is_"),
    [(None, 0), ("low", -10), ("normal", 0), ("high", 10), ("urgent", 100), (7, 7), (-1000, -1000), (1000, 1000)],
)
def test_a_priority_is_a_word_or_a_number(value: Any, is_: int) -> None:
    assert parse(data(priority=value)).priority == is_


@pytest.mark.parametrize(
    ("value", "is_"),
    [
        (None, 0.0),
        (12, 12.0),
        (1.5, 1.5),
        ("1970-01-01T00:01:00Z", 60.0),
        ("1970-01-01T01:01:00+01:00", 60.0),
        ("1970-01-01T00:00:00.500000+00:00", 0.5),
    ],
)
def test_a_moment_is_a_number_or_has_its_zone(value: Any, is_: float) -> None:
    assert parse(data(not_before=value)).not_before == is_


def test_a_task_does_not_wait_for_itself() -> None:
    with pytest.raises(BadInput, match="itself"):
        parse(data(dependencies=["b", "a"]))


def test_what_came_before_survives_the_wait() -> None:
    task = parse(data(colour="red"))
    attempts = (Attempt(attempt=1, job_id="j", started=1.5, ended=2.25, failure_kind="network", error="\u00fc"),)
    state = Waited(fields=dict(task.fields), attempts=attempts, at=12.5, pause=3.0, claim="t")
    assert waited(json.loads(json.dumps(state.to_fields()))) == state


def test_without_a_state_nothing_came_before() -> None:
    assert waited({"task_id": "a"}) == Waited(fields={"task_id": "a"})


@pytest.mark.parametrize(
    "state",
    [
        "3",
        "{}",
        '{"attempts": [3], "at": 0, "pause": 1, "claim": ""}',
        '{"attempts": 3, "at": 0, "pause": 1, "claim": ""}',
        '{"attempts": [], "at": "soon", "pause": 1, "claim": ""}',
        '{"attempts": [], "at": 1e999, "pause": 1, "claim": ""}',
        '{"attempts": [], "at": 1' + "0" * 400 + ', "pause": 1, "claim": ""}',
        json.dumps({"attempts": [ATTEMPT] * (MOST_ATTEMPTS + 1), "at": 0, "pause": 1, "claim": ""}),
        json.dumps(
            {"attempts": [{**ATTEMPT, "started": "0001-01-01T00:00:00+10:00"}], "at": 0, "pause": 1, "claim": ""}
        ),
        json.dumps({"attempts": [{**ATTEMPT, "ended": "0001-01-01T00:00:00"}], "at": 0, "pause": 1, "claim": ""}),
        json.dumps({"attempts": [{**ATTEMPT, "ended": "9999-12-31T23:59:59-23:00"}], "at": 0, "pause": 1, "claim": ""}),
        json.dumps({"attempts": [{**ATTEMPT, "attempt": 7}], "at": 0, "pause": 1, "claim": ""}).replace("7", "1e999"),
    ],
)
def test_a_state_that_no_worker_wrote_is_refused(state: str) -> None:
    fields = fields_of(b'{"task_id": "a", "description": "d", "%s": %s}' % (STATE_KEY.encode(), state.encode()))
    with pytest.raises(BadInput, match=f"^{STATE_KEY} is not what"):
        waited(fields)
