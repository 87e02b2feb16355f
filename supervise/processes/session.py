"""Containment by session, process group and environment marker: what any POSIX system with `/proc` can do.

The leader gets a session (and so a process group) of its own and stays a zombie until the tree is closed:
while it is there, the kernel gives its pid to nobody, so that a signal to the group cannot hit a stranger.
Who left the session is found by the marker that every descendant inherits, and by its parents.

What this cannot promise: a process that left the session, cleared its environment and lost its parent before
anybody looked is not found, and a supervisor killed with -9 leaves the tree alive.
"""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import trio

from supervise.errors import SpawnError, UnsupportedPlatform
from supervise.model import ExitStatus
from supervise.processes import identity
from supervise.processes.containment import Command, Pipes
from supervise.processes.identity import Process

#: In the environment of every child: the trees that it belongs to, the innermost last.
MARK = "SUPERVISE_MARK"

#: How many members one wait watches: more would only cost descriptors, since any end leads to a new look.
WATCHED_AT_ONCE = 32

#: How many descriptors one look, or one signal, needs at once. A tree keeps as many in reserve.
RESERVE = 2

#: How long a look serves other trees, too, in seconds: many that end at once would each read all of /proc.
LOOK_SERVES = 0.01

#: How many programs are started at once.
SPAWNS_AT_ONCE = 8

# Ignored signals and a blocked mask survive exec. The only way to reset them without running Python between
# fork and exec of a process with threads is a program in between, which is started where there is need.
LAUNCHER = """
import os, signal, sys
report, locale, program, *argv = sys.argv[1:]
report = int(report)
os.set_inheritable(report, False)
os.environ.pop("LC_CTYPE", None)  # in the C locale Python sets it for itself, and its children
if locale:
    os.environ["LC_CTYPE"] = locale
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
try:
    os.execv(program, argv)
except OSError as error:
    os.write(report, str(error.errno).encode())
os._exit(127)
"""


def require_platform() -> None:
    """Raise a clear error where this containment cannot work."""
    if not (sys.platform == "linux" and hasattr(os, "pidfd_open") and os.path.isdir("/proc/self")):
        raise UnsupportedPlatform(
            "supervise needs Linux 5.4 or newer with /proc mounted to own a tree of processes; "
            f"this is {sys.platform}. Run it on Linux, or in a Linux container."
        )


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

    def again(self) -> Look:
        """Another look, at what is new since this one."""
        if self._again is None:
            self._again = Look(self._since, self._leaders, self)
        return self._again


@final
class Shared:
    """What all trees of one Trio run share."""

    def __init__(self) -> None:
        # Not Trio's own: a host whose threads are all busy must not keep a tree from being ended.
        self.limiter = trio.CapacityLimiter(SPAWNS_AT_ONCE)
        self.trees: set[SessionContainment] = set()
        self.leaders: set[int] = set()
        self._look: Look | None = None

    def look(self, tree: SessionContainment) -> Look:
        """One that was begun after the tree's last change, and is not old."""
        look = self._look
        if look is None or look.began <= tree.changed or time.monotonic() - look.ended > LOOK_SERVES:
            since = min(each.since for each in (tree, *self.trees))
            look = self._look = Look(since, set(self.leaders))
        return look

    def leave(self, tree: SessionContainment, leaders: Iterable[int]) -> None:
        self.trees.discard(tree)
        self.leaders.difference_update(leaders)
        if not self.trees:
            self._look = None


_shared: trio.lowlevel.RunVar[Shared] = trio.lowlevel.RunVar("supervise.processes.session")


def shared() -> Shared:
    """That of this Trio run."""
    try:
        return _shared.get()
    except LookupError:
        _shared.set(Shared())
        return _shared.get()


@final
class SessionLeader:
    """A child of ours. Its status is read without reaping it; `on_end` is called when it has ended."""

    def __init__(self, popen: subprocess.Popen[bytes], pidfd: int, on_end: Callable[[], None]) -> None:
        self.popen = popen
        self.pid = popen.pid
        self.pidfd = pidfd
        self._on_end = on_end

    async def wait(self) -> ExitStatus:
        await trio.lowlevel.wait_readable(self.pidfd)
        self._on_end()
        try:
            info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)  # noqa: ASYNC222  # WNOHANG
        except ChildProcessError:  # the host ignores SIGCHLD, so that the kernel threw the status away
            return ExitStatus()
        assert info is not None
        if info.si_code == os.CLD_EXITED:
            return ExitStatus(code=info.si_status)
        return ExitStatus.of_signal(info.si_status)


