"""The circuit breaker: after failures in a row nobody asks for a while, then one probe. Pure: the clock is handed in.

    state       event               next
    closed      success             closed      failures forgotten
    closed      failure             closed      or open, if it was the last one allowed in a row
    open        reset_after is over half-open   by itself, when somebody asks
    half-open   permit              half-open   one probe at a time
    half-open   success of probe    closed
    half-open   failure of probe    open        for another reset_after
    half-open   probe given up      half-open   it said nothing: the next one is asked

What was permitted before the breaker opened, and ends while it is open, changes nothing: only the probe closes it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import final

from attrs import frozen


class BreakerState(StrEnum):
    """Whether somebody may try."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@final
@frozen
class Permit:
    """The right to try once; hand it back with what came of it."""

    number: int
    is_probe: bool


@final
class Breaker:
    """One circuit.

    Args:
        failures: so many in a row open it.
        reset_after: how long it stays open before a probe, in seconds.
    """

    def __init__(self, *, failures: int, reset_after: float) -> None:
        self._limit = failures
        self._reset_after = reset_after
        self._failures = 0
        self._opened: float | None = None
        self._probe: int | None = None
        self._numbers = 0

    def state(self, now: float) -> BreakerState:
        """As it is at `now`, in seconds of a clock that does not go back."""
        if self._opened is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if now >= self._opened + self._reset_after else BreakerState.OPEN

    def failures(self) -> int:
        """How many there were in a row."""
        return self._failures

    def opens_in(self, now: float) -> float:
        """Seconds until somebody may try; 0 if now, or as soon as the probe under way has ended."""
        if self._opened is None:
            return 0.0
        return max(0.0, self._opened + self._reset_after - now)

    def ask(self, now: float) -> Permit | None:
        """The right to try, or None: it is open, or a probe is under way."""
        state = self.state(now)
        if state is BreakerState.OPEN or (state is BreakerState.HALF_OPEN and self._probe is not None):
            return None
        self._numbers += 1
        permit = Permit(self._numbers, state is BreakerState.HALF_OPEN)
        if permit.is_probe:
            self._probe = permit.number
        return permit

    def report(self, permit: Permit, *, ok: bool, now: float) -> None:
        """What came of the try. A permit is good for one report."""
        if self._probe == permit.number:
            self._probe = None
            self._opened = None if ok else now
            self._failures = 0 if ok else self._failures + 1
        elif self._opened is None:
            self._failures = 0 if ok else self._failures + 1
            if self._failures >= self._limit:
                self._opened = now

    def given_up(self, permit: Permit) -> None:
        """The try was cancelled, or says nothing about the other side."""
        if self._probe == permit.number:
            self._probe = None
