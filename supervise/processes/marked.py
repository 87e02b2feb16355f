"""A tree found by what its processes cannot easily lose: a session, a process group, a parent, a marker.

The marker is an environment variable that every descendant inherits. What this cannot find: a process that left the
session, cleared its environment and lost its parent before anybody looked.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import final

import trio

from supervise.processes import identity
from supervise.processes.cgroup import Group
from supervise.processes.identity import Process

#: In the environment of every child: the trees that it belongs to, the innermost last.
MARK = "SUPERVISE_MARK"

#: How many members one wait watches: more would only cost descriptors, since any end leads to a new look.
WATCHED_AT_ONCE = 32

#: How many descriptors one look, or one signal, needs at once. A tree keeps as many in reserve.
RESERVE = 2

#: How long a look serves other trees, too, in seconds: many that end at once would each read all of /proc.
LOOK_SERVES = 0.01


@final
class Look:
    """What one reading of /proc shows, sorted so that each tree finds its own quickly."""

    def __init__(self, since: int, leaders: set[int], earlier: Look | None = None) -> None:
        self.began = time.monotonic()
        self._again: Look | None = None
        self._since, self._leaders = since, leaders
        self.is_second = earlier is not None
        self.seen: set[int]
        started, self.seen = identity.started_since(since, skip=earlier.seen if earlier else ())
        self.processes = {process.pid: process for process in started}
        self.children: defaultdict[int, list[Process]] = defaultdict(list)
        self.near: defaultdict[int, list[Process]] = defaultdict(list)
        #: Of those that are in no session or group of ours: what is in one needs no other sign.
        self.environments: dict[int, bytes] = {}
        for process in started:
            self.children[process.parent].append(process)
            leads = {process.pid, process.session, process.group} & leaders
            for leader in leads:
                self.near[leader].append(process)
            if not leads and process.alive and MARK.encode() in (text := identity.environment_of(process)):
                self.environments[process.pid] = text
        self.ended = time.monotonic()

    def is_strangers(self, pid: int, start: int) -> bool:
        """Whether a pid belongs by now to somebody who was started later."""
        process = self.processes.get(pid)
        return process is not None and process.start != start

    def shows(self, pid: int, start: int) -> bool:
        """Whether this process is there, be it as a zombie."""
        process = self.processes.get(pid)
        return process is not None and process.start == start

    def again(self) -> Look:
        """Another look, at what is new since this one."""
        if self._again is None:
            self._again = Look(self._since, self._leaders, self)
        return self._again


@final
class Shared:
    """What all trees of one Trio run share."""

    def __init__(self) -> None:
        self.trees: set[Marked] = set()
        self.leaders: set[int] = set()
        self._look: Look | None = None

    def look(self, tree: Marked) -> Look:
        """One that was begun after the tree's last change, and is not old."""
        look = self._look
        if look is None or look.began <= tree.changed or time.monotonic() - look.ended > LOOK_SERVES:
            since = min(each.since for each in (tree, *self.trees))
            look = self._look = Look(since, set(self.leaders))
        return look

    def leave(self, tree: Marked, leaders: Iterable[int]) -> None:
        self.trees.discard(tree)
        self.leaders.difference_update(leaders)
        if not self.trees:
            self._look = None


_shared: trio.lowlevel.RunVar[Shared] = trio.lowlevel.RunVar("supervise.processes.marked")


def shared() -> Shared:
    """That of this Trio run."""
    try:
        return _shared.get()
    except LookupError:
        _shared.set(Shared())
        return _shared.get()


