"""`supervise worker`."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from supervise.cli.common import in_trio, settings_of
from supervise.cli.options import OUTPUT, WORKER, Config, Directory, File, LogFormat, Root, Seconds, Set, Whole, switch


def worker(
    name: Annotated[str, Parameter(help="The worker's name; one of a name runs under a root.")],
    /,
    *,
    root: Root = None,
    workspace: Annotated[
        Directory | None, Parameter(group=WORKER, help="Workspace of tasks that name none; default: worker.workspace.")
    ] = None,
    max_concurrent: Annotated[Whole | None, Parameter(group=WORKER, help="Jobs at a time.")] = None,
    executor: Annotated[
        Literal["local", "mock"] | None, Parameter(group=WORKER, help="Who runs the jobs: local, or mock for a trial.")
    ] = None,
    lock_file: Annotated[
        File | None, Parameter(group=WORKER, help="A PID file at a place of yours, locked as well.")
    ] = None,
    lock_timeout: Annotated[
        Seconds | None, Parameter(group=WORKER, help="Seconds to wait for a worker of this name to end.")
    ] = None,
    drain_timeout: Annotated[
        Seconds | None, Parameter(group=WORKER, help="Seconds that running jobs have to end after the first signal.")
    ] = None,
    metrics_port: Annotated[
        Whole | None,
        Parameter(group=OUTPUT, metavar="PORT", help="Serve metrics for Prometheus on this port of http.host; 0: any."),
    ] = None,
    set: Set = None,
    config: Config = None,
    log_format: LogFormat = None,
    json: Annotated[bool, switch("--json", "Events, one JSON object a line, on standard output.")] = False,
) -> int:
    """Take tasks from a directory and run them, until a signal comes.

    The first SIGTERM or SIGINT drains: no more tasks are taken, and those under way have --drain-timeout to end. The
    second cancels them and puts their tasks back.

    Example: supervise worker w1 --root /srv/agents --workspace .
    """
    from supervise.cli import worker as command

    options = {
        "worker.root": root,
        "worker.workspace": workspace,
        "worker.max_concurrent": max_concurrent,
        "executor": executor,
        "worker.lock_file": lock_file,
        "worker.lock_timeout": lock_timeout,
        "worker.drain_timeout": drain_timeout,
        "worker.metrics_port": metrics_port,
        "log.format": log_format,
    }
    settings = settings_of(config, set, options)
    return in_trio(command.run, name, settings, json, settings=settings)
