"""Metrics: each event that tells something moves its number, and nothing else does."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from supervise import events as e
from supervise.errors import SuperviseError
from supervise.model import Usage
from supervise.observe.metrics import BUCKETS, Metrics, served
from tests.strategies import events

USAGE = Usage(input_tokens=1, output_tokens=2, cache_read_tokens=3, cache_creation_tokens=4)
W1 = {"worker": "w1"}
SPENT: dict[str, Any] = {"seconds": 0.7, "usage": USAGE, "cost_usd": 0.5}
TASK: dict[str, Any] = {"worker": "w1", "task_id": "t1"}

Sample = tuple[str, frozenset[tuple[str, str]]]


def samples(metrics: Metrics) -> dict[Sample, float]:
    """All there is, but for when a counter was made."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def moved(*seen: e.Event) -> dict[str, float]:
    """What the events have changed, by name and labels but the worker's; without the buckets."""
    metrics = Metrics()
    for event in seen:
        metrics.observe(event)
    found = {}
    for (name, labels), value in samples(metrics).items():
        assert ("worker", "w1") in labels
        if not name.endswith("_bucket"):
            rest = ",".join(sorted(f"{key}={text}" for key, text in labels if key != "worker"))
            found[f"{name}{{{rest}}}" if rest else name] = value
    return found


TOKENS = {
    "supervise_tokens_total{kind=input}": 1,
    "supervise_tokens_total{kind=output}": 2,
    "supervise_tokens_total{kind=cache_read}": 3,
    "supervise_tokens_total{kind=cache_creation}": 4,
    "supervise_cost_usd_total": 0.5,
    "supervise_attempt_seconds_count": 1,
    "supervise_attempt_seconds_sum": 0.7,
}


def test_a_received_task_is_counted() -> None:
    event = e.TaskReceived(**TASK)
    assert moved(event) == {"supervise_tasks_received_total": 1}
    assert moved(event, event) == {"supervise_tasks_received_total": 2}


@pytest.mark.parametrize("status", ["completed", "timed_out", "cancelled"])
def test_a_finished_task_is_counted_with_its_attempt(status: str) -> None:
    assert moved(e.TaskFinished(**TASK, **SPENT, attempt=2, status=status)) == {
        f"supervise_tasks_total{{status={status}}}": 1,
        f"supervise_attempts_total{{outcome={status}}}": 1,
        **TOKENS,
    }


def test_a_retried_attempt_is_counted_and_is_no_end_of_a_task() -> None:
    event = e.TaskRetried(**TASK, **SPENT, attempt=1, failure_kind="network", error="no way", at=0.0)
    assert moved(event) == {"supervise_attempts_total{outcome=network}": 1, **TOKENS}


def test_a_buried_task_has_ended() -> None:
    event = e.TaskBuried(**TASK, **SPENT, attempt=3, reason="max_retries_exceeded", detail="")
    assert moved(event) == {
        "supervise_dead_letters_total{reason=max_retries_exceeded}": 1,
        "supervise_tasks_total{status=dead_letter}": 1,
        "supervise_attempts_total{outcome=failed}": 1,
        **TOKENS,
    }


def test_a_buried_file_was_no_task_and_no_attempt() -> None:
    event = e.TaskBuried(**TASK, attempt=0, reason="invalid_format", detail="")
    assert moved(event) == {"supervise_dead_letters_total{reason=invalid_format}": 1}


def test_a_task_that_was_put_back_is_counted_apart() -> None:
    assert moved(e.TaskPutBack(**TASK, attempt=1, reason="")) == {"supervise_tasks_put_back_total": 1}


def test_an_attempt_of_unknown_cost_costs_nothing() -> None:
    found = moved(e.TaskFinished(**TASK, attempt=1, status="completed", seconds=1.0))
    assert "supervise_cost_usd_total" not in found
    assert found["supervise_tokens_total{kind=input}"] == 0


