"""Containment by a guardian: a tree that nobody leaves, and that ends with its supervisor. See guardian.py.

What this cannot promise: guardian and zygote killed at once leave what was alive. It is then looked for as the
session tier looks (marked.py), and a cgroup, where there is one, holds it all the same.
"""

from __future__ import annotations

import errno
import logging
import marshal
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, final

import trio

from supervise.errors import SpawnError
from supervise.model import ExitStatus
from supervise.processes import identity
from supervise.processes.cgroup import Group, NoLimit
from supervise.processes.containment import Command, Pipes
from supervise.processes.helper import Helper, Limits, changed_limits, is_closed, send
from supervise.processes.identity import Process
from supervise.processes.marked import Marked
from supervise.processes.program import credentials, find_program, spawn_error
from supervise.processes.session import spawning

log = logging.getLogger("supervise.processes")

#: How often a tree is looked at that nobody tells about, in seconds.
LOOK_AGAIN = 0.02

#: A guardian that has not told of an end after so many seconds may have been stopped.
TOLD_SOON = 0.2

GUARDIAN = "guardian"
GUARDIAN_AND_CGROUP = "guardian and cgroup"

Message = dict[str, Any]


@final
class GuardedLeader:
    """A child of the guardian."""

    def __init__(self, pid: int, start: int, owner: GuardianContainment) -> None:
        self.pid = pid
        self.start = start
        self.status: ExitStatus | None = None
        self.ended = trio.Event()
        self._owner = owner
        self._pidfd = identity.pidfd_of(pid, start)

    async def wait(self) -> ExitStatus:
        if self._pidfd is not None:
            # The kernel tells, too: a guardian that was stopped does not.
            await trio.lowlevel.wait_readable(self._pidfd)
            for bound, remedy in ((TOLD_SOON, self._owner.rouse), (self._owner.timeout, self._owner.give_up)):
                with trio.move_on_after(bound):
                    await self.ended.wait()
                    break
                remedy()
        await self.ended.wait()
        self.close()
        assert self.status is not None
        return self.status

    def end(self, status: ExitStatus) -> None:
        if self.status is None:
            self.status = status
            self.ended.set()

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


