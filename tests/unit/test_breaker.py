"""The breaker's table, row by row."""

from __future__ import annotations

import pytest

from supervise.dispatch.breaker import Breaker, BreakerState, Permit


def asked(breaker: Breaker, now: float = 0.0) -> Permit:
    permit = breaker.ask(now)
    assert permit is not None
    return permit


def opened(failures: int = 2) -> Breaker:
    breaker = Breaker(failures=failures, reset_after=60.0)
    for _ in range(failures):
        breaker.report(asked(breaker), ok=False, now=0.0)
    return breaker


def test_closed_success_forgets_the_failures() -> None:
    breaker = Breaker(failures=2, reset_after=60.0)
    for ok in (False, True, False):
        breaker.report(asked(breaker), ok=ok, now=0.0)
    assert breaker.state(0.0) is BreakerState.CLOSED
    assert breaker.failures() == 1


def test_the_last_failure_allowed_opens_it() -> None:
    breaker = opened()
    assert breaker.state(59.9) is BreakerState.OPEN
    assert breaker.ask(59.9) is None
    assert breaker.opens_in(10.0) == 50.0


def test_after_its_time_there_is_one_probe() -> None:
    breaker = opened()
    assert breaker.state(60.0) is BreakerState.HALF_OPEN
    assert asked(breaker, 60.0).is_probe
    assert breaker.ask(61.0) is None
    assert breaker.opens_in(61.0) == 0.0


@pytest.mark.parametrize(("ok", "state"), [(True, BreakerState.CLOSED), (False, BreakerState.OPEN)])
def test_the_probe_decides(ok: bool, state: BreakerState) -> None:
    breaker = opened()
    breaker.report(asked(breaker, 60.0), ok=ok, now=70.0)
    assert breaker.state(129.9) is state
    assert breaker.failures() == (0 if ok else 3)
    assert breaker.ask(130.0) is not None


def test_a_probe_that_is_given_up_makes_room_for_the_next() -> None:
    breaker = opened()
    breaker.given_up(asked(breaker, 60.0))
    assert asked(breaker, 61.0).is_probe


@pytest.mark.parametrize("ok", [True, False])
def test_what_was_permitted_before_it_opened_changes_nothing(ok: bool) -> None:
    breaker = Breaker(failures=1, reset_after=60.0)
    slow, quick = asked(breaker), asked(breaker)
    breaker.report(quick, ok=False, now=0.0)
    breaker.report(slow, ok=ok, now=30.0)
    assert breaker.opens_in(30.0) == 30.0
    breaker.given_up(slow)
    assert breaker.ask(59.0) is None
