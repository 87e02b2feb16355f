"""Tasks that name a script of the catalogue in place of the agent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

from attrs import evolve, frozen

from supervise.agents.protocol import AgentRun
from supervise.agents.script import ScriptAgent
from supervise.catalogue.catalogue import Lookup, Script
from supervise.dispatch.directory import in_thread
from supervise.dispatch.task import Task
from supervise.errors import BadInput, SpecError
from supervise.executors.protocol import Executor, Observer
from supervise.model import JobResult, JobSpec

__all__ = ["Wanted", "WithScripts"]

log = logging.getLogger("supervise.dispatch")


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

    In a thread, so that a large catalogue, or a slow disk, holds up nobody else.
    """

    def __init__(self, executor: Executor, directories: Sequence[Path]) -> None:
        self.name = executor.name
        self._executor = executor
        self._lookup = Lookup(directories)

    async def execute(self, spec: JobSpec, observer: Observer) -> JobResult:
        """See `Executor.execute`."""
        wanted = spec.agent
        if isinstance(wanted, Wanted) and wanted.task.script is not None:
            script = await in_thread(self._lookup.find, wanted.task.script)
            try:
                spec = wanted.found(spec, script)
            except (SpecError, BadInput):
                raise
            except Exception as error:  # of a `spec_of` of somebody's own; as where there is no script
                log.error("task %s: no job could be made of it", wanted.task.task_id, exc_info=error)
                raise BadInput(f"no job could be made of it: {type(error).__name__}: {error}") from None
        return await self._executor.execute(spec, observer)
