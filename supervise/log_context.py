"""Of which job, task and worker a log line tells: whatever is logged inside of `telling_of` belongs to it.

What several jobs share tells of those that share it at the time: the lines of an index watch name its workspace
(`index`), and in `job_id` all its jobs, with commas between them.

Kept in a context variable, which a task inherits from the one that started it, and a thread from the task that it
works for. `supervise.observe.logs` puts it into the lines; with a handler of your own, add `AboutFilter` to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, final

__all__ = ["NAMES", "AboutFilter", "about", "telling_of", "telling_only_of"]

Name = str | Callable[[], str]
"""A name, or who knows it at the time of each line: of what several jobs share."""

_about: ContextVar[Mapping[str, Name] | None] = ContextVar("supervise.about", default=None)

#: What a record may get from here.
NAMES: Final = ("job_id", "task_id", "worker", "index")


def about() -> dict[str, str]:
    """What is logged here and now belongs to: some of `job_id`, `task_id`, `worker` and `index`."""
    names = (_about.get() or {}).items()
    return {name: value for name, told in names if (value := told if isinstance(told, str) else told())}


@contextmanager
def telling_of(**names: Name) -> Iterator[None]:
    """Inside of the block, and in tasks that are started there, log lines also tell of these."""
    with telling_only_of(**{**(_about.get() or {}), **names}):
        yield


@contextmanager
def telling_only_of(**names: Name) -> Iterator[None]:
    """As `telling_of`, but begins anew: for what is started by one job and outlives it."""
    token = _about.set(names)
    try:
        yield
    finally:
        _about.reset(token)


@final
class AboutFilter(logging.Filter):
    """Sets `job_id`, `task_id`, `worker` and `index` of each record, empty where there is none.

    For handlers of your own:

    handler.addFilter(AboutFilter())
    handler.setFormatter(logging.Formatter("%(levelname)s %(job_id)s %(message)s"))
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter.filter`. Lets every record pass."""
        known = about()
        for name in NAMES:
            if not hasattr(record, name):
                setattr(record, name, known.get(name, ""))
        return True
