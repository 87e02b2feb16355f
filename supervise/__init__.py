"""Run coding agents unattended, next to a code-index watch, and leave nothing behind.

The public names. Each is loaded when it is first used, so that `import supervise` costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervise import events
    from supervise.agents.claude import ClaudeAgent
    from supervise.agents.command import Parser, run_command
    from supervise.agents.mock import MockAgent
    from supervise.agents.protocol import Agent, AgentRun
    from supervise.agents.script import ScriptAgent
    from supervise.dispatch.task import Task
    from supervise.dispatch.worker import Worker, open_worker
    from supervise.errors import (
        AlreadyRunning,
        BadInput,
        IllegalTransition,
        JobFailed,
        JobNotDone,
        MissingExtra,
        SettingsError,
        SpawnError,
        SpecError,
        SuperviseError,
        UnsupportedPlatform,
    )
    from supervise.events import Event, EventsDropped
    from supervise.executors.local import LocalExecutor
    from supervise.executors.mock import MockExecutor
    from supervise.executors.protocol import Executor
    from supervise.job.handle import Job, JobState
    from supervise.job.supervisor import Supervisor, open_job, open_supervisor, run_job
    from supervise.model import (
        AgentReport,
        ExitStatus,
        FailureKind,
        IndexReport,
        IndexStatus,
        JobResult,
        JobSpec,
        Leftover,
        Limits,
        Outcome,
        StopPolicy,
        Survivor,
        SweepReport,
        Usage,
        WatchMetrics,
    )
    from supervise.processes.child import Child, Tree
    from supervise.processes.containment import Command
    from supervise.secrets import Secret
    from supervise.settings import (
        AgentSettings,
        BreakerSettings,
        IndexSettings,
        LogSettings,
        Settings,
        WorkerSettings,
    )

_HOME = {
    "supervise.agents.claude": ("ClaudeAgent",),
    "supervise.agents.command": ("Parser", "run_command"),
    "supervise.agents.mock": ("MockAgent",),
    "supervise.agents.protocol": ("Agent", "AgentRun"),
    "supervise.agents.script": ("ScriptAgent",),
    "supervise.dispatch.task": ("Task",),
    "supervise.dispatch.worker": ("Worker", "open_worker"),
    "supervise.errors": (
        "AlreadyRunning",
        "BadInput",
        "IllegalTransition",
        "JobFailed",
        "JobNotDone",
        "MissingExtra",
        "SettingsError",
        "SpawnError",
        "SpecError",
        "SuperviseError",
        "UnsupportedPlatform",
    ),
    "supervise.events": ("Event", "EventsDropped"),
    "supervise.executors.local": ("LocalExecutor",),
    "supervise.executors.mock": ("MockExecutor",),
    "supervise.executors.protocol": ("Executor",),
    "supervise.job.handle": ("Job", "JobState"),
    "supervise.job.supervisor": ("Supervisor", "open_job", "open_supervisor", "run_job"),
    "supervise.model": (
        "AgentReport",
        "ExitStatus",
        "FailureKind",
        "IndexReport",
        "IndexStatus",
        "JobResult",
        "JobSpec",
        "Leftover",
        "Limits",
        "Outcome",
        "StopPolicy",
        "Survivor",
        "SweepReport",
        "Usage",
        "WatchMetrics",
    ),
    "supervise.processes.child": ("Child", "Tree"),
    "supervise.processes.containment": ("Command",),
    "supervise.secrets": ("Secret",),
    "supervise.settings": (
        "AgentSettings",
        "BreakerSettings",
        "IndexSettings",
        "LogSettings",
        "Settings",
        "WorkerSettings",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Agent",
    "AgentReport",
    "AgentRun",
    "AgentSettings",
    "AlreadyRunning",
    "BadInput",
    "BreakerSettings",
    "Child",
    "ClaudeAgent",
    "Command",
    "Event",
    "EventsDropped",
    "Executor",
    "ExitStatus",
    "FailureKind",
    "IllegalTransition",
    "IndexReport",
    "IndexSettings",
    "IndexStatus",
    "Job",
    "JobFailed",
    "JobNotDone",
    "JobResult",
    "JobSpec",
    "JobState",
    "Leftover",
    "Limits",
    "LocalExecutor",
    "LogSettings",
    "MissingExtra",
    "MockAgent",
    "MockExecutor",
    "Outcome",
    "Parser",
    "ScriptAgent",
    "Secret",
    "Settings",
    "SettingsError",
    "SpawnError",
    "SpecError",
    "StopPolicy",
    "SuperviseError",
    "Supervisor",
    "Survivor",
    "SweepReport",
    "Task",
    "Tree",
    "UnsupportedPlatform",
    "Usage",
    "WatchMetrics",
    "Worker",
    "WorkerSettings",
    "events",
    "open_job",
    "open_supervisor",
    "open_worker",
    "run_command",
    "run_job",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    if name == "__version__":
        from importlib.metadata import version

        return version("trio-supervise")
    if name == "events":
        return import_module("supervise.events")
    raise AttributeError(f"module 'supervise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF, "__version__", "events"])
