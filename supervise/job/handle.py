"""The handle of a job: what callers hold. It is cheap, and it knows no process."""

from __future__ import annotations

from enum import StrEnum
from typing import final

import trio

from supervise.errors import JobNotDone
from supervise.events import CancelRequested, Event, JobFinished, StateChanged
from supervise.job.bus import Bus, Subscription
from supervise.model import IndexStatus, JobResult, JobSpec
from supervise.processes.hurry import Hurry

__all__ = ["Job", "JobState"]


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"  # waits for a place among the supervisor's jobs
    STARTING = "starting"  # the index comes up
    RUNNING = "running"  # the agent works
    STOPPING = "stopping"  # the job was cancelled: its agent is being ended
    SETTLING = "settling"  # the agent's tree is empty: the watch ends, the index is reconciled
    DONE = "done"


@final
class Job:
    """A job under way, or ended. Made by `open_job`, `run_job` and `Supervisor`; not by hand.

    Attributes:
        spec: what was asked for.
        state: where the job is now.
        index_status: what is known of its index now.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.state = JobState.QUEUED
        self.index_status = IndexStatus.NONE
        self.cancel_reason: str | None = None
        self._bus = Bus(spec.job_id)
        self._scope = trio.CancelScope()
        self._hurry = Hurry()
        self._cancels = 0
        self._spawned = trio.Event()
        self._done = trio.Event()
        self._result: JobResult | None = None

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.spec.job_id

    def cancel(self, reason: str = "the caller cancelled it") -> None:
        """Ask the job to end; returns at once.

        The agent's tree is ended by the stop policy, then the watch is, and the result says `cancelled`. Called
        again, it goes to the next step of the stop policy at once. Of a job that is done, nothing is asked.

        Args:
            reason: told in the result and the events.
        """
        if self._done.is_set():
            return
        self._cancels += 1
        self._publish(CancelRequested(reason=reason, step=self._cancels))
        if self._cancels == 1:
            self.cancel_reason = reason
            self._scope.cancel()
        else:
            self._hurry.next()

    def subscribe(self) -> Subscription:
        """The job's events for one reader, from its beginning; see `Subscription`. Any number of readers."""
        return self._bus.subscribe()

    async def spawned(self) -> None:
        """Wait until the agent runs, or the job has ended without. Cancelling ends the wait only."""
        await self._spawned.wait()

    async def result(self) -> JobResult:
        """Wait for the end. Cancelling ends the wait only, not the job."""
        await self._done.wait()
        return self.result_nowait()

    def result_nowait(self) -> JobResult:
        """The result.

        Raises:
            JobNotDone: the job has not ended.
        """
        if self._result is None:
            raise JobNotDone(f"job {self.job_id} has no result yet: it is {self.state.value}; await job.result()")
        return self._result

    def __repr__(self) -> str:
        return f"<Job {self.job_id} {self.state.value}>"

    # --- for the job's nursery ----------------------------------------------------------------------------

    def _publish(self, event: Event) -> None:
        self._bus.publish(event)

    def _enter(self, state: JobState) -> None:
        if state is not self.state:
            self.state = state
            self._publish(StateChanged(state=state.value))

    def _finish(self, result: JobResult) -> None:
        self._result = result
        self._enter(JobState.DONE)
        self._publish(JobFinished(result=result))
        self._bus.close()
        self._spawned.set()
        self._done.set()
