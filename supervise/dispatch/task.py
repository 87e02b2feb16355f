"""A task, as it comes from outside: what it may say, and what is refused. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, Final, NoReturn

from attrs import Factory, frozen

from supervise.codec import rfc3339
from supervise.errors import BadInput
from supervise.model import JOB_ID
from supervise.rules import is_number

__all__ = ["Attempt", "Task", "Unfinished", "parse"]

#: Larger tasks are refused, in bytes.
MAX_BYTES: Final = 1024 * 1024

#: Deeper JSON is refused: nobody could write it back.
MAX_DEPTH: Final = 100

#: So many attempts at most may be asked for: their history is kept in one record.
MOST_ATTEMPTS: Final = 100
MOST_DEPENDENCIES: Final = 1000

#: Words for a priority; any whole number from -1000 to 1000 does as well. Higher comes first.
PRIORITIES: Final = {"low": -10, "normal": 0, "high": 10, "urgent": 100}
MOST_PRIORITY: Final = 1000

#: Where a task that waits for its next attempt keeps what came before; only `Waited` writes it.
STATE_KEY: Final = "_supervise"


class Unfinished(BadInput):
    """This is no JSON, or not yet: its writer may still be at it."""


@frozen(kw_only=True)
class Attempt:
    """One try at a task that did not end it.

    Attributes:
        attempt: its number, from 1.
        job_id: of its job.
        started, ended: seconds since the epoch.
        failure_kind: why, as in a result; `killed` for a worker that died.
        error: one line.
    """

    attempt: int
    job_id: str = ""
    started: float = 0.0
    ended: float = 0.0
    failure_kind: str = ""
    error: str = ""


@frozen(kw_only=True)
class Task:
    """What is to be done.

    Attributes:
        task_id: unique among the tasks of a root.
        description: what the agent is told.
        worker: whom it is for; `None` for whoever finds it.
        timeout: seconds; `None` for the default.
        priority: higher comes first.
        dependencies: ids of tasks whose results must be completed first.
        workspace: directory to work in; `None` for the worker's.
        script: name of a script of the catalogue, in place of the agent.
        args: the script's arguments; not looked at without one.
        not_before: seconds since the epoch.
        max_attempts: `None` for the worker's.
        fields: all that was said, unknown keys included.
    """

    task_id: str
    description: str
    worker: str | None = None
    timeout: float | None = None
    priority: int = 0
    dependencies: tuple[str, ...] = ()
    workspace: str | None = None
    script: str | None = None
    args: tuple[str, ...] = ()
    not_before: float = 0.0
    max_attempts: int | None = None
    fields: Mapping[str, Any] = Factory(dict)


def parse(data: bytes) -> Task:
    """The task in the bytes of a file or a message.

    Raises:
        Unfinished: this is no JSON; it may be, when its writer has ended.
        BadInput: it is JSON, but no task; the message names field and rule.
    """
    return of_fields(fields_of(data))


def fields_of(data: bytes, *, most: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in `data`, of at most so many bytes; raises as `parse`."""
    if len(data) > most:
        raise BadInput(f"it is larger than {most} bytes; hand over a file's name instead of its content")
    trouble = ""
    value: Any = None
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        trouble = f"it is not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        trouble = f"it is not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
    except (RecursionError, ValueError) as error:  # ValueError: an integer of too many digits
        problem = "its JSON is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise BadInput(problem) from None
    if trouble:  # outside of the except: a chained JSON error carries the whole text
        raise Unfinished(trouble)
    if not isinstance(value, dict):
        raise BadInput(f"it is {_kind(value)}, but must be a JSON object")
    if not _is_shallow(value):
        raise BadInput(f"its JSON is nested more than {MAX_DEPTH} deep")
    return value


def of_fields(fields: Mapping[str, Any]) -> Task:
    """The task that these fields tell of; raises BadInput."""
    task_id = fields.get("task_id")
    if not isinstance(task_id, str) or not JOB_ID.fullmatch(task_id):
        _refuse("task_id", task_id, f"a text that matches {JOB_ID.pattern}")
    description: Any = fields.get("description")
    if not _is_text(description):
        _refuse("description", description, "a text that is not empty")
    dependencies = fields.get("dependencies") or ()
    if (
        not isinstance(dependencies, list | tuple)
        or len(dependencies) > MOST_DEPENDENCIES
        or not all(isinstance(each, str) and JOB_ID.fullmatch(each) for each in dependencies)
    ):
        _refuse("dependencies", dependencies, f"a list of at most {MOST_DEPENDENCIES} task ids")
    if task_id in dependencies:
        raise BadInput(f"dependencies names the task {task_id!r} itself; it would wait for ever")
    return Task(
        task_id=task_id,
        description=description,
        worker=_maybe(fields, "worker", _is_text, "a worker's name"),
        timeout=_maybe(fields, "timeout", lambda v: is_number(v) and v > 0, "a number of seconds above 0"),
        priority=_priority(fields.get("priority")),
        dependencies=tuple(dependencies),
        workspace=_maybe(fields, "workspace", _is_text, "the path of a directory"),
        script=_maybe(fields, "script", _is_text, "the name of a script"),
        args=_args(fields),
        not_before=_moment(fields.get("not_before")),
        max_attempts=_maybe(fields, "max_attempts", _is_count, f"a whole number from 1 to {MOST_ATTEMPTS}"),
        fields=dict(fields),
    )


