"""The job's side of an agent's run: what `Agent.run` is given, and the clock that it runs against."""

from __future__ import annotations

import logging
import math
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar, final

import attrs
import orjson
import trio
from attrs import evolve

from supervise.agents.protocol import Agent
from supervise.errors import SpawnError, SpecError
from supervise.events import AgentEvent, Event
from supervise.model import AgentReport, FailureKind, JobSpec, Outcome, StopPolicy
from supervise.processes.child import Tree, TreeOpener
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.secrets import MASK
from supervise.settings import AgentSettings

log = logging.getLogger("supervise.job")

#: How deep the payload of an event is masked; what is nested deeper is hidden whole.
LEVELS = 100

#: The fields of events that hold JSON data.
PAYLOADS = ("raw", "input")

E = TypeVar("E", bound=AgentEvent)


@final
class AgentSide:
    """An `AgentRun`, and what the job wants to know of it.

    Attributes:
        ended: set when the agent's tree is empty.
        lines, last_progress: for the heartbeat; the latter on Trio's clock.
    """

    def __init__(
        self,
        spec: JobSpec,
        settings: AgentSettings,
        env: dict[str, str],
        *,
        open_tree: TreeOpener,
        hurry: Hurry,
        kill_wait: float,
        mask: Callable[[str], str],
        emit: Callable[[Event], None],
        on_start: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.settings = settings
        self.ended = trio.Event()
        self.lines = 0
        self.last_progress: float | None = None
        self._env = env
        self._open_tree = open_tree
        self._hurry = hurry
        self._policy = StopPolicy(((signal.SIGTERM, settings.termination_timeout),), kill_wait)
        self._mask = mask
        self._emit = emit
        self._on_start = on_start
        self._clock = trio.CancelScope()
        self._report: AgentReport | None = None
        self._returned = False
        self._cancelled = False
        self._stopping = False
        self._timed_out = False

    # --- for the agent ------------------------------------------------------------------------------------

    def command(self, argv: tuple[str, ...], *, stdin: bytes = b"") -> Command:
        """See `AgentRun.command`."""
        return Command(argv=argv, cwd=str(self.spec.workspace), env=dict(self._env), stdin=stdin, user=self.spec.user)

    def tree(self) -> AbstractAsyncContextManager[Tree]:
        """See `AgentRun.tree`."""
        return self._open_tree("agent", self._policy, self._hurry)

    def started(self, pid: int | None = None) -> None:
        """See `AgentRun.started`."""
        self.last_progress = trio.current_time()
        self._wind_clock()
        self._on_start()

    def progress(self, lines: int = 1) -> None:
        """See `AgentRun.progress`."""
        self.lines += lines
        self.last_progress = trio.current_time()

    def emit(self, event: AgentEvent) -> None:
        """See `AgentRun.emit`."""
        self._emit(self._masked(event))

    def report(self, report: AgentReport) -> None:
        """See `AgentRun.report`."""
        if not isinstance(report, AgentReport):
            raise SpecError(f"an agent must report an AgentReport, not {type(report).__name__}")
        self._report = report

    # --- for the job --------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def run(self, agent: Agent) -> None:
        """The agent, as a child of the job's nursery. What it raises becomes its report."""
        self._wind_clock()  # again when it says that it has started; it may forget to
        try:
            await self._run(agent)
        except BaseException as error:  # SystemExit, say: it goes on up, and is told
            other = BaseExceptionGroup("", [error]).split(trio.Cancelled)[1]
            if other is not None:
                self._raised(agent, other)
            raise
        finally:
            self._timed_out = self._clock.cancel_called
            self._cancelled = trio.current_effective_deadline() == -math.inf
            self._hurry.forget()  # a cancel that found nothing to hurry here is not meant for the index
            self.ended.set()

    async def _run(self, agent: Agent) -> None:
        try:
            with self._clock:
                await trio.lowlevel.checkpoint()  # a job that is cancelled by now starts no agent
                await agent.run(self)
                self._returned = True
        except* Exception as errors:  # also beside a Cancelled, as out of a nursery of the agent's own
            self._raised(agent, errors)

    def stopping(self) -> None:
        """The job is being cancelled: from here on time does not count, unless it is up already."""
        self._stopping = True
        if not self._clock.cancel_called:
            self._clock.deadline = math.inf

    def verdict(self, cancelled: str) -> tuple[Outcome, AgentReport]:
        """How the agent's run ended, and its report. What it had already finished stays finished.

        Args:
            cancelled: why the job was cancelled, should that be what ended it.
        """
        report = self._report or AgentReport()
        # Without a report, one that was stopped has only swallowed that.
        if self._returned and self._report is None and not (self._timed_out or self._cancelled):
            error = "the agent ended without a report"
            return Outcome.FAILED, AgentReport(failure_kind=FailureKind.BAD_OUTPUT, error=error)
        if self._returned and self._report is not None:
            if report.failure_kind is None:
                return Outcome.COMPLETED, report
            return Outcome.FAILED, evolve(report, error=report.error or f"the agent failed: {report.failure_kind}")
        if self._timed_out:
            if report.finished:  # it only lingered after its good last result
                return Outcome.COMPLETED, _with(report, None)
            return Outcome.TIMED_OUT, _with(report, f"the agent did not end within {self.spec.timeout:g} s")
        return Outcome.CANCELLED, _with(report, f"cancelled: {cancelled}")

    def _masked(self, event: E) -> E:
        """An event without secrets. A pipe has masked what was printed, but JSON can spell a secret in many ways."""
        changes: dict[str, Any] = {}
        for attribute in attrs.fields(type(event)):
            value = getattr(event, attribute.name)
            payload = attribute.name in PAYLOADS
            if payload and self._is_clean(value):
                continue
            masked = self._mask_all(value, LEVELS, payload=payload)
            if masked is not value and masked != value:
                changes[attribute.name] = masked
        return evolve(event, **changes) if changes else event

    def _is_clean(self, payload: Any) -> bool:
        """Whether it is JSON without secrets, as most are: to look at it as one text costs far less than to walk it."""
        try:
            text = orjson.dumps(payload).decode()
        except (TypeError, ValueError):  # no JSON, or JSON of an odd kind
            return False
        return self._mask(text) == text

    def _mask_all(self, value: Any, levels: int, *, payload: bool) -> Any:
        """`value` masked. In a payload, what is no JSON becomes text."""
        if isinstance(value, str):
            return self._mask(value)
        if value is None or isinstance(value, int | float):
            return value
        if not isinstance(value, Mapping | list | tuple | set | frozenset):
            return self._mask(_text_of(value)) if payload else value
        if levels == 0:
            return MASK
        if isinstance(value, Mapping):
            return {
                self._mask_key(key, levels, payload=payload): self._mask_all(item, levels - 1, payload=payload)
                for key, item in value.items()
            }
        items = [self._mask_all(item, levels - 1, payload=payload) for item in value]
        if isinstance(value, tuple):
            return tuple(items)
        return items if payload or isinstance(value, list) else frozenset(items)

    def _mask_key(self, key: Any, levels: int, *, payload: bool) -> Any:
        if payload and not isinstance(key, str):
            return self._mask(_text_of(key))
        return self._mask_all(key, levels - 1, payload=payload)

    def _wind_clock(self) -> None:
        if not self._stopping:
            self._clock.deadline = trio.current_time() + self.spec.timeout

    def _raised(self, agent: Agent, error: BaseException) -> None:
        error = plain(error)
        log.error("job %s: the agent raised\n%s", self.spec.job_id, self._mask(told(error)))
        stopped = self._clock.cancel_called or trio.current_effective_deadline() == -math.inf
        if not stopped:  # trouble on the way out does not change what the way out was
            text = f"the agent {agent.name!r} raised {type(error).__name__}: {error}"
            kind = FailureKind.SPAWN if isinstance(error, SpawnError) else FailureKind.AGENT_ERROR
            self._report = AgentReport(failure_kind=kind, error=text)
            self._returned = True

    def failed(self, error: str) -> tuple[Outcome, AgentReport]:
        """As `verdict`, for a job that failed for reasons of ours."""
        report = self._report or AgentReport()
        return Outcome.FAILED, evolve(report, failure_kind=FailureKind.AGENT_ERROR, error=error)


def plain(error: BaseException) -> BaseException:
    """The exception itself, where it is alone in its groups."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def told(error: BaseException) -> str:
    """The traceback, for a log. To be masked: an exception's text may hold anything."""
    return "".join(traceback.format_exception(error))


def _text_of(value: object) -> str:
    """What is no JSON, as text. An agent of the caller's own may hand out anything."""
    try:
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    except Exception:
        return MASK


def _with(report: AgentReport, error: str | None) -> AgentReport:
    return evolve(report, failure_kind=None, error=error)
