"""The command line: commands and options, and how errors are told."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, cast

import trio
from cyclopts import App, CycloptsError, Group, Parameter
from rich.console import Console

from supervise.cli import exit_codes
from supervise.cli.hardening import hide_environment
from supervise.cli.streams import Screen
from supervise.errors import BadInput, SettingsError, SpecError, SuperviseError, UnsupportedPlatform
from supervise.secrets import Masker, secret_values
from supervise.settings import Settings

EPILOGUE = """Exit codes: 0 completed, 1 failed, 2 wrong use, 124 timed out, 130 and 143 cancelled by SIGINT and
SIGTERM, 141 cancelled because standard output was closed."""

app = App(
    name="supervise",
    help="Run coding agents unattended, next to a code-index watch, and leave nothing behind.\n\n"
    "Example: supervise demo",
    help_epilogue=EPILOGUE,
    version_flags=["--version"],
    result_action="return_value",
)

_agent = Group("Agent")
_job = Group("Job")
_worker = Group("Worker")
_task = Group("Task")
_output = Group("Output")

Config = Annotated[Path | None, Parameter(name="--config", help="TOML file to read instead of the user's.")]
Json = Annotated[
    bool,
    Parameter(
        name="--json",
        negative=(),
        show_default=False,
        group=_output,
        help="Events, then the result, one JSON object a line, on standard output.",
    ),
]
STANDARD_INPUT = "<standard input>"
#: Values that no sink of ours may show.
_secrets: set[str] = set()

Fault = Literal["watch-start", "watch-crash", "stubborn", "reconcile", "cancel", "kill"]


@app.command
def run(
    prompt: Annotated[
        str | None, Parameter(help="What the agent is told; '-' or nothing: read from standard input.")
    ] = None,
    /,
    *,
    workspace: Annotated[Path, Parameter(group=_job, help="Directory that the agent works in.")] = Path("."),
    timeout: Annotated[
        float, Parameter(group=_job, help="Seconds from the agent's start until it is stopped.")
    ] = 600.0,
    job_id: Annotated[str | None, Parameter(group=_job, help="Id of the job; made if absent.")] = None,
    user: Annotated[
        str | None, Parameter(group=_job, help="User to run the agent and the index as (root only).")
    ] = None,
    max_memory: Annotated[
        int | None, Parameter(group=_job, help="Bytes for all processes of the job together (cgroup).")
    ] = None,
    max_processes: Annotated[
        int | None, Parameter(group=_job, help="Processes and threads of the job at a time (cgroup).")
    ] = None,
    model: Annotated[str | None, Parameter(group=_agent, help="Model or alias.")] = None,
    max_turns: Annotated[int | None, Parameter(group=_agent, help="Turns after which the run fails.")] = None,
    max_budget_usd: Annotated[float | None, Parameter(group=_agent, help="Dollars after which the run fails.")] = None,
    allowed_tools: Annotated[
        list[str] | None,
        Parameter(group=_agent, negative=(), help="Tool that needs no permission; may be given again."),
    ] = None,
    permission_mode: Annotated[str | None, Parameter(group=_agent, help="acceptEdits, plan, dontAsk, …")] = None,
    resume: Annotated[str | None, Parameter(group=_agent, help="Id of a session to go on with.")] = None,
    session_id: Annotated[str | None, Parameter(group=_agent, help="Id (a UUID) for a new session.")] = None,
    system_prompt_file: Annotated[
        str | None, Parameter(group=_agent, help="File that replaces the system prompt.")
    ] = None,
    append_system_prompt_file: Annotated[
        str | None, Parameter(group=_agent, help="File that is added to the system prompt.")
    ] = None,
    agent_arg: Annotated[
        list[str] | None,
        Parameter(
            group=_agent,
            negative=(),
            allow_leading_hyphen=True,
            help="Further argument of the agent, as it is: --agent-arg=--bare; may be given again.",
        ),
    ] = None,
    set: Annotated[  # the option's name
        list[str] | None,
        Parameter(negative=(), help="A setting, as name=value: --set index.mode=none; may be given again."),
    ] = None,
    config: Config = None,
    json: Json = False,
) -> int:
    """Run a job: the agent, with the index watch beside it, in a directory.

    Example: supervise run --workspace . "Add tests for the parser."
    """
    from supervise.agents.claude import ClaudeAgent
    from supervise.cli import run as command
    from supervise.model import JobSpec, Limits, new_job_id

    settings = Settings.load(config=config, overrides=_overrides(set))
    _secrets.update(_secrets_of(settings))
    agent = ClaudeAgent(
        model=model,
        max_turns=max_turns,
        max_budget_usd=max_budget_usd,
        allowed_tools=allowed_tools or (),
        permission_mode=permission_mode,
        resume=resume,
        session_id=session_id,
        system_prompt_file=system_prompt_file,
        append_system_prompt_file=append_system_prompt_file,
        extra_args=agent_arg or (),
    )
    spec = JobSpec(
        prompt=command.read_prompt("-" if prompt == STANDARD_INPUT else prompt),
        workspace=workspace,
        job_id=job_id or new_job_id(),
        agent=agent,
        timeout=timeout,
        user=user,
        limits=Limits(memory_bytes=max_memory, processes=max_processes),
    )
    return _trio(command.run, spec, settings, json)


@app.command
def demo(
    *,
    fault: Annotated[Fault | None, Parameter(help="Show the road that a fault takes.")] = None,
    keep: Annotated[bool, Parameter(negative=(), show_default=False, help="Keep the scratch directory.")] = False,
    json: Json = False,
) -> int:
    """Run the main job on a scratch repository, with a real small indexer and a scripted agent, and prove the index.

    Needs no Claude, no cidx and no key. Example: supervise demo --fault watch-crash
    """
    from supervise.cli import demo as command

    return _trio(command.run, fault, keep, json)


@app.command
def doctor(
    *,
    sweep: Annotated[
        bool,
        Parameter(negative=(), show_default=False, help="End what supervisors have left that were killed, and tell."),
    ] = False,
    set: Annotated[  # the option's name
        list[str] | None,
        Parameter(negative=(), help="A setting, as name=value: --set containment=guardian; may be given again."),
    ] = None,
    config: Config = None,
    json: Annotated[
        bool, Parameter(negative=(), show_default=False, group=_output, help="One JSON object on standard output.")
    ] = False,
) -> int:
    """Check what this machine gives: containment, state directory, limits, agent and indexer; and how to mend it.

    Exits with 1 if something is in the way of every job. Example: supervise doctor --sweep
    """
    from supervise.cli import doctor as command

    settings = Settings.load(config=config, overrides=_overrides(set))
    _secrets.update(_secrets_of(settings))
    return _trio(command.run, settings, sweep, json)


Root = Annotated[
    Path | None,
    Parameter(name="--root", group=_worker, help="Directory that holds tasks/, results/ …; default: worker.root."),
]
Worker = Annotated[str | None, Parameter(name="--worker", group=_worker, help="Name of a worker; default: all.")]
Set = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="A setting, as name=value; may be given again."),
]
OneObject = Annotated[
    bool,
    Parameter(
        name="--json", negative=(), show_default=False, group=_output, help="One JSON object on standard output."
    ),
]


@app.command
def worker(
    name: Annotated[str, Parameter(help="The worker's name; one of a name runs under a root.")],
    /,
    *,
    root: Root = None,
    workspace: Annotated[
        Path | None, Parameter(group=_worker, help="Workspace of tasks that name none; default: worker.workspace.")
    ] = None,
    max_concurrent: Annotated[int | None, Parameter(group=_worker, help="Jobs at a time.")] = None,
    executor: Annotated[
        Literal["local", "mock"] | None, Parameter(group=_worker, help="Who runs the jobs: local, or mock for a trial.")
    ] = None,
    lock_file: Annotated[
        Path | None, Parameter(group=_worker, help="A PID file at a place of yours, locked as well.")
    ] = None,
    lock_timeout: Annotated[
        float | None, Parameter(group=_worker, help="Seconds to wait for a worker of this name to end.")
    ] = None,
    drain_timeout: Annotated[
        float | None, Parameter(group=_worker, help="Seconds that running jobs have to end after the first signal.")
    ] = None,
    metrics_port: Annotated[
        int | None, Parameter(group=_output, help="Serve metrics for Prometheus on this port of http.host; 0: any.")
    ] = None,
    set: Set = None,
    config: Config = None,
    json: Annotated[
        bool,
        Parameter(
            negative=(), show_default=False, group=_output, help="Events, one JSON object a line, on standard output."
        ),
    ] = False,
) -> int:
    """Take tasks from a directory and run them, until a signal comes.

    The first SIGTERM or SIGINT drains: no more tasks are taken, and those under way have --drain-timeout to end. The
    second cancels them and puts their tasks back. Example: supervise worker w1 --root /srv/agents --workspace .
    """
    from supervise.cli import worker as command

    overrides = {
        "worker.root": root,
        "worker.workspace": workspace,
        "worker.max_concurrent": max_concurrent,
        "executor": executor,
        "worker.lock_file": lock_file,
        "worker.lock_timeout": lock_timeout,
        "worker.drain_timeout": drain_timeout,
        "worker.metrics_port": metrics_port,
    }
    return _trio(command.run, name, _settings(config, set, overrides), json)


@app.command
def submit(
    worker: Annotated[str, Parameter(help="Whose task it is.")],
    description: Annotated[
        str | None, Parameter(help="What the agent is told; '-' or nothing: read from standard input.")
    ] = None,
    /,
    *,
    root: Root = None,
    task_id: Annotated[str | None, Parameter(group=_task, help="Id of the task; made if absent.")] = None,
    priority: Annotated[
        str | None, Parameter(group=_task, help="A whole number, higher comes first; or low, normal, high, urgent.")
    ] = None,
    depends_on: Annotated[
        list[str] | None,
        Parameter(group=_task, negative=(), help="Id of a task that must be completed first; may be given again."),
    ] = None,
    workspace: Annotated[
        Path | None, Parameter(group=_task, help="Directory to work in; default: the worker's.")
    ] = None,
    timeout: Annotated[
        float | None, Parameter(group=_task, help="Seconds from the agent's start until it is stopped.")
    ] = None,
    max_attempts: Annotated[int | None, Parameter(group=_task, help="Attempts; default: the worker's.")] = None,
    not_before: Annotated[
        str | None, Parameter(group=_task, help="Not before this time: 2026-11-21T12:00:00Z.")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        Parameter(group=_task, negative=(), help="Something to keep with the task, name=value; may be given again."),
    ] = None,
    wait: Annotated[
        float | None, Parameter(group=_task, help="Wait for the result, so many seconds at most, and print its text.")
    ] = None,
    set: Set = None,
    config: Config = None,
    json: OneObject = False,
) -> int:
    """Hand a task to a worker. Prints the task's id.

    Example: supervise submit w1 --root /srv/agents --priority high "Add tests for the parser."
    """
    from supervise.cli import run as run_command
    from supervise.cli import tasks as command
    from supervise.model import new_job_id

    fields: dict[str, Any] = {
        "task_id": task_id or new_job_id(),
        "description": run_command.read_prompt(
            "-" if description == STANDARD_INPUT else description, f"supervise submit {worker}"
        ),
        "worker": worker,
        "priority": _whole(priority),
        "dependencies": depends_on,
        "workspace": None if workspace is None else os.path.abspath(workspace),
        "timeout": timeout,
        "max_attempts": max_attempts,
        "not_before": _seconds(not_before),
        "metadata": dict(_pairs(metadata, "--metadata")) or None,
    }
    told = {name: value for name, value in fields.items() if value is not None}
    settings = _settings(config, set, {"worker.root": root})
    return _trio(command.hand_in, settings, worker, told, command.seconds_or_none(wait), json)


@app.command
def logs(
    task: Annotated[str, Parameter(help="Id of a task, or of a job.")],
    /,
    *,
    root: Root = None,
    worker: Worker = None,
    stderr: Annotated[
        bool, Parameter(negative=(), show_default=False, group=_output, help="What it printed on standard error.")
    ] = False,
    follow: Annotated[
        bool, Parameter(negative=(), show_default=False, group=_output, help="Go on until the task has ended.")
    ] = False,
    set: Set = None,
    config: Config = None,
) -> int:
    """Print what the agent of a task has printed, of all attempts.

    Example: supervise logs parser-tests --root /srv/agents --follow
    """
    from supervise.cli import tasks as command

    settings = _settings(config, set, {"worker.root": root})
    return _trio(command.logs, settings, task, worker, "stderr" if stderr else "stdout", follow)


dlq = App(
    name="dlq", help="Dead letters: tasks that came to nothing.\n\nExample: supervise dlq list --root /srv/agents"
)
app.command(dlq)

Names = Annotated[list[str] | None, Parameter(negative=(), help="Names, or task ids, as `dlq list` tells them.")]
All = Annotated[bool, Parameter(name="--all", negative=(), show_default=False, help="All of them.")]


@dlq.command(name="list")
def dlq_list(
    *,
    root: Root = None,
    worker: Worker = None,
    set: Set = None,
    config: Config = None,
    json: Annotated[
        bool, Parameter(negative=(), show_default=False, group=_output, help="One JSON object a line.")
    ] = False,
) -> int:
    """List the dead letters, the oldest first.

    Example: supervise dlq list --root /srv/agents
    """
    from supervise.cli import dlq as command

    return _trio(command.list_all, _settings(config, set, {"worker.root": root}), worker, json)


@dlq.command(name="show")
def dlq_show(
    names: Names = None, /, *, root: Root = None, worker: Worker = None, set: Set = None, config: Config = None
) -> int:
    """Show dead letters whole, as JSON: the task, why it died, and its attempts.

    Example: supervise dlq show parser-tests --root /srv/agents
    """
    from supervise.cli import dlq as command

    return _trio(command.show, _settings(config, set, {"worker.root": root}), _some(names), worker)


@dlq.command(name="retry")
def dlq_retry(
    names: Names = None,
    /,
    *,
    every: All = False,
    root: Root = None,
    worker: Worker = None,
    set: Set = None,
    config: Config = None,
) -> int:
    """Put dead letters back among the tasks, their attempts forgotten.

    Example: supervise dlq retry parser-tests --root /srv/agents
    """
    from supervise.cli import dlq as command

    return _trio(command.retry, _settings(config, set, {"worker.root": root}), names or [], worker, every)


@dlq.command(name="drop")
def dlq_drop(
    names: Names = None,
    /,
    *,
    every: All = False,
    root: Root = None,
    worker: Worker = None,
    set: Set = None,
    config: Config = None,
) -> int:
    """Remove dead letters for good.

    Example: supervise dlq drop parser-tests --root /srv/agents
    """
    from supervise.cli import dlq as command

    return _trio(command.drop, _settings(config, set, {"worker.root": root}), names or [], worker, every)


def main(argv: list[str]) -> int:
    """Run the command line. Returns the exit code; a user never sees a traceback for a mistake of theirs."""
    _secrets.update(secret_values(os.environ))
    try:
        # A word of its own: cyclopts would take "-" for an option, or, told to allow it, every mistyped option.
        words = [STANDARD_INPUT if word == "-" else word for word in argv]
        code = app(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _complain(_plain(error), exit_codes.USAGE)
    except (SpecError, SettingsError, BadInput, UnsupportedPlatform, ImportError) as error:
        if isinstance(error, ImportError) and not isinstance(error, SuperviseError):
            return _bug()
        return _complain(str(error), exit_codes.USAGE)
    except SuperviseError as error:
        return _complain(str(error), exit_codes.FAILED)
    except KeyboardInterrupt:
        return exit_codes.of_signal(2)
    except Exception:
        return _bug()
    return code if isinstance(code, int) else exit_codes.COMPLETED


def _trio(function: Any, *args: Any) -> int:
    """Run a command's async part."""
    import logging

    from supervise.cli.view import ConsoleLog

    hide_environment()
    screen = Screen(sys.stderr)
    console = Console(file=cast("TextIO", screen))
    log = logging.getLogger("supervise")
    log.addHandler(ConsoleLog(console, Masker(_secrets)))
    try:
        code: int = trio.run(lambda: function(*args, console=console))
    finally:
        screen.drain()
    return code


