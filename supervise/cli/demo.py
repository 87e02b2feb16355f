"""`supervise demo`: the main job on real input, with nothing else installed, and a proof at its end."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.text import Text

from supervise.cli import exit_codes
from supervise.cli.signals import Signals
from supervise.cli.stdout import Stdout
from supervise.cli.view import follow
from supervise.codec import rfc3339
from supervise.demo.scene import CANCEL_AFTER, FAULTS, End, Scene, set_up
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
    scratch = Path(tempfile.mkdtemp(prefix="supervise-demo-"))
    try:
        return await _run(scratch, fault, json, console)
    finally:
        if keep:
            console.print(f"supervise: kept {scratch}", highlight=False, soft_wrap=True)
        else:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(shutil.rmtree, scratch)


async def _run(scratch: Path, fault: str | None, json: bool, console: Console) -> int:
    scene = await set_up(scratch, fault)
    people = Console()
    if not json:
        what = FAULTS[fault] if fault else "a job whose index watch sees every edit"
        people.print(f"[bold]supervise demo[/] · {what}", highlight=False, soft_wrap=True)
        people.print(f"[dim]{scene.workspace}: {scene.about}[/]", highlight=False, soft_wrap=True)
    settings = scene.settings
    async with (
        open_job(scene.spec(), settings=settings) as job,
        job.subscribe() as events,
        trio.open_nursery() as nursery,
    ):
        signals = Signals(job)
        await nursery.start(signals.watch)
        if fault == "cancel":
            nursery.start_soon(_cancel, job)
        stdout = Stdout(sys.stdout.fileno(), signals.pipe_closed)
        if json:
            await stdout.json_lines(events, last=lambda result: _proof_event(scene, result))
        else:
            await follow(events, people, f"the job's nursery · {job.job_id}")
        nursery.cancel_scope.cancel()
    end = await scene.end()
    if not json:
        _tell(end, job.result_nowait(), people)
    if signals.ended_by is not None:
        return exit_codes.of_signal(signals.ended_by)
    return exit_codes.COMPLETED if end.as_promised else exit_codes.FAILED


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
    def say(text: str, style: str) -> None:
        people.print(Text(text, style), highlight=False, soft_wrap=True)

    proof = end.proof
    if proof.equal:
        say(f"proof: the index equals the files, digest by digest: {proof.files} files, 0 differences", "bold green")
    else:
        some = "; ".join(proof.differences[:5])
        say(f"proof: the index differs from the files: {len(proof.differences)} differences: {some}", "yellow")
    if end.mark is not None:
        say(f"stale mark: {end.mark} is on the disk ({result.index.reason})", "yellow")
        say("the next job in this workspace reconciles before it watches", "yellow")
    say(f"survivors: {len(result.survivors)}", "bold red" if result.survivors else "bold green")
    if not end.as_promised:
        say("the index differs and nothing on the disk says so: this is a bug in supervise", "bold red")
