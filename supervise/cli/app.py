"""The command line: commands and options, and how errors are told."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, cast

import trio
from cyclopts import App, CycloptsError, Group, Parameter
from rich.console import Console

from supervise.cli import exit_codes
from supervise.cli.hardening import hide_environment
from supervise.cli.streams import Screen
from supervise.errors import SettingsError, SpecError, SuperviseError, UnsupportedPlatform
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


def main(argv: list[str]) -> int:
    """Run the command line. Returns the exit code; a user never sees a traceback for a mistake of theirs."""
    _secrets.update(secret_values(os.environ))
    try:
        # A word of its own: cyclopts would take "-" for an option, or, told to allow it, every mistyped option.
        words = [STANDARD_INPUT if word == "-" else word for word in argv]
        code = app(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _complain(_plain(error), exit_codes.USAGE)
    except (SpecError, SettingsError, UnsupportedPlatform, ImportError) as error:
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


def _overrides(pairs: list[str] | None) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingsError(f"--set {pair!r} is no name=value; write --set index.mode=none, for instance")
        overrides[name] = value
    return overrides


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
