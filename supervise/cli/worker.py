"""`supervise worker`: run a worker until a signal ends it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import final

import trio
from rich.console import Console
from rich.text import Text

from supervise.cli import exit_codes
from supervise.cli.signals import Signals
from supervise.cli.stdout import Stdout
from supervise.cli.told import is_screen, show_event
from supervise.cli.view import COLOURS, say, seen
from supervise.cli.worker_view import WorkerPicture, draw
from supervise.dispatch.dispatcher import Observer
from supervise.dispatch.worker import Worker, open_worker
from supervise.events import Event, WorkerChanged
from supervise.job.bus import Subscription
from supervise.observe.describe import describe
from supervise.settings import Settings


async def run(name: str, settings: Settings, json: bool, *, console: Console) -> int:
    """Run a worker until it is drained; the exit code.

    Args:
        name: the worker's.
        settings: all bounds.
        json: events as lines of JSON on standard output, and nothing else there.
        console: where people look (standard error).
    """
    signals = Signals()
    ending: Ending | None = None
    with ExitStack() as stack:
        stack.enter_context(signals.watch())
        emit = _metrics(settings, stack, console)
        picture = WorkerPicture(name) if is_screen(console) and not json else None
        observe: Observer = picture.observe if picture else lambda task, event: None
        with signals.preparation:  # it may wait for its lock
            async with open_worker(name, settings=settings, emit=emit, observe=observe) as worker:
                ending = Ending(worker)
                signals.belong_to(ending)
                say(console, f"supervise: worker {name} takes tasks from {worker.root / 'tasks' / name}", "dim")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_show, worker, json, picture, console)
                    await worker.stopped()
    await seen(console)
    if ending is None:  # a signal came before there was anything to drain
        return exit_codes.COMPLETED
    if ending.step > 1 and signals.ended_by is not None:
        return exit_codes.of_signal(signals.ended_by)
    return exit_codes.FAILED if worker.put_back or worker.unpublished else exit_codes.COMPLETED


@final
class Ending:
    """The first signal drains the worker, the second cancels its tasks, each further one hurries them."""

    def __init__(self, worker: Worker) -> None:
        self.step = 0
        self._worker = worker

    def cancel(self, reason: str) -> None:
        """See the class."""
        self.step += 1
        if self.step == 1:
            self._worker.drain()
        else:
            self._worker.cancel()


def _metrics(settings: Settings, stack: ExitStack, console: Console) -> Callable[[Event], None]:
    if settings.worker.metrics_port is None:
        return lambda event: None
    from supervise.observe.metrics import Metrics, served

    metrics = Metrics()
    port = stack.enter_context(served(metrics, settings.http.host, settings.worker.metrics_port))
    say(console, f"supervise: metrics at http://{settings.http.host}:{port}/metrics", "dim")
    return metrics.observe


async def _show(worker: Worker, json: bool, picture: WorkerPicture | None, console: Console) -> None:
    def lost() -> None:
        why = stdout.trouble or "its reader has gone away"
        say(console, f"supervise: standard output cannot be written to: {why}; the worker goes on without it", "red")

    stdout = Stdout(1, lost)
    async with worker.subscribe() as events:
        if json:  # a reader who goes away, or takes nothing, keeps no task from its work
            await stdout.json_lines(events)
        elif picture is not None:
            await draw(events, picture, console)
        else:
            await _lines(events, console)


async def _lines(events: Subscription, console: Console) -> None:
    last = ""
    async for event in events:
        if isinstance(event, WorkerChanged):
            if event.status == last:
                continue
            last = event.status
        line = describe(event)
        if line is not None:
            who, what, mood = line
            text = Text(f"{_clock(event)}  {who:<16} {what}", COLOURS[mood])
            show_event(console, event, who, what, COLOURS[mood], text)


def _clock(event: Event) -> str:
    return time.strftime("%H:%M:%S", time.localtime(event.time))
