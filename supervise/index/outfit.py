"""What a shared watch is made of: processes, a mark on the disk, a lock, and logs."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import final

import trio
from attrs import evolve

from supervise.events import Event
from supervise.index.cidx import Cidx
from supervise.index.lock import WorkspaceLock
from supervise.index.pool import Guest, Wish
from supervise.index.stale import DiskMark, Stamper
from supervise.index.validation import DiskValidation
from supervise.index.watch import IndexDriver
from supervise.model import Limits, StopPolicy, Survivor
from supervise.processes.child import ProcessTree, TreeOptions, open_tree
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.processes.output import Logs
from supervise.processes.tiers import Containments
from supervise.settings import Settings


@final
class RealOutfit:
    """An `Outfit` of real processes.

    Its trees carry an id of their own, so that no job's teardown, limits or group reach them. Its logs are in the
    directory of the job that has opened it, and are written there also after that job has ended.
    """

    def __init__(
        self,
        settings: Settings,
        containments: Containments,
        wish: Wish,
        guest: Guest,
        emit: Callable[[Event], None],
        hurry: Hurry,
    ) -> None:
        self.trees: list[ProcessTree] = []
        self._id = f"watch-{secrets.token_hex(8)}"
        self._containments = containments
        self._emit = emit
        self._logs = Logs(guest.directory, settings.log_max_bytes)
        self._options = TreeOptions(
            mark=self._id,
            masker=guest.masker,
            logs=self._logs,
            tail_bytes=settings.tail_bytes,
            pipe_timeout=settings.pipe_timeout,
            contain=containments.of_job(self._id, Limits()),
        )
        env, index = dict(guest.env), wish.settings

        def command(argv: tuple[str, ...]) -> Command:
            return Command(argv=argv, cwd=wish.workspace, env=env, user=wish.user)

        def outlived(survivors: tuple[Survivor, ...]) -> None:
            self.driver.survivors += survivors

        # git reads the workspace only: it gets no key.
        git_env = {name: value for name, value in env.items() if name in ("PATH", "HOME")}
        workspace = Path(wish.workspace)
        stamper = Stamper(workspace, self.open_tree, git_env, wish.user, index.command_timeout, hurry, outlived)
        mark = DiskMark(settings.state_dir, workspace, stamper)
        self.driver = IndexDriver(
            tool=Cidx(index.command),
            settings=index,
            command=command,
            open_tree=self.open_tree,
            mark=mark,
            lock=WorkspaceLock(wish.workspace, mark.directory / "watch"),
            validation=DiskValidation(mark.directory, wish.workspace, index.command, env.get("PATH")),
            emit=emit,
            hurry=hurry,
            kill_wait=settings.kill_wait,
        )

    @asynccontextmanager
    @trio.lowlevel.enable_ki_protection
    async def open_tree(self, role: str, policy: StopPolicy, hurry: Hurry) -> AsyncIterator[ProcessTree]:
        """A tree of this watch; the heartbeats of its jobs see it."""
        tree: ProcessTree | None = None
        try:
            # What git says of the workspace is no output of the index.
            options = evolve(self._options, logs=None) if role == "stamp" else self._options
            async with open_tree(role, policy, hurry, options=options, emit=self._emit) as tree:
                self.trees.append(tree)
                yield tree
        finally:
            if tree is not None:
                self.trees.remove(tree)

    async def close(self) -> None:
        """See `Outfit.close`."""
        try:
            await trio.to_thread.run_sync(self._logs.close)
        finally:
            self._containments.job_ended(self._id)
