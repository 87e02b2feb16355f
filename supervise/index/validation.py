"""What is remembered of `cidx fix-config`, which takes a second or more: that it was good, and for what.

    <state_dir>/workspaces/<hash of the path>/validated.json

It is remembered when it ended with exit code 0 and a watch then said that it was ready, and forgotten when a watch
did not come up, or crashed. It holds for this workspace, this indexer and this configuration; of the indexer, the files
that its command line names are looked at, and no process is started. Losing it costs one more `fix-config`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, final

import trio

from supervise import durable
from supervise.codec import loads, to_line
from supervise.index.cidx import INDEX_DIRECTORY

log = logging.getLogger("supervise.index")

#: The indexer's configuration, in the workspace.
CONFIG = os.path.join(INDEX_DIRECTORY, "config.json")


class Validation(Protocol):
    """What is remembered of one workspace. Nothing here raises for what the disk does."""

    async def known(self) -> bool:
        """Whether tool and configuration are as they were when they were found good."""

    async def note(self) -> None:
        """They are good as they are now: `fix-config` ended with exit code 0. Kept in memory until `remember`."""

    async def remember(self) -> None:
        """What was noted has borne a watch: keep it."""

    async def forget(self) -> None:
        """They may be no good."""


@final
class DiskValidation:
    """A `Validation` in the workspace's directory under the state directory.

    Args:
        directory: where `DiskMark` keeps what is known of the workspace.
        workspace: the directory whose configuration is meant.
        command: the indexer's program and first arguments.
        path: where the program is looked for, as in the environment variable PATH.
    """

    def __init__(self, directory: Path, workspace: str, command: tuple[str, ...], path: str | None) -> None:
        self._file = directory / "validated.json"
        self._workspace = workspace
        self._command = command
        self._path = path
        self._noted: Mapping[str, object] | None = None

    async def known(self) -> bool:
        """See `Validation.known`."""
        return await trio.to_thread.run_sync(self._known)

    async def note(self) -> None:
        """See `Validation.note`."""
        self._noted = await trio.to_thread.run_sync(self._identity)

    async def remember(self) -> None:
        """See `Validation.remember`."""
        if self._noted is not None:
            await trio.to_thread.run_sync(self._write, self._noted)

    async def forget(self) -> None:
        """See `Validation.forget`."""
        self._noted = None
        await trio.to_thread.run_sync(self._remove)

    def _known(self) -> bool:
        try:
            record = loads(self._file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        identity = self._identity()
        return identity is not None and record == identity

    def _write(self, identity: Mapping[str, object]) -> None:
        try:
            durable.replace(self._file, to_line(dict(identity)), durable=False)
        except OSError as error:
            log.warning("%s could not be written: %s", self._file, error.strerror)

    def _remove(self) -> None:
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s could not be removed: %s", self._file, error.strerror)

    def _identity(self) -> dict[str, object] | None:
        """Tool and configuration as they are now; `None` if that cannot be told."""
        try:
            program = shutil.which(self._command[0], path=self._path)
            if program is None:
                return None
            tool = [_file(os.path.join(self._workspace, program))]
            # A program that is run by an interpreter is an argument of it.
            tool += [_file(os.path.join(self._workspace, word)) for word in self._command[1:]]
            config = _file(os.path.join(self._workspace, CONFIG))
            return {"command": list(self._command), "tool": tool, "config": config}
        except (OSError, ValueError):
            return None


def _file(path: str) -> list[object] | None:
    """What tells a file from another, and from itself when it was written again; `None` for no file."""
    try:
        real = os.path.realpath(path)
        found = os.stat(real)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [real, found.st_size, found.st_mtime_ns]
