"""Steps that wait, and somebody who cannot: each `next()` ends the wait that is under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import trio


@final
class Hurry:
    """Shared by all waits of a teardown. A second cancel, or a second Ctrl-C, calls `next()`."""

    def __init__(self) -> None:
        self._waits: set[trio.CancelScope] = set()
        self._owed = 0

    def next(self) -> None:
        """End the steps that are waiting now; if none is, the next one will not wait."""
        waiting = [scope for scope in self._waits if not scope.cancel_called]
        for scope in waiting:
            scope.cancel()
        if not waiting:
            self._owed += 1

    def forget(self) -> None:
        """What is still owed belonged to steps that are over, or never were."""
        self._owed = 0

    @contextmanager
    def step(self, seconds: float) -> Iterator[trio.CancelScope]:
        """A wait of at most `seconds`, which `next()` ends early."""
        with trio.move_on_after(seconds) as scope:
            if self._owed:
                self._owed -= 1
                scope.cancel()
            self._waits.add(scope)
            try:
                yield scope
            finally:
                self._waits.discard(scope)
