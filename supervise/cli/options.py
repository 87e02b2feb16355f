"""Options that several commands have. Light: imported by every call of the command line, also by `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from supervise.cli.mistakes import path, paths, whole_number

TASK = Group("Task", sort_key=1)
WORKER = Group("Worker", sort_key=2)
JOB = Group("Job", sort_key=3)
AGENT = Group("Agent", sort_key=4)
OUTPUT = Group("Output", sort_key=5)
SETTINGS = Group("Settings", sort_key=6)


def paragraphs(text: str) -> str:
    """A docstring as a help text: its lines are as long as the terminal wants them."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def switch(name: str, help: str, group: Group = OUTPUT) -> Parameter:
    """An option without a value, and without a --no- form of it."""
    return Parameter(name=name, negative=(), show_default=False, group=group, help=help)


Whole = Annotated[int, Parameter(converter=whole_number, metavar="N")]
Seconds = Annotated[float, Parameter(metavar="SECONDS")]
Bytes = Annotated[int, Parameter(converter=whole_number, metavar="BYTES")]
Text = Annotated[str, Parameter(metavar="TEXT")]
Id = Annotated[str, Parameter(metavar="ID")]
Named = Annotated[str, Parameter(metavar="NAME")]
Words = Annotated[list[str], Parameter(metavar="TEXT", negative=())]
Pairs = Annotated[list[str], Parameter(metavar="NAME=VALUE", negative=())]
File = Annotated[Path, Parameter(converter=path, metavar="FILE")]
Directory = Annotated[Path, Parameter(converter=path, metavar="DIR")]
Directories = Annotated[list[Path], Parameter(converter=paths, metavar="DIR", negative=())]

Config = Annotated[
    File | None, Parameter(name="--config", group=SETTINGS, help="TOML file to read instead of the user's.")
]
Set = Annotated[
    Pairs | None,
    Parameter(
        name="--set",
        group=SETTINGS,
        help="A setting, such as index.mode=none; may be given again. See: supervise config",
    ),
]
LogFormat = Annotated[
    Literal["console", "json"] | None,
    Parameter(
        name="--log-format",
        group=OUTPUT,
        metavar="FORMAT",
        help="Logs and events on standard error: for people, or JSON lines.",
    ),
]
Events = Annotated[bool, switch("--json", "Events, then the result, one JSON object a line, on standard output.")]
OneObject = Annotated[bool, switch("--json", "One JSON object on standard output.")]
ObjectLines = Annotated[bool, switch("--json", "One JSON object a line on standard output.")]
Root = Annotated[
    Directory | None,
    Parameter(name="--root", group=WORKER, help="Directory that holds tasks/, results/ …; default: worker.root."),
]
Worker = Annotated[Named | None, Parameter(name="--worker", group=WORKER, help="Name of a worker; default: all.")]
User = Annotated[
    Named | None, Parameter(name="--user", group=JOB, help="User to run the job's programs as (root only).")
]
MaxMemory = Annotated[
    Bytes | None,
    Parameter(name="--max-memory", group=JOB, help="Memory for all processes of the agent together (cgroup)."),
]
MaxProcesses = Annotated[
    Whole | None,
    Parameter(name="--max-processes", group=JOB, help="Processes and threads of the agent at a time (cgroup)."),
]
JobId = Annotated[Id | None, Parameter(name="--job-id", group=JOB, help="Id of the job; made if absent.")]
Workspace = Annotated[Directory, Parameter(name="--workspace", group=JOB, help="Directory to work in.")]
