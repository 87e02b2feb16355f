"""All that is known of cidx: its commands, what its lines mean, and when its reconcile is to be believed.

Measured on code-indexer 11.79: its exit codes prove little. `index --reconcile` exits 0 even when every file
failed, so that the verdict is read from code and output; `status` exits 0 in every state, so that it is not asked.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import final

from attrs import frozen

from supervise.model import ExitStatus

#: The directory in a workspace that holds the index, and tells that there is one.
INDEX_DIRECTORY = ".code-indexer"


class Line(StrEnum):
    """What a line of the indexer's output means to us."""

    READY = "ready"
    ERROR = "error"
    OTHER = "other"


@frozen
class Cidx:
    """The command lines.

    Attributes:
        command: program and first arguments.
    """

    command: tuple[str, ...] = ("cidx",)

    @property
    def start(self) -> tuple[str, ...]:
        """Start the daemon, where there is one. Without daemon mode: exit code 1, and no failure."""
        return (*self.command, "start")

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop the daemon, where there is one."""
        return (*self.command, "stop")

    @property
    def fix_config(self) -> tuple[str, ...]:
        """Repair the configuration, without asking."""
        return (*self.command, "fix-config", "--force")

    @property
    def watch(self) -> tuple[str, ...]:
        """Watch the workspace until SIGINT, which flushes pending edits."""
        return (*self.command, "watch")

    @property
    def reconcile(self) -> tuple[str, ...]:
        """Bring the index level with the workspace."""
        return (*self.command, "index", "--reconcile")


_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# The first: 11.x. The second: older versions.
_READY = re.compile(r"Watchdog observer started monitoring:|Starting git-aware watch on")
# "ERROR …", also behind a time ("2026-11-21T05:43:07Z ERROR …"), or behind a logger's name ("… - cidx - ERROR - …");
# not a file of that name ("indexed ERROR.md", "- ERROR.md").
_ERROR = re.compile(r"^[^A-Za-z]*(?:\dT\d[^A-Za-z]*)?(?:\dZ[^A-Za-z]*)?ERROR(?![\w/-]|\.\w)| - ERROR - ")
_PLANNED = re.compile(r"\bindexing\s+(\d[\d,]{0,20})\s+files?\b", re.IGNORECASE)
_PROCESSED = re.compile(r"\bfiles processed:\s*(\d[\d,]{0,20})", re.IGNORECASE)
# The word, not a path that holds it ("src/cancelled.py").
_CANCELLED = re.compile(r"(?<![\w./-])cancell?ed(?![\w/-]|\.\w)", re.IGNORECASE)
_ALREADY_RUNNING = re.compile(r"\balready running\b", re.IGNORECASE)


def meaning(line: str) -> Line:
    """What a line of output, of any command, means."""
    parts = _ANSI.sub("", line).split("\r")
    if any(map(_READY.search, parts)):
        return Line.READY
    if any(map(_ERROR.search, parts)):
        return Line.ERROR
    return Line.OTHER


def says_already_running(output: str) -> bool:
    """Whether `cidx start` says that a daemon was there before."""
    return _ALREADY_RUNNING.search(output) is not None


@final
class ReconcileVerdict:
    """Reads the output of a reconcile line by line, and says whether it may be believed.

    Memory does not grow with the output.
    """

    def __init__(self) -> None:
        self._first_error = ""
        self._errors = 0
        self._planned: int | None = None
        self._processed: int | None = None
        self._cancelled = False

    def line(self, line: str) -> None:
        """The next line of output."""
        for part in _ANSI.sub("", line).split("\r"):  # a progress bar writes many times over one line
            self._part(part)

    def _part(self, plain: str) -> None:
        if meaning(plain) is Line.ERROR:
            self._errors += 1
            self._first_error = self._first_error or plain.strip()[:200]
            return
        if planned := _PLANNED.search(plain):
            self._planned = max(self._planned or 0, _count(planned))
        if processed := _PROCESSED.search(plain):
            self._processed = _count(processed)
        if _CANCELLED.search(plain):
            self._cancelled = True

    def against(self, status: ExitStatus | None) -> str:
        """What speaks against the reconcile: empty if nothing does.

        Args:
            status: how it ended; `None` if it had to be stopped.
        """
        if status is None:
            return "it did not end in time"
        if not status.ok:
            return f"it ended with {status}" + (f": {self._first_error}" if self._errors else "")
        if self._errors:
            more = f" (and {self._errors - 1} more)" if self._errors > 1 else ""
            return f"it printed errors: {self._first_error}{more}"
        if self._cancelled:
            return "it says that it was cancelled"
        if self._planned and (self._processed or 0) < self._planned:
            return f"it was to index {self._planned} files and says that it processed {self._processed or 0}"
        return ""


def _count(match: re.Match[str]) -> int:
    return int(match.group(1).replace(",", ""))
