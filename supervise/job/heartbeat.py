"""The heartbeat of a job: every so often, what is alive and when the agent last made progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import trio

from supervise import durable
from supervise.codec import event_to_json, to_line
from supervise.events import Heartbeat, ProcessBeat
from supervise.job.handle import Job
from supervise.job.threads import in_thread
from supervise.processes.child import ProcessTree

log = logging.getLogger("supervise.job")

#: The file, in the job's directory.
HEARTBEAT = "heartbeat.json"


class Pulse(Protocol):
    """What the agent's run tells of itself."""

    lines: int
    last_progress: float | None  # on Trio's clock, seconds


@trio.lowlevel.enable_ki_protection
async def beat(
    job: Job,
    pulse: Pulse,
    trees: Callable[[], Sequence[ProcessTree]],
    directory: Path,
    interval: float,
    scope: trio.CancelScope,
) -> None:
    """Beat every `interval` seconds, until `scope` is cancelled: also while the job is being torn down.

    Each beat is an event and, as JSON, the file `heartbeat.json` in `directory` (replaced whole).
    """
    began = trio.current_time()
    with scope:
        while True:
            try:  # without a free descriptor, not even /proc can be read; the job goes on all the same
                heartbeat = _look(job, pulse, trees(), trio.current_time() - began)
                job._publish(heartbeat)
                data = to_line({**event_to_json(heartbeat), "time": time.time(), "job_id": job.job_id})
                await in_thread(_write, directory / HEARTBEAT, data)
            except OSError as error:
                log.warning("job %s: its heartbeat failed: %s", job.job_id, error.strerror)
            await trio.sleep(interval)


def _write(path: Path, data: bytes) -> None:
    durable.replace(path, data, durable=False)


def _look(job: Job, pulse: Pulse, trees: Sequence[ProcessTree], uptime: float) -> Heartbeat:
    beats = [
        ProcessBeat(
            role=tree.role,
            pid=process.pid,
            start_time=process.start_time,
            state=process.state,
            rss_bytes=process.rss_bytes,
            cpu_seconds=process.cpu_seconds,
        )
        for tree in trees
        for process in tree.members()
    ]
    silent = None if pulse.last_progress is None else trio.current_time() - pulse.last_progress
    return Heartbeat(
        state=job.state.value,
        index_status=job.index_status,
        uptime=uptime,
        agent_silent_seconds=silent,
        agent_lines=pulse.lines,
        rss_bytes=sum(each.rss_bytes for each in beats),
        cpu_seconds=sum(each.cpu_seconds for each in beats),
        containment=trees[0].tier if trees else "",
        processes=tuple(beats),
    )
