"""`supervise doctor`."""

from __future__ import annotations

from typing import Annotated

from supervise.cli.common import in_trio, settings_of
from supervise.cli.options import JOB, Config, OneObject, Set, switch


def doctor(
    *,
    sweep: Annotated[
        bool, switch("--sweep", "End what supervisors have left that were killed, and tell.", JOB)
    ] = False,
    set: Set = None,
    config: Config = None,
    json: OneObject = False,
) -> int:
    """Check what this machine gives, and tell how to mend what is missing.

    Looks at containment, state directory, limits, clock, agent, indexer and Redis. Exits with 1 if something is in the
    way of every job.

    Example: supervise doctor

    Example: supervise doctor --sweep
    """
    from supervise.cli import doctor as command

    settings = settings_of(config, set)
    return in_trio(command.run, settings, sweep, json, settings=settings)
