"""Events in words for people: one line each."""

from __future__ import annotations

import json
from typing import Any

from supervise import events as e
from supervise.codec import rfc3339
from supervise.model import IndexStatus, Outcome

Line = tuple[str, str, str]
"""Who, what, and how it feels: `good`, `bad`, `warn` or empty."""


def describe(event: e.Event, workspace: str = "") -> Line | None:
    """The line of an event, printable; `None` for those that only clutter.

    Args:
        event: what happened.
        workspace: paths inside of it are told as relative ones.
    """
    line = _describe(event)
    if line is None:
        return None
    who, what, mood = line
    if workspace and not isinstance(event, e.JobStarted):
        what = what.replace(f"{workspace}/", "")
    return _one_line(who), _one_line(what), mood


def _describe(event: e.Event) -> Line | None:
    match event:
        case e.JobStarted():
            index = "no index" if event.index == "none" else f"index {event.index}"
            return "job", f"in {event.workspace}: agent {event.agent}, {index}, held by {event.containment}", ""
        case e.StateChanged():
            return "job", event.state, ""
        case e.CancelRequested():
            again = "" if event.step == 1 else f" (step {event.step}: go on at once)"
            return "job", f"cancel: {event.reason}{again}", "warn"
        case e.JobFinished():
            return "job", _finished(event), "good" if event.result.outcome is Outcome.COMPLETED else "bad"
        case e.EventsDropped():
            return "job", f"{event.count} events were dropped: this reader is too slow", "warn"
        case e.ProcessStarted() if event.role != "stamp":
            return event.role, f"started {event.program} (pid {event.pid})", ""
        case e.ProcessExited() if event.role != "stamp":
            how = f"exit code {event.exit_code}" if event.signal is None else event.signal
            return event.role, f"pid {event.pid} ended: {how}", ""
        case e.SignalSent():
            return event.role, f"{event.signal} to {_count(event.count, 'process', 'processes')}", "warn"
        case e.TreeEmpty() if event.survivors or event.role in ("agent", "watch"):
            if event.survivors:
                return event.role, f"{event.survivors} could not be ended", "bad"
            return event.role, "its tree is empty", ""
        case e.OutputTruncated():
            return event.role, f"{event.stream}: {event.reason}", "warn"
        case e.IndexChanged():
            return "index", _index(event), _mood(event.status)
        case e.IndexOutput():
            return "index", event.line, "bad" if event.kind == "error" else ""
        case e.ReconcileFinished():
            if event.ok:
                return "index", f"reconciled in {event.seconds:.2f} s", "good"
            return "index", f"the reconcile is not to be believed: {event.reason}", "bad"
        case e.AgentEvent():
            return _agent(event)
        case e.TaskEvent():
            return _task(event)
        case e.WorkerTrouble():
            if event.error:
                return event.worker, f"{event.what}: {event.error}", "bad"
            return event.worker, f"{event.what} works again", "good"
        case e.WorkerChanged():
            return event.worker, _worker(event), _WORKER_MOOD.get(event.status, "bad")
    return None


_WORKER_MOOD = {"healthy": "", "degraded": "warn", "draining": "warn"}


def _worker(event: e.WorkerChanged) -> str:
    why = f" ({'; '.join(event.reasons)})" if event.reasons else ""
    active = f", at work on {', '.join(event.active_tasks)}" if event.active_tasks else ""
    return f"{event.status}{why}: {_count(event.queue_size, 'task waits', 'tasks wait')}{active}"


def _task(event: e.TaskEvent) -> Line | None:
    match event:
        case e.TaskReceived():
            return event.task_id, "received" + (f", priority {event.priority}" if event.priority else ""), ""
        case e.TaskClaimed():
            return event.task_id, f"attempt {event.attempt} begins", ""
        case e.TaskFinished():
            mood = "good" if event.status == Outcome.COMPLETED else "bad"
            return event.task_id, f"{event.status} after {event.seconds:.2f} s", mood
        case e.TaskRetried():
            what = f"attempt {event.attempt} failed ({event.failure_kind}): {event.error}"
            return event.task_id, f"{what}; once more {_when(event.at)}", "warn"
        case e.TaskBuried():
            return event.task_id, f"is a dead letter ({event.reason}): {event.detail}", "bad"
        case e.TaskPutBack():
            return event.task_id, f"was put back: {event.reason}", "warn"
    return None


def _when(at: float) -> str:
    try:
        return f"at {rfc3339(at)}"
    except (OverflowError, ValueError, OSError):  # past every calendar
        return "some day"


def _agent(event: e.AgentEvent) -> Line | None:
    match event:
        case e.AgentInit():
            return "agent", f"session {event.session_id or 'without id'}, model {event.model or 'unknown'}", ""
        case e.AgentText():
            return "agent", _one_line(event.text), ""
        case e.AgentToolUse():
            return "agent", f"{event.name} {_input(event.input)}", ""
        case e.AgentToolResult() if event.is_error:
            return "agent", f"tool failed: {_one_line(event.text)}", "warn"
        case e.AgentRetry():
            why = event.status or event.error or "connection trouble"
            tries = f"try {event.attempt or '?'} of {event.max_retries or '?'}"
            return "agent", f"the API failed ({why}): {tries}", "warn"
        case e.AgentPermissionDenied():
            return "agent", f"{event.tool} was denied: {_one_line(event.message)}", "warn"
        case e.AgentResult():
            cost = "" if event.cost_usd is None else f", ${event.cost_usd:.4f}"
            how = "error" if event.is_error else "done"
            turns = "" if event.num_turns is None else f" after {_count(event.num_turns, 'turn', 'turns')}"
            mood = "bad" if event.is_error else "good"
            text = _one_line(event.text or "; ".join(event.errors))
            return "agent", f"{how}{turns}{cost}: {text}", mood
        case e.AgentOutput():
            return "agent", _one_line(event.line), "warn" if event.stream == "stderr" else ""
        case e.BadLine():
            return "agent", f"a line that is no event ({event.reason}): {_one_line(event.excerpt)}", "warn"
    return None


def _index(event: e.IndexChanged) -> str:
    if event.cause == "end":
        clean = "it saw every edit, and the index is fresh" if event.status is IndexStatus.WATCH_TERMINATED else ""
        reason = event.reason or clean
        return event.status.value + (f": {reason}" if reason else "")
    return f"{event.cause} → {event.state}" + (f": {event.reason}" if event.reason else "")


def _mood(status: IndexStatus) -> str:
    return {
        IndexStatus.FAILED: "bad",
        IndexStatus.WATCH_TERMINATED: "good",
        IndexStatus.READY_VIA_FALLBACK: "good",
    }.get(status, "")


def _finished(event: e.JobFinished) -> str:
    result = event.result
    kind = f" ({result.failure_kind.value})" if result.failure_kind else ""
    return f"{result.outcome.value}{kind} after {result.duration_seconds:.2f} s; index {result.index.status.value}"


def _input(value: Any) -> str:
    if isinstance(value, dict):
        for name in ("command", "file_path", "path", "pattern", "url", "description"):
            if isinstance(value.get(name), str):
                return _one_line(value[name])
    return _one_line(json.dumps(value, default=str))


def _one_line(text: str, limit: int = 300) -> str:
    # Control characters of somebody's output must not reach a terminal.
    flat = " ".join("".join(c if c.isprintable() else " " for c in text[: limit * 4]).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
