"""What is written for others to read."""

from __future__ import annotations

import json

import pytest

from supervise.codec import to_line
from supervise.dispatch import records
from supervise.dispatch.task import Attempt, Task
from supervise.model import FailureKind, JobResult, Outcome

TASK = Task(task_id="a", description="d", fields={"task_id": "a", "description": "d", "colour": "red"})


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (JobResult(job_id="j", outcome=Outcome.COMPLETED), 0),
        (JobResult(job_id="j", outcome=Outcome.COMPLETED, exit_code=3), 3),
        (JobResult(job_id="j", outcome=Outcome.COMPLETED, signal="SIGTERM"), None),
        (JobResult(job_id="j", outcome=Outcome.TIMED_OUT, exit_code=143), 124),
        (JobResult(job_id="j", outcome=Outcome.TIMED_OUT), 124),
        (JobResult(job_id="j", outcome=Outcome.CANCELLED), None),
    ],
)
def test_the_exit_code_of_a_result(job: JobResult, code: int | None) -> None:
    assert records.result(TASK, "w", 1, job, 0.0)["exit_code"] == code


def test_a_result_tells_of_task_job_and_attempt() -> None:
    job = JobResult(job_id="j", outcome=Outcome.FAILED, failure_kind=FailureKind.AUTH, text="t", error="e")
    record = json.loads(to_line(records.result(TASK, "w", 3, job, 0.5)))
    told = {"task_id": "a", "worker": "w", "status": "failed", "failure_kind": "auth", "attempt": 3, "retry_count": 2}
    assert told.items() <= record.items()
    assert record["timestamp"] == "1970-01-01T00:00:00.500000Z"


def test_a_dead_letter_keeps_the_fields_and_says_why() -> None:
    attempts = [Attempt(attempt=1), Attempt(attempt=2)]
    record = records.dead_letter(TASK, "w", attempts, "auth", "no key", 0.0)
    assert record["colour"] == "red"
    assert (record["dlq_worker"], record["dlq_reason"], record["dlq_detail"]) == ("w", "auth", "no key")
    assert (record["retry_count"], [each["attempt"] for each in record["attempts"]]) == (1, [1, 2])


def test_a_field_of_the_task_does_not_hide_why() -> None:
    task = Task(task_id="a", description="d", fields={"task_id": "a", "dlq_reason": "mine"})
    assert records.dead_letter(task, "w", [], "auth", "", 0.0)["dlq_reason"] == "auth"


def test_a_file_of_any_name_can_be_told_of() -> None:
    record = records.no_task("\udcff\n.json", None, "w", "it is no task", 0.0)
    assert record["name"] == "\\udcff\n.json"
    assert record["dlq_reason"] == "invalid_format"
    assert "task_id" not in record
    assert records.no_task("x.json", "a", "w", "taken", 0.0)["task_id"] == "a"


def test_a_receipt() -> None:
    expected = {"task_id": "a", "worker": "w", "status": "received", "timestamp": "1970-01-01T00:00:00.000000Z"}
    assert records.received("a", "w", 0.0) == expected
