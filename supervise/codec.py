"""Values to JSON and back, by cattrs. An event's time goes out as RFC 3339 in UTC.

What comes in is taken at its word: `"false"` is no boolean, and `null` no text. cattrs alone would convert both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import Enum, IntEnum, StrEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import attrs
import orjson

from supervise.errors import BadInput, SuperviseError
from supervise.events import EVENT_TYPES, AgentEvent, Event, UnknownEvent
from supervise.model import AgentLike, JobSpec
from supervise.secrets import Secret
from supervise.settings import IndexSettings

if TYPE_CHECKING:
    from cattrs import Converter

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

#: How deep the JSON in a line may be nested before it is cut, where no encoder can follow it any further.
_LEVELS = 100

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
        places = "; ".join(transform_error(error, format_exception=_told))
    raise BadInput(f"this is no {kind.__name__}: {places}")


def _told(error: BaseException, kind: Any) -> str:
    """What is wrong at one place of the data. The value itself is left out: it may be a secret."""
    from cattrs.v import format_exception

    if isinstance(error, SuperviseError):
        return str(error)
    if isinstance(error, AttributeError):  # cattrs found no keys()
        return "an object is wanted"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of these is wanted: " + ", ".join(str(member.value) for member in kind)
    if get_origin(kind) is Literal:
        return "one of these is wanted: " + ", ".join(map(str, get_args(kind)))
    return format_exception(error, kind)


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as a JSON object: `type`, `time` (RFC 3339), then its fields."""
    fields = dict(_converter().unstructure(event))
    time = fields.pop("time")
    if isinstance(event, AgentEvent) and not isinstance(event, UnknownEvent):
        fields.pop("raw")  # its known fields are there; the line itself is in the log
    return {"type": event.type, "time": None if time is None else rfc3339(time), **fields}


def event_from_json(data: Mapping[str, Any]) -> Event:
    """The event that `event_to_json` made `data` from (without `raw`, but for an `UnknownEvent`).

    Raises:
        BadInput: an unknown type or fields of a wrong shape.
    """
    if not isinstance(data, Mapping):
        raise BadInput("an event is a JSON object")
    fields = dict(data)
    name = fields.pop("type", None)
    if not isinstance(name, str) or name not in EVENT_TYPES:
        raise BadInput(f"no event has the type {name!r}")
    if isinstance(fields.get("time"), str):
        fields["time"] = _seconds(fields["time"])
    return from_json(EVENT_TYPES[name], fields)


def _seconds(text: str) -> float:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:  # without an offset it would be the time of some place
        raise BadInput(f"the time {text!r} of the event is not RFC 3339")
    return time.timestamp()


def to_line(data: Any) -> bytes:
    """JSON data as one line, newline included. Anything goes: lone surrogates, huge integers, deep nesting.

    What is nested deeper than the encoders can follow is cut to "…"; what is not finite becomes `null`.
    """
    try:
        return orjson.dumps(data, option=orjson.OPT_APPEND_NEWLINE)
    except (TypeError, ValueError):
        pass  # what orjson refuses, the slower way below writes
    try:
        return _slow_line(data)
    except RecursionError:
        return _slow_line(_cut(data, _LEVELS))


def _slow_line(data: Any) -> bytes:
    text = json.dumps(data, separators=(",", ":"), default=str)
    if "NaN" in text or "Infinity" in text:  # perhaps as a number, which is no JSON
        text = json.dumps(json.loads(text, parse_constant=lambda _: None), separators=(",", ":"))
    return text.encode() + b"\n"


def _cut(data: Any, levels: int) -> Any:
    if isinstance(data, Mapping):
        return {key: _cut(value, levels - 1) for key, value in data.items()} if levels else "…"
    if isinstance(data, list | tuple):
        return [_cut(value, levels - 1) for value in data] if levels else "…"
    return data


