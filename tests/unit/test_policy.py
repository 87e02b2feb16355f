"""What becomes of a task after an attempt, row by row; and how long it waits."""

from __future__ import annotations

import pytest

from supervise.dispatch.backoff import RETRYABLE, Backoff
from supervise.dispatch.policy import Bury, Finish, Pause, Policy, Retry, counts_for_breaker
from supervise.dispatch.task import MOST_ATTEMPTS, Task
from supervise.errors import SettingsError
from supervise.model import FailureKind, JobResult, Outcome
from supervise.settings import WorkerSettings

NOW = 1000.0
POLICY = Policy(max_attempts=3, backoff=Backoff(base=1.0, cap=300.0), quota_pause=300.0, longest_quota_pause=3600.0)
TASK = Task(task_id="a", description="d")
K = FailureKind


def failed(kind: FailureKind | None, **more: float) -> JobResult:
    return JobResult(job_id="j", outcome=Outcome.FAILED, failure_kind=kind, **more)  # type: ignore[arg-type]  # reset_at


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.TIMED_OUT, Outcome.CANCELLED])
def test_what_did_not_fail_is_a_result(outcome: Outcome) -> None:
    assert POLICY.after(TASK, 1, JobResult(job_id="j", outcome=outcome), now=NOW, chance=0.0) == Finish()


@pytest.mark.parametrize("kind", [K.OVERLOADED, K.NETWORK, K.STALLED, K.KILLED, K.AGENT_ERROR, None])
def test_a_retryable_failure_waits_and_the_last_one_is_a_dead_letter(kind: FailureKind | None) -> None:
    after = [POLICY.after(TASK, attempt, failed(kind), now=NOW, chance=0.0) for attempt in (1, 2, 3, 4)]
    assert after == [Retry(NOW + 1), Retry(NOW + 2), Bury("max_retries_exceeded"), Bury("max_retries_exceeded")]


@pytest.mark.parametrize("kind", sorted(set(FailureKind) - RETRYABLE - {K.QUOTA}))
def test_any_other_failure_is_a_dead_letter_of_its_kind(kind: FailureKind) -> None:
    assert POLICY.after(TASK, 1, failed(kind), now=NOW, chance=0.0) == Bury(kind.value)


def test_every_kind_of_failure_is_of_one_sort() -> None:
    final = {K.AUTH, K.REFUSED, K.BUDGET, K.MAX_TURNS, K.BAD_OUTPUT, K.SPAWN}
    assert RETRYABLE | final | {K.QUOTA} == set(FailureKind)
    assert not RETRYABLE & final


@pytest.mark.parametrize(
    ("reset_at", "until"),
    [(None, 1300.0), (1000.0, 1300.0), (5.0, 1300.0), (1000.5, 1000.5), (4600.0, 4600.0), (1e12, 4600.0)],
)
def test_a_quota_pauses_until_its_reset_if_that_can_be_believed(reset_at: float | None, until: float) -> None:
    result = failed(K.QUOTA) if reset_at is None else failed(K.QUOTA, reset_at=reset_at)
    assert POLICY.after(TASK, 3, result, now=NOW, chance=0.0) == Pause(until)


@pytest.mark.parametrize(("own", "last"), [(1, 1), (5, 5), (None, 3)])
def test_a_task_may_say_how_many_attempts(own: int | None, last: int) -> None:
    task = Task(task_id="a", description="d", max_attempts=own)
    decisions = [POLICY.after_failure(task, attempt, now=NOW, chance=0.0) for attempt in range(1, last + 1)]
    assert [isinstance(each, Bury) for each in decisions] == [False] * (last - 1) + [True]


@pytest.mark.parametrize(
    ("result", "speaks"),
    [
        (JobResult(job_id="j", outcome=Outcome.COMPLETED), True),
        (JobResult(job_id="j", outcome=Outcome.CANCELLED), None),
        (JobResult(job_id="j", outcome=Outcome.TIMED_OUT), False),
        (failed(K.QUOTA), None),
        *[(failed(kind), False) for kind in sorted(set(FailureKind) - {K.QUOTA})],
    ],
)
def test_what_an_end_says_to_the_breaker(result: JobResult, speaks: bool | None) -> None:
    assert counts_for_breaker(result) is speaks


def test_pauses_double_up_to_the_cap() -> None:
    pauses = [POLICY.backoff.pause(failures, 0.0) for failures in range(1, 12)]
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert POLICY.backoff.pause(10**6, 0.0) == 300


def test_chance_makes_a_pause_a_quarter_shorter_at_most() -> None:
    assert [POLICY.backoff.pause(3, chance) for chance in (0.0, 0.5, 1.0)] == [4.0, 3.5, 3.0]


def test_no_more_attempts_can_be_set_than_a_task_can_keep() -> None:
    assert WorkerSettings(max_attempts=MOST_ATTEMPTS).max_attempts == MOST_ATTEMPTS
    with pytest.raises(SettingsError, match="1 to 100"):
        WorkerSettings(max_attempts=MOST_ATTEMPTS + 1)
