"""Logs as lines, for people or as JSON, by structlog. The library itself logs by `logging`, under `supervise`.

A service that embeds the library and has no logging of its own:

    supervise.observe.logs.configure(LogSettings(format="json"))

Each line tells of its job (`job_id`), and of task and worker where there are any.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, Final, TextIO, final

from supervise.codec import to_line
from supervise.errors import MissingExtra
from supervise.log_context import about
from supervise.secrets import Masker
from supervise.settings import LogSettings

if TYPE_CHECKING:
    from structlog.typing import Processor

__all__ = ["LOGGER", "configure", "formatter"]

#: What all loggers of this library are below.
LOGGER: Final = "supervise"


def configure(settings: LogSettings, *, stream: TextIO | None = None, masker: Masker | None = None) -> logging.Handler:
    """Write what the library logs to a stream, as the settings say.

    Args:
        settings: format and level.
        stream: where to; default standard error. A stream that blocks holds up whoever logs.
        masker: its secrets are masked in each line.

    Returns:
        The handler, which is now one of the logger `supervise`; `removeHandler` takes it back.

    Raises:
        MissingExtra: structlog is not installed.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
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
    first: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        _add_about,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor]
    if settings.format == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_json)]
    else:
        # The plain tracebacks: the others show local variables, and so secrets.
        plain = structlog.dev.plain_traceback
        last = [_printable, structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=plain, pad_event_to=0)]
    inner = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=first, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )
    return _Masked(inner, masker or Masker())


def _add_about(logger: Any, method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in about().items():
        fields.setdefault(name, value)
    return fields


def _printable(logger: Any, method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Somebody's words shall not steer a terminal."""
    for name, value in fields.items():
        if isinstance(value, str):
            fields[name] = "".join(c if c.isprintable() or c in "\n\t" else " " for c in value)
    return fields


def _json(fields: Any, **_: Any) -> str:
    return to_line(fields).decode().rstrip("\n")


@final
class _Masked(logging.Formatter):
    """The whole line is masked, tracebacks included."""

    def __init__(self, inner: logging.Formatter, masker: Masker) -> None:
        super().__init__()
        self._inner = inner
        self._masker = masker

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return self._masker.text(self._inner.format(record))
