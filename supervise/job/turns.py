"""So many places for jobs; who asked first gets one first. And of jobs with an index, one in each workspace."""

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
        self._places = places
        self._free = places
        self._waiting: deque[Turn] = deque()

    def ask(self) -> Turn:
        """Get in line. To be ended in any case."""
        turn = Turn(self)
        self._waiting.append(turn)
        self._admit()
        return turn

    @property
    def unused(self) -> bool:
        """Nobody has a place, or waits for one."""
        return self._free == self._places and not self._waiting

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

    @property
    def came(self) -> bool:
        """Whether the place is there."""
        return self._came.is_set()

    async def comes(self) -> None:
        """Wait for the place. Cancelling ends the wait only."""
        await self._came.wait()

    def end(self) -> None:
        """Give the place back, or leave the line. Call once."""
        self._turns._end(self)


@final
class JobTurns:
    """Hands out places for jobs.

    A job with an index first waits for its workspace: two watches of one index, or a reconcile beside a watch, would
    harm it. It waits without a place, so that it keeps no other job from one.
    """

    def __init__(self, places: int) -> None:
        self._places = Turns(places)
        self._workspaces: dict[str, Turns] = {}

    def ask(self, workspace: str | None) -> JobTurn:
        """Get in line, of this workspace first. To be ended in any case."""
        return JobTurn(self, workspace)


@final
class JobTurn:
    """One job that has asked."""

    def __init__(self, turns: JobTurns, workspace: str | None) -> None:
        self._turns = turns
        self._workspace = workspace
        self._alone = None if workspace is None else turns._workspaces.setdefault(workspace, Turns(1)).ask()
        #: In line at once where it can be: the order of asking is kept.
        self._place = turns._places.ask() if self._alone is None or self._alone.came else None

    async def comes(self) -> None:
        """Wait for workspace and place. Cancelling ends the wait only."""
        if self._alone is not None:
            await self._alone.comes()
        self._place = self._place or self._turns._places.ask()
        await self._place.comes()

    def end(self) -> None:
        """Give back what it has, or leave the line. Call once."""
        if self._place is not None:
            self._place.end()
        if self._workspace is not None and self._alone is not None:
            self._alone.end()
            if self._turns._workspaces[self._workspace].unused:
                del self._turns._workspaces[self._workspace]
