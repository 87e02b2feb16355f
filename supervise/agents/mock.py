"""An agent without a process, for tests of whoever embeds this library: it does what its script says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import final

import trio
from attrs import field, frozen

from supervise.agents.protocol import AgentRun
from supervise.errors import SpecError
from supervise.events import AgentEvent, AgentText
from supervise.model import AgentReport, FailureKind, Usage

__all__ = ["MockAgent"]

#: A step: a text to say, an event to publish, seconds to wait, or a function to call (and await).
Step = str | AgentEvent | float | Callable[[AgentRun], object]


def _steps(value: Iterable[Step]) -> tuple[Step, ...]:
    if isinstance(value, str):
        raise SpecError(f"MockAgent.steps is the text {value!r}, but must be a list of steps: write [{value!r}]")
    return tuple(value)


def _kind(value: FailureKind | str | None) -> FailureKind | None:
    return None if value is None else FailureKind(value)


@final
@frozen(kw_only=True)
class MockAgent:
    """Plays a script in the process of the job, and reports what it was told to.

    Attributes:
        steps: what happens, in order: a `str` is published as `AgentText`, an `AgentEvent` as it is, a number is
            a wait in seconds, a function is called with the `AgentRun` and awaited if it returns an awaitable.
        hang: never end by itself; the job has to be cancelled or to time out.
        text, session_id, usage, cost_usd, num_turns: the report.
        failure_kind, error: fail instead, with this kind and one-line error.
    """

    steps: tuple[Step, ...] = field(default=(), converter=_steps)
    hang: bool = False
    text: str = "done"
    session_id: str | None = "mock"
    usage: Usage = Usage()
    cost_usd: float | None = None
    num_turns: int | None = 1
    failure_kind: FailureKind | None = field(default=None, converter=_kind)
    error: str | None = None

    @property
    def name(self) -> str:
        """See `Agent.name`."""
        return "mock"

    async def run(self, run: AgentRun) -> None:
        """See `Agent.run`."""
        run.started()
        for step in self.steps:
            await self._do(step, run)
            run.progress()
        if self.hang:
            await trio.sleep_forever()
        failed = self.failure_kind is not None or self.error is not None
        run.report(
            AgentReport(
                failure_kind=(self.failure_kind or FailureKind.AGENT_ERROR) if failed else None,
                error=(self.error or f"the script says {self.failure_kind}") if failed else None,
                text=self.text,
                session_id=self.session_id,
                usage=self.usage,
                cost_usd=self.cost_usd,
                num_turns=self.num_turns,
                finished=not failed,
            )
        )
        await trio.lowlevel.checkpoint()

    async def _do(self, step: Step, run: AgentRun) -> None:
        match step:
            case str():
                run.emit(AgentText(text=step))
            case AgentEvent():
                run.emit(step)
            case int() | float():
                await trio.sleep(step)
            case _:
                answer = step(run)
                if isinstance(answer, Awaitable):
                    await answer
        await trio.lowlevel.checkpoint()
