"""`supervise dlq`: list, show, retry, drop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from cyclopts import App, Parameter

from supervise.cli.common import in_trio, settings_of
from supervise.cli.options import TASK, Config, ObjectLines, Root, Set, Worker, paragraphs, switch

app = App(
    name="dlq", help="Dead letters: tasks that came to nothing.\n\nExample: supervise dlq list --root /srv/agents"
)

Names = Annotated[list[str] | None, Parameter(negative=(), help="Names, or task ids, as `dlq list` tells them.")]
All = Annotated[bool, switch("--all", "All of them.", TASK)]


def list_all(
    *, root: Root = None, worker: Worker = None, set: Set = None, config: Config = None, json: ObjectLines = False
) -> int:
    """List the dead letters, the oldest first.

    Example: supervise dlq list --root /srv/agents
    """
    from supervise.cli import dlq as command

    settings = settings_of(config, set, {"worker.root": root})
    return in_trio(command.list_all, settings, worker, json, settings=settings)


def show(
    names: Names = None, /, *, root: Root = None, worker: Worker = None, set: Set = None, config: Config = None
) -> int:
    """Show dead letters whole, as JSON: the task, why it died, and its attempts.

    Example: supervise dlq show parser-tests --root /srv/agents
    """
    from supervise.cli import dlq as command

    settings = settings_of(config, set, {"worker.root": root})
    return in_trio(command.show, settings, names or [], worker, settings=settings)


def retry(
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

    settings = settings_of(config, set, {"worker.root": root})
    return in_trio(command.retry, settings, names or [], worker, every, settings=settings)


def drop(
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

    settings = settings_of(config, set, {"worker.root": root})
    return in_trio(command.drop, settings, names or [], worker, every, settings=settings)


_commands: dict[str, Callable[..., int]] = {"list": list_all, "show": show, "retry": retry, "drop": drop}
for _order, (_name, _function) in enumerate(_commands.items()):
    app.command(_function, name=_name, sort_key=_order, help=paragraphs(_function.__doc__ or ""))
