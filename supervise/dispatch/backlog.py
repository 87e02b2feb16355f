"""The tasks that wait, and which of them is next. Pure: the clock is handed in.

delayed     its time has not come (`not_before`, or the pause before a retry)
blocked     a task that it depends on has not completed
ready       by priority, then by arrival
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import final

from attrs import frozen

__all__ = ["Backlog", "Offer"]


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
    """

    key: str
    task_id: str
    priority: int = 0
    dependencies: tuple[str, ...] = ()
    not_before: float = 0.0
    attempts: int = 0


@final
class Backlog:
    """Waiting offers. Of those that are ready, `next` gives the one of the highest priority that came first."""

    def __init__(self) -> None:
        self._offers: dict[str, tuple[int, Offer]] = {}
        self._ready: list[tuple[int, int, str]] = []  # (-priority, arrival, key)
        self._delayed: list[tuple[float, int, str]] = []  # (not_before, arrival, key)
        self._missing: dict[str, set[str]] = {}  # key → ids that it waits for
        self._waiters: dict[str, set[str]] = {}  # id → keys that wait for it
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._offers)

    def __contains__(self, key: str) -> bool:
        return key in self._offers

    @property
    def blocked(self) -> dict[str, tuple[str, ...]]:
        """Task ids that wait for others, and for which."""
        return {self._offers[key][1].task_id: tuple(sorted(ids)) for key, ids in self._missing.items()}

    def add(self, offer: Offer, *, missing: Iterable[str] = ()) -> None:
        """One more. `missing` are those of its dependencies that have not completed. Replaces one of the same key."""
        self.remove(offer.key)
        self._arrivals += 1
        self._offers[offer.key] = (self._arrivals, offer)
        waits_for = set(missing)
        if waits_for:
            self._missing[offer.key] = waits_for
            for task_id in waits_for:
                self._waiters.setdefault(task_id, set()).add(offer.key)
        else:
            self._delay(offer.key)

    def remove(self, key: str) -> Offer | None:
        """It waits no more. Its entries in the heaps are passed over when they come up."""
        found = self._offers.pop(key, None)
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

    def _delay(self, key: str) -> None:
        arrival, offer = self._offers[key]
        heapq.heappush(self._delayed, (offer.not_before, arrival, key))

    def _is(self, arrival: int, key: str) -> bool:
        """Whether an entry of a heap still stands for something."""
        found = self._offers.get(key)
        return found is not None and found[0] == arrival