@final
class SessionContainment:
    """One tree, held by sessions and a marker.

    Args:
        token: a text that no other tree has; it is the marker.
    """

    tier = "process group"

    def __init__(self, token: str) -> None:
        require_platform()
        self._token = token
        self.since = identity.now_in_ticks()
        self._leaders: dict[int, SessionLeader] = {}
        self._not_ours: dict[int, str] = {}
        self._reserve: list[int] = []
        self._known: set[tuple[int, int]] = set()
        self.changed = time.monotonic()
        self._shared = shared()
        self._shared.trees.add(self)

    async def spawn(self, command: Command, pipes: Pipes) -> SessionLeader:
        program = find_program(command)
        mark = "/".join(filter(None, [os.environ.get(MARK, ""), self._token]))
        options: dict[str, Any] = {
            "stdin": pipes.stdin,
            "stdout": pipes.stdout,
            "stderr": pipes.stderr,
            "cwd": command.cwd,
            "env": {**command.env, MARK: mark},
            "start_new_session": True,
            **_credentials(command),
        }
        # Not abandoned when cancelled: Trio waits for the thread, so the child is known before anything else runs.
        popen = await trio.to_thread.run_sync(partial(_popen, program, command, options), limiter=self._shared.limiter)
        try:
            leader = SessionLeader(popen, os.pidfd_open(popen.pid), self._change)
        except OSError as error:  # out of descriptors: no child is left half started
            os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
            raise spawn_error(command, error) from None
        self._leaders[popen.pid] = leader
        self._shared.leaders.add(popen.pid)
        self._change()
        self._fill_reserve()
        return leader

    def members(self) -> list[Process]:
        with self._descriptors():
            return self._members(self._shared.look(self))

    def empty(self) -> bool:
        if not self._leaders:
            return True
        with self._descriptors():
            look = self._shared.look(self)
            # Who forks and ends while /proc is read is missed, and its child too. A second look at what is new
            # since the first finds the child.
            return not self._members(look) and not self._members(look.again())

    def _members(self, look: Look) -> list[Process]:
        token = self._token.encode()
        found = {process.pid: process for leader in self._leaders for process in look.near.get(leader, ())}
        for pid, start in self._known:
            if (process := look.processes.get(pid)) is not None and process.start == start:
                found[pid] = process
        for pid, environment in look.environments.items():
            if token in environment:
                found[pid] = look.processes[pid]
        new = list(found)
        while new:  # children of members are members, whatever they did to their session and environment
            for child in look.children.get(new.pop(), ()):
                if child.pid not in found:
                    found[child.pid] = child
                    new.append(child.pid)
        members = [found[pid] for pid in sorted(found) if found[pid].alive]
        # Who was found by a parent stays a member when the teardown has ended that parent first.
        known = {(member.pid, member.start) for member in members}
        self._known = self._known | known if look.is_second else known
        return members

    def signal(self, number: int) -> int:
        members = self.members()
        for leader in {member.group for member in members if member.group in self._leaders}:
            # One call for the whole group: a child forked meanwhile gets the signal, too.
            for each in (number, signal.SIGCONT):
                try:
                    os.killpg(leader, each)
                except (ProcessLookupError, PermissionError) as error:
                    self._refused(leader, error)
        with self._descriptors():
            for member in members:
                if member.group not in self._leaders:
                    self._signal_one(member, number)
        self._change()
        return len(members)

    def _change(self) -> None:
        """An earlier look, perhaps another tree's, tells nothing about this one any more."""
        self.changed = time.monotonic()

    def signal_group(self, leader: int, number: int) -> None:
        """Send one signal to a leader's process group, as a terminal does. The leader must not be reaped yet."""
        try:
            os.killpg(leader, number)
        except (ProcessLookupError, PermissionError) as error:
            self._refused(leader, error)

    async def gone(self, members: Sequence[Process]) -> None:
        pidfds: list[int] = []
        try:
            for member in members[:WATCHED_AT_ONCE]:
                try:
                    pidfds.append(os.pidfd_open(member.pid))
                except ProcessLookupError:
                    continue
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE):
                        raise
                    break
                now = identity.read(member.pid)
                if now is None or now.start != member.start:  # the pid went to a stranger: not to be waited for
                    os.close(pidfds.pop())
            else:
                async with trio.open_nursery() as nursery:
                    for pidfd in pidfds:
                        nursery.start_soon(trio.lowlevel.wait_readable, pidfd)
                return
            await trio.sleep(0.02)  # no descriptor is free: nothing tells, so look again soon
        finally:
            self._change()
            for pidfd in pidfds:
                os.close(pidfd)

    def not_ours(self) -> dict[int, str]:
        return self._not_ours

    def close(self) -> None:
        for leader in self._leaders.values():
            os.close(leader.pidfd)
            leader.popen.poll()  # reaps; a survivor stays
        self._shared.leave(self, self._leaders)
        self._leaders.clear()
        self._use_reserve()

    @contextmanager
    def _descriptors(self) -> Iterator[None]:
        """Descriptors are free in here, also if the rest of this process has used up all others."""
        self._use_reserve()
        try:
            yield
        finally:
            if self._leaders:
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

    def _signal_one(self, member: Process, number: int) -> None:
        try:
            pidfd = os.pidfd_open(member.pid)
        except OSError as error:
            self._refused(member.pid, error)
            return
        try:
            # The descriptor is of whoever has the pid now: is it still the one that was found?
            now = identity.read(member.pid)
            if now is not None and now.start == member.start:
                signal.pidfd_send_signal(pidfd, number)
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        except OSError as error:
            self._refused(member.pid, error)
        finally:
            os.close(pidfd)

    def _refused(self, pid: int, error: OSError) -> None:
        if error.errno != errno.ESRCH:
            self._not_ours[pid] = f"it could not be signalled: {error.strerror}"


