"""The heart: one job is one nursery, and this is its whole life.

    put the stale mark on the disk
    open the nursery
        child 1: the index    this job's lease on the watch of the workspace, which lives in the supervisor's nursery:
                              levels what is stale, watches, and settles when the last job leaves
        child 2: the heartbeat, and beside it who writes the event log
        wait until the index says that the agent may start, at most `startup_timeout`
        child 3: the agent    when this child has ended, its tree is empty
        give the lease back, and wait for the report
    write the result

A cancellation, by `job.cancel()` or of the caller's scope, reaches the agent and this body alone. Index and
heartbeat live behind shields and end when they are told to, so that there is one order on every road: first the
agent's tree, then the watch, then the reconcile. Each step is bounded by a setting.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import trio
from attrs import frozen

from supervise import durable
from supervise.agents.claude import ClaudeAgent
from supervise.agents.protocol import Agent
from supervise.codec import to_json, to_line
from supervise.events import Event, IndexChanged, JobStarted
from supervise.index.cidx import INDEX_DIRECTORY
from supervise.index.pool import Guest, Lease, WatchPool, Wish
from supervise.index.watch import Index, NoIndex
from supervise.job.agent_side import AgentSide, plain, told
from supervise.job.directory import RESULT
from supervise.job.environment import agent_environment, index_environment
from supervise.job.event_log import EVENTS, EventLog
from supervise.job.handle import Job, JobState
from supervise.job.heartbeat import beat
from supervise.job.threads import in_thread
from supervise.job.turns import Turn
from supervise.model import FailureKind, IndexReport, IndexStatus, JobResult, JobSpec, Outcome, StopPolicy, Survivor
from supervise.processes.child import ProcessTree, TreeOptions, open_tree
from supervise.processes.hurry import Hurry
from supervise.processes.output import Logs
from supervise.processes.tiers import Containments
from supervise.secrets import Masker, secret_values
from supervise.settings import IndexSettings, Settings

log = logging.getLogger("supervise.job")

#: Shorter values of secret-like names that no child is given are not masked.
LONG_ENOUGH = 8

BY_SCOPE = "the caller's scope was cancelled"


@trio.lowlevel.enable_ki_protection
async def run(job: Job, shared: Shared, directory: Path, turn: Turn, *, with_index: bool) -> None:
    """Run a job to its end. Its result is in `job` and in `directory` on every road out.

    Args:
        job: the handle, fresh.
        shared: what all jobs of the supervisor share.
        directory: the job's own, for logs, heartbeat and result.
        turn: to begin; it is ended here.
        with_index: as `wants_index` said when the turn was asked for.

    A cancellation of the caller's scope runs the bounded teardown, and propagates. What else goes wrong is in the
    result, and only what is no `Exception` is raised, too.
    """
    began, clock = time.time(), trio.current_time()
    parts: Parts | None = None
    bug: str | None = None
    events = EventLog(directory / EVENTS, shared.settings.events_max_bytes)
    job._bus.tap(events.take)
    try:
        with job._scope:
            await turn.comes()
            began, clock = time.time(), trio.current_time()
            parts = Parts(job, shared, directory, with_index=with_index)
            await live(job, parts, events)
    except* Exception as errors:
        bug = _bug(job, parts, errors)
    finally:
        result = _result(job, parts, bug, began, trio.current_time() - clock)
        with trio.CancelScope(shield=True):
            if parts is not None:
                parts.give_back()
                await in_thread(parts.logs.close)
            await events.close(result, _masker(job, parts).text)
            await _write(directory / RESULT, result)
        turn.end()
        job._finish(result)


async def live(job: Job, parts: Parts, events: EventLog) -> None:
    """The nursery. On every road out, the agent's tree is empty and the index has reported."""
    job._publish(parts.introduction())
    job._enter(JobState.STARTING)
    index, agent = parts.index, parts.agent_side
    beating = trio.CancelScope(shield=True)
    beats = (job, agent, parts.all_trees, parts.directory, parts.settings.heartbeat_interval, beating)
    await index.mark(job.job_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.run_index, name="index")
        nursery.start_soon(beat, *beats, name="heartbeat")
        nursery.start_soon(events.keep, parts.masker.text, name="event log")
        agent_runs = False
        try:
            with trio.move_on_after(parts.startup_timeout):
                await index.ready()
            index.agent_starts()
            nursery.start_soon(agent.run, parts.agent, name="agent")
            agent_runs = True
            await agent.ended.wait()
            job._enter(JobState.SETTLING)
            index.finish()
            await parts.index_ended.wait()
        except BaseException:  # a cancellation, or a bug: one order for both
            agent.stopping()
            with trio.CancelScope(shield=True):
                if agent_runs and not agent.ended.is_set():
                    job._enter(JobState.STOPPING)
                    await agent.ended.wait()
                job._enter(JobState.SETTLING)
                index.cancel()
                await parts.index_ended.wait()
            raise
        finally:
            beating.cancel()
            events.stop()