@final
class GuardianContainment:
    """One tree, owned by a guardian.

    Args:
        token: a text that no other tree has; it is the marker.
        helper: whom to ask for the guardian.
        group: makes the tree's cgroup, or raises `NoLimit`; `None` where there are none.
    """

    def __init__(self, token: str, helper: Helper, group: Callable[[], Group] | None = None) -> None:
        self.tier = GUARDIAN if group is None else GUARDIAN_AND_CGROUP
        self.timeout = helper.timeout
        self._token = token
        self._helper = helper
        self._make_group = group
        self._group: Group | None = None
        self._since = identity.now_in_ticks()
        self._control: socket.socket | None = None
        self._limits: Limits = {}
        self._opened = trio.Event()
        self._news = trio.Event()
        self._guardian: tuple[int, int] | None = None  # pid and start, since it said hello
        self._pidfd: int | None = None
        self._leaders: dict[int, GuardedLeader] = {}
        self._unanswered: list[float] = []
        self._answers: dict[int, Message | None] = {}
        self._asked: set[int] = set()  # spawns that no answer has come for
        self._spawns = 0
        self._spawned = 0
        self._told_empty = 0
        self._denied: dict[int, str] = {}
        self._lost: Marked | None = None

    # --- starting

    async def spawn(self, command: Command, pipes: Pipes) -> GuardedLeader:
        # In a thread: the program, its directory and its user may be behind a network that hangs.
        make = partial(_program, command, Marked.environment(self._token))
        program = await trio.to_thread.run_sync(make, limiter=spawning())
        if self._lost is not None:
            raise self._no_guardian(command)
        try:
            if self._make_group is not None and self._group is None:
                self._group = self._make_group()
        except NoLimit as error:
            name = command.argv[0]
            raise SpawnError(name, "limit", f"{name!r} was not started: {error}") from None
        answer = await self._ask(program, pipes)
        if answer is None and self._guardian is None:  # it was never there, so nothing was started: once more
            answer = await self._ask(program, pipes)
        if answer is None:
            raise self._no_guardian(command)
        if answer["op"] == "refused":
            raise _refused(command, answer["errno"], answer["stage"])
        return self._leaders[answer["pid"]]

    async def _ask(self, program: Message, pipes: Pipes) -> Message | None:
        """The guardian's answer; None if it was killed, or does not answer."""
        if self._control is None:
            self._control = await self._helper.ask()
            self._limits = self._helper.limits()
            self._opened.set()
        self._spawns += 1
        number = self._spawns
        memory = _memory(marshal.dumps({**program, "limits": changed_limits(self._limits)}))
        try:
            path = None if self._group is None else str(self._group.path)
            request = marshal.dumps({"op": "spawn", "id": number, "cgroup": path})
            send(self._control, request, [memory, pipes.stdin, pipes.stdout, pipes.stderr])
            self._asked.add(number)
        except (BrokenPipeError, ConnectionResetError):
            self._answers[number] = None  # it is dead: the reader will find out, too
        except BlockingIOError:  # it was stopped, and its queue is full
            self.give_up()
        finally:
            os.close(memory)
        for bound, remedy in ((self.timeout / 2, self.rouse), (self.timeout / 2, self.give_up), (1.0, self.rouse)):
            with trio.move_on_after(bound):
                while number not in self._answers:
                    await self._news.wait()
                break
            remedy()
        return self._answers.pop(number, None)

    def _no_guardian(self, command: Command) -> SpawnError:
        name = command.argv[0]
        text = f"the program {name!r} was not started: the guardian of its tree was killed, or did not answer"
        return SpawnError(name, "other", text)

    # --- listening

    async def serve(self) -> None:
        while True:
            await self._opened.wait()
            assert self._control is not None
            await trio.lowlevel.wait_readable(self._control)
            while (data := self._receive(self._control)) is not None:
                if not data:
                    self._lose()
                    break
                self._hear(marshal.loads(data))
            self._news.set()
            self._news = trio.Event()

    def _receive(self, control: socket.socket) -> bytes | None:
        """A message; empty when the guardian is gone, None when there is none yet."""
        while True:
            try:
                return control.recv(65536)
            except BlockingIOError:
                return None
            except ConnectionResetError:  # it ended with a message of ours unread; what it said comes after this
                continue

    def _hear(self, message: Message) -> None:
        match message["op"]:
            case "hello":
                self._guardian = (message["pid"], message["start"])
                self._helper.guardians.add(message["pid"])
                self._pidfd = self._open_guardian()
            case "started":
                self._spawned += 1
                leader = GuardedLeader(message["pid"], message["start"], self)
                self._leaders[leader.pid] = leader
                self._asked.discard(message["id"])
                self._answers[message["id"]] = message
                keepers = [self._guardian] if self._guardian else []
                self._helper.record.enter(self._token, self._leaders, keepers)
            case "refused":
                self._asked.discard(message["id"])
                self._answers[message["id"]] = message
            case "ended":
                for pid, code in message["leaders"]:
                    self._leaders[pid].end(ExitStatus(code=code) if code >= 0 else ExitStatus.of_signal(-code))
                self._told_empty = message["empty"]
            case "signalled":
                self._unanswered[:1] = []
                denied = "it could not be signalled: Operation not permitted"
                self._denied.update(dict.fromkeys(message["denied"], denied))

    def _lose(self) -> None:
        """The guardian is dead. The zygote ends what it has left; if that is dead, too, we do."""
        self._close_control()
        self._asked.clear()
        for number in range(1, self._spawns + 1):
            self._answers.setdefault(number, None)
        if self._guardian is None:  # it was never there
            self._answers = {self._spawns: None}
            return
        log.warning("the guardian (process %d) of a tree was killed: the tree is ended", self._guardian[0])
        self._helper.guardians.discard(self._guardian[0])
        leaders = [(leader.pid, leader.start) for leader in self._leaders.values()]
        self._lost = Marked(self._token, since=self._since, lost=leaders, group=self._group)
        for leader in self._leaders.values():
            leader.end(ExitStatus.of_signal(signal.SIGKILL))  # by PR_SET_PDEATHSIG, or by the zygote

    # --- looking and ending

    def members(self) -> list[Process]:
        if self._guardian is None:
            return []
        found = {process.pid: process for process in self._below_guardian() if process.alive}
        if self._lost is not None:
            found |= {process.pid: process for process in (*self._helper.orphans(), *self._lost.members())}
        return [found[pid] for pid in sorted(found)]

    def empty(self) -> bool:
        if self._lost is not None:
            return not self.members() and self._lost.empty()
        return self._told_empty == self._spawned and not self._asked

    def signal(self, number: int) -> int:
        if self._lost is not None:
            self._helper.rouse()
            return self._lost.signal(number)
        try:
            count = len(self.members())  # before they end
        except OSError:  # no descriptor is free to count them; the guardian needs none
            count = sum(leader.status is None for leader in self._leaders.values())
        if self._group is not None and number == signal.SIGKILL:
            self._group.kill()  # the kernel's own, against which nobody can fork
        self._tell(number, None)
        return count

    def signal_group(self, leader: int, number: int) -> None:
        if self._lost is None:
            self._tell(number, leader)

    async def change(self) -> None:
        if self._lost is None:
            await self._news.wait()
            return
        with trio.move_on_after(LOOK_AGAIN):
            await trio.sleep_forever()

    def not_ours(self) -> dict[int, str]:
        return self._denied if self._lost is None else self._denied | self._lost.not_ours()

    def rouse(self) -> None:
        """If somebody has stopped guardian or zygote, they go on."""
        self._helper.rouse()
        self._signal_guardian(signal.SIGCONT)

    def give_up(self) -> None:
        """The guardian does not answer: it is killed, and the zygote ends its tree."""
        if self._guardian is None:
            self._helper.give_up()
        else:
            self._signal_guardian(signal.SIGKILL)

    def close(self, *, survivors: bool = False) -> None:
        self._close_control()
        for leader in self._leaders.values():
            leader.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._lost is not None:
            self._lost.close()
        if self._group is not None and (self._lost is not None or self._guardian is None):
            self._group.remove()  # else the guardian does, as its last act
        if self._guardian is not None and not survivors:  # else it stays, and is no orphan
            self._helper.guardians.discard(self._guardian[0])
        if self._leaders and not survivors:
            self._helper.record.strike(self._token)

    def _tell(self, number: int, leader: int | None) -> None:
        """Ask the guardian to signal. A stopped one is continued; one that has not answered for long is killed."""
        now = trio.current_time()
        if self._unanswered and now - self._unanswered[0] > self.timeout:
            self.give_up()
        self._unanswered.append(now)
        if self._control is not None:
            try:
                send(self._control, marshal.dumps({"op": "signal", "number": int(number), "group": leader}))
            except (BrokenPipeError, ConnectionResetError, BlockingIOError):
                return  # the reader finds out; or it is stopped and its queue is full of the same
        self.rouse()

    def _below_guardian(self) -> list[Process]:
        assert self._guardian is not None
        pid, start = self._guardian
        now = identity.read(pid)
        # While it dies it may still have its children: /proc says so as long as it is no zombie.
        return identity.descendants(pid) if now is not None and now.start == start else []

    def _signal_guardian(self, number: int) -> None:
        if self._pidfd is None and self._guardian is not None:  # no descriptor was free when it said hello
            self._pidfd = self._open_guardian()
        if self._pidfd is not None:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except OSError as error:
                if error.errno != errno.ESRCH:
                    log.warning("the guardian (process %s) could not be signalled: %s", self._guardian, error.strerror)

    def _open_guardian(self) -> int | None:
        """Proved by its socket, as /proc may hide it from us: as long as that is open, the pid is its own."""
        assert self._guardian is not None
        try:
            pidfd = os.pidfd_open(self._guardian[0])
        except OSError:  # it is gone, which its socket tells; or no descriptor is free
            return None
        if self._control is not None and not is_closed(self._control):
            return pidfd
        os.close(pidfd)
        return None

    def _close_control(self) -> None:
        if self._control is not None:
            trio.lowlevel.notify_closing(self._control)
            self._helper.close(self._control)
            self._control = None
            self._opened = trio.Event()


