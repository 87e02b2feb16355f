"""The port between dispatcher and world: where tasks come from, and what can be done with one.

Two protocols. A `Source` tells of waiting tasks, and gives claims. A `Claim` is the right to run one task, for one
attempt; exactly one of `finish`, `retry`, `bury` and `release` ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from attrs import frozen

from supervise.dispatch.backlog import Offer
from supervise.dispatch.task import Attempt, Task
from supervise.errors import SuperviseError

__all__ = ["Arrived", "Claim", "ClaimLost", "Completed", "News", "Source", "SourceTrouble", "Vanished"]


class ClaimLost(SuperviseError):
    """The task was taken from us: somebody else has its claim, and what came of ours is not published."""


class SourceTrouble(SuperviseError):
    """The source cannot do this now: a full disk, a lost connection. Nothing is lost; it may be asked again."""


@frozen
class Arrived:
    """A task waits."""

    offer: Offer


@frozen
class Vanished:
    """A task waits no more: somebody else has taken or removed it."""

    key: str


@frozen
class Completed:
    """A task has completed, perhaps somewhere else: others may depend on it."""

    task_id: str


News = Arrived | Vanished | Completed


class Claim(Protocol):
    """The right to run one task, for one attempt.

    All of its methods raise `ClaimLost` if it is ours no more, and `SourceTrouble` if they have to be called again.
    Cancelling them may leave the claim as it was; the next start of the source finds it.
    """

    @property
    def task(self) -> Task:
        """What is to be done."""

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """What came before. Its length plus one numbers this attempt, and fences it off from them."""

    async def renew(self) -> None:
        """Keep the claim until cancelled. Raises ClaimLost as soon as it is lost."""

    async def finish(self, record: Mapping[str, Any]) -> None:
        """Publish the result. Once this returns, it stays."""

    async def retry(self, attempts: tuple[Attempt, ...], at: float) -> None:
        """Put the task back with this history, for `at` (seconds since the epoch) or later."""

    async def bury(self, record: Mapping[str, Any]) -> None:
        """Make a dead letter of the task."""

    async def release(self) -> None:
        """Put the task back as it was."""


class Source(Protocol):
    """Where tasks come from."""

    def listen(self, wake: Callable[[], None]) -> None:
        """Call `wake` whenever there is news."""

    def news(self) -> Sequence[News]:
        """What has happened since this was called last."""

    async def recover(self) -> Sequence[Claim]:
        """The claims that a dead worker has left without an end. To be asked first, once."""

    async def claim(self, offer: Offer) -> Claim | None:
        """Take a task; None if it is gone. Raises SourceTrouble: it still waits."""

    async def completed(self, task_ids: Iterable[str]) -> set[str]:
        """Those that have completed. Of the others, `news` tells when they do. Raises SourceTrouble."""
