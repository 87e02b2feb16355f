"""What the command line's exit codes mean."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervise.model import JobResult

COMPLETED = 0
FAILED = 1
USAGE = 2
TIMED_OUT = 124
BROKEN_PIPE = 128 + signal.SIGPIPE


def of_signal(number: int) -> int:
    """130 for SIGINT, 143 for SIGTERM: as a shell tells of a process that died of it."""
    return 128 + number


def of_result(result: JobResult, ended_by: int | None) -> int:
    """The exit code of a job.

    Args:
        result: what came out of it.
        ended_by: the signal that we were sent, or SIGPIPE for a reader who went away.
    """
    from supervise.model import Outcome  # here, since the help needs none of it

    match result.outcome:
        case Outcome.COMPLETED:
            return COMPLETED
        case Outcome.TIMED_OUT:
            return TIMED_OUT
        case Outcome.CANCELLED if ended_by is not None:
            return of_signal(ended_by)
    return FAILED
