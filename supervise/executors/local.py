"""Run jobs in this process."""

from __future__ import annotations

from typing import final

import trio

from supervise.executors.protocol import Observer
from supervise.job.bus import Subscription
from supervise.job.supervisor import Supervisor
from supervise.model import JobResult, JobSpec

__all__ = ["LocalExecutor"]


@final
class LocalExecutor:
    """An `Executor` that runs each job under a supervisor which somebody else has opened.

    Args:
        supervisor: its limit, containment and state directory are the jobs'.
    """

    name = "local"

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def execute(self, spec: JobSpec, observer: Observer) -> JobResult:
        """See `Executor.execute`."""
        async with self._supervisor.open_job(spec) as job, job.subscribe() as events:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_tell, events, observer)
                await events.job_ended()
            return job.result_nowait()


async def _tell(events: Subscription, observer: Observer) -> None:
    async for event in events:
        observer(event)
