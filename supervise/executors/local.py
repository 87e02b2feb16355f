"""Run jobs in this process."""

from __future__ import annotations

from typing import final

import trio

from supervise.executors.protocol import Observer
from supervise.job.bus import Subscription
from supervise.job.handle import Job
from supervise.job.supervisor import Supervisor
from supervise.model import JobResult, JobSpec, Outcome

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
        job: Job | None = None
        try:
            async with (
                self._supervisor.open_job(spec) as job,
                job.subscribe() as events,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(_tell, events, observer)
                await events.job_ended()
        except BaseException as error:
            # The block is left when the job has ended. Perhaps its agent was done when the cancellation came, and its
            # index was not: then the work is there, and would be done twice.
            if job is None or not _is_cancellation(error) or job.result_nowait().outcome is Outcome.CANCELLED:
                raise
        return job.result_nowait()


async def _tell(events: Subscription, observer: Observer) -> None:
    async for event in events:
        observer(event)


def _is_cancellation(error: BaseException) -> bool:
    """And nothing else. Nurseries wrap it."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)
