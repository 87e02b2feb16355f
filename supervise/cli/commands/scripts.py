"""`supervise scripts`: list, search, show, run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from supervise.cli.common import in_trio, settings_of
from supervise.cli.options import (
    JOB,
    SETTINGS,
    Config,
    Directories,
    Events,
    JobId,
    LogFormat,
    MaxMemory,
    MaxProcesses,
    ObjectLines,
    OneObject,
    Seconds,
    Set,
    User,
    Workspace,
    paragraphs,
)

app = App(
    name="scripts",
    help="Scripts of your catalogue: find them, run them as jobs.\n\nExample: supervise scripts list",
)

Dirs = Annotated[
    Directories | None,
    Parameter(
        name="--dir",
        group=SETTINGS,
        help="Directory of scripts, in place of script_dirs; may be given again.",
    ),
]
Name = Annotated[str, Parameter(help="Name of a script, or its path in the catalogue.")]


def list_all(*, dir: Dirs = None, set: Set = None, config: Config = None, json: ObjectLines = False) -> int:
    """List the scripts: name, description, tags.

    Example: supervise scripts list --dir ~/src/project/scripts
    """
    from supervise.cli import scripts as command

    settings = settings_of(config, set, {"script_dirs": _paths(dir)})
    return in_trio(command.list_all, settings, json, settings=settings, brief=True)


def search(
    query: Annotated[str, Parameter(help="Words in a name, a description or a tag, whatever their case.")],
    /,
    *,
    dir: Dirs = None,
    set: Set = None,
    config: Config = None,
    json: ObjectLines = False,
) -> int:
    """List the scripts whose name, description or tags hold these words.

    Example: supervise scripts search backup
    """
    from supervise.cli import scripts as command

    settings = settings_of(config, set, {"script_dirs": _paths(dir)})
    return in_trio(command.search, settings, query, json, settings=settings, brief=True)


def show(name: Name, /, *, dir: Dirs = None, set: Set = None, config: Config = None, json: OneObject = False) -> int:
    """Show all that a script says of itself, how long it may run, and what is wrong with it.

    Example: supervise scripts show nightly-report
    """
    from supervise.cli import scripts as command

    settings = settings_of(config, set, {"script_dirs": _paths(dir)})
    return in_trio(command.show, settings, name, json, settings=settings)


def run(
    name: Name,
    /,
    *args: Annotated[str, Parameter(help="Arguments of the script; put -- before the first one with a hyphen.")],
    input: Annotated[
        str,
        Parameter(
            group=JOB,
            metavar="TEXT",
            show_default=False,
            help="What it reads from standard input; '-': what we read there.",
        ),
    ] = "",
    workspace: Workspace = Path("."),
    timeout: Annotated[
        Seconds | None,
        Parameter(group=JOB, help="Seconds until it is stopped; default: its header's, else its task class's."),
    ] = None,
    job_id: JobId = None,
    user: User = None,
    max_memory: MaxMemory = None,
    max_processes: MaxProcesses = None,
    dir: Dirs = None,
    set: Set = None,
    config: Config = None,
    log_format: LogFormat = None,
    json: Events = False,
) -> int:
    """Run a script as a job: with a timeout, the index watch beside it, and nothing left behind.

    What it prints goes to standard output, what happens meanwhile to standard error.

    Example: supervise scripts run nightly-report --workspace . -- --month 10
    """
    from supervise.cli import scripts as command
    from supervise.model import Limits

    settings = settings_of(config, set, {"script_dirs": _paths(dir), "log.format": log_format})
    wanted = command.Wanted(
        name=name,
        args=args,
        stdin=_standard_input() if input == "-" else input,
        timeout=timeout,
        workspace=workspace,
        job_id=job_id,
        user=user,
        limits=Limits(memory_bytes=max_memory, processes=max_processes),
    )
    return in_trio(command.run, settings, wanted, json, settings=settings)


def _standard_input() -> str:
    """All of it; bytes that are no UTF-8 reach the script as they are."""
    with open(0, "rb", closefd=False) as stdin:
        return stdin.read().decode("utf-8", "surrogateescape")


def _paths(dirs: list[Path] | None) -> str | None:
    """As a setting: a JSON list, since a path may hold a comma."""
    import json

    return None if dirs is None else json.dumps([str(path) for path in dirs])


_commands: dict[str, Callable[..., int]] = {"list": list_all, "search": search, "show": show, "run": run}
for _order, (_name, _function) in enumerate(_commands.items()):
    app.command(_function, name=_name, sort_key=_order, help=paragraphs(_function.__doc__ or ""))
