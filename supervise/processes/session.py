"""Containment by session, process group and environment marker: what any POSIX system with `/proc` can do.

The leader gets a session (and so a process group) of its own and stays a zombie until the tree is closed:
while it is there, the kernel gives its pid to nobody, so that a signal to the group cannot hit a stranger. A host
that ignores SIGCHLD, or reaps all children there are, takes that away: then members are signalled one by one.
Who left the session is found by the marker that every descendant inherits, and by its parents.

What this cannot promise: a process that left the session, cleared its environment and lost its parent before
anybody looked is not found, and a supervisor killed with -9 leaves the tree alive until the next start sweeps.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, final

import trio

from supervise.errors import SpawnError, UnsupportedPlatform
from supervise.model import ExitStatus
from supervise.processes.containment import Command, Pipes
from supervise.processes.marked import Marked, is_child
from supervise.processes.program import credentials, find_program, spawn_error
from supervise.processes.records import Record

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
    known_as = os.readlink("/proc/self")
    if known_as != str(os.getpid()):
        raise UnsupportedPlatform(
            "/proc belongs to another pid namespace, so that no process can be found by its pid: this one is "
            f"{os.getpid()} here, and {known_as} there. Mount /proc in the namespace of this process: "
            "`mount -t proc proc /proc`, or `unshare --pid --fork --mount-proc`."
        )


@final
class SessionLeader:
    """A child of ours. Its status is read without reaping it; `on_end` is called when it has ended."""

    def __init__(self, popen: subprocess.Popen[bytes], pidfd: int | None, on_end: Callable[[], None]) -> None:
        self.popen = popen
        self.pid = popen.pid
        self.pidfd = pidfd
        self._on_end = on_end

    async def wait(self) -> ExitStatus:
        if self.pidfd is None:  # it had ended before we could ask for one
            await trio.lowlevel.checkpoint()
            return ExitStatus()
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
class SessionContainment(Marked):
    """One tree, held by sessions and a marker.

    Args:
        token: a text that no other tree has; it is the marker.
        record: what the next supervisor needs to find the tree, if this one is killed.
        refusal: why nothing may be started: limits that this tier cannot keep.
    """

    tier = "process group"

    def __init__(self, token: str, record: Record | None = None, refusal: str | None = None) -> None:
        require_platform()
        super().__init__(token)
        self._record = record
        self._refusal = refusal
        self._leaders: list[SessionLeader] = []

    async def spawn(self, command: Command, pipes: Pipes) -> SessionLeader:
        options: dict[str, Any] = {
            "stdin": pipes.stdin,
            "stdout": pipes.stdout,
            "stderr": pipes.stderr,
            "cwd": command.cwd,
            "env": {**command.env, **self.environment(self.token)},
            "start_new_session": True,
        }
        # Not abandoned when cancelled: Trio waits for the thread, so the child is known before anything else runs.
        popen = await trio.to_thread.run_sync(partial(self._popen, command, options), limiter=spawning())
        try:
            leader = SessionLeader(popen, os.pidfd_open(popen.pid), self._change)
        except ProcessLookupError:  # it has ended, and the host ignores SIGCHLD, so that it was reaped
            leader = SessionLeader(popen, None, self._change)
        except OSError as error:  # out of descriptors: no child is left half started
            if is_child(os.P_PID, popen.pid):
                os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
            raise spawn_error(command, error) from None
        self._leaders.append(leader)
        if leader.pidfd is None:
            self.search()
        else:
            self.hold(leader.pid, leader.pidfd)
        if self._record is not None:
            self._record.enter(self.token, [each.pid for each in self._leaders])
        return leader

    def _popen(self, command: Command, options: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Runs in a worker thread: files and users may be on a network that does not answer."""
        program = find_program(command)
        if self._refusal is not None:
            name = command.argv[0]
            raise SpawnError(name, "limit", f"{name!r} was not started: {self._refusal}")
        if (user := credentials(command)) is not None:
            options = {**options, "user": user.uid, "group": user.gid, "extra_groups": user.groups}
        return _popen(program, command, options)

    async def serve(self) -> None:
        """Nothing is to be done: the kernel tells."""

    def close(self, *, survivors: bool = False) -> None:
        for leader in self._leaders:
            if leader.pidfd is not None:
                os.close(leader.pidfd)
            leader.popen.poll()  # reaps; a survivor stays
        self._leaders.clear()
        super().close(survivors=survivors)
        if not survivors and self._record is not None:
            self._record.strike(self.token)


_spawning: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("supervise.processes.session")


def spawning() -> trio.CapacityLimiter:
    """Not Trio's own: a host whose threads are all busy must not keep a tree from being ended."""
    try:
        return _spawning.get()
    except LookupError:
        _spawning.set(trio.CapacityLimiter(SPAWNS_AT_ONCE))
        return _spawning.get()


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
