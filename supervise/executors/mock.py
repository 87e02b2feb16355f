"""Run nothing: what a job would give is made up. For tests of whoever embeds this library, and for benchmarks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import final

import trio

from supervise.executors.protocol import Observer
from supervise.model import JobResult, JobSpec, Outcome

__all__ = ["MockExecutor"]

Script = Callable[[JobSpec], JobResult | Awaitable[JobResult]]


@final
class MockExecutor:
    """An `Executor` that starts no process.

    Args:
        script: makes a spec its result, or an awaitable of one. Without it, every job completes.
        seconds: how long each job takes, before the script is asked.

    Attributes:
        executed: the last 1,000 specs, in the order of their beginning.
    """

    name = "mock"

    def __init__(self, script: Script | None = None, *, seconds: float = 0.0) -> None:
        self.executed: deque[JobSpec] = deque(maxlen=1000)
        self._script = script
        self._seconds = seconds

    async def execute(self, spec: JobSpec, observer: Observer) -> JobResult:
        """See `Executor.execute`. No event is told."""
        began = time.time()
        self.executed.append(spec)
        await trio.sleep(self._seconds)
        if self._script is not None:
            result = self._script(spec)
            return await result if isinstance(result, Awaitable) else result
        return JobResult(
            job_id=spec.job_id,
            outcome=Outcome.COMPLETED,
            text="mock",
            started_at=began,
            ended_at=time.time(),
            labels=dict(spec.labels),
        )
