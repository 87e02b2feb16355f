"""Logs as lines, for people or as JSON, by structlog. The library itself logs by `logging`, under `supervise`.

A service that embeds the library and has no logging of its own:

    supervise.observe.logs.configure(LogSettings(format="json"))

Each line tells of its job (`job_id`), and of task and worker where there are any.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TextIO, final

from supervise.codec import to_line
from supervise.errors import MissingExtra
from supervise.log_context import NAMES, about
from supervise.secrets import Masker
from supervise.settings import LogSettings

if TYPE_CHECKING:
    from structlog.typing import Processor

__all__ = ["LOGGER", "CarefulHandler", "configure", "formatter"]

#: What all loggers of this library are below.
LOGGER: Final = "supervise"
#: How deep a value may be nested before it is cut.
LEVELS: Final = 20
#: What lines after the first begin with, for people: who reads shall not take them for lines of their own.
INDENT: Final = "    "
#: The fields that are shown without their names.
_COLUMNS: Final = ("timestamp", "level", "event", "logger", "logger_name")


def configure(settings: LogSettings, *, stream: TextIO | None = None, masker: Masker | None = None) -> logging.Handler:
    """Write what the library logs to a stream, as the settings say.

    Args:
        settings: format and level.
        stream: where to; default standard error. A stream that blocks holds up whoever logs. One that refuses loses
            lines, of which the first is told of on standard error, by the kind of trouble alone.
        masker: its secrets are masked in each line.

    Returns:
        The handler, which is now one of the logger `supervise`; `removeHandler` takes it back.

    Raises:
        MissingExtra: structlog is not installed.
    """
    handler = _StreamHandler(masker or Masker(), sys.stderr if stream is None else stream)
    handler.setFormatter(formatter(settings, masker=masker))
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    logger.setLevel(settings.level.upper())
    return handler


def formatter(settings: LogSettings, *, masker: Masker | None = None, colours: bool = False) -> logging.Formatter:
    """A formatter for handlers of your own; arguments as of `configure`.

    Args:
        colours: for the format `console`, where a person looks at a terminal.

    Raises:
        MissingExtra: structlog is not installed.
    """
    try:
        import structlog
    except ImportError:
        raise MissingExtra("writing logs", "cli", "structlog") from None
    masker = masker or Masker()
    people = settings.format != "json"
    first: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        _add_about,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: Processor = structlog.processors.JSONRenderer(serializer=_json)
    if people:
        # The plain tracebacks: the others show local variables, and so secrets.
        plain = structlog.dev.plain_traceback
        last = structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=plain, pad_event_to=0)
    inner = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=first,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _Plain(masker, people), last],
    )
    return _Whole(inner, masker, people, colours)


class CarefulHandler(logging.Handler):
    """A handler that does not repeat what it could not write, as those of `logging` do: there may be secrets in it.

    It tells of the first trouble only, on standard error, by its kind.

    Args:
        masker: of that line.
        args: for the next class.
    """

    def __init__(self, masker: Masker, *args: Any) -> None:
        super().__init__(*args)
        self._masker = masker
        self._has_told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.handleError`."""
        if self._has_told or not logging.raiseExceptions:
            return
        self._has_told = True
        kind, error, _ = sys.exc_info()
        what = "an error" if kind is None else kind.__name__
        if isinstance(error, OSError) and error.errno is not None:
            what += f", {os.strerror(error.errno)}"  # the system's words; those of the error may be anybody's
        line = f"supervise: a line of the log could not be written ({what}); no more is told of such\n"
        try:
            sys.stderr.write(_clean(self._masker.text(line).rstrip("\n")) + "\n")
        except (OSError, ValueError, AttributeError):  # closed, or none at all: there is nobody to tell
            return


@final
class _StreamHandler(CarefulHandler, logging.StreamHandler[TextIO]):
    """Lines on a stream."""


