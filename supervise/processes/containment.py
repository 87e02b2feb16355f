"""The seam between what a tree of processes is for and how it is held together.

`Tree` (child.py) knows policies, pipes and events; a `Containment` knows how to start a program so that its
descendants can be found, and how to find, signal and await them. One instance holds one tree.
"""

from __future__ import annotations

from typing import Protocol

from attrs import frozen

from supervise.model import ExitStatus
from supervise.processes.identity import Process


@frozen(kw_only=True)
class Command:
    """A program to start.

    Attributes:
        argv: the program and its arguments.
        cwd: the directory it starts in.
        env: its whole environment.
        stdin: what it reads from standard input, followed by end of file.
        user: name of the user to run as; `None` for ours.
    """

    argv: tuple[str, ...]
    cwd: str
    env: dict[str, str]
    stdin: bytes = b""
    user: str | None = None

    def __repr__(self) -> str:
        return f"Command({self.argv[0]!r}, cwd={self.cwd!r})"  # arguments and environment may hold secrets


@frozen(kw_only=True)
class Pipes:
    """The child's ends of its standard streams, as descriptors."""

    stdin: int
    stdout: int
    stderr: int


class Leader(Protocol):
    """A program that was started: the leader of its session."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> ExitStatus:
        """Its exact status, as soon as it has ended. Only one task may wait. Cancelling ends the wait only."""


class Containment(Protocol):
    """Holds the processes of one tree."""

    @property
    def tier(self) -> str:
        """What holds the tree together, in words."""

    async def spawn(self, command: Command, pipes: Pipes) -> Leader:
        """Start a program in this tree. Cancelling waits for the spawn to end first: no child is half started.

        Raises:
            SpawnError: it could not be started; nothing is left of the attempt.
        """

    def members(self) -> list[Process]:
        """All living processes of the tree, as far as one look shows them."""

    def empty(self) -> bool:
        """Whether no process of the tree is alive; looks twice where one look can miss somebody."""

    def signal(self, number: int) -> int:
        """Send a signal to every member, then SIGCONT. Returns how many there were."""

    async def change(self) -> None:
        """Return when a member has ended, or may have. Cancelling ends the wait only."""

    def signal_group(self, leader: int, number: int) -> None:
        """Send one signal to a leader's process group, as a terminal does."""

    def not_ours(self) -> dict[int, str]:
        """Members that could not be signalled, pid to reason."""

    async def serve(self) -> None:
        """What has to be done as long as the tree is open. Runs in a task of the tree, and is cancelled at its end."""

    def close(self, *, survivors: bool = False) -> None:
        """Give back what the tree held: zombies are reaped, descriptors closed.

        Args:
            survivors: some of its processes could not be ended; what the disk knows of them is kept.
        """
