"""`supervise demo`: the main job on real input, with nothing else installed, and a proof at its end."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO, cast

import trio
from rich.console import Console

from supervise.cli import exit_codes
from supervise.cli.kill import KillAsJson, KillForPeople
from supervise.cli.signals import Signals
from supervise.cli.stdout import Stdout
from supervise.cli.streams import Screen
from supervise.cli.view import follow, say, seen, tell
from supervise.codec import rfc3339
from supervise.demo.scene import CANCEL_AFTER, FAULTS, End, Scene, set_up
from supervise.errors import SuperviseError
from supervise.events import AgentToolUse
from supervise.job.handle import Job
from supervise.job.supervisor import open_job
from supervise.model import JobResult


async def run(fault: str | None, keep: bool, json: bool, *, console: Console) -> int:
    """Run the demo and return its exit code: 0 if it ended with the proof, or with the stale mark it promised.

    Args:
        fault: one of `FAULTS`, or None.
        keep: leave the scratch directory there.
        json: events, the proof and the result as lines of JSON on standard output.
        console: standard error, for complaints.
    """
    signals = Signals()
    with signals.watch():
        try:
            scratch = Path(tempfile.mkdtemp(prefix="supervise-demo-"))
        except OSError as error:
            raise SuperviseError(f"the demo needs a directory for temporary files: {error.strerror}") from error
        try:
            return await _run(scratch, fault, json, console, signals)
        finally:
            if keep:
                say(console, f"supervise: kept {scratch}")
            else:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(shutil.rmtree, scratch)


async def _run(scratch: Path, fault: str | None, json: bool, console: Console, signals: Signals) -> int:
    with signals.preparation:
        scene = await set_up(scratch, fault)
    if signals.preparation.cancelled_caught and signals.ended_by is not None:
        return exit_codes.of_signal(signals.ended_by)
    token = trio.lowlevel.current_trio_token()
    screen = Screen(sys.stdout, lambda: token.run_sync_soon(signals.pipe_closed))
    # Where both are one terminal, one console draws on it.
    people = console if screen.isatty() and console.is_terminal else Console(file=cast("TextIO", screen))
    if not json:
        what = FAULTS[fault] if fault else "a job whose index watch sees every edit"
        tell(people, f"supervise demo · {what}", "bold")
        say(people, f"{scene.workspace}: {scene.about}", "dim")
    spec = scene.spec()
    as_promised = True
    if fault == "kill":
        with signals.preparation_again():
            show = KillAsJson(signals) if json else KillForPeople(people)
            as_promised = await show.run(scene)
        if signals.ended_by is not None:
            return exit_codes.of_signal(signals.ended_by)
        spec = scene.next_spec()
    async with open_job(spec, settings=scene.settings) as job, job.subscribe() as events:
        signals.belong_to(job)
        async with trio.open_nursery() as nursery:
            if fault == "cancel":
                nursery.start_soon(_cancel, job)
            if json:
                stdout = Stdout(1, signals.pipe_closed)
                await stdout.json_lines(events, last=lambda result: _proof_event(scene, result))
            else:
                await follow(events, people, f"the job's nursery · {job.job_id}")
            nursery.cancel_scope.cancel()
    end = await scene.end()
    if not json:
        _tell(end, job.result_nowait(), people)
        await seen(people)
    if signals.ended_by is not None:
        return exit_codes.of_signal(signals.ended_by)
    return exit_codes.COMPLETED if end.as_promised and as_promised else exit_codes.FAILED


async def _cancel(job: Job) -> None:
    used = 0
    async with job.subscribe() as events:
        async for event in events:
            used += isinstance(event, AgentToolUse)
            if used == CANCEL_AFTER:
                job.cancel("the demo was asked to show it")
                return


async def _proof_event(scene: Scene, result: JobResult) -> dict[str, Any]:
    end = await scene.end()
    return {
        "type": "proof",
        "time": rfc3339(time.time()),
        "job_id": result.job_id,
        "equal": end.proof.equal,
        "files": end.proof.files,
        "differences": list(end.proof.differences),
        "stale_mark": end.mark is not None,
    }


def _tell(end: End, result: JobResult, people: Console) -> None:
    proof = end.proof
    if proof.equal:
        equal = f"proof: the index equals the files, digest by digest: {proof.files} files, 0 differences"
        tell(people, equal, "bold green")
    else:
        some = "; ".join(proof.differences[:5])
        count = len(proof.differences)
        tell(people, f"proof: the index differs from the files: {count} differences: {some}", "yellow")
    if end.mark is not None:
        tell(people, f"stale mark: {result.index.reason}; the next job here reconciles first", "yellow")
        say(people, f"{end.mark} says so on the disk", "dim")
    tell(people, f"survivors: {len(result.survivors)}", "bold red" if result.survivors else "bold green")
    if not end.as_promised:
        tell(people, "the index differs and nothing on the disk says so: this is a bug in supervise", "bold red")
