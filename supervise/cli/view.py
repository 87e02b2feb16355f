"""What a person sees of a job: a live picture on a terminal, else one line for each event."""

from __future__ import annotations

import logging
import time
from collections import deque
from functools import partial
from typing import final

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from supervise import events as e
from supervise.job.bus import Subscription
from supervise.observe.describe import describe

COLOURS = {"good": "green", "bad": "bold red", "warn": "yellow", "": ""}
KEPT = 12


async def follow(events: Subscription, console: Console, title: str) -> None:
    """Show events until the job ends. Cancelling stops showing."""
    if console.is_terminal:
        await _live(events, console, title)
    else:
        await _lines(events, console)


async def _lines(events: Subscription, console: Console) -> None:
    began: float | None = None
    async for event in events:
        began = began or event.time
        line = describe(event)
        if line is not None and began is not None and event.time is not None:
            who, what, mood = line
            text = Text(f"{event.time - began:8.3f}  {who:<10} ") + Text(what, COLOURS[mood])
            show = partial(console.print, text, soft_wrap=True, highlight=False)
            await trio.to_thread.run_sync(show, abandon_on_cancel=True)


async def _live(events: Subscription, console: Console, title: str) -> None:
    picture = Picture(title)
    with Live(picture, console=console, refresh_per_second=8, transient=False) as live:
        async for event in events:
            picture.take(event)
            live.refresh() if isinstance(event, e.JobFinished) else None


@final
class Picture:
    """The nursery of a job and its latest events."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began: float | None = None
        self._ended: float | None = None
        self._state = "queued"
        self._index = ("NotStarted", "none", "")
        self._agent = "not started"
        self._beat: e.Heartbeat | None = None
        self._lines: deque[tuple[float, str, str, str]] = deque(maxlen=KEPT)

    def take(self, event: e.Event) -> None:
        """The next event."""
        assert event.time is not None
        self._began = self._began or event.time
        match event:
            case e.StateChanged():
                self._state = event.state
            case e.IndexChanged():
                self._index = (event.state, event.status.value, event.reason)
            case e.Heartbeat():
                self._beat = event
            case e.ProcessStarted(role="agent"):
                self._agent = f"pid {event.pid}"
            case e.ProcessExited(role="agent"):
                self._agent = f"ended: {event.signal or f'exit code {event.exit_code}'}"
            case e.JobFinished():
                self._ended = event.time
        line = describe(event)
        if line is not None:
            self._lines.append((event.time - self._began, *line))

    def __rich__(self) -> RenderableType:
        now = self._ended or time.time()
        elapsed = 0.0 if self._began is None else now - self._began
        tree = Tree(Text.assemble(("job ", "bold"), (self._state, "bold cyan"), f"  {elapsed:5.1f} s"))
        state, status, reason = self._index
        tree.add(Text.assemble(("index  ", "bold"), f"{state}  ", (status, "cyan"), f"  {reason}"))
        tree.add(Text.assemble(("agent  ", "bold"), self._agent))
        tree.add(Text.assemble(("heartbeat  ", "bold"), self._heartbeat(now)))
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(justify="right", style="dim", no_wrap=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
        for at, who, what, mood in self._lines:
            table.add_row(f"{at:.2f}", who, Text(what, COLOURS[mood]))
        return Panel(Group(tree, Text(), table), title=self._title, title_align="left", border_style="dim")

    def _heartbeat(self, now: float) -> str:
        beat = self._beat
        if beat is None or beat.time is None:
            return "none yet"
        count = len(beat.processes)
        return f"{max(0.0, now - beat.time):.0f} s ago: {count} processes, {beat.rss_bytes / 2**20:.0f} MiB"


@final
class ConsoleLog(logging.Handler):
    """Log records on a console, so that they do not tear a live picture."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        text = self.format(record)
        self._console.print(Text(f"{record.levelname.lower()}: {text}", "dim"), soft_wrap=True, highlight=False)
