"""What an agent is to a job. Any class that follows `Agent` can be run; nothing has to be registered."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

from supervise.events import AgentEvent
from supervise.model import AgentReport, JobSpec
from supervise.processes.child import Tree
from supervise.processes.containment import Command
from supervise.settings import AgentSettings

__all__ = ["Agent", "AgentRun"]


class AgentRun(Protocol):
    """One run of an agent: what the job gives, and what it wants to hear."""

    @property
    def spec(self) -> JobSpec:
        """The job's spec."""

    @property
    def settings(self) -> AgentSettings:
        """The agent's settings."""

    def command(self, argv: tuple[str, ...], *, stdin: bytes = b"") -> Command:
        """A command in the job's workspace, with the agent's environment and user."""

    def tree(self) -> AbstractAsyncContextManager[Tree]:
        """A tree of processes that ends when its block is left, by the job's stop policy."""

    def started(self, pid: int | None = None) -> None:
        """The agent is running now: the job's timeout counts from here. Call once."""

    def progress(self, lines: int = 1) -> None:
        """The agent has shown life; the heartbeat tells when it last did."""

    def emit(self, event: AgentEvent) -> None:
        """Publish what the agent said."""

    def report(self, report: AgentReport) -> None:
        """The verdict and the numbers. May be called again, the last call counts; also while being cancelled."""


@runtime_checkable
class Agent(Protocol):
    """Somebody who does the work of a job."""

    @property
    def name(self) -> str:
        """A short name for events and logs."""

    async def run(self, run: AgentRun) -> None:
        """Do the work, and report.

        Cancellation is how a job is stopped: clean up, `run.report` what is known, and let `trio.Cancelled`
        pass. Processes belong into `run.tree()`, which ends them on every road. An exception makes the job fail
        with `agent_error`. An agent that shields itself for ever cannot be ended, and neither can its job: bound
        what you shield.
        """