@frozen(kw_only=True)
class Waited:
    """What is told of a task that waits for its next attempt.

    Attributes:
        fields: the task's own.
        attempts: what came before.
        at: when it may be tried again, in seconds since the epoch.
        pause: how far off that was when it was written, in seconds: the clock may have been set back since.
        claim: which claim has left it so; empty for a task that waits for its first attempt.
    """

    fields: dict[str, Any]
    attempts: tuple[Attempt, ...] = ()
    at: float = 0.0
    pause: float = 0.0
    claim: str = ""

    def to_fields(self) -> dict[str, Any]:
        """As they are written into its file."""
        attempts = [history(each) for each in self.attempts]
        state = {"attempts": attempts, "at": self.at, "pause": self.pause, "claim": self.claim}
        return {**self.fields, STATE_KEY: state}


def waited(fields: Mapping[str, Any]) -> Waited:
    """What `Waited.to_fields` has put together. Raises BadInput."""
    state = fields.get(STATE_KEY)
    own = {name: value for name, value in fields.items() if name != STATE_KEY}
    if state is None:
        return Waited(fields=own)
    try:
        found = Waited(
            fields=own,
            attempts=tuple(_attempt(each) for each in state["attempts"]),
            at=float(state["at"]),
            pause=float(state["pause"]),
            claim=str(state["claim"]),
        )
        found.to_fields()  # it will have to be written again
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise BadInput(f"{STATE_KEY} is not what a worker writes there; leave it out") from None
    if len(found.attempts) > MOST_ATTEMPTS or not (math.isfinite(found.at) and math.isfinite(found.pause)):
        raise BadInput(f"{STATE_KEY} is not what a worker writes there; leave it out")
    return found


def history(attempt: Attempt) -> dict[str, Any]:
    """An attempt as records tell of it."""
    return {
        "attempt": attempt.attempt,
        "job_id": attempt.job_id,
        "started": rfc3339(attempt.started),
        "ended": rfc3339(attempt.ended),
        "failure_kind": attempt.failure_kind,
        "error": attempt.error,
    }


def _attempt(record: Mapping[str, Any]) -> Attempt:
    return Attempt(
        attempt=int(record["attempt"]),
        job_id=str(record["job_id"]),
        started=datetime.fromisoformat(record["started"]).timestamp(),
        ended=datetime.fromisoformat(record["ended"]).timestamp(),
        failure_kind=str(record["failure_kind"]),
        error=str(record["error"]),
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two values for one key: nobody can know which one was meant."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]  # `add` returns None, which is what lets the next name come
        raise BadInput(f"the key {twice[:80]!r} is there twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise BadInput(f"{name} is no number of JSON")


def _is_shallow(value: Any) -> bool:
    todo = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if isinstance(item, dict | list):
            if depth >= MAX_DEPTH:
                return False
            todo.extend((each, depth + 1) for each in (item.values() if isinstance(item, dict) else item))
    return True


def _kind(value: Any) -> str:
    names = {str: "a text", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_ATTEMPTS


def _maybe(fields: Mapping[str, Any], name: str, test: Any, rule: str) -> Any:
    value = fields.get(name)
    if value is not None and not test(value):
        _refuse(name, value, rule)
    return value


def _args(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """A task without a script may have something of its own under this key."""
    value = fields.get("args")
    if value is None or fields.get("script") is None:
        return ()
    if not isinstance(value, list | tuple) or not all(_is_argument(each) for each in value):
        _refuse("args", value, "a list of texts without NUL")
    return tuple(value)


def _is_argument(value: Any) -> bool:
    """As a text, but it may be empty."""
    return isinstance(value, str) and _is_text(f".{value}")


def _priority(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, str) and value in PRIORITIES:
        return PRIORITIES[value]
    if type(value) is not int or abs(value) > MOST_PRIORITY:
        rule = f"a whole number from -{MOST_PRIORITY} to {MOST_PRIORITY} (higher comes first), or one of"
        _refuse("priority", value, f"{rule} {', '.join(PRIORITIES)}")
    return int(value)


def _moment(value: Any) -> float:
    """Seconds since the epoch, of a number or of RFC 3339."""
    if value is None:
        return 0.0
    if is_number(value):
        return float(value)
    moment: datetime | None = None
    if isinstance(value, str):
        with suppress(ValueError, OverflowError):  # told below, together with a time without a zone
            moment = datetime.fromisoformat(value)
    if moment is None or moment.tzinfo is None:
        rule = "a time with its zone, as 2026-11-21T12:00:00Z, or seconds since the epoch"
        _refuse("not_before", value, rule)
    return moment.timestamp()


def _refuse(name: str, value: Any, rule: str) -> NoReturn:
    shown = "missing" if value is None else ascii(value) if len(ascii(value)) <= 80 else ascii(value)[:79] + "…"
    raise BadInput(f"{name} is {shown}, but must be {rule}")
