"""Who runs a job: here, in a test's imagination, or elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from supervise.events import Event
from supervise.model import JobResult, JobSpec

Observer = Callable[[Event], None]


class Executor(Protocol):
    """Runs jobs."""

    @property
    def name(self) -> str:
        """What it is called in results and logs."""

    async def execute(self, spec: JobSpec, observer: Observer) -> JobResult:
        """Run one job to its end.

        Args:
            spec: what to do.
            observer: called with each event. It must not raise, and not block.

        Returns:
            The result, whatever the outcome.

        Raises:
            SpecError, BadInput: it cannot be run, and never will be.
            SuperviseError: it could not be run at all now: a directory that cannot be written, an executor that is
                closed.

        Cancelling ends the job, waits for its bounded teardown, and propagates. But a job that had come to its own
        end by then is not lost: its result is returned.
        """
