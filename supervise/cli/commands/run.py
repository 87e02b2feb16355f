"""`supervise run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from supervise.cli.common import absolute, in_trio, settings_of
from supervise.cli.options import (
    AGENT,
    JOB,
    Config,
    Events,
    File,
    Id,
    JobId,
    LogFormat,
    MaxMemory,
    MaxProcesses,
    Named,
    Seconds,
    Set,
    User,
    Whole,
    Words,
    Workspace,
)


def run(
    prompt: Annotated[
        str | None, Parameter(help="What the agent is told; '-' or nothing: read from standard input.")
    ] = None,
    /,
    *,
    workspace: Workspace = Path("."),
    timeout: Annotated[
        Seconds, Parameter(group=JOB, help="Seconds from the agent's start until it is stopped.")
    ] = 600.0,
    job_id: JobId = None,
    user: User = None,
    max_memory: MaxMemory = None,
    max_processes: MaxProcesses = None,
    model: Annotated[Named | None, Parameter(group=AGENT, help="Model or alias.")] = None,
    max_turns: Annotated[Whole | None, Parameter(group=AGENT, help="Turns after which the run fails.")] = None,
    max_budget_usd: Annotated[
        float | None, Parameter(group=AGENT, metavar="DOLLARS", help="Dollars after which the run fails.")
    ] = None,
    allowed_tools: Annotated[
        Words | None,
        Parameter(group=AGENT, help="Tool that needs no permission; may be given again."),
    ] = None,
    permission_mode: Annotated[Named | None, Parameter(group=AGENT, help="acceptEdits, plan, dontAsk, …")] = None,
    resume: Annotated[Id | None, Parameter(group=AGENT, help="Id of a session to go on with.")] = None,
    session_id: Annotated[Id | None, Parameter(group=AGENT, help="Id (a UUID) for a new session.")] = None,
    system_prompt_file: Annotated[
        File | None, Parameter(group=AGENT, help="File that replaces the system prompt.")
    ] = None,
    append_system_prompt_file: Annotated[
        File | None, Parameter(group=AGENT, help="File that is added to the system prompt.")
    ] = None,
    agent_arg: Annotated[
        Words | None,
        Parameter(
            group=AGENT,
            allow_leading_hyphen=True,
            help="Further argument of the agent, as it is: --agent-arg=--bare; may be given again.",
        ),
    ] = None,
    set: Set = None,
    config: Config = None,
    log_format: LogFormat = None,
    json: Events = False,
) -> int:
    """Run a job: the agent, with the index watch beside it, in a directory.

    The agent's last words go to standard output, what happens meanwhile to standard error. Ctrl-C ends the job: the
    agent gets SIGTERM and a grace, then SIGKILL; a second Ctrl-C does not wait for the grace.

    Example: supervise run --workspace . "Add tests for the parser."

    Example: supervise run --json --timeout 300 - < prompt.txt | jq .type
    """
    from supervise.agents.claude import ClaudeAgent
    from supervise.cli import run as command
    from supervise.model import JobSpec, Limits, new_job_id

    settings = settings_of(config, set, {"log.format": log_format})
    agent = ClaudeAgent(
        model=model,
        max_turns=max_turns,
        max_budget_usd=max_budget_usd,
        allowed_tools=allowed_tools or (),
        permission_mode=permission_mode,
        resume=resume,
        session_id=session_id,
        system_prompt_file=_text(system_prompt_file),
        append_system_prompt_file=_text(append_system_prompt_file),
        extra_args=agent_arg or (),
    )
    spec = JobSpec(
        prompt=command.read_prompt(prompt),
        workspace=workspace,
        job_id=job_id or new_job_id(),
        agent=agent,
        timeout=timeout,
        user=user,
        limits=Limits(memory_bytes=max_memory, processes=max_processes),
    )
    return in_trio(command.run, spec, settings, json, settings=settings)


def _text(file: Path | None) -> str | None:
    """For the agent's command line; relative to here, not to the workspace."""
    return None if file is None else absolute(file)
