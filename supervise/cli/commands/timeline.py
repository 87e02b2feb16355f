"""`supervise timeline`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from supervise.cli.common import in_trio, settings_of
from supervise.cli.options import OUTPUT, Config, File, OneObject, Root, Set


def timeline(
    job: Annotated[str, Parameter(help="Id of a job, or of a task.")],
    /,
    *,
    svg: Annotated[
        File | None, Parameter(group=OUTPUT, help="Write the picture to this file, as SVG; '-': standard output.")
    ] = None,
    root: Root = None,
    set: Set = None,
    config: Config = None,
    json: OneObject = False,
) -> int:
    """Draw the life of a job: watch, agent, heartbeats, signals and reconciles, to the millisecond.

    Example: supervise timeline 20261121-120000-1f2e --svg life.svg
    """
    from supervise.cli import timeline as command

    settings = settings_of(config, set, {"worker.root": root})
    return in_trio(command.run, settings, job, svg, json, settings=settings)
