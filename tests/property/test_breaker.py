"""The breaker against its rule: after failures in a row nobody for a while, then one probe at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervise.dispatch.breaker import Breaker, BreakerState, Permit

LIMIT = 3
RESET = 10.0
deeds = st.lists(st.tuples(st.sampled_from(["ask", "ask", "ok", "bad", "give up", "wait"]), st.integers(0, 12)))


@given(deeds)
def test_any_order_of_questions_and_answers(life: list[tuple[str, int]]) -> None:
    breaker = Breaker(failures=LIMIT, reset_after=RESET)
    now, failed = 0.0, 0
    opened: float | None = None
    probe: Permit | None = None
    out: list[Permit] = []
    for what, number in life:
        if what == "wait":
            now += number
        elif what == "ask":
            permit = breaker.ask(now)
            assert (permit is not None) == (opened is None or (now >= opened + RESET and probe is None))
            if permit is not None:
                assert permit.is_probe == (opened is not None)
                assert permit.number not in [each.number for each in out]
                out.append(permit)
                probe = permit if permit.is_probe else probe
        elif out:
            permit = out.pop(number % len(out))
            ok = what == "ok"
            if what == "give up":
                breaker.given_up(permit)
                probe = None if permit == probe else probe
                continue
            breaker.report(permit, ok=ok, now=now)
            if permit == probe:
                probe, opened = None, None if ok else now
                failed = 0 if ok else failed + 1
            elif opened is None:
                failed = 0 if ok else failed + 1
                opened = now if failed >= LIMIT else None
        assert breaker.failures() == failed
        expected = BreakerState.CLOSED if opened is None else BreakerState.OPEN
        if opened is not None and now >= opened + RESET:
            expected = BreakerState.HALF_OPEN
        assert breaker.state(now) is expected
        assert breaker.opens_in(now) == (0.0 if opened is None else max(0.0, opened + RESET - now))