class Marked:
    """One tree, found by its marker and by the sessions of its leaders. What `Containment` asks for, but `spawn`.

    Args:
        token: a text that no other tree has; it is the marker.
        since: when its first process may have been started, in ticks since boot; default now.
        lost: pid and start (ticks) of processes of the tree that somebody else has started: they may have ended, and
            their pids may be strangers' by now.
        group: the cgroup of the tree.
        keepers: pid and start of processes that are none of the tree, but whose children are.
    """

    def __init__(
        self,
        token: str,
        *,
        since: int | None = None,
        lost: Iterable[tuple[int, int]] | None = None,
        group: Group | None = None,
        keepers: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.token = token
        self.since = identity.now_in_ticks() if since is None else since
        self.changed = time.monotonic()
        self._known = set(lost or ())
        #: Leaders that stay zombies until the tree is closed: pid to pidfd and start.
        self._held: dict[int, tuple[int, int]] = {}
        self._is_lost = lost is not None  # to be looked for, though we have started nothing
        self._lost = dict(self._known)
        self._group = group
        self._ends_group = group is not None  # all that is in it at once
        self._keepers = set(keepers)
        self._not_ours: dict[int, str] = {}
        self._reserve: list[int] = []
        self._shared = shared()
        self._shared.trees.add(self)
        self._shared.leaders.update(self._lost)

    @staticmethod
    def environment(token: str) -> dict[str, str]:
        """What the marker is in the environment of a child: ours, if we have one, and the token."""
        return {MARK: "/".join(filter(None, [os.environ.get(MARK, ""), token]))}

    def search(self) -> None:
        """A process was started that nothing is known of but the marker."""
        self._is_lost = True
        self._change()

    def hold(self, leader: int, pidfd: int) -> None:
        """A leader was started, a child of ours; its pid is its own until `close`, unless somebody reaps it."""
        self._held[leader] = (pidfd, identity.start_of(leader))
        self._shared.leaders.add(leader)
        self._change()
        self._fill_reserve()

    def _let_go(self) -> None:
        """Leaders that were reaped behind our back may be strangers by now, by their pids."""
        for leader, (pidfd, start) in list(self._held.items()):
            if not is_child(os.P_PIDFD, pidfd):
                del self._held[leader]
                self._lost[leader] = start
                self._is_lost = True

    def members(self) -> list[Process]:
        if not (self._held or self._is_lost):
            return []
        with self._descriptors():
            return self._members(self._shared.look(self))

    def empty(self) -> bool:
        if not (self._held or self._is_lost):
            return True
        with self._descriptors():
            look = self._shared.look(self)
            # Who forks and ends while /proc is read is missed, and its child too. A second look at what is new
            # since the first finds the child.
            grouped = self._group is not None and self._ends_group and self._group.populated()
            return not grouped and not self._members(look) and not self._members(look.again())

    def _members(self, look: Look) -> list[Process]:
        token = self.token.encode()
        self._let_go()
        leaders = self._held.keys() | {pid for pid, start in self._lost.items() if self._leads(look, pid, start)}
        found = {process.pid: process for leader in leaders for process in look.near.get(leader, ())}
        for pid, start in self._known:
            if (process := look.processes.get(pid)) is not None and process.start == start:
                found[pid] = process
        for pid, environment in look.environments.items():
            if token in environment:
                found[pid] = look.processes[pid]
        found |= self._grouped(look)
        new = [*found, *(pid for pid, start in self._keepers if look.shows(pid, start))]
        while new:  # children of members are members, whatever they did to their session and environment
            for child in look.children.get(new.pop(), ()):
                if child.pid not in found and (child.pid, child.start) not in self._keepers:
                    found[child.pid] = child
                    new.append(child.pid)
        members = [found[pid] for pid in sorted(found) if found[pid].alive]
        # Who was found by a parent stays a member when the teardown has ended that parent first.
        known = {(member.pid, member.start) for member in members}
        self._known = self._known | known if look.is_second else known
        return members

    def _grouped(self, look: Look) -> dict[int, Process]:
        """Those in the cgroup."""
        if self._group is None:
            return {}
        found = {pid: look.processes.get(pid) or identity.read(pid) for pid in self._group.pids()}
        still = set(self._group.pids())  # who is not: its pid may have been a stranger's when it was looked at
        return {pid: process for pid, process in found.items() if process is not None and pid in still}

    def _leads(self, look: Look, pid: int, start: int) -> bool:
        """Whether the session of a leader that we do not hold is still the tree's."""
        return not look.is_strangers(pid, start)

    def signal(self, number: int) -> int:
        members = self.members()
        if self._group is not None and self._ends_group and number == signal.SIGKILL:
            self._group.kill()
        self._let_go()
        for leader in {member.group for member in members if member.group in self._held}:
            # One call for the whole group: a child forked meanwhile gets the signal, too.
            for each in (number, signal.SIGCONT):
                try:
                    os.killpg(leader, each)
                except (ProcessLookupError, PermissionError) as error:
                    self._refused(leader, error)
        with self._descriptors():
            for member in members:
                if member.group not in self._held:
                    self._signal_one(member, number, signal.SIGCONT)
        self._change()
        return len(members)

    def _change(self) -> None:
        """An earlier look, perhaps another tree's, tells nothing about this one any more."""
        self.changed = time.monotonic()

    def signal_group(self, leader: int, number: int) -> None:
        """Send one signal to a leader's process group, as a terminal does."""
        self._let_go()
        try:
            if leader in self._held:
                os.killpg(leader, number)
                return
            members = [member for member in self.members() if member.group == leader]
        except OSError as error:
            self._refused(leader, error)
            return
        with self._descriptors():
            for member in members:
                self._signal_one(member, number)
        self._change()

    async def change(self) -> None:
        members = self.members()
        pidfds: list[int] = []
        try:
            for member in members[:WATCHED_AT_ONCE]:
                if (pidfd := identity.pidfd_of(member.pid, member.start)) is None:
                    break
                pidfds.append(pidfd)
            else:
                async with trio.open_nursery() as nursery:
                    for pidfd in pidfds:
                        nursery.start_soon(trio.lowlevel.wait_readable, pidfd)
                return
            await trio.sleep(LOOK_SERVES)  # it has just ended, or no descriptor is free: look again soon
        finally:
            self._change()
            for pidfd in pidfds:
                os.close(pidfd)

    def not_ours(self) -> dict[int, str]:
        return self._not_ours

    def close(self, *, survivors: bool = False) -> None:
        self._shared.leave(self, {*self._held, *self._lost})
        self._held.clear()
        self._lost.clear()
        self._is_lost = False
        self._use_reserve()

    @contextmanager
    def _descriptors(self) -> Iterator[None]:
        """Descriptors are free in here, also if the rest of this process has used up all others."""
        self._use_reserve()
        try:
            yield
        finally:
            if self._held or self._is_lost:
                self._fill_reserve()

    def _use_reserve(self) -> None:
        while self._reserve:
            os.close(self._reserve.pop())

    def _fill_reserve(self) -> None:
        try:
            while len(self._reserve) < RESERVE:
                self._reserve.append(os.open("/proc", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return  # somebody was faster; the next time may be better

    def _signal_one(self, member: Process, *numbers: int) -> None:
        try:
            pidfd = os.pidfd_open(member.pid)
        except OSError as error:
            self._refused(member.pid, error)
            return
        try:
            # The descriptor is of whoever has the pid now: is it still the one that was found?
            now = identity.read(member.pid)
            if now is not None and now.start == member.start:
                for number in numbers:
                    signal.pidfd_send_signal(pidfd, number)
        except OSError as error:
            self._refused(member.pid, error)
        finally:
            os.close(pidfd)

    def _refused(self, pid: int, error: OSError) -> None:
        if error.errno != errno.ESRCH:
            self._not_ours[pid] = f"it could not be signalled: {error.strerror}"


def is_child(kind: int, number: int) -> bool:
    """Whether this is a child of ours that nobody has reaped, alive or not: then its pid is its own."""
    try:
        os.waitid(kind, number, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return False
    return True
