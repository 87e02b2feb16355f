"""The owner of what jobs share, and the calls that users make."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import final

import trio

from supervise.errors import SettingsError, SpecError, SuperviseError
from supervise.index.outfit import RealOutfit
from supervise.index.pool import WatchPool
from supervise.job import nursery as job_nursery
from supervise.job.agent_side import plain
from supervise.job.directory import JobDirectory, occupy
from supervise.job.handle import Job
from supervise.job.threads import in_thread
from supervise.job.tidy import Tidy
from supervise.job.turns import Turn, Turns
from supervise.log_context import telling_of
from supervise.model import JobResult, JobSpec, SweepReport
from supervise.processes.session import require_platform
from supervise.processes.sweep import sweep
from supervise.processes.tiers import Containments, open_containments
from supervise.settings import Settings

__all__ = ["Supervisor", "open_job", "open_supervisor", "run_job"]


@final
class Supervisor:
    """Runs jobs, at most so many at a time. Made by `open_supervisor`.

    Jobs with an index share the watch of their workspace; the last one out ends it, and a job that comes meanwhile
    waits for that, without a place.

    Attributes:
        settings: all bounds.
        swept: what the sweep at the start has found of earlier supervisors, and ended.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        settings: Settings,
        max_concurrent: int,
        containments: Containments,
        swept: SweepReport,
    ) -> None:
        self.settings = settings
        self.swept = swept
        self._containments = containments
        self._nursery = nursery
        self._turns = Turns(max_concurrent)
        self._watches = WatchPool(nursery, partial(RealOutfit, settings, containments), self._turns.admit)
        self._closed = False
        self._jobs: dict[str, Job] = {}

    @property
    def containment(self) -> str:
        """What holds the processes of a job together, in words."""
        return self._containments.tier

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that have not ended, the oldest first."""
        return tuple(self._jobs.values())

    async def start(self, spec: JobSpec) -> Job:
        """Start a job.

        Args:
            spec: what to do.

        Returns:
            The job, when its agent is spawned; or when it has ended without (a spawn failure is in its result).

        Raises:
            SpecError: a job of this id is running, here or in another process.
            SettingsError: the state directory cannot be written.
            SuperviseError: the supervisor's block was left, or no descriptor is free.

        Cancelling cancels the job, and waits for its teardown.
        """
        job = self._launch(spec)
        try:
            await job.spawned()
        except BaseException as error:
            _abandon([job], error)
            await _outlast([job])
            raise
        return job

    async def run(self, spec: JobSpec) -> JobResult:
        """Run a job to its end. Raises and cancels as `run_job` does."""
        async with self.open_job(spec) as job:
            return await job.result()

    @asynccontextmanager
    @trio.lowlevel.enable_ki_protection
    async def open_job(self, spec: JobSpec) -> AsyncIterator[Job]:
        """A job as a block. See the function `open_job`."""
        job = self._launch(spec)
        try:
            yield job
            await job._done.wait()
        except BaseException as error:
            _abandon([job], error)
            await _outlast([job])
            raise

    @trio.lowlevel.enable_ki_protection
    def _launch(self, spec: JobSpec) -> Job:
        if self._closed:
            raise SuperviseError(f"job {spec.job_id} cannot start: the block of its supervisor was left; open another")
        if spec.job_id in self._jobs:
            raise SpecError(f"JobSpec.job_id is {spec.job_id!r}, but a job of this id is running; choose another")
        with_index = job_nursery.wants_index(self.settings, spec)
        workspace = os.path.realpath(spec.workspace)
        job = self._jobs[spec.job_id] = Job(spec)  # from here on, our tidy lets its directory be
        try:
            directory = self._occupied(spec)
        except BaseException:
            del self._jobs[spec.job_id]
            raise
        turn = self._turns.ask(lambda: not (with_index and self._watches.is_closing(workspace)))
        self._nursery.start_soon(self._run, job, directory, turn, with_index, name=f"supervise job {spec.job_id}")
        return job

    def _occupied(self, spec: JobSpec) -> JobDirectory:
        try:
            return occupy(self.settings.state_dir / "jobs" / spec.job_id)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                why = f"{error.strerror}, and each job holds one; start fewer at a time, or raise the limit (ulimit -n)"
                raise SuperviseError(f"job {spec.job_id} cannot start: {why}") from error
            raise _unwritable(self.settings, error) from error

    @trio.lowlevel.enable_ki_protection
    async def _run(self, job: Job, directory: JobDirectory, turn: Turn, with_index: bool) -> None:
        try:
            shared = job_nursery.Shared(self.settings, self._containments, self._watches)
            with telling_of(job_id=job.job_id):
                await job_nursery.run(job, shared, directory.path, turn, with_index=with_index)
        finally:
            directory.release()
            del self._jobs[job.job_id]


@asynccontextmanager
@trio.lowlevel.enable_ki_protection
async def open_supervisor(*, max_concurrent: int = 5, settings: Settings | None = None) -> AsyncIterator[Supervisor]:
    """Open a supervisor: the owner of what jobs share.

        async with supervise.open_supervisor(max_concurrent=5) as sup:
            job = await sup.start(spec)

    Args:
        max_concurrent: jobs at a time; further ones wait in the order of their start.
        settings: all bounds; default `Settings()`, which reads no file and no environment.

    Raises:
        SettingsError: the state directory cannot be made.
        UnsupportedPlatform: this system cannot own a tree of processes, or not as `settings.containment` asks for.

    What an earlier supervisor has left, killed together with its helpers, is ended first (see `Supervisor.swept`).
    Beside the jobs, directories of old ones are removed, as `settings.jobs_max_age` and `jobs_max_bytes` say.
    Leaving the block waits for the jobs. An exception in the block, or a cancellation, cancels them, waits for
    their teardown, and leaves unwrapped.

    A second Ctrl-C goes to the next step of the stop policy where the block is in Trio's main task. Elsewhere, catch
    SIGINT yourself (`trio.open_signal_receiver`) and call `job.cancel()` again.
    """
    if not isinstance(max_concurrent, int) or max_concurrent < 1:
        raise SpecError(f"max_concurrent is {max_concurrent!r}, but must be a whole number, 1 or more")
    require_platform()
    settings = settings or Settings()
    failure: BaseException | None = None
    async with AsyncExitStack() as stack:
        try:
            await in_thread(lambda: settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True))
            swept = await sweep(settings.state_dir, grace=settings.orphan_grace, kill_wait=settings.kill_wait)
            containments = await stack.enter_async_context(open_containments(settings))
        except OSError as error:
            raise _unwritable(settings, error) from error
        try:
            async with trio.open_nursery() as nursery:
                supervisor = Supervisor(nursery, settings, max_concurrent, containments, swept)
                jobs, is_running = settings.state_dir / "jobs", supervisor._jobs.__contains__
                tidy = Tidy(jobs, settings.jobs_max_age, settings.jobs_max_bytes, is_running)
                nursery.start_soon(tidy.run, name="supervise tidy")
                try:
                    yield supervisor
                    for job in supervisor.jobs:
                        await job._done.wait()
                except BaseException as error:  # raised below, so that the nursery does not wrap it
                    failure = error
                    supervisor._closed = True
                    _abandon(supervisor.jobs, error)
                    await _outlast(supervisor.jobs)
                finally:
                    supervisor._closed = True
                    tidy.stop()
        except BaseExceptionGroup as group:
            # That the jobs' tasks were cancelled, too, is no news beside the block's own exception.
            other = group.split(trio.Cancelled)[1]
            if other is not None:  # an agent's SystemExit, say
                raise plain(other) from None
            if failure is None:
                raise
        if failure is not None:
            raise failure


@asynccontextmanager
@trio.lowlevel.enable_ki_protection
async def open_job(spec: JobSpec, *, settings: Settings | None = None) -> AsyncIterator[Job]:
    """Run a job beside the block.

        async with supervise.open_job(spec) as job, job.subscribe() as events:
            async for event in events:
                print(event)

    Args:
        spec: what to do.
        settings: all bounds; default `Settings()`.

    Raises:
        SettingsError, UnsupportedPlatform: as `open_supervisor`.

    The block gets the handle before anything has happened, so that a subscription misses nothing. Leaving the
    block waits for the job. An exception in the block, or a cancellation, cancels the job, waits for its
    teardown, and leaves unwrapped; `job.result_nowait()` then holds the result.
    """
    async with open_supervisor(max_concurrent=1, settings=settings) as supervisor, supervisor.open_job(spec) as job:
        yield job


@trio.lowlevel.enable_ki_protection
async def run_job(
    spec: JobSpec,
    *,
    settings: Settings | None = None,
    task_status: trio.TaskStatus[Job] = trio.TASK_STATUS_IGNORED,
) -> JobResult:
    """Run a job to its end.

    Args:
        spec: what to do.
        settings: all bounds; default `Settings()`.
        task_status: `job = await nursery.start(run_job, spec)` gets the `Job` when the agent is spawned, or when
            the job has ended without.

    Returns:
        The result, whatever the outcome; `result.raise_for_outcome()` makes an exception of it.

    Raises:
        SettingsError, UnsupportedPlatform: as `open_supervisor`.

    When the caller's scope is cancelled, the bounded teardown runs, `job.result_nowait()` and the state directory
    hold the result, and `trio.Cancelled` propagates.

    A second Ctrl-C goes to the next step of the stop policy where this runs in Trio's main task. In another task,
    catch SIGINT yourself (`trio.open_signal_receiver`) and call `job.cancel()` again.
    """
    async with open_job(spec, settings=settings) as job:
        await job.spawned()
        task_status.started(job)
        return await job.result()


def _abandon(jobs: Iterable[Job], error: BaseException) -> None:
    """Their caller leaves: they end. One that was cancelled before keeps its grace, unless it is Ctrl-C that comes."""
    for job in jobs:
        if job.cancel_reason is None or isinstance(error, KeyboardInterrupt):
            job.cancel(_why(error))


async def _outlast(jobs: Iterable[Job]) -> None:
    """Wait for the jobs' teardown, whatever comes. A Ctrl-C meanwhile hurries them."""
    jobs = tuple(jobs)
    while True:
        try:
            with trio.CancelScope(shield=True):
                for job in jobs:
                    await job._done.wait()
            return
        except KeyboardInterrupt:
            for job in jobs:
                job.cancel("Ctrl-C again")


def _why(error: BaseException) -> str:
    if isinstance(error, trio.Cancelled):
        return "the caller's scope was cancelled"
    if isinstance(error, GeneratorExit):
        return "the block was abandoned"
    return f"the block was left by {type(error).__name__}"


def _unwritable(settings: Settings, error: OSError) -> SettingsError:
    return SettingsError(
        f"the state directory {str(settings.state_dir)!r} cannot be written: {error.strerror}; "
        "set state_dir (SUPERVISE_STATE_DIR) to a directory of yours"
    )
