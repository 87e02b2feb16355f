"""Tasks that name a script of the catalogue in place of the agent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, final

import trio
from attrs import evolve, frozen

from supervise.agents.protocol import AgentRun
from supervise.agents.script import ScriptAgent
from supervise.catalogue.catalogue import Lookup, Script, shown
from supervise.dispatch.task import Task
from supervise.errors import BadInput, SpecError, SuperviseError
from supervise.executors.protocol import Executor, Observer
from supervise.model import JobResult, JobSpec

__all__ = ["Wanted", "WithScripts"]

log = logging.getLogger("supervise.dispatch")

#: How long a task waits for its script to be found, in seconds. 100,000 scripts are read in less than 10 s; who needs
#: longer waits for a file system that does not answer, and takes a place from other tasks meanwhile.
PATIENCE: Final = 30.0


@final
@frozen(kw_only=True)
class Wanted:
    """Stands for a script that is not looked up yet: the catalogue may hold thousands, and a spec is made at once.

    Attributes:
        task: names it.
        change: what somebody else makes of the spec, once it is whole.
    """

    task: Task
    change: Callable[[Task, JobSpec], JobSpec] | None
    name: str = "script"

    async def run(self, run: AgentRun) -> None:
        """Never: `WithScripts` puts the script in its place."""
        raise AssertionError("the script was not looked up")

    def found(self, spec: JobSpec, script: Script) -> JobSpec:
        """The spec to run. Raises BadInput or SpecError: this script cannot be run so."""
        task = self.task
        spec = evolve(
            spec,
            agent=ScriptAgent(path=script.path, args=task.args, name=script.name),
            timeout=script.seconds(task.timeout, spec.timeout),
        )
        return spec if self.change is None else self.change(task, spec)


@final
class WithScripts:
    """An `Executor` before another one: looks up the scripts of the catalogue.

    In one thread of its own: a large catalogue, or a slow disk, holds up nobody but those who want a script. They
    share what is read for one of them.

    Args:
        executor: runs the jobs.
        directories: of the catalogue.
        patience: seconds that the lookup of a script may take.
    """

    def __init__(self, executor: Executor, directories: Sequence[Path], patience: float = PATIENCE) -> None:
        self.name = executor.name
        self._executor = executor
        self._directories = directories
        self._patience = patience
        self._lookup = Lookup(directories)
        self._thread = trio.CapacityLimiter(1)  # one that is left behind keeps it: they do not become many

    async def execute(self, spec: JobSpec, observer: Observer) -> JobResult:
        """See `Executor.execute`. Cancelling ends a lookup at once; its thread is left behind.

        Raises:
            BadInput, SpecError: there is no such script, or it cannot be run so.
            SuperviseError: whether there is one could not be found out.
        """
        wanted = spec.agent
        if isinstance(wanted, Wanted) and wanted.task.script is not None:
            script = await self._find(wanted.task.script)
            try:
                spec = wanted.found(spec, script)
            except (SpecError, BadInput):
                raise
            except Exception as error:  # of a `spec_of` of somebody's own; as where there is no script
                log.error("task %s: no job could be made of it", wanted.task.task_id, exc_info=error)
                raise BadInput(f"no job could be made of it: {type(error).__name__}: {error}") from None
        return await self._executor.execute(spec, observer)

    async def _find(self, name: str) -> Script:
        with trio.move_on_after(self._patience):
            return await trio.to_thread.run_sync(
                self._lookup.find, name, time.monotonic(), abandon_on_cancel=True, limiter=self._thread
            )
        where = ", ".join(shown(str(directory)) for directory in self._directories)
        raise SuperviseError(
            f"the script {name!r} was not found within {self._patience:g} s; look whether {where} can be read"
        )
