"""What a person sees of a job: a live picture on a terminal, else one line for each event."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterable
from typing import final

import trio
from attrs import frozen
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from supervise import events as e
from supervise.cli.streams import Screen
from supervise.cli.told import is_screen, show_event, show_line
from supervise.observe.describe import describe

COLOURS = {"good": "green", "bad": "bold red", "warn": "yellow", "": ""}
KEPT = 12
#: Of the picture and of the terminal, without the lines of what happened.
ROWS_AROUND = 8


async def follow(events: AsyncIterable[e.Event], console: Console, title: str) -> None:
    """Show events until they end, and wait until they are seen. Cancelling stops showing."""
    if is_screen(console):
        await _live(events, console, title)
    else:
        await _lines(events, console)
    await seen(console)


async def seen(console: Console) -> None:
    """Wait until all is written: others write to the same terminal. Cancelling ends the wait."""
    file: object = console.file
    if isinstance(file, Screen):
        await trio.to_thread.run_sync(file.drain, abandon_on_cancel=True)


def say(console: Console, text: str, style: str = "") -> None:
    """One line that is left whole, so that the paths in it can be copied."""
    show_line(console, Text(text, style), style, soft_wrap=True)


def tell(console: Console, text: str, style: str = "") -> None:
    """Words, wrapped where a person reads them on a terminal."""
    show_line(console, Text(text, style), style, soft_wrap=not is_screen(console))


async def _lines(events: AsyncIterable[e.Event], console: Console) -> None:
    began, workspace = 0.0, ""
    async for event in events:
        assert event.time is not None
        began = began or event.time
        if isinstance(event, e.JobStarted):
            workspace = event.workspace
        line = describe(event, workspace)
        if line is not None:
            who, what, mood = line
            text = Text(f"{event.time - began:8.3f}  {who:<10} ") + Text(what, COLOURS[mood])
            show_event(console, event, who, what, COLOURS[mood], text)


async def _live(events: AsyncIterable[e.Event], console: Console, title: str) -> None:
    picture = Picture(title)
    with Live(picture, console=console, refresh_per_second=8, transient=False):
        async for event in events:
            picture.take(event)


def framed(body: RenderableType, title: str, options: ConsoleOptions) -> RenderableType:
    """A picture's frame: with room behind it for the ^C that a terminal echoes, which would begin a line else."""
    width = max(1, options.max_width - len("^C") - 1)
    return Constrain(Panel(body, title=title, title_align="left", border_style="dim"), width)


@final
class Picture:
    """The nursery of a job and its latest events."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began: float | None = None
        self._ended: float | None = None
        self._workspace = ""
        self._has_index = True
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
            case e.JobStarted():
                self._workspace = event.workspace
                self._has_index = event.index != "none"
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
        line = describe(event, self._workspace)
        if line is not None:
            self._lines.append((event.time - self._began, *line))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The end is drawn whole; before, the newest lines that there is room for."""
        ended = self._ended is not None
        now = self._ended or time.time()
        elapsed = 0.0 if self._began is None else now - self._began
        state, status, reason = self._index
        tree = Tree(Text.assemble(("job ", "bold"), (self._state, "bold cyan"), f"  {elapsed:5.1f} s"))
        if self._has_index:
            tree.add(Text.assemble(("index  ", "bold"), f"{state}  ", (status, "cyan"), f"  {reason}"))
        tree.add(Text.assemble(("agent  ", "bold"), self._agent))
        tree.add(Text.assemble(("heartbeat  ", "bold"), "ended with the job" if ended else self._heartbeat(now)))
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(justify="right", style="dim", no_wrap=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(ratio=1, overflow="ellipsis", no_wrap=not ended)
        room = KEPT if ended else max(1, min(KEPT, console.height - ROWS_AROUND))
        for at, who, what, mood in tuple(self._lines)[-room:]:  # a copy: another thread draws
            table.add_row(f"{at:.2f}", who, Text(what, COLOURS[mood]))
        body = Group(tree if ended else Cut(tree), Text(), table)
        yield framed(body, self._title, options)

    def _heartbeat(self, now: float) -> str:
        beat = self._beat
        if beat is None or beat.time is None:
            return "none yet"
        count = len(beat.processes)
        noun = "process" if count == 1 else "processes"
        return f"{max(0.0, now - beat.time):.0f} s ago: {count} {noun}, {beat.rss_bytes / 2**20:.0f} MiB"


@final
@frozen
class Cut:
    """What is drawn with its lines cut, not wrapped: its height does not change."""

    drawn: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich's console protocol."""
        yield from console.render(self.drawn, options.update(no_wrap=True, overflow="ellipsis"))