@pytest.mark.parametrize(("seconds", "least"), [(0.05, 0.1), (0.1, 0.1), (0.2, 0.5), (3600, 3600), (4000, None)])
def test_an_attempt_falls_into_the_buckets_above_it(seconds: float, least: float | None) -> None:
    metrics = Metrics()
    metrics.observe(e.TaskFinished(**TASK, attempt=1, status="completed", seconds=seconds))
    for bound in BUCKETS:
        value = metrics.registry.get_sample_value("supervise_attempt_seconds_bucket", {**W1, "le": str(float(bound))})
        assert value == (1 if least is not None and bound >= least else 0)


@pytest.mark.parametrize(("breaker", "number"), [("closed", 0), ("half_open", 1), ("open", 2)])
def test_the_present_state_of_the_worker_is_shown(breaker: str, number: int) -> None:
    before = e.WorkerChanged(worker="w1", status="degraded", queue_size=9, active_tasks=("a",), breaker="open")
    now = e.WorkerChanged(
        worker="w1", status="healthy", queue_size=3, active_tasks=("a", "b"), breaker=breaker, breaker_failures=4
    )
    assert moved(before, now) == {
        "supervise_queue_size": 3,
        "supervise_active_tasks": 2,
        "supervise_circuit_breaker_state": number,
        "supervise_circuit_breaker_failures": 4,
        "supervise_worker_status{status=healthy}": 1,
        "supervise_worker_status{status=degraded}": 0,
        "supervise_worker_status{status=draining}": 0,
        "supervise_worker_status{status=unhealthy}": 0,
    }


def test_trouble_comes_and_goes() -> None:
    trouble = e.WorkerTrouble(worker="w1", what="directory", error="gone")
    mended = e.WorkerTrouble(worker="w1", what="directory", error="")
    assert moved(trouble) == {"supervise_worker_trouble{what=directory}": 1}
    assert moved(trouble, mended) == {"supervise_worker_trouble{what=directory}": 0}


def test_every_metric_has_an_event_that_moves_it() -> None:
    metrics = Metrics()
    names = {family.name for family in metrics.registry.collect()}
    for event in (
        e.TaskReceived(**TASK),
        e.TaskFinished(**TASK, **SPENT, attempt=1, status="completed"),
        e.TaskBuried(**TASK, **SPENT, attempt=1, reason="auth", detail=""),
        e.TaskPutBack(**TASK, attempt=1, reason=""),
        e.WorkerChanged(worker="w1", status="healthy", queue_size=1, active_tasks=("a",), breaker="open"),
        e.WorkerChanged(worker="w1", status="healthy", queue_size=1, active_tasks=("a",), breaker_failures=1),
        e.WorkerTrouble(worker="w1", what="claim", error="x"),
    ):
        metrics.observe(event)
    assert {family.name for family in metrics.registry.collect() if family.samples} == names
    assert len(names) == 14


@settings(suppress_health_check=[HealthCheck.too_slow])  # so many kinds of events take a busy machine a while
@given(events)
def test_no_event_is_too_odd_to_be_counted(event: e.Event) -> None:
    metrics = Metrics()
    metrics.observe(event)
    metrics.observe(event)
    for (name, _), value in samples(metrics).items():
        assert not name.endswith(("_total", "_count", "_bucket")) or value >= 0


def test_they_are_served_while_the_block_runs() -> None:
    metrics = Metrics()
    with served(metrics, "127.0.0.1", 0) as port:
        metrics.observe(e.TaskReceived(**TASK))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert 'supervise_tasks_received_total{worker="w1"} 1.0' in answer.read().decode()
        with pytest.raises(SuperviseError, match=f"127.0.0.1:{port}: Address already in use; name another"):
            served(metrics, "127.0.0.1", port).__enter__()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 65536), ("no.such.host.invalid", 0), ("203.0.113.1", 0)])
def test_where_nobody_can_listen_is_told(host: str, port: int) -> None:
    with pytest.raises(SuperviseError, match=f"metrics cannot be served on {host}:{port}: "):
        served(Metrics(), host, port).__enter__()
