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
from collections.abc import Collection, Iterator, Sequence
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
class SessionLeader:
    """A child of ours. Its status is read without reaping it."""

    def __init__(self, popen: subprocess.Popen[bytes], pidfd: int) -> None:
        self.popen = popen
        self.pid = popen.pid
        self.pidfd = pidfd

    async def wait(self) -> ExitStatus:
        await trio.lowlevel.wait_readable(self.pidfd)
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
        self._since = identity.now_in_ticks()
        self._leaders: dict[int, SessionLeader] = {}
        self._not_ours: dict[int, str] = {}
        self._reserve: list[int] = []
        self._known: set[tuple[int, int]] = set()

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
        popen = await trio.to_thread.run_sync(partial(_popen, program, command, options))
        try:
            leader = SessionLeader(popen, os.pidfd_open(popen.pid))
        except OSError as error:  # out of descriptors: no child is left half started
            os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
            raise spawn_error(command, error) from None
        self._leaders[popen.pid] = leader
        self._fill_reserve()
        return leader

    def members(self) -> list[Process]:
        return self._look()[0]

    def empty(self) -> bool:
        if not self._leaders:
            return True
        members, seen = self._look()
        # Who forks and ends while /proc is read is missed, and its child too. A second look at what is new since
        # the first finds the child.
        return not members and not self._look(skip=seen - self._leaders.keys())[0]

    def _look(self, skip: Collection[int] = ()) -> tuple[list[Process], set[int]]:
        with self._descriptors():
            return self._members(skip)

    def _members(self, skip: Collection[int]) -> tuple[list[Process], set[int]]:
        started, seen = identity.started_since(self._since, skip=skip)
        processes = {process.pid: process for process in started}
        token = self._token.encode()
        found = {
            process.pid
            for process in started
            if process.pid in self._leaders
            or process.session in self._leaders
            or process.group in self._leaders
            or (process.pid, process.start) in self._known
            or (process.alive and token in identity.environment_of(process.pid))
        }
        grown = True
        while grown:  # children of members are members, whatever they did to their session and environment
            more = {p.pid for p in started if p.parent in found and p.pid not in found}
            grown = bool(more)
            found |= more
        members = [processes[pid] for pid in sorted(found) if processes[pid].alive]
        # Who was found by a parent stays a member when the teardown has ended that parent first.
        known = {(member.pid, member.start) for member in members}
        self._known = self._known | known if skip else known
        return members, seen

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
        return len(members)

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
            for pidfd in pidfds:
                os.close(pidfd)

    def not_ours(self) -> dict[int, str]:
        return self._not_ours

    def close(self) -> None:
        for leader in self._leaders.values():
            os.close(leader.pidfd)
            leader.popen.poll()  # reaps; a survivor stays
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
