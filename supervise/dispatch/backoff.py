"""How long to wait before the next attempt. Pure: time and chance are handed in."""

from __future__ import annotations

from attrs import frozen

from supervise.model import FailureKind

#: Kinds of failure that another attempt may not have.
RETRYABLE = frozenset(
    {
        FailureKind.OVERLOADED,
        FailureKind.NETWORK,
        FailureKind.STALLED,
        FailureKind.KILLED,
        FailureKind.AGENT_ERROR,
    }
)

#: A pause is this share shorter at most: tasks that failed together do not come back together.
JITTER = 0.25


@frozen(kw_only=True)
class Backoff:
    """Pauses that double from `base` to `cap`, in seconds, each a little shorter by chance."""

    base: float
    cap: float

    def pause(self, failures: int, chance: float) -> float:
        """Seconds to wait after so many failed attempts (1 or more).

        Args:
            failures: how many attempts have failed.
            chance: a number from 0 to 1, drawn anew each time.
        """
        # Past 63 doublings any base is past any cap, and a float may overflow.
        full = min(self.cap, self.base * 2.0 ** min(failures - 1, 63))
        return full * (1.0 - JITTER * chance)
