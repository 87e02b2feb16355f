"""End what an earlier supervisor left: one that was killed together with its helpers, or on a bare process group."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import final

import trio
from attrs import evolve

from supervise.errors import SpawnError
from supervise.model import Leftover, StopPolicy, SweepReport
from supervise.processes import identity
from supervise.processes.cgroup import Group
from supervise.processes.child import TreeOptions, open_tree
from supervise.processes.containment import Command, Leader, Pipes
from supervise.processes.hurry import Hurry
from supervise.processes.marked import Marked
from supervise.processes.records import Leftovers, PidStart, leftovers

log = logging.getLogger("supervise.processes")

#: Guardians and zygotes end by themselves when their tree is empty. Whoever does not, in seconds, was stopped.
KEEPERS_GONE = 1.0


async def sweep(state_dir: Path, *, grace: float, kill_wait: float) -> SweepReport:
    """End all processes that supervisors have left which are no more, and remove their records and cgroups.

    Args:
        state_dir: where the supervisors kept their state.
        grace: seconds between SIGTERM and SIGKILL.
        kill_wait: how long what was killed is waited for, in seconds.

    Returns:
        What was found. What could not be ended keeps its record, for the next sweep.

    Only records whose lock can be taken are swept: living supervisors' are left alone. Cancelling waits for the tree
    that is being ended, which is bounded by `grace` and `kill_wait`.
    """
    report = SweepReport()
    left = await trio.to_thread.run_sync(leftovers, state_dir)
    try:
        while left:
            one = left[-1]
            report, keep = await _sweep_one(one, report, StopPolicy(((signal.SIGTERM, grace),), kill_wait))
            left.pop().close(keep=keep)
    finally:
        for one in left:
            one.close(keep=True)
    if report.found:
        names = ", ".join(f"{each.pid} ({each.command})" for each in report.found)
        log.warning("processes that an earlier supervisor had left were ended: %s", names)
    for survivor in report.survivors:
        log.error("process %d of an earlier supervisor lives on: %s", survivor.pid, survivor.reason)
    return report


async def _sweep_one(left: Leftovers, report: SweepReport, policy: StopPolicy) -> tuple[SweepReport, bool]:
    group = None if left.cgroup is None or not left.cgroup.is_dir() else Group(left.cgroup)
    if left.since is None:  # the machine was started anew since
        return evolve(report, supervisors=report.supervisors + 1), False
    containment = LeftTree(left, group)
    found = containment.members()
    told = tuple(Leftover(each.pid, each.start_time, identity.command_of(each.pid)) for each in found)
    options = TreeOptions(mark=left.id, contain=lambda token: containment)
    async with open_tree("sweep", policy, Hurry(), options=options, emit=lambda event: None) as tree:
        pass  # leaving the block ends what is in it
    for keeper in left.keepers:
        await _end_keeper(keeper)
    removed = group is not None and group.remove()
    report = evolve(
        report,
        supervisors=report.supervisors + 1,
        found=report.found + told,
        survivors=report.survivors + tree.survivors,
        groups=report.groups + removed,
    )
    return report, bool(tree.survivors) or (group is not None and not removed)


@final
class LeftTree(Marked):
    """All that one supervisor has left. Nothing can be started in it."""

    tier = "leftovers"

    def __init__(self, left: Leftovers, group: Group | None) -> None:
        super().__init__(left.id, since=left.since, lost=left.processes, group=group)

    async def spawn(self, command: Command, pipes: Pipes) -> Leader:
        name = command.argv[0]
        raise SpawnError(name, "other", f"the program {name!r} was not started: its supervisor is no more")

    async def serve(self) -> None:
        """Nothing is to be done: nobody tells."""


async def _end_keeper(keeper: PidStart) -> None:
    pid, start = keeper
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return  # it has ended
    try:
        now = identity.read(pid)
        if now is None or now.start != start:
            return
        for number in (None, signal.SIGCONT, signal.SIGKILL):
            if number is not None:
                signal.pidfd_send_signal(pidfd, number)
            with trio.move_on_after(KEEPERS_GONE):
                await trio.lowlevel.wait_readable(pidfd)
                return
    except OSError as error:
        log.warning("the guardian (process %d) of an earlier supervisor could not be ended: %s", pid, error.strerror)
    finally:
        os.close(pidfd)
