"""The life of the index watch, as tables. No Trio, no I/O, no clock.

The watch is a machine of seven states. Three are states of rest: `NotStarted` (nothing is known of the index),
`Terminated` (it was brought level with the workspace and nothing runs) and `Failed` (nothing runs and nothing may
be concluded). In the other four, a process of the indexer runs: `Starting`, `Running` and `Stopping` are the
watch; `FallbackReconcile` is `cidx index --reconcile`, which never runs beside a watch.

`TABLE` maps state and event to the next state. A missing row is the one error, `IllegalTransition`.

What a table cannot hold is how the end depends on all that happened before. That is `Facts`, a value which the
driver fills in, and `ENDS`, the list of endings of which the first that matches is taken. The driver
(watch.py) knows no rule: it reports events, asks `next_state` and `ending`, and does what they say.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from attrs import evolve, frozen

from supervise.errors import IllegalTransition
from supervise.model import IndexStatus


class State(StrEnum):
    """Where the watch is in its life."""

    NOT_STARTED = "NotStarted"
    STARTING = "Starting"
    RUNNING = "Running"
    STOPPING = "Stopping"
    FAILED = "Failed"
    FALLBACK_RECONCILE = "FallbackReconcile"
    TERMINATED = "Terminated"


class Event(StrEnum):
    """What can happen to the watch, or to the reconcile in its place."""

    START = "start"  # the indexer's commands are being run
    READY = "ready"  # the watch has said that it watches
    SETTLED = "settled"  # it has said nothing, but has lived for settle_time
    EXITED = "exited"  # it has ended, unasked or not as asked
    FAILED = "failed"  # it could not be started, did not come up, or must not be started; a reconcile failed
    STOP = "stop"  # it is asked to flush and end
    FLUSHED = "flushed"  # it ended with exit code 0 in answer
    RECONCILE = "reconcile"  # a reconcile begins
    RECONCILED = "reconciled"  # and has proved to be good


TABLE: dict[tuple[State, Event], State] = {
    (State.NOT_STARTED, Event.START): State.STARTING,
    (State.NOT_STARTED, Event.RECONCILE): State.FALLBACK_RECONCILE,  # a stale workspace, before its watch
    (State.NOT_STARTED, Event.FAILED): State.FAILED,  # disabled, or another watches
    #
    (State.STARTING, Event.READY): State.RUNNING,
    (State.STARTING, Event.SETTLED): State.RUNNING,
    (State.STARTING, Event.EXITED): State.FAILED,
    (State.STARTING, Event.FAILED): State.FAILED,
    (State.STARTING, Event.STOP): State.STOPPING,
    #
    (State.RUNNING, Event.READY): State.RUNNING,  # late, after it had settled
    (State.RUNNING, Event.EXITED): State.FAILED,
    (State.RUNNING, Event.STOP): State.STOPPING,
    #
    (State.STOPPING, Event.READY): State.STOPPING,  # the line and our signal have crossed
    (State.STOPPING, Event.FLUSHED): State.TERMINATED,
    (State.STOPPING, Event.EXITED): State.FAILED,
    #
    (State.FAILED, Event.START): State.STARTING,  # again, after a crash or after a reconcile that failed
    (State.FAILED, Event.RECONCILE): State.FALLBACK_RECONCILE,
    (State.FAILED, Event.FAILED): State.FAILED,  # one more reason
    #
    (State.FALLBACK_RECONCILE, Event.RECONCILED): State.TERMINATED,
    (State.FALLBACK_RECONCILE, Event.FAILED): State.FAILED,
    #
    (State.TERMINATED, Event.START): State.STARTING,  # the stale workspace was reconciled: now its watch
    (State.TERMINATED, Event.RECONCILE): State.FALLBACK_RECONCILE,  # what the agent did since then
    (State.TERMINATED, Event.FAILED): State.FAILED,  # disabled, after the stale workspace was reconciled
}

#: States in which the last job may end.
FINAL = frozenset({State.NOT_STARTED, State.TERMINATED, State.FAILED})

#: What is told of the index while the watch is in a state; `None` leaves what was told before.
LIVE_STATUS: dict[State, IndexStatus | None] = {
    State.NOT_STARTED: None,
    State.STARTING: None,
    State.RUNNING: IndexStatus.WATCHING,
    State.STOPPING: IndexStatus.STALE,  # until the end has proved otherwise
    State.FAILED: IndexStatus.STALE,
    State.FALLBACK_RECONCILE: IndexStatus.RECONCILING_FALLBACK,
    State.TERMINATED: None,
}


def next_state(state: State, event: Event) -> State:
    """The state after `event`.

    Raises:
        IllegalTransition: the table has no such row.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        raise IllegalTransition(state.value, event.value) from None