def loads(data: bytes | str) -> Any:
    """JSON data from text. Falls back to `json` for what orjson refuses (lone surrogates).

    An integer past 64 bits may come back as the nearest float.

    Raises:
        ValueError: not JSON (also bytes that are not UTF-8).
        RecursionError: nested too deep.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data if isinstance(data, str) else data.decode())  # json would take UTF-16, too


def _exactly(kinds: type | tuple[type, ...], wanted: str, make: Callable[[Any], Any]) -> Any:
    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise BadInput(f"{wanted} is wanted")
        return make(value)

    return structure


def _as_it_is(value: Any) -> Any:
    return value


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise BadInput("a number that a float can hold is wanted") from None


@lru_cache(1)
def _converter() -> Converter:
    """The converter, made on first use: cattrs costs more to import than all of the ground."""
    from cattrs import Converter

    converter = Converter(forbid_extra_keys=True, prefer_attrib_converters=False)
    converter.register_structure_hook(bool, _exactly(bool, "true or false", _as_it_is))
    converter.register_structure_hook(int, _exactly(int, "a whole number", _as_it_is))
    converter.register_structure_hook(float, _exactly((int, float), "a number", _float))
    converter.register_structure_hook(str, _exactly(str, "a text", _as_it_is))
    for mixed in (StrEnum, IntEnum):  # without hooks of their own they would go by those of `str` and `int`
        converter.register_unstructure_hook(mixed, lambda member: member.value)
        converter.register_structure_hook(mixed, lambda value, kind: kind(value))
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook(Path, _exactly(str, "a path", Path))
    # A secret never leaves by JSON: whoever receives a spec has secrets of their own.
    converter.register_unstructure_hook(Secret, lambda _: None)
    converter.register_structure_hook(Secret, _exactly(str, "a text", Secret))
    _register_tuples(converter)
    _register_payloads(converter)
    _register_spec(converter)
    return converter


def _register_tuples(converter: Converter) -> None:
    """Tuples of one kind come from lists alone: a text would be taken apart into its letters."""

    def tuple_in(value: Any, kind: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise BadInput("a list is wanted")
        items: Any = list[get_args(kind)[0]]  # type: ignore[misc]  # a type made at run time
        return tuple(converter.structure(value, items))

    def is_tuple(kind: Any) -> bool:
        origin: Any = get_origin(kind)
        return origin is tuple and get_args(kind)[1:] == (...,)

    converter.register_structure_hook_func(is_tuple, tuple_in)


def _register_payloads(converter: Converter) -> None:
    """What agents printed is JSON data already. Walking it again would fail where it is nested deep."""
    from cattrs.gen import make_dict_unstructure_fn, override

    def agent_event_out(cls: Any) -> Any:
        payloads = {
            field.name: override(unstruct_hook=_as_it_is)
            for field in attrs.fields(cls)
            if field.name in ("raw", "input")
        }
        return make_dict_unstructure_fn(cls, converter, **payloads)  # type: ignore[arg-type]  # overrides, by field name

    converter.register_unstructure_hook_factory(
        lambda t: isinstance(t, type) and issubclass(t, AgentEvent), agent_event_out
    )


def _register_spec(converter: Converter) -> None:
    """The fields of `JobSpec` whose type says too little: which agent, and which index."""

    def agent_out(agent: Any) -> Any:
        if agent is None:
            return None
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
        if not isinstance(data, Mapping):
            raise BadInput("an object is wanted")
        fields = dict(data)
        tag = fields.pop("kind", None)
        if not isinstance(tag, str) or tag not in _agents:
            raise BadInput(f"the agent {tag!r} is not known here; import the module that defines it")
        return converter.structure(fields, _agents[tag])

    def index_in(data: Any, _: Any) -> Any:
        return data if data is None or data == "settings" else converter.structure(data, IndexSettings)

    def index_out(value: Any) -> Any:
        return value if value is None or value == "settings" else converter.unstructure(value, IndexSettings)

    def is_agent(kind: Any) -> bool:
        return kind is AgentLike or kind == AgentLike | None

    attrs.resolve_types(JobSpec)
    index_type = attrs.fields(JobSpec).index.type
    converter.register_structure_hook_func(is_agent, agent_in)
    converter.register_unstructure_hook_func(is_agent, agent_out)
    converter.register_structure_hook_func(lambda t: t == index_type, index_in)
    converter.register_unstructure_hook_func(lambda t: t == index_type, index_out)
