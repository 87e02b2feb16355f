"""So many places for jobs; who asked first gets one first."""

from __future__ import annotations

from collections import deque
from typing import final

import trio


@final
class Turns:
    """Hands out places in the order of asking.

    A semaphore in each job's own task would not do: Trio runs the tasks of one moment in any order.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: deque[Turn] = deque()

    def ask(self) -> Turn:
        """Get in line. To be ended in any case."""
        turn = Turn(self)
        self._waiting.append(turn)
        self._admit()
        return turn

    def _admit(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._waiting.popleft()._came.set()

    def _end(self, turn: Turn) -> None:
        if turn._came.is_set():
            self._free += 1
        else:
            self._waiting.remove(turn)
        self._admit()


@final
class Turn:
    """One who has asked."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._came = trio.Event()

    async def comes(self) -> None:
        """Wait for the place. Cancelling ends the wait only."""
        await self._came.wait()

    def end(self) -> None:
        """Give the place back, or leave the line. Call once."""
        self._turns._end(self)
