"""`supervise run`: one real job."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from supervise.cli import exit_codes
from supervise.cli.signals import Signals
from supervise.cli.stdout import Stdout
from supervise.cli.view import follow, say
from supervise.errors import SpecError
from supervise.job.supervisor import open_job
from supervise.log_context import telling_of
from supervise.model import JobResult, JobSpec, Outcome
from supervise.settings import Settings

STDOUT = 1


async def run(spec: JobSpec, settings: Settings, json: bool, *, console: Console) -> int:
    """Run a job, show it, and return the exit code.

    Args:
        spec: what to do.
        settings: all bounds.
        json: events and result as lines of JSON on standard output, and nothing else there.
        console: where people look (standard error).
    """
    signals = Signals()
    with signals.watch():
        async with open_job(spec, settings=settings) as job, job.subscribe() as events:
            signals.belong_to(job)
            stdout = Stdout(STDOUT, signals.pipe_closed)
            if json:
                written = await stdout.json_lines(events)
            else:
                await follow(events, console, f"supervise run · {job.job_id}")
                written = await stdout.text(_text(await job.result()))
            directory = settings.state_dir / "jobs" / job.job_id
            if not json:
                tell_result(job.result_nowait(), directory, console)
            where = directory / "result.json"
            if not written:
                say(console, f"supervise: nobody reads standard output; the result is in {where}", "red")
            elif stdout.trouble:
                told = f"standard output cannot be written to: {stdout.trouble}; the result is in {where}"
                say(console, f"supervise: {told}", "red")
    return stdout.exit_code(exit_codes.of_result(job.result_nowait(), signals.ended_by))


def read_prompt(words: str | None, example: str = "supervise run") -> str:
    """The prompt of the command line; `-` and nothing mean standard input. `example` is the command that asks."""
    if words is not None and words != "-":
        return words
    if sys.stdin is None or (words is None and sys.stdin.isatty()):
        raise SpecError(f'no prompt was given; write one, as in: {example} "Add tests for the parser."')
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = error.start
    raise SpecError(f"the prompt on standard input is not UTF-8 (byte {place}); convert it")


def _text(result: JobResult) -> bytes:
    text = result.text
    if os.isatty(STDOUT):  # an agent shall not steer somebody's terminal
        text = "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in text)
    return (text if not text or text.endswith("\n") else text + "\n").encode("utf-8", "replace")


def tell_result(result: JobResult, directory: Path, console: Console) -> None:
    with telling_of(job_id=result.job_id):
        _tell_end(result, directory, console)


def _tell_end(result: JobResult, directory: Path, console: Console) -> None:
    if result.outcome is not Outcome.COMPLETED:
        say(console, f"supervise: {result.error}", "red")
    if result.index.stale:
        why = result.index.status.value + (f": {result.index.reason}" if result.index.reason else "")
        say(console, f"supervise: the index is marked stale ({why}); the next job reconciles it first", "yellow")
    for survivor in result.survivors:
        say(console, f"supervise: process {survivor.pid} lives on: {survivor.reason}", "red")
    say(console, f"supervise: logs in {directory}", "dim")
