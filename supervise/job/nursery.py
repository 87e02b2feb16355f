"""The heart: one job is one nursery, and this is its whole life.

    put the stale mark on the disk
    open the nursery
        child 1: the index    levels what is stale, watches, and settles at the end
        child 2: the heartbeat
        wait until the index says that the agent may start, at most `startup_timeout`
        child 3: the agent    when this child has ended, its tree is empty
        tell the index that the agent is gone, and wait for its report
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

from supervise import durable
from supervise.agents.claude import ClaudeAgent
from supervise.agents.protocol import Agent
from supervise.codec import to_json, to_line
from supervise.events import Event, IndexChanged, JobStarted
from supervise.index.cidx import INDEX_DIRECTORY, Cidx
from supervise.index.stale import DiskMark, Stamper
from supervise.index.watch import Index, IndexDriver, NoIndex
from supervise.job.agent_side import AgentSide
from supervise.job.environment import agent_environment, index_environment
from supervise.job.handle import Job, JobState
from supervise.job.heartbeat import beat
from supervise.model import IndexReport, JobResult, StopPolicy, Survivor
from supervise.processes.child import ProcessTree, TreeOptions, open_tree
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.processes.session import SessionContainment
from supervise.secrets import Masker, secret_values
from supervise.settings import IndexSettings, Settings

log = logging.getLogger("supervise.job")


@trio.lowlevel.enable_ki_protection
async def run(job: Job, settings: Settings, directory: Path, limit: trio.Semaphore) -> None:
    """Run a job to its end. Its result is in `job` and in `directory` on every road out.

    Args:
        job: the handle, fresh.
        settings: all bounds.
        directory: the job's own, for logs, heartbeat and result.
        limit: a place is taken for the length of the job.

    A cancellation of the caller's scope runs the bounded teardown, and propagates. Nothing else is raised: what
    goes wrong is in the result.
    """
    parts = Parts(job, settings, directory)
    began, clock = time.time(), trio.current_time()
    held, bug = False, None
    try:
        with job._scope:
            await limit.acquire()
            held = True
            began, clock = time.time(), trio.current_time()
            await live(job, parts)
    except trio.Cancelled:
        job.cancel_reason = job.cancel_reason or "the caller's scope was cancelled"
        raise
    except Exception as error:
        log.exception("job %s: a bug in supervise", job.job_id)
        bug = f"a bug in supervise: {error!r}"
    finally:
        result = parts.result(began=began, seconds=trio.current_time() - clock, bug=bug)
        with trio.CancelScope(shield=True):
            await _write(directory / "result.json", result)
        if held:
            limit.release()
        job._finish(result)


async def live(job: Job, parts: Parts) -> None:
    """The nursery. On every road out, the agent's tree is empty and the index has reported."""
    job._enter(JobState.STARTING)
    job._publish(parts.introduction())
    index, agent = parts.index, parts.agent_side
    beating = trio.CancelScope(shield=True)
    await index.mark(job.job_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(index.run)
        nursery.start_soon(beat, job, agent, parts.trees, parts.directory, parts.settings.heartbeat_interval, beating)
        agent_runs = False
        try:
            with trio.move_on_after(parts.startup_timeout):
                await index.ready()
            index.agent_starts()
            nursery.start_soon(agent.run, parts.agent)
            agent_runs = True
            await agent.ended.wait()
            job._enter(JobState.SETTLING)
            index.finish()
            parts.index_report = await index.report()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                if agent_runs and not agent.ended.is_set():
                    job._enter(JobState.STOPPING)
                    await agent.ended.wait()
                job._enter(JobState.SETTLING)
                index.cancel()
                parts.index_report = await index.report()
            raise
        finally:
            beating.cancel()


class Parts:
    """What a job is put together from: agent, index, and what they share."""

    def __init__(self, job: Job, settings: Settings, directory: Path) -> None:
        spec = job.spec
        self.settings = settings
        self.directory = directory
        self.trees: list[ProcessTree] = []
        self.index_report: IndexReport | None = None
        self._job = job
        self._agent_survivors: tuple[Survivor, ...] = ()
        index_settings = settings.index if spec.index == "settings" else spec.index
        index_env = index_environment(os.environ, index_settings or settings.index, spec.user)
        agent_env = agent_environment(os.environ, settings.agent, spec)
        self.masker = Masker(secret_values(agent_env) | secret_values(index_env))
        self._options = TreeOptions(
            mark=job.job_id,
            masker=self.masker,
            log_dir=directory,
            log_max_bytes=settings.log_max_bytes,
            tail_bytes=settings.tail_bytes,
            pipe_timeout=settings.pipe_timeout,
        )
        self.agent = cast("Agent", spec.agent or ClaudeAgent())
        self.agent_side = AgentSide(
            spec,
            settings.agent,
            agent_env,
            open_tree=self.open_tree,
            hurry=job._hurry,
            kill_wait=settings.kill_wait,
            emit=job._publish,
            on_start=self._agent_started,
        )
        self.startup_timeout = index_settings.startup_timeout if index_settings else 0.0
        self.index: Index = NoIndex()
        if index_settings is not None and _wants_index(index_settings, spec.workspace):
            self.index = self._index(index_settings, index_env)

    def introduction(self) -> JobStarted:
        """The job's first event."""
        return JobStarted(
            workspace=str(self._job.spec.workspace),
            agent=self.agent.name,
            index="none" if isinstance(self.index, NoIndex) else "cidx",
            containment=SessionContainment.tier,
        )

    @asynccontextmanager
    @trio.lowlevel.enable_ki_protection
    async def open_tree(self, role: str, policy: StopPolicy, hurry: Hurry) -> AsyncIterator[ProcessTree]:
        """A tree of this job; the heartbeat sees it, and its survivors are kept."""
        tree: ProcessTree | None = None
        try:
            async with open_tree(role, policy, hurry, options=self._options, emit=self._emit) as tree:
                self.trees.append(tree)
                yield tree
        finally:
            if tree is not None:
                self.trees.remove(tree)
                if role == "agent":
                    self._agent_survivors += tree.survivors

    def result(self, *, began: float, seconds: float, bug: str | None) -> JobResult:
        """What came out of the job; secrets masked in what did not come through a pipe."""
        outcome, report = self.agent_side.verdict(self._job.cancel_reason)
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
            session_id=report.session_id,
            usage=report.usage,
            cost_usd=report.cost_usd,
            num_turns=report.num_turns,
            index=self.index_report or IndexReport(),
            permission_denials=report.permission_denials,
            stdout_tail=mask(report.stdout_tail),
            stderr_tail=mask(report.stderr_tail),
            survivors=survivors,
            duration_seconds=seconds,
            error=None if report.error is None else mask(report.error),
            reset_at=report.reset_at,
            started_at=began,
            ended_at=time.time(),
            labels=self._job.spec.labels,
        )

    def _index(self, settings: IndexSettings, env: dict[str, str]) -> IndexDriver:
        spec = self._job.spec

        def command(argv: tuple[str, ...]) -> Command:
            return Command(argv=argv, cwd=str(spec.workspace), env=env, user=spec.user)

        # git reads the workspace only: it gets no key.
        git_env = {name: value for name, value in env.items() if name in ("PATH", "HOME")}
        stamper = Stamper(spec.workspace, self.open_tree, git_env, spec.user, settings.command_timeout)
        return IndexDriver(
            tool=Cidx(settings.command),
            settings=settings,
            command=command,
            open_tree=self.open_tree,
            mark=DiskMark(self.settings.state_dir, spec.workspace, stamper),
            emit=self._emit,
            hurry=self._job._hurry,
            kill_wait=self.settings.kill_wait,
        )

    def _emit(self, event: Event) -> None:
        if isinstance(event, IndexChanged):
            self._job.index_status = event.status
        self._job._publish(event)

    def _agent_started(self) -> None:
        self._job._enter(JobState.RUNNING)
        self._job._spawned.set()


def _wants_index(settings: IndexSettings, workspace: Path) -> bool:
    if settings.mode == "auto":
        return (workspace / INDEX_DIRECTORY).is_dir()
    return settings.mode == "cidx"


async def _write(path: Path, result: JobResult) -> None:
    data = to_line({"type": "result", **to_json(result)})
    try:
        await trio.to_thread.run_sync(lambda: durable.replace(path, data, durable=True))
    except OSError as error:
        log.error("the result of job %s could not be written to %s: %s", result.job_id, path, error.strerror)
