"""Which containment this machine gives, and what all trees of one supervisor share."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import final

import trio

from supervise.errors import UnsupportedPlatform
from supervise.model import Limits
from supervise.processes import cgroup
from supervise.processes.cgroup import Group, NoCgroup, NoLimit
from supervise.processes.containment import Containment
from supervise.processes.guarded import GUARDIAN, GUARDIAN_AND_CGROUP, GuardianContainment
from supervise.processes.helper import PROGRAM, Helper
from supervise.processes.identity import TELLS_CHILDREN
from supervise.processes.records import Record
from supervise.processes.session import SessionContainment, require_platform, spawning
from supervise.settings import Settings

log = logging.getLogger("supervise.processes")

DEGRADED = "the kernel does not tell the children of a process (CONFIG_PROC_CHILDREN): all of /proc is read instead"


@final
class Containments:
    """Makes the containment of each tree of one supervisor. Made by `open_containments`.

    Attributes:
        tier: what holds a tree together, in words.
        notes: why it is not better, where it could be.
    """

    def __init__(self, record: Record, helper: Helper | None, group: Group | None, notes: tuple[str, ...]) -> None:
        self.tier = SessionContainment.tier if helper is None else GUARDIAN if group is None else GUARDIAN_AND_CGROUP
        self.notes = notes
        self._record = record
        self._helper = helper
        self._group = group
        self._ended: list[Group] = []

    def of_job(self, job_id: str, limits: Limits) -> Callable[[str], Containment]:
        """What makes the containments of one job's trees, from their markers. Give it back by `job_ended`."""
        return partial(self._contain, f"job-{job_id}" if limits else None, limits)

    def job_ended(self, job_id: str) -> None:
        """The job's own group is not wanted any more; the guardians of its trees may still be in the way."""
        if self._group is not None:
            self._ended.append(Group(self._group.path / f"job-{job_id}"))
            self._ended = [group for group in self._ended if not group.remove()]

    def _contain(self, job: str | None, limits: Limits, mark: str) -> Containment:
        token = f"{self._record.id}:{mark}"
        if self._helper is None:
            refusal = f"limits are not available here: {'; '.join(self.notes)}" if limits else None
            return SessionContainment(token, self._record, refusal)
        if self._group is None and not limits:
            return GuardianContainment(token, self._helper)
        return GuardianContainment(token, self._helper, partial(self._make_group, job, limits, mark))

    def _make_group(self, job: str | None, limits: Limits, mark: str) -> Group:
        if self._group is None:
            raise NoLimit(f"limits are not available here: {'; '.join(self.notes)}")
        above = self._group
        _, role, token = mark.rsplit(":", 2)
        try:
            if job is not None:
                above = self._group.child(job)
                above.limit(limits)
            return above.child(f"{role}-{token}")
        except OSError as error:
            raise NoLimit(f"no cgroup can be made in {above.path}: {error.strerror}") from None


@asynccontextmanager
async def open_containments(settings: Settings) -> AsyncIterator[Containments]:
    """Find out which tier there is, and open what it needs: record, cgroup, forking helper.

    Args:
        settings: `state_dir`, `containment`, `orphan_grace`, `guardian_timeout`.

    Raises:
        UnsupportedPlatform: this system, or this user, cannot have the tier that the settings ask for.
        OSError: the record cannot be written.

    Leaving waits until the helper has ended, at most twice `guardian_timeout`, and removes what is on the disk.
    """
    require_platform()
    record = await trio.to_thread.run_sync(Record, settings.state_dir, limiter=spawning())
    helper: Helper | None = None
    group: Group | None = None
    try:
        helper, group, notes = _tier(settings, record)
        if helper is not None and (missing := await helper.warm()) is not None:
            await helper.aclose()
            if group is not None:
                await group.remove_soon()
            helper, group, notes = _without_guardian(settings, missing)
        yield Containments(record, helper, group, notes)
    finally:
        with trio.CancelScope(shield=True):
            try:
                if helper is not None:
                    await helper.aclose()
                if group is not None and not await group.remove_soon():  # zygote and guardians do, unless killed
                    log.error("the cgroup %s could not be removed: there are processes in it", group.path)
            finally:  # a Ctrl-C in the main task breaks every wait, shielded or not
                record.close(keep=record.has_entries())


def _tier(settings: Settings, record: Record) -> tuple[Helper | None, Group | None, tuple[str, ...]]:
    wanted = settings.containment
    if wanted == "process-group":
        return None, None, ("the setting containment asks for process-group",)
    if (missing := no_guardian()) is not None:
        return _without_guardian(settings, missing)
    notes: tuple[str, ...] = () if TELLS_CHILDREN else (DEGRADED,)
    group: Group | None = None
    if wanted == "guardian":
        notes += ("the setting containment asks for a guardian without a cgroup",)
    else:
        try:
            group = cgroup.make(record.id)
            record.set_cgroup(group.path)
        except NoCgroup as error:
            if wanted == "cgroup":
                text = f"containment is 'cgroup', but {error}; set it to auto or guardian"
                raise UnsupportedPlatform(text) from None
            notes += (str(error),)
    helper = Helper(
        orphan_grace=settings.orphan_grace,
        timeout=settings.guardian_timeout,
        record=record,
        cgroup=group.path if group else None,
        scan=not TELLS_CHILDREN,
    )
    return helper, group, notes


def _without_guardian(settings: Settings, missing: str) -> tuple[None, None, tuple[str, ...]]:
    if settings.containment != "auto":
        text = f"containment is {settings.containment!r}, but {missing}; set it to auto or process-group"
        raise UnsupportedPlatform(text)
    log.warning("no guardian: %s; a process group alone holds each tree", missing)
    return None, None, (missing,)


def no_guardian() -> str | None:
    """Why there can be no guardian, or None."""
    if not sys.executable or not os.access(sys.executable, os.X_OK):
        return "sys.executable names no Python that could run it (a guardian is a Python program of its own)"
    if getattr(sys, "frozen", False) or not os.path.isfile(PROGRAM):
        return "supervise is packed into one file, where a guardian's program cannot be started"
    if not hasattr(os, "memfd_create"):
        return "this Python has no os.memfd_create"
    return None


__all__ = ["Containments", "no_guardian", "open_containments"]
