"""`supervise run`: one real job."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio
from rich.console import Console

from supervise.cli import exit_codes
from supervise.cli.signals import Signals
from supervise.cli.stdout import Stdout
from supervise.cli.view import follow
from supervise.job.supervisor import open_job
from supervise.model import JobResult, JobSpec, Outcome
from supervise.settings import Settings


async def run(spec: JobSpec, settings: Settings, json: bool, *, console: Console) -> int:
    """Run a job, show it, and return the exit code.

    Args:
        spec: what to do.
        settings: all bounds.
        json: events and result as lines of JSON on standard output, and nothing else there.
        console: where people look (standard error).
    """
    async with open_job(spec, settings=settings) as job, job.subscribe() as events, trio.open_nursery() as nursery:
        signals = Signals(job)
        await nursery.start(signals.watch)
        stdout = Stdout(sys.stdout.fileno(), signals.pipe_closed)
        if json:
            if not await stdout.json_lines(events) and not stdout.closed:
                where = settings.state_dir / "jobs" / job.job_id / "result.json"
                console.print(f"standard output is blocked: its lines were given up; the result is in {where}")
        else:
            await follow(events, console, f"supervise run · {job.job_id}")
            result = await job.result()
            with trio.move_on_after(30):
                await stdout.write(_text(result))
            _tell(result, settings, console)
        nursery.cancel_scope.cancel()
    return exit_codes.of_result(job.result_nowait(), signals.ended_by)


def read_prompt(words: str | None) -> str:
    """The prompt of the command line; `-` and nothing mean standard input."""
    if words is not None and words != "-":
        return words
    if sys.stdin is None or (words is None and os.isatty(sys.stdin.fileno())):
        return ""
    return sys.stdin.read()


def log_directory(settings: Settings, job_id: str) -> Path:
    """Where a job's logs are."""
    return settings.state_dir / "jobs" / job_id


def _text(result: JobResult) -> bytes:
    text = result.text
    return (text if not text or text.endswith("\n") else text + "\n").encode("utf-8", "replace")


def _tell(result: JobResult, settings: Settings, console: Console) -> None:
    if result.outcome is not Outcome.COMPLETED:
        console.print(f"supervise: {result.error}", style="red", highlight=False, soft_wrap=True)
    if result.index.stale:
        why = result.index.status.value + (f": {result.index.reason}" if result.index.reason else "")
        console.print(
            f"supervise: the index is marked stale ({why}); the next job reconciles it first",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    for survivor in result.survivors:
        console.print(f"supervise: process {survivor.pid} lives on: {survivor.reason}", style="red", highlight=False)
    console.print(f"supervise: logs in {log_directory(settings, result.job_id)}", style="dim", highlight=False)