def _secrets_of(settings: Settings) -> set[str]:
    """What a file or the command line told us, and the environment need not hold."""
    known = (settings.index.voyage_api_key, settings.redis.url, settings.http.token)
    return {secret.reveal() for secret in known if secret} | secret_values(settings.agent.env)


def _settings(config: Path | None, pairs: list[str] | None, options: dict[str, Any]) -> Settings:
    """What the options say goes over what `--set` says."""
    given = {name: str(value) for name, value in options.items() if value is not None}
    settings = Settings.load(config=config, overrides={**_overrides(pairs), **given})
    _secrets.update(_secrets_of(settings))
    return settings


def _overrides(pairs: list[str] | None) -> dict[str, Any]:
    return dict(_pairs(pairs, "--set"))


def _pairs(pairs: list[str] | None, option: str) -> Iterator[tuple[str, str]]:
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            example = "index.mode=none" if option == "--set" else "ticket=1234"
            raise SettingsError(f"{option} {pair!r} is no name=value; write {option} {example}, for instance")
        yield name, value


def _whole(text: str | None) -> int | str | None:
    """A number where it is one; else the word, for whoever knows what words there are."""
    return int(text) if text is not None and re.fullmatch(r"[-+]?[0-9]{1,9}", text) else text


def _seconds(text: str | None) -> float | str | None:
    """Likewise, of a moment."""
    return float(text) if text is not None and re.fullmatch(r"[-+]?[0-9]{1,15}(\.[0-9]*)?", text) else text


def _some(names: list[str] | None) -> list[str]:
    if not names:
        raise SettingsError("no dead letter was named; supervise dlq list tells which there are")
    return names


def _plain(error: CycloptsError) -> str:
    return " ".join(str(error).split()) + " (supervise --help lists what there is)"


def _complain(message: str, code: int) -> int:
    line = " ".join(Masker(_secrets).text(message).splitlines())
    print(f"supervise: {line}", file=sys.stderr)
    return code


def _bug() -> int:
    """A bug of ours: the traceback helps whoever mends it. Secrets are masked in it."""
    print(Masker(_secrets).text(traceback.format_exc()), file=sys.stderr)
    return _complain("this is a bug in supervise; please report the lines above", exit_codes.FAILED)
