"""An agent that is a command line program: the driver that Claude Code and any other CLI share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

import trio

from supervise.agents.protocol import AgentRun
from supervise.agents.verdict import judge
from supervise.errors import SpawnError
from supervise.events import (
    AgentEvent,
    AgentOutput,
    AgentPermissionDenied,
    AgentResult,
    BadLine,
    UnknownEvent,
)
from supervise.model import AgentReport, ExitStatus, FailureKind
from supervise.processes.child import Child
from supervise.processes.output import Lines

__all__ = ["Parser", "run_command"]


class Parser(Protocol):
    """Bytes of standard output to events. Pure; see stream_json.py."""

    def feed(self, data: bytes) -> Sequence[AgentEvent]: ...

    def close(self) -> Sequence[AgentEvent]: ...


async def run_command(run: AgentRun, argv: tuple[str, ...], parser: Parser, *, stdin: bytes) -> None:
    """Run a program that speaks a protocol on its standard output, to its end, and report.

    Args:
        run: the job's side.
        argv: program and arguments.
        parser: understands the output. Its last `AgentResult` decides the outcome.
        stdin: what the program reads.

    Cancelling ends the program's tree by the job's stop policy, reports what is known, and propagates.
    """
    reader = _Reader(run, parser)
    stderr = Lines(reader.stderr_line)
    child: Child | None = None
    try:
        async with run.tree() as tree:
            child = await tree.spawn(run.command(argv, stdin=stdin), stdout=reader.feed, stderr=stderr.feed)
            run.started(child.pid)
            with reader.patience:
                await child.wait()
            reader.stopped_by_us = child.status is None
    except SpawnError as error:
        run.report(AgentReport(failure_kind=FailureKind.SPAWN, error=str(error)))
    finally:
        if child is not None:
            reader.close()
            stderr.close()
            run.report(reader.report(argv[0], child.status, child.tails()))


@final
class _Reader:
    """Follows the agent's output."""

    def __init__(self, run: AgentRun, parser: Parser) -> None:
        #: Ends the wait for the program: after a good last result and silence, or when it cannot be understood.
        self.patience = trio.CancelScope()
        self.stopped_by_us = False
        self._run = run
        self._parser = parser
        self._result: AgentResult | None = None
        self._too_long: BadLine | None = None
        self._session_id: str | None = None
        self._denials = 0
        self._finished = False

    def feed(self, data: bytes) -> None:
        self._run.progress(0)  # the beginning of a long line is life, too
        self._take(self._parser.feed(data))
        if not self._too_long:
            linger = self._run.settings.exit_linger if self._finished else float("inf")
            self.patience.deadline = trio.current_time() + linger

    def stderr_line(self, line: str) -> None:
        self._run.progress()
        self._run.emit(AgentOutput(stream="stderr", line=line))

    def close(self) -> None:
        self._take(self._parser.close())

    def report(self, program: str, status: ExitStatus | None, tails: tuple[str, str]) -> AgentReport:
        kind, error = judge(
            self._result,
            status,
            bad_line=self._too_long,
            stopped_by_us=self.stopped_by_us,
            stderr_tail=tails[1],
            program=program,
        )
        result = self._result or AgentResult()
        return AgentReport(
            failure_kind=kind,
            error=error,
            text=result.text,
            session_id=result.session_id or self._session_id,
            usage=result.usage,
            cost_usd=result.cost_usd,
            num_turns=result.num_turns,
            permission_denials=max(result.permission_denials, self._denials),
            reset_at=result.reset_at,
            exit=status,
            finished=self._finished,
            stdout_tail=tails[0],
            stderr_tail=tails[1],
        )

    def _take(self, events: Sequence[AgentEvent]) -> None:
        for event in events:
            match event:
                case AgentResult():
                    self._result = event
                    self._finished = not event.is_error
                case UnknownEvent() | BadLine(too_long=False):  # news of a background task, say: no further turn
                    pass
                case AgentPermissionDenied():
                    self._denials += 1
                case BadLine(too_long=True):
                    self._too_long = self._too_long or event
                    self.patience.cancel()
                case _:  # the result was not the last: a further turn has begun, and may be silent for long
                    self._finished = False
            self._session_id = getattr(event, "session_id", None) or self._session_id
            self._run.emit(event)
        if events:
            self._run.progress(len(events))