def _memory(data: bytes) -> int:
    """A descriptor to read this from: arguments and environment may be too large for a message."""
    memory = os.memfd_create("supervise-program", os.MFD_CLOEXEC)
    with open(memory, "wb", closefd=False) as file:
        file.write(data)
    return memory


def _program(command: Command, marker: dict[str, str]) -> Message:
    """What the guardian has to know of a program."""
    path = find_program(command)
    user = credentials(command)
    try:
        return {
            "path": _raw(path),
            "argv": [_raw(word) for word in command.argv],
            "env": {_raw(name): _raw(value) for name, value in {**command.env, **marker}.items()},
            "cwd": _raw(command.cwd),
            "umask": _umask(),
            "user": None if user is None else [user.uid, user.gid, user.groups],
        }
    except ValueError as error:
        name = command.argv[0]
        raise SpawnError(name, "other", f"the program {name!r} was not started: {error}") from None


def _raw(text: str) -> bytes:
    data = os.fsencode(text)
    if b"\0" in data:
        raise ValueError("embedded null byte")
    return data


def _umask() -> int:
    """Ours. It can only be asked for by setting it, which other threads would notice."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o022


def _refused(command: Command, number: int, stage: str) -> SpawnError:
    name, text = command.argv[0], os.strerror(number)
    match stage:
        case "cwd":
            text = f"{name!r} was not started: its working directory {command.cwd!r} cannot be entered: {text}"
            return SpawnError(name, "bad_cwd", text)
        case "user":
            text = f"{name!r} was not started: it could not become {command.user!r}: {text}"
            return SpawnError(name, "user", text)
        case "cgroup":
            text = f"{name!r} was not started: its cgroup could not be joined: {text}; set containment to guardian"
            return SpawnError(name, "limit", text)
        case "limits":
            return SpawnError(name, "limit", f"{name!r} was not started: its resource limits could not be set: {text}")
    return spawn_error(command, OSError(number, text))