def find_program(command: Command) -> str:
    """The path of the program that `command` names.

    Raises:
        SpawnError: there is none, it cannot be executed, or the working directory is missing.
    """
    name = command.argv[0]
    if not os.path.isdir(command.cwd):
        raise SpawnError(
            name,
            "bad_cwd",
            f"{name!r} was not started: its working directory {command.cwd!r} is missing or no directory",
        )
    if "/" in name:
        path = os.path.join(command.cwd, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
        exists = os.path.exists(path)
    else:
        search = command.env.get("PATH", os.defpath)
        found = shutil.which(name, path=search)
        if found is not None:
            return os.path.abspath(found)
        exists = shutil.which(name, mode=os.F_OK, path=search) is not None
    if exists:
        raise SpawnError(name, "not_executable", f"the program {name!r} cannot be executed; check its mode bits")
    where = "" if "/" in name else " on the PATH"
    raise SpawnError(
        name,
        "not_found",
        f"the program {name!r} was not found{where}; install it, or name another (agent.command, index.command)",
    )


def _credentials(command: Command) -> dict[str, Any]:
    """Popen's options for another user."""
    if command.user is None:
        return {}
    name = command.argv[0]
    try:
        entry = pwd.getpwnam(command.user)
    except KeyError:
        raise SpawnError(name, "user", f"{name!r} was not started: there is no user {command.user!r} here") from None
    if entry.pw_uid == os.geteuid():
        return {}
    if os.geteuid() != 0:
        raise SpawnError(
            name,
            "user",
            f"{name!r} was not started as {command.user!r}: only root may run programs as another user",
        )
    groups = os.getgrouplist(command.user, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}


def _popen(program: str, command: Command, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Runs in a worker thread."""
    try:
        if _inherits_odd_signals():
            return _popen_by_launcher(program, command, options)
        return subprocess.Popen(list(command.argv), executable=program, **options)
    except OSError as error:
        raise spawn_error(command, error) from None
    except ValueError as error:  # a NUL, or text that the file system's encoding does not have
        name = command.argv[0]
        raise SpawnError(name, "other", f"the program {name!r} was not started: {error}") from None


def _inherits_odd_signals() -> bool:
    """Whether a child would start with ignored or blocked signals, other than those that Popen resets itself."""
    if signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return True
    restored = {signal.SIGPIPE, signal.SIGXFSZ}
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"SigIgn:"):
                ignored = int(line.split()[1], 16)
                return any(ignored >> (number - 1) & 1 for number in signal.valid_signals() - restored)
    return False


def _popen_by_launcher(program: str, command: Command, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        # -I -S: no site, no user's PYTHON… variables: only these lines run before the program.
        arguments = (str(write), command.env.get("LC_CTYPE", ""), program, *command.argv)
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, *arguments]
        popen = subprocess.Popen(launcher, pass_fds=(write,), **options)
        os.close(write)
        write = -1
        report = os.read(read, 16)  # ends with the exec, at the latest with the launcher
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    if report:
        popen.wait()
        raise OSError(int(report), os.strerror(int(report)))
    return popen


def spawn_error(command: Command, error: OSError) -> SpawnError:
    """What the kernel said, in words that name the program."""
    name = command.argv[0]
    kinds = {
        errno.ENOENT: ("not_found", "was not found, or its interpreter (the #! line) is missing"),
        errno.ENOTDIR: ("not_found", "was not found"),
        errno.EACCES: ("not_executable", "may not be executed, or its directory may not be entered"),
        errno.EPERM: ("not_executable", "may not be executed"),
        errno.ENOEXEC: (
            "bad_format",
            "is no program: neither a binary of this machine nor a script with a #! line",
        ),
        errno.E2BIG: ("limit", "was given arguments and environment that are too large"),
        errno.EAGAIN: ("limit", "was not started: the limit of processes is reached"),
        errno.ENOMEM: ("limit", "was not started: no memory"),
        errno.EMFILE: ("limit", "was not started: this process has no file descriptor left"),
        errno.ENFILE: ("limit", "was not started: the system has no file descriptor left"),
    }
    kind, text = kinds.get(error.errno or 0, ("other", f"was not started: {error.strerror}"))
    return SpawnError(name, kind, f"the program {name!r} {text}")
