"""Metrics for Prometheus, made of events and of nothing else. In a registry of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from supervise import events as e
from supervise.errors import MissingExtra, SuperviseError

__all__ = ["Metrics", "served"]

#: Upper bounds of the histogram of attempts, in seconds: from a script to a long agent's run.
BUCKETS = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)

STATUSES = ("healthy", "degraded", "draining", "unhealthy")
BREAKER = {"closed": 0, "half_open": 1, "open": 2}


@final
class Metrics:
    """Counts what a worker's events tell.

    Attributes:
        registry: what is counted, for whoever serves it by other means.

    Raises:
        MissingExtra: prometheus_client is not installed.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError:
            raise MissingExtra("metrics", "worker", "prometheus-client") from None
        self.registry = registry = CollectorRegistry()
        of_worker = ("worker",)
        self._received = Counter(
            "supervise_tasks_received", "Tasks seen for the first time", of_worker, registry=registry
        )
        self._ended = Counter(
            "supervise_tasks", "Tasks that came to their end", ("worker", "status"), registry=registry
        )
        self._buried = Counter("supervise_dead_letters", "Dead letters", ("worker", "reason"), registry=registry)
        self._attempts = Counter("supervise_attempts", "Attempts that ended", ("worker", "outcome"), registry=registry)
        self._put_back = Counter("supervise_tasks_put_back", "Tasks put back, uncounted", of_worker, registry=registry)
        self._seconds = Histogram(
            "supervise_attempt_seconds", "Length of attempts", of_worker, buckets=BUCKETS, registry=registry
        )
        self._tokens = Counter("supervise_tokens", "Tokens, as agents told", ("worker", "kind"), registry=registry)
        self._cost = Counter("supervise_cost_usd", "Dollars, as agents told", of_worker, registry=registry)
        self._queue = Gauge("supervise_queue_size", "Tasks that wait", of_worker, registry=registry)
        self._active = Gauge("supervise_active_tasks", "Tasks under way", of_worker, registry=registry)
        self._breaker = Gauge(
            "supervise_circuit_breaker_state", "0 closed, 1 half-open, 2 open", of_worker, registry=registry
        )
        self._failures = Gauge("supervise_circuit_breaker_failures", "Failures in a row", of_worker, registry=registry)
        self._status = Gauge(
            "supervise_worker_status", "1 for the present status", ("worker", "status"), registry=registry
        )
        self._trouble = Gauge(
            "supervise_worker_trouble", "1 for what does not work", ("worker", "what"), registry=registry
        )

    def observe(self, event: e.Event) -> None:
        """Count an event; those that tell nothing here are passed over. Never waits."""
        match event:
            case e.TaskReceived():
                self._received.labels(event.worker).inc()
            case e.TaskFinished():
                self._ended.labels(event.worker, event.status).inc()
                self._attempt(event, event.status)
            case e.TaskRetried():
                self._attempt(event, event.failure_kind)
            case e.TaskBuried():
                self._buried.labels(event.worker, event.reason).inc()
                if event.attempt:  # else it was no task
                    self._ended.labels(event.worker, "dead_letter").inc()
                    self._attempt(event, "failed")
            case e.TaskPutBack():
                self._put_back.labels(event.worker).inc()
            case e.WorkerChanged():
                self._changed(event)
            case e.WorkerTrouble():
                self._trouble.labels(event.worker, event.what).set(1 if event.error else 0)

    def _attempt(self, event: e.TaskFinished | e.TaskRetried | e.TaskBuried, outcome: str) -> None:
        worker, usage = event.worker, event.usage
        self._attempts.labels(worker, outcome).inc()
        self._seconds.labels(worker).observe(event.seconds)
        for kind, count in (
            ("input", usage.input_tokens),
            ("output", usage.output_tokens),
            ("cache_read", usage.cache_read_tokens),
            ("cache_creation", usage.cache_creation_tokens),
        ):
            self._tokens.labels(worker, kind).inc(max(0, count))
        if event.cost_usd is not None:
            self._cost.labels(worker).inc(max(0.0, event.cost_usd))

    def _changed(self, event: e.WorkerChanged) -> None:
        self._queue.labels(event.worker).set(event.queue_size)
        self._active.labels(event.worker).set(len(event.active_tasks))
        self._breaker.labels(event.worker).set(BREAKER.get(event.breaker, 2))
        self._failures.labels(event.worker).set(event.breaker_failures)
        for status in STATUSES:
            self._status.labels(event.worker, status).set(1 if status == event.status else 0)


@contextmanager
def served(metrics: Metrics, host: str, port: int) -> Iterator[int]:
    """Serve the metrics at `/metrics` while the block runs, from threads of their own. Gives the port.

    Args:
        metrics: what is served.
        host: address to listen on.
        port: 0 for any.

    Raises:
        SuperviseError: nobody can listen there.
    """
    from prometheus_client import start_http_server

    try:
        server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise SuperviseError(
            f"metrics cannot be served on {host}:{port}: {why}; name another port (--metrics-port)"
        ) from None
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
