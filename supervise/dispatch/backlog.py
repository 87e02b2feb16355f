"""The tasks that wait, and which of them is next. Pure: the clock is handed in.

delayed     its time has not come (`not_before`, or the pause before a retry)
blocked     a task that it depends on has not completed
ready       by priority, then by arrival
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import islice
from typing import Final, final

from attrs import frozen

__all__ = ["Backlog", "Offer"]

#: So many of the blocked are told of.
MOST_TOLD: Final = 100

#: So many dependencies are followed to find out whether tasks wait for each other.
MOST_STEPS: Final = 10_000


@final
@frozen(kw_only=True)
class Offer:
    """A task that waits, without its content.

    Attributes:
        key: what its source knows it by.
        task_id: its id.
        priority: higher comes first.
        dependencies: ids of tasks that must be completed first.
        not_before: seconds since the epoch.
        attempts: how many there were.
        retry_at, pause: when the next one may come (seconds since the epoch), and how far off that was when it was
            written (seconds). Whoever offers it makes `not_before` of them.
    """

    key: str
    task_id: str
    priority: int = 0
    dependencies: tuple[str, ...] = ()
    not_before: float = 0.0
    attempts: int = 0
    retry_at: float = 0.0
    pause: float = 0.0


@final
class Backlog:
    """Waiting offers. Of those that are ready, `next` gives the one of the highest priority that came first."""

    def __init__(self) -> None:
        self._offers: dict[str, tuple[int, Offer]] = {}
        self._ready: list[tuple[int, int, str]] = []  # (-priority, arrival, key)
        self._delayed: list[tuple[float, int, str]] = []  # (not_before, arrival, key)
        self._missing: dict[str, set[str]] = {}  # key → ids that it waits for
        self._waiters: dict[str, set[str]] = {}  # id → keys that wait for it
        self._keys: dict[str, str] = {}  # by task id
        self._circles: list[tuple[str, ...]] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._offers)

    def __contains__(self, key: str) -> bool:
        return key in self._offers

    @property
    def blocked(self) -> dict[str, tuple[str, ...]]:
        """Task ids that wait for others, and for which: of a hundred tasks."""
        told = islice(self._missing.items(), MOST_TOLD)
        return {self._offers[key][1].task_id: tuple(sorted(ids)) for key, ids in told}

    @property
    def circles(self) -> tuple[tuple[str, ...], ...]:
        """Task ids that wait for each other, each for the next one, and the last for the first: for ever."""
        return tuple(self._circles)

    def add(self, offer: Offer, *, missing: Iterable[str] = (), arrival: int | None = None) -> None:
        """One more. Replaces one of the same key.

        Args:
            offer: it.
            missing: those of its dependencies that have not completed.
            arrival: of one that was here before, as `arrival` told it; it takes its place again.
        """
        self.remove(offer.key)
        if arrival is None:
            self._arrivals += 1
            arrival = self._arrivals
        self._offers[offer.key] = (arrival, offer)
        self._keys[offer.task_id] = offer.key
        waits_for = set(missing)
        if waits_for:
            self._missing[offer.key] = waits_for
            for task_id in waits_for:
                self._waiters.setdefault(task_id, set()).add(offer.key)
            if circle := self._circle(offer.task_id):
                self._circles.append(circle)
        else:
            self._delay(offer.key)

    def arrival(self, key: str) -> int:
        """Of one that waits: its number in the order of their coming."""
        return self._offers[key][0]

    def remove(self, key: str) -> Offer | None:
        """It waits no more. Its entries in the heaps are passed over when they come up."""
        found = self._offers.pop(key, None)
        if found is not None:
            self._keys.pop(found[1].task_id, None)
            self._break(found[1].task_id)
        for task_id in self._missing.pop(key, ()):
            self._waiters[task_id].discard(key)
            if not self._waiters[task_id]:
                del self._waiters[task_id]
        if len(self._ready) + len(self._delayed) > 2 * len(self._offers) + 64:
            self._ready = [entry for entry in self._ready if self._is(entry[1], entry[2])]
            self._delayed = [entry for entry in self._delayed if self._is(entry[1], entry[2])]
            heapq.heapify(self._ready)
            heapq.heapify(self._delayed)
        return None if found is None else found[1]

    def completed(self, task_id: str) -> None:
        """This task has completed: those that wait for nothing else are blocked no more."""
        self._break(task_id)
        for key in self._waiters.pop(task_id, set()):
            self._missing[key].discard(task_id)
            if not self._missing[key]:
                del self._missing[key]
                self._delay(key)

    def next(self, now: float) -> Offer | None:
        """The one that is to be taken now; `None` if none is ready. It stays here until it is removed.

        Args:
            now: seconds since the epoch.
        """
        while self._delayed and self._delayed[0][0] <= now:
            _, arrival, key = heapq.heappop(self._delayed)
            if self._is(arrival, key):
                heapq.heappush(self._ready, (-self._offers[key][1].priority, arrival, key))
        while self._ready:
            _, arrival, key = self._ready[0]
            if self._is(arrival, key):
                return self._offers[key][1]
            heapq.heappop(self._ready)
        return None

    def next_time(self) -> float | None:
        """When the first of the delayed becomes ready, in seconds since the epoch; `None` if there is none."""
        while self._delayed and not self._is(self._delayed[0][1], self._delayed[0][2]):
            heapq.heappop(self._delayed)
        return self._delayed[0][0] if self._delayed else None

    def _circle(self, first: str) -> tuple[str, ...]:
        """Those that wait for each other since this one waits, too; empty if there are none, or hard to find."""
        came_from: dict[str, str] = {}
        todo, steps = [first], 0
        while todo:
            task_id = todo.pop()
            for other in self._missing.get(self._keys.get(task_id, ""), ()):
                steps += 1
                if other == first:
                    path = [task_id]
                    while path[-1] != first:
                        path.append(came_from[path[-1]])
                    return tuple(reversed(path))
                if steps > MOST_STEPS:
                    return ()
                if other in self._keys and other not in came_from:
                    came_from[other] = task_id
                    todo.append(other)
        return ()

    def _break(self, task_id: str) -> None:
        """Who waited for this one in a circle does not wait for ever."""
        if self._circles:
            self._circles = [circle for circle in self._circles if task_id not in circle]

    def _delay(self, key: str) -> None:
        arrival, offer = self._offers[key]
        heapq.heappush(self._delayed, (offer.not_before, arrival, key))

    def _is(self, arrival: int, key: str) -> bool:
        """Whether an entry of a heap still stands for something."""
        found = self._offers.get(key)
        return found is not None and found[0] == arrival