@frozen
class Shared:
    """What all jobs of a supervisor share: bounds, what holds their processes, and the watches."""

    settings: Settings
    containments: Containments
    watches: WatchPool


class Parts:
    """What a job is put together from: agent, index, and what they share."""

    def __init__(self, job: Job, shared: Shared, directory: Path, *, with_index: bool) -> None:
        spec = job.spec
        self.settings = settings = shared.settings
        self._containments = shared.containments
        self.directory = directory
        self.trees: list[ProcessTree] = []
        self.index_ended = trio.Event()
        self._job = job
        self._index_report = IndexReport()
        self._agent_survivors: tuple[Survivor, ...] = ()
        index_settings = _index_settings(settings, spec)
        index_env = index_environment(os.environ, index_settings or settings.index, spec.user)
        agent_env = agent_environment(os.environ, settings.agent, spec)
        # Of ours, too: what no child is given, a child of our user can still read in /proc, and print. But a short
        # value there is rather a word than a key, and masking it would tear holes into the agent's JSON.
        not_given = {value for value in secret_values(os.environ) if len(value) >= LONG_ENOUGH}
        self.masker = Masker(not_given | secret_values(agent_env) | secret_values(index_env))
        self.logs = Logs(directory, settings.log_max_bytes)
        self._options = TreeOptions(
            mark=job.job_id,
            masker=self.masker,
            logs=self.logs,
            tail_bytes=settings.tail_bytes,
            pipe_timeout=settings.pipe_timeout,
            contain=shared.containments.of_job(job.job_id, spec.limits),
        )
        self.agent = cast("Agent", spec.agent or ClaudeAgent())
        self.agent_side = AgentSide(
            spec,
            settings.agent,
            agent_env,
            open_tree=self.open_tree,
            hurry=job._hurry,
            kill_wait=settings.kill_wait,
            mask=self.masker.text,
            emit=job._publish,
            on_start=self._agent_started,
        )
        self.startup_timeout = index_settings.startup_timeout if index_settings else 0.0
        self.index: Index = NoIndex()
        self._lease: Lease | None = None
        if index_settings is not None and with_index:
            wish = Wish(workspace=os.path.realpath(spec.workspace), settings=index_settings, user=spec.user)
            guest = Guest(directory=directory, env=index_env, masker=self.masker, emit=self._emit, hurry=job._hurry)
            # The last thing here: from now on, it is to be given back.
            self.index = self._lease = shared.watches.join(wish, guest)

    def give_back(self) -> None:
        """What the job had for itself of what all jobs share."""
        if self._lease is not None:
            self._lease.abandon()
        self._containments.job_ended(self._job.job_id)

    def all_trees(self) -> tuple[ProcessTree, ...]:
        """Those of the job, and those that it shares."""
        return (*self.trees, *(self._lease.trees if self._lease else ()))

    def introduction(self) -> JobStarted:
        """The job's first event."""
        return JobStarted(
            workspace=str(self._job.spec.workspace),
            agent=self.agent.name,
            index="none" if isinstance(self.index, NoIndex) else "cidx",
            containment=self._containments.tier,
        )

    @asynccontextmanager
    @trio.lowlevel.enable_ki_protection
    async def open_tree(self, role: str, policy: StopPolicy, hurry: Hurry) -> AsyncIterator[ProcessTree]:
        """A tree of the agent; the heartbeat sees it, and its survivors are kept."""
        tree: ProcessTree | None = None
        try:
            async with open_tree(role, policy, hurry, options=self._options, emit=self._emit) as tree:
                self.trees.append(tree)
                yield tree
        finally:
            if tree is not None:
                self.trees.remove(tree)
                self._agent_survivors += tree.survivors

    @trio.lowlevel.enable_ki_protection
    async def run_index(self) -> None:
        """The index, as a child of the job's nursery. Even a bug in it fails the index only, and is told."""
        report: IndexReport | None = None
        reason = "a bug in supervise: the index made no report"
        try:
            await self.index.run()
            with trio.move_on_after(1, shield=True):  # it is there by now; nobody shall wait for ever
                report = await self.index.report()
        except Exception as error:
            reason = _bug(self._job, self, error)
        finally:
            if report is None:
                report = IndexReport(status=IndexStatus.FAILED, reason=reason, stale=True)
                state = self.index.state.value
                self._emit(IndexChanged(state=state, cause="bug", status=report.status, reason=reason))
            self._index_report = report
            self.index_ended.set()

    def result(self, *, began: float, seconds: float, bug: str | None) -> JobResult:
        """What came out of the job; secrets masked in what did not come through a pipe."""
        outcome, report = self.agent_side.verdict(self._job.cancel_reason or BY_SCOPE)
        if bug is not None:
            outcome, report = self.agent_side.failed(bug)
        survivors = self._agent_survivors + self.index.survivors
        for survivor in survivors:
            log.error("job %s: process %d lives on: %s", self._job.job_id, survivor.pid, survivor.reason)
        mask = self.masker.text
        return JobResult(
            job_id=self._job.job_id,
            outcome=outcome,
            failure_kind=report.failure_kind,
            exit_code=report.exit.code if report.exit else None,
            signal=report.exit.signal if report.exit else None,
            text=mask(report.text),
            session_id=None if report.session_id is None else mask(report.session_id),
            usage=report.usage,
            cost_usd=report.cost_usd,
            num_turns=report.num_turns,
            index=self._index_report,
            permission_denials=report.permission_denials,
            stdout_tail=mask(report.stdout_tail),
            stderr_tail=mask(report.stderr_tail),
            survivors=survivors,
            duration_seconds=seconds,
            error=None if report.error is None else _one_line(mask(report.error)),
            reset_at=report.reset_at,
            started_at=began,
            ended_at=time.time(),
            labels={mask(name): mask(text) for name, text in self._job.spec.labels.items()},
        )

    def _emit(self, event: Event) -> None:
        if isinstance(event, IndexChanged):
            self._job.index_status = event.status
        self._job._publish(event)

    def _agent_started(self) -> None:
        if self._job.state is JobState.STARTING:  # not when it was cancelled during the spawn
            self._job._enter(JobState.RUNNING)
        self._job._spawned.set()


