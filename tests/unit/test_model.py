"""What values say of themselves."""

from __future__ import annotations

import pytest

import supervise
from supervise import JobResult, Outcome, WatchMetrics


@pytest.mark.parametrize(
    ("metrics", "rate"),
    [
        (WatchMetrics(), None),
        (WatchMetrics(starts=1), 1.0),
        (WatchMetrics(starts=1, failed_starts=1), 0.0),
        (WatchMetrics(starts=4, failed_starts=1, crashes=2), 0.25),
    ],
)
def test_success_rate(metrics: WatchMetrics, rate: float | None) -> None:
    assert metrics.success_rate == rate


@pytest.mark.parametrize("outcome", Outcome)
def test_raise_for_outcome(outcome: Outcome) -> None:
    result = JobResult(job_id="a", outcome=outcome, error="why")
    if outcome is Outcome.COMPLETED:
        assert result.raise_for_outcome() is result
        return
    with pytest.raises(supervise.JobFailed, match=f"job a {outcome.value}.*why") as caught:
        result.raise_for_outcome()
    assert caught.value.result is result
