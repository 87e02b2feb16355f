"""So many places for jobs: who asked first gets one first, of those who may begin."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import final

import trio


@final
class Turns:
    """Hands out places in the order of asking.

    A semaphore in each job's own task would not do: Trio runs the tasks of one moment in any order. And who may not
    begin yet waits in line without a place, so that it keeps no other job from one.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = places
        self._waiting: list[Turn] = []
        self._numbers = count()

    def ask(self, may_begin: Callable[[], bool] = lambda: True) -> Turn:
        """Get in line. To be ended in any case.

        Args:
            may_begin: asked when there is a place. When its answer changes to yes, call `admit`.
        """
        turn = Turn(self, next(self._numbers), may_begin)
        self._waiting.append(turn)
        self.admit()
        return turn

    @property
    def unused(self) -> bool:
        """Nobody has a place, or waits for one."""
        return self._free == self._places and not self._waiting

    def admit(self) -> None:
        """Hand out what places there are."""
        for turn in tuple(self._waiting):
            if not self._free:
                return
            if turn._may_begin():
                self._free -= 1
                self._waiting.remove(turn)
                turn._came.set()

    def _back(self, turn: Turn) -> None:
        """In line again, where it was."""
        turn._came = trio.Event()
        self._free += 1
        self._waiting.append(turn)
        self._waiting.sort(key=lambda each: each._number)
        self.admit()

    def _end(self, turn: Turn) -> None:
        if turn._came.is_set():
            self._free += 1
        else:
            self._waiting.remove(turn)
        self.admit()


@final
class Turn:
    """One who has asked."""

    def __init__(self, turns: Turns, number: int, may_begin: Callable[[], bool]) -> None:
        self._turns = turns
        self._number = number
        self._may_begin = may_begin
        self._came = trio.Event()

    async def comes(self) -> None:
        """Wait for the place. When this returns, the turn may begin at this moment. Cancelling ends the wait only."""
        await self._came.wait()
        while not self._may_begin():  # any more: things have changed since the place was handed out
            self._turns._back(self)
            await self._came.wait()

    def end(self) -> None:
        """Give the place back, or leave the line. Call once."""
        self._turns._end(self)
