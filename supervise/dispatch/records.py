"""What is written for others to read: results, dead letters, triggers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from supervise.codec import rfc3339, to_json
from supervise.dispatch.policy import INVALID
from supervise.dispatch.task import Attempt, Task, history
from supervise.model import JobResult, Outcome

#: As timeout(1) says it.
TIMED_OUT = 124


def result(task: Task, worker: str, attempt: int, job: JobResult, now: float) -> dict[str, Any]:
    """The result of a task."""
    code = job.exit_code
    if job.outcome is Outcome.TIMED_OUT:
        code = TIMED_OUT
    elif code is None and job.signal is None and job.outcome is Outcome.COMPLETED:
        code = 0  # an agent without a process
    return {
        "task_id": task.task_id,
        "worker": worker,
        "status": job.outcome.value,
        "exit_code": code,
        "signal": job.signal,
        "stdout": job.stdout_tail,
        "stderr": job.stderr_tail,
        "text": job.text,
        "duration_seconds": job.duration_seconds,
        "timestamp": rfc3339(now),
        "retry_count": attempt - 1,
        "attempt": attempt,
        "job_id": job.job_id,
        "session_id": job.session_id,
        "usage": to_json(job.usage),
        "cost_usd": job.cost_usd,
        "num_turns": job.num_turns,
        "index_status": job.index.status.value,
        "failure_kind": None if job.failure_kind is None else job.failure_kind.value,
        "error": job.error,
    }


def dead_letter(
    task: Task, worker: str, attempts: Sequence[Attempt], reason: str, detail: str, now: float
) -> dict[str, Any]:
    """A task that came to nothing: its fields, and why."""
    return {**task.fields, **_dead(worker, attempts, reason, detail, now)}


def no_task(name: str, task_id: str | None, worker: str, detail: str, now: float) -> dict[str, Any]:
    """A file that is no task; its bytes lie beside this record."""
    told = {} if task_id is None else {"task_id": task_id}
    return {
        **told,
        "name": name.encode("utf-8", "backslashreplace").decode(),
        **_dead(worker, (), INVALID, detail, now),
    }


def received(task_id: str, worker: str, now: float) -> dict[str, Any]:
    """The trigger that tells of a task's receipt."""
    return {"task_id": task_id, "worker": worker, "status": "received", "timestamp": rfc3339(now)}


def _dead(worker: str, attempts: Sequence[Attempt], reason: str, detail: str, now: float) -> dict[str, Any]:
    return {
        "dlq_worker": worker,
        "dlq_reason": reason,
        "dlq_detail": detail,
        "dlq_timestamp": rfc3339(now),
        "retry_count": max(0, len(attempts) - 1),
        "attempts": [history(each) for each in attempts],
    }
