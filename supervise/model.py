"""The values that go into a job and come out of it. attrs, frozen, validated; no Trio, no I/O."""

from __future__ import annotations

import math
import os
import re
import secrets
import signal
import stat
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Protocol, runtime_checkable

from attrs import Factory, field, frozen

from supervise.errors import JobFailed, SpecError
from supervise.rules import Validator, is_environment, rules
from supervise.settings import IndexSettings

__all__ = [
    "AgentReport",
    "ExitStatus",
    "FailureKind",
    "IndexReport",
    "IndexStatus",
    "JobResult",
    "JobSpec",
    "Leftover",
    "Limits",
    "Outcome",
    "StopPolicy",
    "Survivor",
    "SweepReport",
    "Usage",
    "WatchMetrics",
    "new_job_id",
]

_r = rules(SpecError)
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Outcome(StrEnum):
    """How a job ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


class FailureKind(StrEnum):
    """Why a job failed."""

    AGENT_ERROR = "agent_error"
    AUTH = "auth"
    QUOTA = "quota"
    OVERLOADED = "overloaded"
    NETWORK = "network"
    REFUSED = "refused"
    BUDGET = "budget"
    MAX_TURNS = "max_turns"
    STALLED = "stalled"
    BAD_OUTPUT = "bad_output"
    SPAWN = "spawn"
    KILLED = "killed"


class IndexStatus(StrEnum):
    """What is known of the index. The first five are final, `watching` and `reconciling_fallback` are live.

    `watching` is also the last word on a job that leaves a shared watch to others: the last one out settles the index.
    """

    NONE = "none"
    WATCH_TERMINATED = "watch_terminated"
    READY_VIA_FALLBACK = "ready_via_fallback"
    STALE = "stale"
    FAILED = "failed"
    WATCHING = "watching"
    RECONCILING_FALLBACK = "reconciling_fallback"


@frozen
class ExitStatus:
    """How a process ended: an exit code 0-255, or the name of the signal that ended it."""

    code: int | None = None
    signal: str | None = None

    @classmethod
    def of_signal(cls, number: int) -> ExitStatus:
        """The status of a process that died of signal `number`."""
        try:
            return cls(signal=signal.Signals(number).name)
        except ValueError:  # a real-time signal has no name in Python
            return cls(signal=f"SIG{number}")

    @property
    def ok(self) -> bool:
        """Exit code 0."""
        return self.code == 0

    def __str__(self) -> str:
        return f"exit code {self.code}" if self.signal is None else f"signal {self.signal}"


# The converters leave alone what they do not understand: the validator behind them can name the field.


def _steps(value: Sequence[tuple[int, float]]) -> tuple[tuple[signal.Signals, float], ...]:
    try:
        return tuple((signal.Signals(number), float(grace)) for number, grace in value)
    except (TypeError, ValueError, OverflowError):
        return value  # type: ignore[return-value]  # left to the validator


def _are_steps(value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(step, tuple)
        and len(step) == 2
        and isinstance(step[0], signal.Signals)
        and isinstance(step[1], float)
        and 0 <= step[1] < math.inf
        for step in value
    )


@frozen
class StopPolicy:
    """How a tree of processes is ended: each (signal, grace in seconds) in turn, SIGKILL at the end.

    Attributes:
        steps: signals with the time that the tree is given to end after each, in seconds.
        kill_wait: how long the tree is waited for after SIGKILL, in seconds. What still lives then is
            reported as a survivor.
    """

    steps: tuple[tuple[signal.Signals, float], ...] = field(
        default=((signal.SIGTERM, 10.0),),
        converter=_steps,
        validator=_r.check(_are_steps, "steps of a signal and a grace of 0 s or more"),
    )
    kill_wait: float = field(default=5.0, validator=_r.positive("seconds"))


_whole = _r.check(lambda v: type(v) is int, "a whole number")


@frozen
class Usage:
    """Tokens as the agent reported them; never an estimate."""

    input_tokens: int = field(default=0, validator=_whole)
    output_tokens: int = field(default=0, validator=_whole)
    cache_read_tokens: int = field(default=0, validator=_whole)
    cache_creation_tokens: int = field(default=0, validator=_whole)


@frozen
class Survivor:
    """A process that could not be ended within `kill_wait`."""

    pid: int
    start_time: float  # seconds since the epoch
    command: str
    role: str
    reason: str


@frozen
class Leftover:
    """A process that an earlier supervisor, killed since, has left."""

    pid: int
    start_time: float  # seconds since the epoch
    command: str


@frozen(kw_only=True)
class SweepReport:
    """What the sweep at a supervisor's start has found.

    Attributes:
        supervisors: how many supervisors had ended without taking back their records.
        found: the processes that they had left.
        survivors: those of them that could not be ended.
        groups: how many cgroups of theirs were removed.
    """

    supervisors: int = 0
    found: tuple[Leftover, ...] = ()
    survivors: tuple[Survivor, ...] = ()
    groups: int = 0


def _least(least: int, rule: str) -> Validator:
    return _r.check(lambda v: v is None or (type(v) is int and v >= least), rule)


@frozen(kw_only=True)
class Limits:
    """Bounds for all processes of a job's agent together, kept by the kernel's cgroup controllers.

    The index is not bounded by them: its watch may be shared with other jobs, and belongs to none.
    A controller that is not enabled yet is enabled in `cgroup.subtree_control` of the group that holds the
    supervisor's, and stays so.

    Attributes:
        memory_bytes: memory, in bytes; past it the kernel kills. Swap is limited to 0 with it. `None` for no limit.
        processes: processes and threads at a time; past it no more can be forked. `None` for no limit.

    Raises:
        SpecError: a limit below what any program needs.
    """

    memory_bytes: int | None = field(default=None, validator=_least(1 << 20, "bytes, 1 MiB (1048576) or more, or None"))
    processes: int | None = field(default=None, validator=_least(1, "a whole number, 1 or more, or None"))

    def __bool__(self) -> bool:
        """Whether there is any."""
        return self.memory_bytes is not None or self.processes is not None


@frozen(kw_only=True)
class WatchMetrics:
    """What the watch did, for all jobs that shared it, and what it saved.

    Times of day are seconds since the epoch, lengths are seconds.
    `saved_seconds` is the last reconcile of this workspace that is on record minus what this clean end took:
    `None` where no reconcile was ever measured, or the watch did not end cleanly.
    `levellings` counts the reconcile of a stale workspace before its watch; `fallbacks` those in the watch's place:
    at once after a start that failed, and at the end.
    """

    started_at: float | None = None
    stopped_at: float | None = None
    uptime: float = 0.0
    starts: int = 0
    failed_starts: int = 0
    crashes: int = 0
    restarts: int = 0
    levellings: int = 0
    fallbacks: int = 0
    reconcile_seconds: float | None = None
    flush_seconds: float | None = None
    saved_seconds: float | None = None

    @property
    def success_rate(self) -> float | None:
        """Share of starts after which the watch came up and did not crash; `None` if it was never started."""
        return None if self.starts == 0 else (self.starts - self.failed_starts - self.crashes) / self.starts


@frozen(kw_only=True)
class IndexReport:
    """What became of the index.

    Attributes:
        status: one of the final statuses, or `watching`: other jobs still use the watch that this job has left.
        reason: why, in one line; empty for a clean end.
        watch_restarts: how often the watch was started again after a crash.
        stale: whether the stale mark stays on disk, so that the next job reconciles first. Where the watch is shared,
            it stays until the last job has left.
        metrics: the numbers when this job left.
    """

    status: IndexStatus = IndexStatus.NONE
    reason: str = ""
    watch_restarts: int = 0
    stale: bool = False
    metrics: WatchMetrics = WatchMetrics()


def _kind(value: FailureKind | str | None) -> FailureKind | None:
    try:
        return None if value is None else FailureKind(value)
    except ValueError:
        return value  # type: ignore[return-value]  # left to the validator


_kind_or_none = _r.check(
    lambda v: v is None or isinstance(v, FailureKind), "a FailureKind or None: " + ", ".join(FailureKind)
)
_text = _r.instance(str, "a text")
_text_or_none = _r.instance((str, NoneType), "a text or None")
_number_or_none = _r.check(
    lambda v: v is None or type(v) is int or (isinstance(v, float) and math.isfinite(v)), "a number or None"
)
_whole_or_none = _r.check(lambda v: v is None or type(v) is int, "a whole number or None")


@frozen(kw_only=True)
class AgentReport:
    """What an agent says of its run: the verdict and the numbers.

    Raises:
        SpecError: a bad value; the message names field, value and rule.
    """

    failure_kind: FailureKind | None = field(default=None, converter=_kind, validator=_kind_or_none)
    error: str | None = field(default=None, validator=_text_or_none)
    text: str = field(default="", validator=_text)
    session_id: str | None = field(default=None, validator=_text_or_none)
    usage: Usage = field(default=Usage(), validator=_r.instance(Usage, "a Usage"))
    cost_usd: float | None = field(default=None, validator=_number_or_none)
    num_turns: int | None = field(default=None, validator=_whole_or_none)
    permission_denials: int = field(default=0, validator=_whole)
    #: When a quota resets: seconds since the epoch.
    reset_at: float | None = field(default=None, validator=_number_or_none)
    exit: ExitStatus | None = field(
        default=None, validator=_r.instance((ExitStatus, NoneType), "an ExitStatus or None")
    )
    #: A good last result was seen, whatever came after it.
    finished: bool = field(default=False, validator=_r.instance(bool, "true or false"))
    stdout_tail: str = field(default="", validator=_text)
    stderr_tail: str = field(default="", validator=_text)


@frozen(kw_only=True)
class JobResult:
    """What came out of a job. Returned for every outcome.

    Attributes:
        outcome: `completed`, `failed`, `timed_out` or `cancelled`.
        failure_kind: why, for `failed`; else `None`.
        exit_code, signal: how the agent's process ended; both `None` for an agent without a process.
        text: the agent's final text, whole.
        usage, cost_usd, num_turns, session_id: as the agent reported them.
        index: what became of the index.
        permission_denials: how many tool calls the agent was denied.
        stdout_tail, stderr_tail: the end of the agent's output.
        survivors: processes that could not be ended. Empty, or something is wrong on this machine.
        duration_seconds: from the job's start to its end, the index settled.
        error: one line, for every outcome but `completed`.
        reset_at: when the quota resets (seconds since the epoch), where the agent said so.
        started_at, ended_at: seconds since the epoch.
    """

    job_id: str
    outcome: Outcome
    failure_kind: FailureKind | None = None
    exit_code: int | None = None
    signal: str | None = None
    text: str = ""
    session_id: str | None = None
    usage: Usage = Usage()
    cost_usd: float | None = None
    num_turns: int | None = None
    index: IndexReport = IndexReport()
    permission_denials: int = 0
    stdout_tail: str = ""
    stderr_tail: str = ""
    survivors: tuple[Survivor, ...] = ()
    duration_seconds: float = 0.0
    error: str | None = None
    reset_at: float | None = None
    started_at: float = 0.0
    ended_at: float = 0.0
    labels: dict[str, str] = Factory(dict)

    def raise_for_outcome(self) -> JobResult:
        """This result, if the job completed.

        Raises:
            JobFailed: for every other outcome; it carries this result.
        """
        if self.outcome is not Outcome.COMPLETED:
            raise JobFailed(self)
        return self


def new_job_id() -> str:
    """A fresh job id: sortable by time, unique without coordination."""
    return time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime()) + secrets.token_hex(4)


@runtime_checkable
class AgentLike(Protocol):
    """What a `JobSpec` must be given as its agent; the whole protocol is `supervise.agents.Agent`."""

    @property
    def name(self) -> str: ...

    async def run(self, run: Any) -> None: ...


def _absolute(value: str | os.PathLike[str]) -> Path:
    # Without the rule for the empty text it would be the working directory.
    if value == "" or not isinstance(value, str | os.PathLike):
        return value  # type: ignore[return-value]  # left to the validator
    path = Path(value)
    # abspath() of some Pythons cuts at a NUL; the validator refuses it.
    return path if "\0" in str(path) else Path(os.path.abspath(path))


def _check_workspace(instance: JobSpec, attribute: Any, value: Path) -> None:
    if not isinstance(value, Path):
        raise SpecError(f"JobSpec.workspace is {value!r} but must be the path of a directory")
    try:
        kind = value.stat().st_mode
    except FileNotFoundError:
        problem = "does not exist; create it or name another directory"
    except (OSError, ValueError) as error:
        problem = f"cannot be looked at ({getattr(error, 'strerror', None) or error}); name another directory"
    else:
        if stat.S_ISDIR(kind):
            return
        problem = "is no directory; name the directory to work in"
    raise SpecError(f"JobSpec.workspace is {str(value)!r}, which {problem}")


def _mapping(value: Mapping[str, str] | None) -> dict[str, str]:
    if value is not None and not isinstance(value, Mapping):
        return value  # type: ignore[unreachable]  # callers without a type checker
    return dict(value or {})


def _is_user(value: object) -> bool:
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _shown_env(value: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{name!r}: …" for name in value) + "}"


@frozen(kw_only=True)
class JobSpec:
    """One job: what to do, where, and within which bounds.

    Attributes:
        prompt: what the agent is told. Not empty.
        workspace: the directory that the agent works in. It must exist.
        job_id: made if absent; `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
        agent: who does the work: any object that follows `supervise.agents.Agent`. `None` is a `ClaudeAgent`
            as the supervisor's settings say.
        index: an `IndexSettings`; `None` for no index; `"settings"` for what the supervisor's settings say.
        timeout: seconds from the agent's spawn until the agent is stopped; the reconcile is not included.
        env: further environment of the agent. Values are taken for secrets where their names say so.
        user: name of the user that the agent and the index run as (root only).
        limits: bounds for all processes of the agent together, where the cgroup controllers are ours to use;
            elsewhere the job fails and says that they are not available here.
        labels: free texts that come back in the result.

    Raises:
        SpecError: a bad value; the message names field, value and rule.
    """

    prompt: str = field(
        repr=lambda text: repr(text if len(text) <= 60 else text[:57] + "…"),
        validator=_r.check(
            lambda v: isinstance(v, str) and bool(v.strip()) and "\0" not in v,
            "a text that is not empty and has no NUL",
        ),
    )
    workspace: Path = field(converter=_absolute, validator=_check_workspace)
    job_id: str = field(
        factory=new_job_id,
        validator=_r.check(
            lambda v: isinstance(v, str) and JOB_ID.fullmatch(v) is not None,
            "1-128 letters, digits, '.', '_' or '-', the first a letter or digit",
        ),
    )
    agent: AgentLike | None = field(
        default=None,
        validator=_r.check(
            lambda v: v is None or isinstance(v, AgentLike),
            "an agent: an object with a name and an async run()",
        ),
    )
    index: IndexSettings | Literal["settings"] | None = field(
        default="settings",
        validator=_r.check(
            lambda v: v is None or v == "settings" or isinstance(v, IndexSettings),
            "an IndexSettings, None or 'settings'",
        ),
    )
    timeout: float = field(default=600.0, validator=_r.positive("seconds"))
    env: dict[str, str] = field(
        factory=dict,
        converter=_mapping,
        repr=_shown_env,
        validator=_r.check(is_environment, "names and texts without NUL, names without '='", hide=True),
    )
    user: str | None = field(
        default=None,
        validator=_r.check(lambda v: v is None or _is_user(v), "a user's name without NUL, or None"),
    )
    limits: Limits = field(factory=Limits, validator=_r.instance(Limits, "Limits(memory_bytes=…, processes=…)"))
    labels: dict[str, str] = field(
        factory=dict,
        converter=_mapping,
        validator=_r.check(
            lambda v: isinstance(v, dict) and all(isinstance(n, str) and isinstance(t, str) for n, t in v.items()),
            "texts by name",
        ),
    )
