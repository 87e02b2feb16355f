"""What becomes of a task after an attempt. Pure: the clock and chance are handed in.

outcome                          the task                       the breaker
completed                        result                         success
timed out                        result (exit code 124)         failure
cancelled                        result                         -
failed: quota                    waits for the reset, uncounted - (the worker pauses)
failed: retryable                waits for its next attempt     failure
        … and was the last one   dead letter                    failure
failed: anything else            dead letter                    failure
"""

from __future__ import annotations

from attrs import frozen

from supervise.dispatch.backoff import RETRYABLE, Backoff
from supervise.dispatch.task import Task
from supervise.model import FailureKind, JobResult, Outcome

__all__ = ["Bury", "Decision", "Finish", "Pause", "Policy", "Retry"]

MAX_RETRIES = "max_retries_exceeded"
INVALID = "invalid_format"


@frozen
class Finish:
    """Publish the result."""


@frozen
class Retry:
    """Try again at `at`, in seconds since the epoch, or later."""

    at: float


@frozen
class Bury:
    """Make a dead letter of it."""

    reason: str


@frozen
class Pause:
    """Nobody can work until `until`, in seconds since the epoch: the task waits, and so does the worker."""

    until: float


Decision = Finish | Retry | Bury | Pause


@frozen(kw_only=True)
class Policy:
    """The rules.

    Attributes:
        max_attempts: of a task that does not say.
        backoff: pauses between attempts.
        quota_pause: seconds to wait at a quota that does not say when it resets.
        longest_quota_pause: seconds; a reset that lies further off is not believed.
    """

    max_attempts: int
    backoff: Backoff
    quota_pause: float
    longest_quota_pause: float

    def after(self, task: Task, attempt: int, result: JobResult, *, now: float, chance: float) -> Decision:
        """What becomes of the task.

        Args:
            task: it.
            attempt: the number of the one that has ended.
            result: what came of it.
            now: seconds since the epoch.
            chance: a number from 0 to 1, drawn anew.
        """
        if result.outcome is not Outcome.FAILED:
            return Finish()
        kind = result.failure_kind or FailureKind.AGENT_ERROR
        if kind is FailureKind.QUOTA:
            return Pause(self._reset(result.reset_at, now))
        if kind not in RETRYABLE:
            return Bury(kind.value)
        return self.after_failure(task, attempt, now=now, chance=chance)

    def limit(self, task: Task) -> int:
        """How many attempts at the task there may be."""
        return task.max_attempts or self.max_attempts

    def after_failure(self, task: Task, attempt: int, *, now: float, chance: float) -> Retry | Bury:
        """What becomes of a task after a failure that another attempt may not have: a worker's death, for one."""
        if attempt >= self.limit(task):
            return Bury(MAX_RETRIES)
        return Retry(now + self.backoff.pause(attempt, chance))

    def _reset(self, reset_at: float | None, now: float) -> float:
        if reset_at is None or reset_at <= now:
            return now + self.quota_pause
        return min(reset_at, now + self.longest_quota_pause)


def counts_for_breaker(result: JobResult) -> bool | None:
    """Whether it speaks for (True) or against (False) whoever does the work; None if it says nothing."""
    if result.outcome is Outcome.COMPLETED:
        return True
    if result.outcome is Outcome.CANCELLED or result.failure_kind is FailureKind.QUOTA:
        return None
    return False
