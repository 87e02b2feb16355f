"""Every error that `supervise` raises. One root: `SuperviseError`.

A message says what happened, to which thing, and what to do about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from supervise.model import JobResult

__all__ = [
    "AlreadyRunning",
    "BadInput",
    "IllegalTransition",
    "JobFailed",
    "JobNotDone",
    "MissingExtra",
    "SettingsError",
    "SpawnError",
    "SpecError",
    "SuperviseError",
    "UnsupportedPlatform",
]


class SuperviseError(Exception):
    """Root of all errors of this library."""


class SpecError(SuperviseError, ValueError):
    """A value of a spec breaks its rule. The message names field, value and rule."""


class SettingsError(SuperviseError, ValueError):
    """A setting is unknown or has a bad value, or a settings file does not parse."""


class BadInput(SuperviseError, ValueError):
    """Input from outside (JSON, a file) is not what it should be."""


class IllegalTransition(SuperviseError):
    """An event arrived in a state that has no transition for it: a bug, not a user's mistake."""

    def __init__(self, state: str, event: str) -> None:
        super().__init__(f"event {event!r} is not legal in state {state!r}: no such row in the transition table")
        self.state = state
        self.event = event


class SpawnError(SuperviseError):
    """A program could not be started.

    Attributes:
        program: the program as it was asked for (`argv[0]`).
        kind: `not_found`, `not_executable`, `bad_format`, `bad_cwd`, `user`, `limit` or `other`.
    """

    def __init__(self, program: str, kind: str, message: str) -> None:
        super().__init__(message)
        self.program = program
        self.kind = kind


class AlreadyRunning(SuperviseError):
    """Somebody else has the lock of a single instance, or may have: its file names a living process.

    Attributes:
        path: the lock file.
        pid: of whoever has it; `None` if neither the kernel nor the file says.
        locked: whether the file is locked; else it only names the process.
    """

    def __init__(self, path: Path, pid: int | None, *, locked: bool = True) -> None:
        if locked:
            what = f"{path} is locked; end that one, or wait for it (--lock-timeout)"
        else:
            what = (
                f"{path} is not locked, but names this living process, which may have written it; end it, or remove "
                "the file if the process is another program's, or name another lock file (--lock-file)"
            )
        super().__init__(f"already running (PID {pid or 'unknown'}): {what}")
        self.path = path
        self.pid = pid
        self.locked = locked


class JobNotDone(SuperviseError):
    """`Job.result_nowait()` was called before the job had ended."""


class JobFailed(SuperviseError):
    """Raised by `JobResult.raise_for_outcome()` for every outcome but `completed`.

    Attributes:
        result: the whole `JobResult`.
    """

    def __init__(self, result: JobResult) -> None:
        kind = f" ({result.failure_kind.value})" if result.failure_kind else ""
        detail = f": {result.error}" if result.error else ""
        super().__init__(f"job {result.job_id} {result.outcome.value}{kind}{detail}")
        self.result = result


class MissingExtra(SuperviseError, ImportError):
    """An optional part was used whose packages are not installed."""

    def __init__(self, part: str, extra: str, missing: str) -> None:
        super().__init__(
            f"{part} needs the package {missing!r}, which is not installed; "
            f"install it with: pip install 'trio-supervise[{extra}]'"
        )
        self.extra = extra


class UnsupportedPlatform(SuperviseError):
    """This operating system lacks what supervision needs."""
