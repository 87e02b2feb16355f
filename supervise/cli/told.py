"""How people are told what happens: a console for them, or the same as log lines of JSON."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO, final

from rich.console import Console
from rich.text import Text

from supervise.cli.streams import on_terminal
from supervise.observe.logs import LOGGER, CarefulHandler, formatter
from supervise.secrets import Masker
from supervise.settings import LogSettings, Settings

if TYPE_CHECKING:
    from supervise.events import Event

#: What a style says of the importance of a line.
_LEVELS = {"red": logging.ERROR, "bold red": logging.ERROR, "yellow": logging.WARNING}


def level_of(style: str) -> int:
    """The level of a line of this style."""
    return _LEVELS.get(style, logging.INFO)


@final
class Told(Console):
    """A console that leaves out what `log.level` does not want, and that may write log lines in place of text.

    Args:
        stream: where to.
        settings: format and level.
        masker: for what is written as log lines.
    """

    def __init__(self, stream: TextIO, settings: LogSettings, masker: Masker) -> None:
        as_json = settings.format == "json"
        super().__init__(file=stream, force_terminal=False if as_json else None)
        self.as_json = as_json
        self.level = logging.getLevelNamesMapping()[settings.level.upper()]
        self._settings = settings
        self._masker = masker

    @cached_property
    def formatter(self) -> logging.Formatter:
        """Of the log lines. Made for the first one: most commands log nothing, and structlog takes long to load."""
        return formatter(self._settings, masker=self._masker, colours=self._has_colours)

    @property
    def _has_colours(self) -> bool:
        return not self.as_json and self.is_terminal and not self.no_color

    def wants(self, style: str) -> bool:
        """Whether lines of this style are to be shown."""
        return level_of(style) >= self.level

    def log_line(self, record: logging.LogRecord) -> None:
        """One line of the log, between what else is on the screen."""
        line = self.formatter.format(record)
        if self.as_json:
            self.file.write(f"{line}\n")
        else:
            # With colours, the formatter has left none but its own codes in the line. Else there are none to look for.
            self.print(Text.from_ansi(line) if self._has_colours else Text(line), soft_wrap=True)

    def write_record(self, name: str, text: str, style: str = "", **fields: Any) -> None:
        """What would be shown to people, as a line of the log."""
        made = logging.LogRecord(f"{LOGGER}.{name}", level_of(style), "", 0, text, None, None)
        made.__dict__.update(fields)
        self.log_line(made)


def is_screen(console: Console) -> bool:
    """Whether a person looks at a terminal there, on which a picture can be drawn."""
    return on_terminal(console.file) and not (isinstance(console, Told) and console.as_json)


def show_line(console: Console, text: Text, style: str = "", **options: Any) -> None:
    """A line for people; left out or logged where that is wanted."""
    if not isinstance(console, Told):
        console.print(text, **options)
    elif console.wants(style):
        if console.as_json:
            console.write_record("cli", text.plain, style)
        else:
            console.print(text, **options)


def show_event(console: Console, event: Event, who: str, what: str, style: str, line: Text) -> None:
    """An event for people, as `line`; likewise."""
    if isinstance(console, Told) and console.as_json:
        if console.wants(style):
            ids = {name: getattr(event, name) for name in ("job_id", "task_id", "worker") if getattr(event, name, "")}
            console.write_record("events", what, style, type=event.type, who=who, **ids)
    else:
        show_line(console, line, style, soft_wrap=True)


@contextmanager
def console_for(stream: TextIO, settings: Settings | None, masker: Masker) -> Iterator[Console]:
    """A console on which the log is written, too, for the length of the block.

    Args:
        stream: where to; writing to it must not block.
        settings: of which `log` counts; for people if absent.
        masker: of the log.
    """
    wanted = LogSettings() if settings is None else settings.log
    console = Told(stream, wanted, masker)
    handler = _Handler(console, masker)
    if not console.as_json:  # what the index warns of is an event, too, and shown as such
        handler.addFilter(lambda record: record.levelno > logging.WARNING or record.name != f"{LOGGER}.index")
    logger = logging.getLogger(LOGGER)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(wanted.level.upper())
    try:
        yield console
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


@final
class _Handler(CarefulHandler):
    """Log lines on the console."""

    def __init__(self, console: Told, masker: Masker) -> None:
        super().__init__(masker)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        try:
            self._console.log_line(record)
        except Exception:  # as all handlers do: who logs is not harmed
            self.handleError(record)