def wants_index(settings: Settings, spec: JobSpec) -> bool:
    """Whether a job of this spec has an index; `auto` asks the workspace."""
    index = _index_settings(settings, spec)
    if index is None or index.mode == "none":
        return False
    return index.mode == "cidx" or os.path.isdir(spec.workspace / INDEX_DIRECTORY)


def _index_settings(settings: Settings, spec: JobSpec) -> IndexSettings | None:
    return settings.index if spec.index == "settings" else spec.index


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _masker(job: Job, parts: Parts | None) -> Masker:
    """Also of a job that was never put together."""
    return parts.masker if parts else Masker(secret_values(os.environ) | secret_values(job.spec.env))


def _bug(job: Job, parts: Parts | None, error: BaseException) -> str:
    """Log a bug of ours, or of an agent or a disk that did what nobody thought of, and put it in one line."""
    error = plain(error)
    masker = _masker(job, parts)
    log.error("job %s: a bug in supervise\n%s", job.job_id, masker.text(told(error)))
    return _one_line(masker.text(f"a bug in supervise: {type(error).__name__}: {error}"))


def _result(job: Job, parts: Parts | None, bug: str | None, began: float, seconds: float) -> JobResult:
    """The result, also of a job that was never put together, or whose parts do not fit into a result."""
    if parts is not None:
        try:
            return parts.result(began=began, seconds=seconds, bug=bug)
        except Exception as error:
            bug = _bug(job, parts, error)
    mask = _masker(job, parts).text
    return JobResult(
        job_id=job.job_id,
        outcome=Outcome.FAILED if bug else Outcome.CANCELLED,
        failure_kind=FailureKind.AGENT_ERROR if bug else None,
        error=bug or _one_line(mask(f"cancelled: {job.cancel_reason or BY_SCOPE}")),
        duration_seconds=seconds,
        started_at=began,
        ended_at=time.time(),
        labels={mask(name): mask(text) for name, text in job.spec.labels.items()},
    )


async def _write(path: Path, result: JobResult) -> None:
    try:
        data = to_line({"type": "result", **to_json(result)})
        await in_thread(lambda: durable.replace(path, data, durable=True))
    except OSError as error:
        log.error("the result of job %s could not be written to %s: %s", result.job_id, path, error.strerror)
    except Exception as error:  # an agent's report may hold what no JSON can
        log.error("the result of job %s could not be written to %s: %s", result.job_id, path, type(error).__name__)
