"""Values to JSON and back, by cattrs. Times of day go out as RFC 3339 in UTC."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import attrs
import orjson

from supervise.errors import BadInput
from supervise.events import EVENT_TYPES, AgentEvent, Event, UnknownEvent
from supervise.model import AgentLike, IndexSettings, JobSpec
from supervise.secrets import Secret

__all__ = [
    "event_from_json",
    "event_to_json",
    "from_json",
    "loads",
    "register_agent",
    "rfc3339",
    "to_json",
    "to_line",
]

T = TypeVar("T")

_agents: dict[str, type] = {}


def register_agent(cls: type, tag: str) -> None:
    """Let specs with an agent of attrs class `cls` go through JSON, marked by `tag`."""
    if _agents.setdefault(tag, cls) is not cls:
        raise BadInput(f"the agent tag {tag!r} is taken by {_agents[tag].__qualname__}; choose another")
    _converter.cache_clear()


def rfc3339(time: float) -> str:
    """Seconds since the epoch as RFC 3339 text in UTC, to the microsecond."""
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def to_json(value: Any) -> Any:
    """`value` (attrs value, enum, path, …) as plain JSON data."""
    return _converter().unstructure(value)


def from_json(kind: type[T], data: Any) -> T:
    """The value of class `kind` that `to_json` made `data` from.

    Raises:
        BadInput: `data` is not of that shape; the message names the places.
    """
    from cattrs import transform_error

    try:
        return _converter().structure(data, kind)
    except Exception as error:  # cattrs raises groups of whatever the fields raise
        raise BadInput(f"this is no {kind.__name__}: " + "; ".join(transform_error(error))) from error


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as a JSON object: `type`, `time` (RFC 3339), then its fields."""
    fields: dict[str, Any] = _converter().unstructure(event)
    time = fields.pop("time")
    if isinstance(event, AgentEvent) and not isinstance(event, UnknownEvent):
        fields.pop("raw")  # its known fields are there; the line itself is in the log
    return {"type": event.type, "time": None if time is None else rfc3339(time), **fields}


def event_from_json(data: dict[str, Any]) -> Event:
    """The event that `event_to_json` made `data` from (without `raw`, but for an `UnknownEvent`).

    Raises:
        BadInput: an unknown type or fields of a wrong shape.
    """
    fields = dict(data)
    name = fields.pop("type", None)
    if name not in EVENT_TYPES:
        raise BadInput(f"no event has the type {name!r}")
    if isinstance(fields.get("time"), str):
        try:
            fields["time"] = datetime.fromisoformat(fields["time"]).timestamp()
        except ValueError as error:
            raise BadInput(f"the time {data['time']!r} of the event is not RFC 3339") from error
    return from_json(EVENT_TYPES[name], fields)


def to_line(data: Any) -> bytes:
    """JSON data as one line, newline included. Anything goes: lone surrogates, huge integers."""
    try:
        return orjson.dumps(data, option=orjson.OPT_APPEND_NEWLINE)
    except (TypeError, ValueError):
        return json.dumps(data, separators=(",", ":"), default=str).encode() + b"\n"


def loads(data: bytes | str) -> Any:
    """JSON data from text. Falls back to `json` for what orjson refuses (lone surrogates).

    Raises:
        ValueError: not JSON (also bytes that are not UTF-8).
        RecursionError: nested too deep.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)


@lru_cache(1)
def _converter() -> Any:
    """The converter, made on first use: cattrs costs more to import than all of the ground."""
    from cattrs import Converter

    converter = Converter(forbid_extra_keys=True, prefer_attrib_converters=False)
    converter.register_unstructure_hook_func(
        lambda t: isinstance(t, type) and issubclass(t, Enum), lambda member: member.value
    )
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook(Path, lambda value, _: Path(value))
    # A secret never leaves by JSON: whoever receives a spec has secrets of their own.
    converter.register_unstructure_hook(Secret, lambda _: None)
    converter.register_structure_hook(Secret, lambda value, _: Secret(value))

    def agent_out(agent: Any) -> Any:
        for tag, cls in _agents.items():
            if type(agent) is cls:
                fields: dict[str, Any] = converter.unstructure_attrs_asdict(agent)
                return {"kind": tag, **fields}
        raise BadInput(
            f"an agent of class {type(agent).__qualname__} cannot be written as JSON; "
            "register it with supervise.codec.register_agent"
        )

    def agent_in(data: Any, _: Any) -> Any:
        if data is None:
            return None
        fields = dict(data)
        tag = fields.pop("kind", None)
        if tag not in _agents:
            raise BadInput(f"the agent {tag!r} is not known here; import the module that defines it")
        return converter.structure(fields, _agents[tag])

    def index_in(data: Any, _: Any) -> Any:
        return data if data is None or data == "settings" else converter.structure(data, IndexSettings)

    def index_out(value: Any) -> Any:
        return value if value is None or value == "settings" else converter.unstructure(value, IndexSettings)

    optional_agent = AgentLike | None
    converter.register_structure_hook_func(lambda t: t is AgentLike or t == optional_agent, agent_in)
    converter.register_unstructure_hook_func(
        lambda t: t is AgentLike or t == optional_agent,
        lambda value: None if value is None else agent_out(value),
    )
    attrs.resolve_types(JobSpec)
    index_type = attrs.fields(JobSpec).index.type
    converter.register_structure_hook_func(lambda t: t == index_type, index_in)
    converter.register_unstructure_hook_func(lambda t: t == index_type, index_out)
    return converter
