"""`supervise demo`."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from supervise.cli.common import in_trio
from supervise.cli.options import Events, switch

Fault = Literal["watch-start", "watch-crash", "stubborn", "reconcile", "cancel", "kill"]


def demo(
    *,
    fault: Annotated[Fault | None, Parameter(help="Show the road that a fault takes.")] = None,
    keep: Annotated[bool, switch("--keep", "Keep the scratch directory, and say where it is.")] = False,
    json: Events = False,
) -> int:
    """Run the main job on a scratch repository, with a real small indexer and a scripted agent, and prove the index.

    Needs no Claude, no cidx and no key.

    Example: supervise demo

    Example: supervise demo --fault watch-crash
    """
    from supervise.cli import demo as command

    return in_trio(command.run, fault, keep, json)
