"""What can happen in a job, as values. attrs, frozen; no Trio, no I/O.

Each event has a `type` (of the class), and `time` and `job_id`, which the job sets when it publishes it.
`EVENT_TYPES` maps each type's name to its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar, TypeVar

import attrs
from attrs import Factory, field, frozen

from supervise.model import IndexStatus, JobResult, Usage

#: What a published event holds of any one text, in characters. The whole is in the log, and in the result.
TEXT_LIMIT = 16 * 1024

EVENT_TYPES: dict[str, type[Event]] = {}


@frozen(kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        time: seconds since the epoch; `None` until the job has published the event.
        job_id: the job that it happened in; empty until published.
    """

    type: ClassVar[str] = "event"
    time: float | None = field(default=None, eq=False)
    job_id: str = field(default="", eq=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        EVENT_TYPES[cls.type] = cls


# --- the job -----------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class JobStarted(Event):
    """The job's nursery is open."""

    type: ClassVar[str] = "job_started"
    workspace: str
    agent: str
    index: str
    containment: str


@frozen(kw_only=True)
class StateChanged(Event):
    """The job moved on: `starting`, `running`, `stopping`, `settling`, `done`."""

    type: ClassVar[str] = "state"
    state: str


@frozen(kw_only=True)
class CancelRequested(Event):
    """Somebody asked the job to end. `step` counts how often: each time goes on to the stop policy's next step."""

    type: ClassVar[str] = "cancel"
    reason: str
    step: int


@frozen(kw_only=True)
class JobFinished(Event):
    """The last event of a job."""

    type: ClassVar[str] = "job_finished"
    result: JobResult


@frozen(kw_only=True)
class EventsDropped(Event):
    """This reader was too slow: `count` events were lost before the next one."""

    type: ClassVar[str] = "events_dropped"
    count: int


@frozen(kw_only=True)
class ProcessBeat:
    """One process of the job, as a heartbeat sees it."""

    role: str
    pid: int
    start_time: float
    state: str
    rss_bytes: int
    cpu_seconds: float


@frozen(kw_only=True)
class Heartbeat(Event):
    """What is alive in the job, and when the agent last made progress.

    Attributes:
        state, index_status: of the job and of its index.
        uptime: seconds since the job's start.
        agent_silent_seconds: since the agent last printed anything; `None` before its start.
        agent_lines: lines that the agent has printed so far.
        rss_bytes, cpu_seconds: of all processes of the job; a process that has ended no longer counts.
        processes: each process of the job.
    """

    type: ClassVar[str] = "heartbeat"
    state: str
    index_status: IndexStatus
    uptime: float
    agent_silent_seconds: float | None
    agent_lines: int
    rss_bytes: int
    cpu_seconds: float
    containment: str
    processes: tuple[ProcessBeat, ...] = ()


# --- processes ---------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class ProcessStarted(Event):
    """A program was started. Its arguments are not told, only its name."""

    type: ClassVar[str] = "process_started"
    role: str
    pid: int
    program: str


@frozen(kw_only=True)
class ProcessExited(Event):
    """A program that we started has ended. Its descendants may live on until its tree is stopped."""

    type: ClassVar[str] = "process_exited"
    role: str
    pid: int
    exit_code: int | None
    signal: str | None


@frozen(kw_only=True)
class SignalSent(Event):
    """A signal was sent to `count` processes of a tree."""

    type: ClassVar[str] = "signal_sent"
    role: str
    signal: str
    count: int


@frozen(kw_only=True)
class TreeEmpty(Event):
    """No process of this tree is left alive; or, if `survivors` is not 0, those could not be ended."""

    type: ClassVar[str] = "tree_empty"
    role: str
    seconds: float
    survivors: int


@frozen(kw_only=True)
class OutputTruncated(Event):
    """Output was dropped from a log (size limit, or the disk) or ended late (a stranger holds the pipe)."""

    type: ClassVar[str] = "output_truncated"
    role: str
    stream: str
    reason: str


# --- the index ---------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class IndexChanged(Event):
    """The state of the watch, or what is known of the index, has changed."""

    type: ClassVar[str] = "index"
    state: str
    cause: str
    status: IndexStatus
    reason: str = ""


@frozen(kw_only=True)
class IndexOutput(Event):
    """A line that the indexer printed and that matters: readiness, or an error."""

    type: ClassVar[str] = "index_output"
    kind: str
    line: str


@frozen(kw_only=True)
class ReconcileFinished(Event):
    """`cidx index --reconcile` has ended; `ok` is read from exit code and output."""

    type: ClassVar[str] = "reconcile"
    ok: bool
    seconds: float
    reason: str


# --- the agent ---------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class AgentEvent(Event):
    """Something that the agent said.

    Attributes:
        raw: the whole line as the agent printed it, unknown fields included; `None` where the line was too long
            to be kept, and for all but the first event of a line that gives several.
    """

    type: ClassVar[str] = "agent"
    raw: Mapping[str, Any] | None = field(default=None, eq=False, repr=False)


@frozen(kw_only=True)
class AgentInit(AgentEvent):
    """A turn of the agent begins."""

    type: ClassVar[str] = "agent_init"
    session_id: str | None = None
    model: str | None = None
    cwd: str | None = None
    permission_mode: str | None = None
    version: str | None = None


@frozen(kw_only=True)
class AgentText(AgentEvent):
    """The agent wrote a text."""

    type: ClassVar[str] = "agent_text"
    text: str = ""


@frozen(kw_only=True)
class AgentThinking(AgentEvent):
    """The agent thought aloud."""

    type: ClassVar[str] = "agent_thinking"
    text: str = ""


@frozen(kw_only=True)
class AgentToolUse(AgentEvent):
    """The agent calls a tool."""

    type: ClassVar[str] = "agent_tool_use"
    id: str = ""
    name: str = ""
    input: Any = None


@frozen(kw_only=True)
class AgentToolResult(AgentEvent):
    """A tool's answer, its texts joined."""

    type: ClassVar[str] = "agent_tool_result"
    id: str = ""
    text: str = ""
    is_error: bool = False


@frozen(kw_only=True)
class AgentRetry(AgentEvent):
    """The API failed and the agent tries again."""

    type: ClassVar[str] = "agent_retry"
    attempt: int | None = None
    max_retries: int | None = None
    delay: float | None = None  # seconds
    status: int | None = None
    error: str | None = None


@frozen(kw_only=True)
class AgentPermissionDenied(AgentEvent):
    """A tool call was denied."""

    type: ClassVar[str] = "agent_permission_denied"
    tool: str = ""
    id: str = ""
    message: str = ""


@frozen(kw_only=True)
class AgentPartial(AgentEvent):
    """A piece of a message that is still being written."""

    type: ClassVar[str] = "agent_partial"
    text: str = ""


@frozen(kw_only=True)
class AgentResult(AgentEvent):
    """A result line: the agent's own word on its run. There may be several; the last one counts.

    Attributes:
        duration, api_duration: seconds.
        api_status: HTTP status of the failed API call, where there was one.
        permission_denials: how many tool calls were denied.
        reset_at: when a quota resets (seconds since the epoch), where the line says so.
    """

    type: ClassVar[str] = "agent_result"
    is_error: bool = False
    subtype: str = ""
    text: str = ""
    errors: tuple[str, ...] = ()
    session_id: str | None = None
    usage: Usage = Factory(Usage)
    cost_usd: float | None = None
    num_turns: int | None = None
    duration: float | None = None
    api_duration: float | None = None
    stop_reason: str | None = None
    terminal_reason: str | None = None
    api_status: int | None = None
    api_error: str | None = None
    permission_denials: int = 0
    reset_at: float | None = None


@frozen(kw_only=True)
class AgentOutput(AgentEvent):
    """A line of an agent that speaks no protocol, or of its standard error."""

    type: ClassVar[str] = "agent_output"
    stream: str = "stdout"
    line: str = ""


@frozen(kw_only=True)
class UnknownEvent(AgentEvent):
    """A line of a kind that this version does not know; passed through in `raw`."""

    type: ClassVar[str] = "agent_unknown"
    kind: str = ""
    subtype: str = ""


@frozen(kw_only=True)
class BadLine(AgentEvent):
    """A line of the agent that is not what its protocol says. `excerpt` is its beginning.

    Attributes:
        too_long: the line passed the parser's `max_line`; the job fails with `bad_output`.
    """

    type: ClassVar[str] = "agent_bad_line"
    reason: str = ""
    excerpt: str = ""
    size: int = 0
    too_long: bool = False


# --- tasks -------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class TaskEvent(Event):
    """Something that happened to a task of a worker."""

    type: ClassVar[str] = "task"
    worker: str
    task_id: str


@frozen(kw_only=True)
class TaskReceived(TaskEvent):
    """The task was seen for the first time."""

    type: ClassVar[str] = "task_received"
    priority: int = 0


@frozen(kw_only=True)
class TaskClaimed(TaskEvent):
    """An attempt begins."""

    type: ClassVar[str] = "task_claimed"
    attempt: int


@frozen(kw_only=True)
class TaskFinished(TaskEvent):
    """The task has come to its end, and its result is published."""

    type: ClassVar[str] = "task_finished"
    attempt: int
    status: str
    seconds: float
    usage: Usage = Factory(Usage)
    cost_usd: float | None = None


@frozen(kw_only=True)
class TaskRetried(TaskEvent):
    """An attempt has failed; the next one begins at `at` (seconds since the epoch) or later."""

    type: ClassVar[str] = "task_retried"
    attempt: int
    failure_kind: str
    error: str
    at: float
    seconds: float = 0.0
    usage: Usage = Factory(Usage)
    cost_usd: float | None = None


@frozen(kw_only=True)
class TaskBuried(TaskEvent):
    """The task is a dead letter. `task_id` is the file's name where it was no task."""

    type: ClassVar[str] = "task_buried"
    attempt: int
    reason: str
    detail: str
    seconds: float = 0.0
    usage: Usage = Factory(Usage)
    cost_usd: float | None = None


@frozen(kw_only=True)
class TaskPutBack(TaskEvent):
    """The task waits again, and nothing was counted: the worker ends, or cannot work."""

    type: ClassVar[str] = "task_put_back"
    attempt: int
    reason: str


@frozen(kw_only=True)
class WorkerChanged(Event):
    """The worker, as its heartbeat tells of it.

    Attributes:
        status: `healthy`, `degraded`, `draining` or `unhealthy`.
        reasons: why it is not healthy.
        queue_size: tasks that wait, for their time and for others, too.
        active_tasks: ids of those under way.
        breaker: `closed`, `open` or `half_open`.
        breaker_failures: in a row.
    """

    type: ClassVar[str] = "worker"
    worker: str
    status: str
    reasons: tuple[str, ...] = ()
    queue_size: int = 0
    active_tasks: tuple[str, ...] = ()
    breaker: str = "closed"
    breaker_failures: int = 0


@frozen(kw_only=True)
class WorkerTrouble(Event):
    """Something that the worker needs does not work, or works again (`error` is empty then)."""

    type: ClassVar[str] = "worker_trouble"
    worker: str
    what: str
    error: str


# --- publication -------------------------------------------------------------------------------------------

E = TypeVar("E", bound=Event)


def published(event: E, *, time: float, job_id: str) -> E:
    """`event` as readers get it: stamped, and its texts and payloads clipped to `TEXT_LIMIT`.

    A buffer of so many events is thereby bounded in bytes, too.
    """
    changes: dict[str, Any] = {"time": time, "job_id": job_id}
    if isinstance(event, AgentEvent):
        for attribute in attrs.fields(type(event)):
            if attribute.name in changes:
                continue
            value = getattr(event, attribute.name)
            if isinstance(value, str):
                if len(value) > TEXT_LIMIT:
                    changes[attribute.name] = value[:TEXT_LIMIT] + f"… [{len(value)} characters]"
            elif isinstance(value, dict | list | tuple) and weight(value, TEXT_LIMIT) > TEXT_LIMIT:
                changes[attribute.name] = None if attribute.name in ("raw", "input") else ()
    return attrs.evolve(event, **changes)


def weight(value: Any, limit: int) -> int:
    """About how many characters `value` holds; counting ends soon after `limit`."""
    total = 0
    todo: list[Any] = [value]
    while todo and total <= limit:
        item = todo.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 8
            todo.extend(islice(item.keys(), limit))
            todo.extend(islice(item.values(), limit))
        elif isinstance(item, list | tuple):
            total += 8 + len(item)
            todo.extend(islice(item, limit))
        else:
            total += 8
    return total
