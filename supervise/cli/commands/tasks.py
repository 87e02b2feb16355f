"""`supervise submit` and `supervise logs`."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from supervise.cli.common import absolute, in_trio, name_value_pairs, seconds, settings_of, whole
from supervise.cli.options import (
    TASK,
    Config,
    Directory,
    Id,
    Named,
    OneObject,
    Pairs,
    Root,
    Seconds,
    Set,
    Whole,
    Words,
    Worker,
    switch,
)


def submit(
    worker: Annotated[str, Parameter(help="Whose task it is.")],
    description: Annotated[
        str | None, Parameter(help="What the agent is told; '-' or nothing: read from standard input.")
    ] = None,
    /,
    *,
    root: Root = None,
    task_id: Annotated[Id | None, Parameter(group=TASK, help="Id of the task; made if absent.")] = None,
    script: Annotated[
        Named | None,
        Parameter(group=TASK, help="Run this script of the worker's catalogue; the description is its standard input."),
    ] = None,
    script_arg: Annotated[
        Words | None,
        Parameter(
            group=TASK,
            allow_leading_hyphen=True,
            help="Argument of the script: --script-arg=--fast; may be given again.",
        ),
    ] = None,
    priority: Annotated[
        str | None,
        Parameter(
            group=TASK, metavar="PRIORITY", help="A whole number, higher comes first; or low, normal, high, urgent."
        ),
    ] = None,
    depends_on: Annotated[
        Annotated[list[str], Parameter(metavar="ID", negative=())] | None,
        Parameter(group=TASK, help="Id of a task that must be completed first; may be given again."),
    ] = None,
    workspace: Annotated[
        Directory | None, Parameter(group=TASK, help="Directory to work in; default: the worker's.")
    ] = None,
    timeout: Annotated[
        Seconds | None, Parameter(group=TASK, help="Seconds from the agent's start until it is stopped.")
    ] = None,
    max_attempts: Annotated[Whole | None, Parameter(group=TASK, help="Attempts; default: the worker's.")] = None,
    not_before: Annotated[
        str | None, Parameter(group=TASK, metavar="TIME", help="Not before this time: 2026-11-21T12:00:00Z.")
    ] = None,
    metadata: Annotated[
        Pairs | None,
        Parameter(group=TASK, help="Something to keep with the task; may be given again."),
    ] = None,
    wait: Annotated[
        Seconds | None,
        Parameter(
            group=TASK,
            help="Wait so long at most for the result, and print its text; exit code 124 if there is none by then.",
        ),
    ] = None,
    set: Set = None,
    config: Config = None,
    json: OneObject = False,
) -> int:
    """Hand a task to a worker. Prints the task's id.

    Example: supervise submit w1 --root /srv/agents --priority high "Add tests for the parser."

    Example: supervise submit w1 --root /srv/agents --wait 900 --script nightly-report "for October"
    """
    from supervise.cli import run as run_command
    from supervise.cli import tasks as command
    from supervise.errors import SettingsError
    from supervise.model import new_job_id

    if script_arg and script is None:
        raise SettingsError("--script-arg is given without --script; name the script, or leave it out")
    fields: dict[str, Any] = {
        "task_id": task_id or new_job_id(),
        "description": run_command.read_prompt(description, f"supervise submit {worker}"),
        "worker": worker,
        "script": script,
        "args": script_arg,
        "priority": whole(priority),
        "dependencies": depends_on,
        "workspace": None if workspace is None else absolute(workspace),
        "timeout": timeout,
        "max_attempts": max_attempts,
        "not_before": seconds(not_before),
        "metadata": dict(name_value_pairs(metadata, "--metadata")) or None,
    }
    told = {name: value for name, value in fields.items() if value is not None}
    settings = settings_of(config, set, {"worker.root": root})
    return in_trio(command.hand_in, settings, worker, told, command.seconds_or_none(wait), json, settings=settings)


def logs(
    task: Annotated[str, Parameter(help="Id of a task, or of a job.")],
    /,
    *,
    root: Root = None,
    worker: Worker = None,
    stderr: Annotated[bool, switch("--stderr", "What it printed on standard error.")] = False,
    follow: Annotated[bool, switch("--follow", "Go on until the task has ended.")] = False,
    set: Set = None,
    config: Config = None,
) -> int:
    """Print what the agent of a task has printed, of all attempts.

    Example: supervise logs parser-tests --root /srv/agents --follow
    """
    from supervise.cli import tasks as command

    settings = settings_of(config, set, {"worker.root": root})
    stream = "stderr" if stderr else "stdout"
    return in_trio(command.logs, settings, task, worker, stream, follow, settings=settings)
