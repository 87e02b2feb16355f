"""End what an earlier supervisor left: one that was killed together with its helpers, or on a bare process group."""

from __future__ import annotations

import errno
import logging
import os
import signal
from pathlib import Path
from typing import final

import trio
from attrs import evolve

from supervise.errors import SpawnError
from supervise.model import Leftover, StopPolicy, Survivor, SweepReport
from supervise.processes import identity
from supervise.processes.cgroup import Group
from supervise.processes.child import TreeOptions, open_tree
from supervise.processes.containment import Command, Leader, Pipes
from supervise.processes.hurry import Hurry
from supervise.processes.identity import Process
from supervise.processes.marked import Look, Marked
from supervise.processes.records import Leftovers, PidStart, leftovers
from supervise.processes.session import spawning

log = logging.getLogger("supervise.processes")

#: Guardians and zygotes end by themselves when their tree is empty. Whoever does not, in seconds, was stopped.
KEEPERS_GONE = 1.0

#: Why somebody is left alone who belongs to what is swept.
SWEEPS = "it runs this sweep"


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
    left = await trio.to_thread.run_sync(leftovers, state_dir, limiter=spawning())
    try:
        while left:
            one = left[-1]
            try:
                report, keep = await _sweep_one(one, report, StopPolicy(((signal.SIGTERM, grace),), kill_wait))
            except OSError as error:  # no descriptor, say: new jobs can run all the same
                log.error("what is left in %s could not be looked for: %s", one.directory, error.strerror)
                keep = True
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
    for keeper in left.keepers:
        _signal_keeper(keeper, signal.SIGCONT)  # it does its own part, unless somebody stops it again
    containment = LeftTree(left, group)
    found = containment.members()
    told = tuple(Leftover(each.pid, each.start_time, identity.command_of(each.pid)) for each in found)
    options = TreeOptions(mark=left.id, contain=lambda token: containment)
    async with open_tree("sweep", policy, Hurry(), options=options, emit=lambda event: None) as tree:
        pass  # leaving the block ends what is in it
    survivors = tree.survivors + tuple(
        Survivor(each.pid, each.start_time, identity.command_of(each.pid), "sweep", SWEEPS)
        for each in containment.spared()
    )
    async with trio.open_nursery() as nursery:
        for keeper in left.keepers:
            nursery.start_soon(_end_keeper, keeper)
    removed = group is not None and not containment.spared() and await group.remove_soon()
    report = evolve(
        report,
        supervisors=report.supervisors + 1,
        found=report.found + told,
        survivors=report.survivors + survivors,
        groups=report.groups + removed,
    )
    return report, bool(survivors) or (group is not None and not removed)


@final
class LeftTree(Marked):
    """All that one supervisor has left. Nothing can be started in it.

    Whoever starts a supervisor in a shell that an earlier one has left belongs to that one's tree. The sweep ends
    neither itself nor its ancestors, nor what it has started.
    """

    tier = "leftovers"

    def __init__(self, left: Leftovers, group: Group | None) -> None:
        self._line = _line()
        super().__init__(left.id, since=left.since, lost=left.processes, group=group, keepers=left.keepers)
        self._spared: dict[int, Process] = {}
        # Else the kernel would end us with it.
        self._ends_group = group is not None and self._line.isdisjoint((p, identity.start_of(p)) for p in group.pids())

    def spared(self) -> list[Process]:
        """We and our ancestors, as far as they belong to it."""
        return [*self._spared.values()]

    def _members(self, look: Look) -> list[Process]:
        members = super()._members(look)
        self._spared |= {each.pid: each for each in members if (each.pid, each.start) in self._line}
        if not self._spared:
            return members
        ours = {(each.pid, each.start) for each in identity.descendants(os.getpid())}
        return [each for each in members if (each.pid, each.start) not in self._line | ours]

    def _leads(self, look: Look, pid: int, start: int) -> bool:
        # Much may have happened since: the session of a leader that has ended could be a stranger's by its number.
        return look.shows(pid, start)

    async def spawn(self, command: Command, pipes: Pipes) -> Leader:
        name = command.argv[0]
        raise SpawnError(name, "other", f"the program {name!r} was not started: its supervisor is no more")

    async def serve(self) -> None:
        """Nothing is to be done: nobody tells."""


async def _end_keeper(keeper: PidStart) -> None:
    """Wait until it has ended, as it does without a supervisor and children; or end it."""
    if (pidfd := identity.pidfd_of(*keeper)) is None:
        return
    try:
        for number in (signal.SIGCONT, signal.SIGKILL):
            signal.pidfd_send_signal(pidfd, number)
            with trio.move_on_after(KEEPERS_GONE):
                await trio.lowlevel.wait_readable(pidfd)
                return
    except OSError as error:
        if error.errno != errno.ESRCH:
            log.warning("the guardian (process %d) of an earlier supervisor lives on: %s", keeper[0], error.strerror)
    finally:
        os.close(pidfd)


def _signal_keeper(keeper: PidStart, number: int) -> None:
    if (pidfd := identity.pidfd_of(*keeper)) is not None:
        try:
            signal.pidfd_send_signal(pidfd, number)
        except OSError as error:
            if error.errno != errno.ESRCH:
                log.warning("the guardian (process %d) could not be signalled: %s", keeper[0], error.strerror)
        finally:
            os.close(pidfd)


def _line() -> set[PidStart]:
    """This process and its ancestors."""
    found: set[PidStart] = set()
    process = identity.read(os.getpid())
    while process is not None:
        found.add((process.pid, process.start))
        process = identity.read(process.parent) if process.parent else None
    return found
