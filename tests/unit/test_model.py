"""What values say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import supervise
from supervise import (
    AgentReport,
    FailureKind,
    JobResult,
    JobSpec,
    Limits,
    MockAgent,
    Outcome,
    SpecError,
    Usage,
    WatchMetrics,
)


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


def test_a_report_takes_a_kind_by_its_name() -> None:
    assert AgentReport(failure_kind="auth").failure_kind is FailureKind.AUTH


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("failure_kind", "bad luck"),
        ("failure_kind", 7),
        ("text", None),
        ("error", 7),
        ("session_id", b"x"),
        ("usage", {"input_tokens": 1}),
        ("cost_usd", "much"),
        ("cost_usd", float("nan")),
        ("num_turns", 1.5),
        ("permission_denials", None),
        ("reset_at", "soon"),
        ("exit", 0),
        ("finished", "yes"),
        ("stdout_tail", b""),
    ],
)
def test_a_report_refuses_what_is_no_value(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=f"AgentReport.{field} is .* must be"):
        AgentReport(**{field: value})


def test_usage_counts_in_whole_numbers() -> None:
    with pytest.raises(SpecError, match=r"Usage.output_tokens is 'many', but must be a whole number"):
        Usage(output_tokens="many")  # type: ignore[arg-type]  # a bad value, on purpose


@pytest.mark.parametrize("user", ["", "a\0b", "\udcff", 7])
def test_a_user_that_cannot_be_one(user: Any) -> None:
    with pytest.raises(SpecError, match=r"JobSpec.user is .* a user's name"):
        JobSpec(prompt="x", workspace=Path("/"), user=user)


def test_the_steps_of_a_script_are_no_text() -> None:
    with pytest.raises(SpecError, match=r"MockAgent.steps is the text 'abc'.*write \['abc'\]"):
        MockAgent(steps="abc")


@pytest.mark.parametrize(
    ("limits", "any_is_set"),
    [(Limits(), False), (Limits(processes=1), True), (Limits(memory_bytes=1 << 20), True)],
)
def test_limits_are_something_where_one_is_set(limits: Limits, any_is_set: bool) -> None:
    assert bool(limits) == any_is_set


def test_how_an_agent_is_written_is_public() -> None:
    for name in ("run_command", "Parser", "Command", "Tree", "Child"):
        assert name in supervise.__all__
        assert getattr(supervise, name).__name__ == name
