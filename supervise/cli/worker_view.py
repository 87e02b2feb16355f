"""A worker on a terminal: the jobs under way as a tree, and below it what happened last."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterable, Callable
from typing import final

from attrs import define
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from supervise import events as e
from supervise.cli.view import COLOURS, Cut, framed
from supervise.dispatch.task import Task
from supervise.model import IndexStatus
from supervise.observe.describe import describe

#: Lines of what happened, at most.
KEPT = 12
#: Of the frame and what is around it, in lines.
ROWS_AROUND = 6

STATUS = {"healthy": "green", "degraded": "yellow", "draining": "yellow", "unhealthy": "bold red"}


@define
class _Branch:
    """A job under way."""

    began: float
    attempt: int
    state: str = "claimed"
    index: IndexStatus = IndexStatus.NONE
    last: str = ""
    rss_bytes: int = 0


@final
class WorkerPicture:
    """What is drawn. `take` and `observe` tell it what happens; another thread draws.

    Args:
        name: the worker's.
        clock: seconds since the epoch.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.time) -> None:
        self._name = name
        self._clock = clock
        self._began = clock()
        self._status: e.WorkerChanged | None = None
        self._branches: dict[str, _Branch] = {}
        self._lines: deque[tuple[float, str, str, str]] = deque(maxlen=KEPT)
        self._ended = {"completed": 0, "not completed": 0, "dead": 0}
        self._over = False

    def take(self, event: e.Event) -> None:
        """The next event of the worker."""
        assert event.time is not None
        match event:
            case e.WorkerChanged():
                self._status = event
                return
            case e.TaskClaimed():
                self._branches[event.task_id] = _Branch(event.time, event.attempt)
            case e.TaskFinished():
                self._ended["completed" if event.status == "completed" else "not completed"] += 1
                self._branches.pop(event.task_id, None)
            case e.TaskBuried():
                self._ended["dead"] += 1
                self._branches.pop(event.task_id, None)
            case e.TaskEvent() if not isinstance(event, e.TaskReceived):  # it waits again
                self._branches.pop(event.task_id, None)
        line = describe(event)
        if line is not None:
            self._lines.append((event.time, *line))

    def observe(self, task: Task, event: e.Event) -> None:
        """The next event of a task's job."""
        branch = self._branches.get(task.task_id)
        if branch is None:  # its end has been told
            return
        match event:
            case e.StateChanged():
                branch.state = event.state
            case e.IndexChanged():
                branch.index = event.status
            case e.Heartbeat():
                branch.rss_bytes = event.rss_bytes
            case e.AgentEvent():
                line = describe(event)
                branch.last = branch.last if line is None else line[1]

    def close(self) -> None:
        """What is drawn next is the last picture, and stays."""
        self._over = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The tree first: where there is little room, the oldest of what happened has none."""
        now = self._clock()
        branches = tuple(self._branches.items())
        tree = Tree(self._head(now))
        room = max(1, console.height - ROWS_AROUND - 1)
        for task_id, branch in branches[:room]:
            tree.add(self._told(task_id, branch, now))
        if len(branches) > room:
            tree.add(Text(f"… and {len(branches) - room} more", "dim"))
        lines = tuple(self._lines)
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(style="bold", no_wrap=True, overflow="ellipsis", max_width=max(8, console.width // 3))
        table.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
        left = max(1, room - min(len(branches), room))
        for at, who, what, mood in lines[-left:]:
            table.add_row(time.strftime("%H:%M:%S", time.localtime(at)), who, Text(what, COLOURS[mood]))
        body = Group(Cut(tree), Text(), table)
        yield framed(body, f"supervise worker · {self._name}", options)

    def _head(self, now: float) -> Text:
        status = self._status
        counts = ", ".join(f"{count} {what}" for what, count in self._ended.items() if count) or "none ended yet"
        if status is None:
            return Text.assemble((self._name, "bold"), "  starting")
        told = "stopped" if self._over else status.status
        style = "" if self._over else STATUS.get(status.status, "bold red")
        breaker = "" if status.breaker == "closed" else f", breaker {status.breaker}"
        waits = f"{status.queue_size} wait{'s' if status.queue_size == 1 else ''}"
        why = f"  {'; '.join(status.reasons)}" if status.reasons and not self._over else ""
        text = f"  {len(self._branches)} at work, {waits}, {counts}{breaker}  {now - self._began:.0f} s{why}"
        return Text.assemble((self._name, "bold"), "  ", (told, style), text)

    def _told(self, task_id: str, branch: _Branch, now: float) -> Text:
        again = f"  attempt {branch.attempt}" if branch.attempt > 1 else ""
        index = f"  index {branch.index.value}" if branch.index is not IndexStatus.NONE else ""
        memory = f"  {branch.rss_bytes / 2**20:.0f} MiB" if branch.rss_bytes else ""
        return Text.assemble(
            (task_id, "bold"),
            again,
            "  ",
            (branch.state, "cyan"),
            f"  {max(0.0, now - branch.began):.1f} s",
            (f"{index}{memory}", "dim"),
            f"  {branch.last}" if branch.last else "",
        )


async def draw(events: AsyncIterable[e.Event], picture: WorkerPicture, console: Console) -> None:
    """Draw until the events end. Cancelling leaves the last picture as it is."""
    with Live(picture, console=console, refresh_per_second=4, transient=False):
        async for event in events:
            picture.take(event)
        picture.close()
