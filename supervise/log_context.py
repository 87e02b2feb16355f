"""Of which job, task and worker a log line tells: whatever is logged inside of `telling_of` belongs to it.

What several jobs share belongs to none of them: the watch of an index tells of its workspace alone (`index`).

Kept in a context variable, which a task inherits from the one that started it, and a thread from the task that it
works for. `supervise.observe.logs` puts it into the lines; with a handler of your own, add `AboutFilter` to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, final

__all__ = ["NAMES", "AboutFilter", "about", "telling_of", "telling_only_of"]

_about: ContextVar[Mapping[str, str] | None] = ContextVar("supervise.about", default=None)

#: What a record may get from here.
NAMES: Final = ("job_id", "task_id", "worker", "index")


def about() -> Mapping[str, str]:
    """What is logged here and now belongs to: some of `job_id`, `task_id`, `worker` and `index`."""
    return _about.get() or {}


@contextmanager
def telling_of(**names: str) -> Iterator[None]:
    """Inside of the block, and in tasks that are started there, log lines also tell of these."""
    with telling_only_of(**{**about(), **names}):
        yield


@contextmanager
def telling_only_of(**names: str) -> Iterator[None]:
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