def _add_about(logger: Any, method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """An `AboutFilter` that somebody has set before us leaves empty ones: that is as if there were none."""
    known = about()
    for name in NAMES:
        if fields.get(name, "") == "":
            fields.pop(name, None)
            if name in known:
                fields[name] = known[name]
    for name, value in known.items():
        fields.setdefault(name, value)
    return fields


@final
class _Plain:
    """What was logged as plain values without secrets; for people, without what steers a terminal, either.

    Masking comes first: what is changed, cut or quoted is not found any more.
    """

    def __init__(self, masker: Masker, people: bool) -> None:
        self._mask = masker.text
        self._people = people

    def __call__(self, logger: Any, method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        error = _error_of(fields.pop("exc_info", None))
        if error is not None:
            fields["exception"] = self._traceback(error)
        values = {self._key(name): self._value(value, LEVELS) for name, value in fields.items()}
        if self._people:
            event, _, rest = _text(values.get("event", "")).replace("\r\n", "\n").partition("\n")
            values["event"] = event
            # Whatever has lines of its own goes below the line.
            below = [rest, *(_text(values.pop(name, "")) for name in ("stack_info", "stack", "exception"))]
            for name in _COLUMNS:
                if name in values:
                    values[name] = _clean(_text(values[name]).replace("\n", "\\n"))
            if any(below):
                values["exception"] = "\n".join(_clean_lines(text) for text in below if text)
        return values

    def _key(self, name: Any) -> str:
        name = self._mask(_text(name))
        return "".join(c if c.isprintable() and c not in " =" else "_" for c in name) if self._people else name

    def _value(self, value: Any, levels: int) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Enum):
            return self._value(value.value, levels)
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            if not levels:
                return "…"
            if isinstance(value, Mapping):
                return {self._mask(_text(key)): self._value(each, levels - 1) for key, each in value.items()}
            return [self._value(each, levels - 1) for each in value]
        text = self._mask(_text(value))
        # structlog quotes what has blanks or line ends in it.
        return _clean_lines(text) if self._people else text

    def _traceback(self, error: BaseException) -> str:
        """Masked before it is put together: those of groups begin each line with a bar."""
        told = traceback.TracebackException.from_exception(error)
        todo = [told]
        while todo:
            each = todo.pop()
            words = self._mask("".join(each.format_exception_only()))
            # Of this object alone: the class is not ours.
            setattr(each, "format_exception_only", lambda words=words, **_: iter([words]))  # noqa: B010  # mypy forbids the plain way
            todo += [*filter(None, (each.__cause__, each.__context__)), *(each.exceptions or ())]
        return "".join(told.format()).rstrip("\n")


def _error_of(exc_info: Any) -> BaseException | None:
    """`logging` has a triple; structlog's own loggers also an error, or a word that there is one."""
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1]
    if isinstance(exc_info, BaseException):
        return exc_info
    return sys.exc_info()[1] if exc_info else None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return str.__str__(value)
    try:
        return str(value)
    except Exception as error:  # somebody's own class
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _clean(text: str) -> str:
    """Somebody's words shall not steer a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _clean_lines(text: str) -> str:
    return "\n".join(_clean(line) for line in text.replace("\r\n", "\n").split("\n"))


def _json(fields: Any, **_: Any) -> str:
    line = to_line(fields).decode().rstrip("\n")
    # JSON lets pass what steers some terminals: C1, and what turns the direction of writing.
    return line if line.isprintable() else _ODD.sub(_escaped, line)


_ODD = re.compile(r"[^ -~]")


def _escaped(match: re.Match[str]) -> str:
    letter = match[0]
    if letter.isprintable():
        return letter
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


@final
class _Whole(logging.Formatter):
    """The finished line is masked once more, and cleaned. Colours are structlog's: all else is clean by then."""

    def __init__(self, inner: logging.Formatter, masker: Masker, people: bool, colours: bool) -> None:
        super().__init__()
        self._inner = inner
        self._masker = masker
        self._people = people
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        line = self._masker.text(self._inner.format(record))
        if not self._people:
            return line
        lines = line.rstrip("\n").split("\n")
        return f"\n{INDENT}".join(lines if self._colours else map(_clean, lines))