@frozen(kw_only=True)
class Facts:
    """What has happened while jobs used the index, as far as it decides what the index is worth.

    Attributes:
        index: the job has an index at all.
        alone: the lock of the workspace was ours from the start, so that nobody else had a watch there. Without it
            there is no watch, and the reconcile at the end waits for the lock.
        locked_out: that wait was in vain.
        level_before: the index was level with the workspace when the watch started: it was not stale, or the
            reconcile before the watch was good.
        ready_in_time: the readiness line was seen, and before any agent was let go. What an agent writes before
            the watch watches, nobody sees.
        crashes: how often the watch ended unasked.
        errors: `ERROR` lines of the watch.
        flushed: it ended with exit code 0 in answer to our flush signal.
        cancelled: the job was cancelled; of several that shared the watch, the last one.
        fallback: reconciling is allowed.
        reconcile_on_cancel: also after a cancellation.
    """

    index: bool = True
    alone: bool = True
    locked_out: bool = False
    level_before: bool = False
    ready_in_time: bool = False
    crashes: int = 0
    errors: int = 0
    flushed: bool = False
    cancelled: bool = False
    fallback: bool = True
    reconcile_on_cancel: bool = False

    def with_(self, **changes: Any) -> Facts:
        """A copy with some facts changed."""
        return evolve(self, **changes)

    @property
    def clean(self) -> bool:
        """Nothing speaks against the watch."""
        up = self.alone and self.level_before and self.ready_in_time
        return up and self.crashes == 0 and self.errors == 0 and self.flushed


@frozen
class End:
    """What to do when the trees of all agents are empty and the watch has ended.

    Attributes:
        name: of the situation.
        applies: whether it is given.
        reconcile: whether to reconcile; `status` is then that of a good reconcile, and a bad one is `failed`.
        status: what the index is told to be.
    """

    name: str
    applies: Callable[[Facts], bool]
    reconcile: bool
    status: IndexStatus


ENDS: tuple[End, ...] = (
    End("no index", lambda f: not f.index, False, IndexStatus.NONE),
    End("clean", lambda f: f.clean, False, IndexStatus.WATCH_TERMINATED),
    End("cancelled", lambda f: f.cancelled and not f.reconcile_on_cancel, False, IndexStatus.STALE),
    End("fallback off", lambda f: not f.fallback, False, IndexStatus.FAILED),
    End("locked out", lambda f: f.locked_out, False, IndexStatus.FAILED),
    End("otherwise", lambda f: True, True, IndexStatus.READY_VIA_FALLBACK),
)


def ending(facts: Facts) -> End:
    """The first ending that matches."""
    return next(end for end in ENDS if end.applies(facts))


#: Final statuses that leave the stale mark on disk.
LEAVES_MARK = frozenset({IndexStatus.STALE, IndexStatus.FAILED})


@frozen
class RestartBudget:
    """How often a crashed watch may be started again, and after which pause.

    Attributes:
        most: restarts within `window` seconds; past that, the watch stays failed.
        first, longest: the pause before a restart, doubling from one to the other, in seconds.
        past: when the restarts were, in the seconds of any steady clock.
    """

    most: int = 3
    window: float = 60.0
    first: float = 0.5
    longest: float = 8.0
    past: tuple[float, ...] = ()

    def pause(self, now: float) -> float | None:
        """Seconds to wait before the next restart; `None` when there is none left."""
        recent = self._recent(now)
        if len(recent) >= self.most:
            return None
        return float(min(self.longest, self.first * 2 ** len(recent)))

    def spent(self, now: float) -> RestartBudget:
        """The budget after a restart at `now`."""
        return evolve(self, past=(*self._recent(now), now))

    def _recent(self, now: float) -> tuple[float, ...]:
        return tuple(at for at in self.past if now - at < self.window)
