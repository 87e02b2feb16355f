"""The supervisor's end of the zygote: it starts the program in guardian.py, and asks it for guardians."""

from __future__ import annotations

import array
import errno
import logging
import marshal
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, final

import trio

from supervise.processes import guardian, identity
from supervise.processes.identity import Process
from supervise.processes.marked import MARK
from supervise.processes.records import Record
from supervise.processes.session import spawning

log = logging.getLogger("supervise.processes")

PROGRAM = guardian.__file__

#: What the zygote keeps of our environment: no keys, as its children could read them, but what Python may need.
KEPT = ("LD_LIBRARY_PATH", MARK)

ZYGOTE = "zygote"

#: Of /proc/PID/status, see proc(5).
RIGHTS = re.compile(rb"^(?:Uid|Gid|Groups|Cap\w+|NoNewPrivs|Seccomp\w*):.*$", re.MULTILINE)

#: How long a zygote that has closed its socket may take to end, in seconds.
ENDS_SOON = 1.0

#: Interpreters that have run a guardian for this process.
_proved: set[str] = set()

NAMESPACES = sorted(set(os.listdir("/proc/self/ns")) - {"time_for_children"}) if os.path.isdir("/proc/self/ns") else ()

LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})

Limits = dict[int, tuple[int, int] | None]


@final
class Helper:
    """The zygote of one supervisor: started when it is first wanted, and anew when it is gone.

    Args:
        orphan_grace: seconds between SIGTERM and SIGKILL when we are gone.
        timeout: how long it may leave a request unanswered, in seconds.
        record: where it is written down.
        cgroup: the group of all trees, which it removes in the end.
        scan: children are found by reading all of /proc.
    """

    def __init__(
        self, *, orphan_grace: float, timeout: float, record: Record, cgroup: Path | None, scan: bool = False
    ) -> None:
        self.timeout = timeout
        self.record = record
        self.cgroup = cgroup
        self.scan = scan
        self.guardians: set[int] = set()
        self._grace = orphan_grace
        self._starting = trio.Lock()
        self._running: _Running | None = None
        self._earlier: list[_Running] = []
        self._spare: socket.socket | None = None
        self._pid = os.getpid()

    async def ask(self) -> socket.socket:
        """Ask for a guardian. Returns our end of its socket; if it is closed before it says hello, there is none.

        One is forked in advance, so that whoever asks need not wait for the fork.

        Raises:
            OSError: no descriptor or process is free for it.
        """
        try:
            running = await self.start()
            if self._spare is not None and is_closed(self._spare):  # it was killed meanwhile
                self.close(self._spare)
                self._spare = None
            control = self._spare if self._spare is not None else self._request(running)
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):  # it was killed; or stopped for long
            self._drop()
            control = self._request(await self.start())
        self._spare = None
        self._fork_in_advance()
        return control

    async def warm(self) -> str | None:
        """Start it, with a guardian, before somebody waits for them.

        Returns:
            Why this Python cannot run a guardian, found out by trying once; `None` if it can.
        """
        try:
            running = await self.start()
        except OSError:  # whoever asks will be told
            return None
        self._fork_in_advance()
        if sys.executable in _proved:
            return None
        if self._spare is not None:
            with trio.move_on_after(self.timeout):
                await trio.lowlevel.wait_readable(self._spare)
            if self._in_advance():
                _proved.add(sys.executable)
                return None
        with trio.move_on_after(ENDS_SOON):
            await running.ended()
        if running.popen.poll() is None:  # whoever asks will be told
            return None
        said = " ".join(running.complaints_text().split())
        return f"{sys.executable} cannot run a guardian: {said or 'it said nothing'}"

    def _fork_in_advance(self) -> None:
        try:
            if self._running is not None and self._spare is None:
                self._spare = self._request(self._running)
        except OSError:  # the next one who asks will be told, if it is still so
            return

    def _request(self, running: _Running) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            ours.setblocking(False)
            send(running.requests, marshal.dumps({"grace": self._grace}), [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    async def start(self) -> _Running:
        """Start it, unless it runs with what we are now: a zygote cannot change what it was forked with."""
        async with self._starting:
            running = self._running
            if running is not None and running.identity == _identity() and running.popen.poll() is None:
                return running
            self._drop()
            self._forget_ended()
            start = partial(_start, self.scan, self.cgroup)
            self._running = await trio.to_thread.run_sync(start, limiter=spawning())
            self.record.enter(ZYGOTE, [], [(self._running.popen.pid, self._running.start)])
            return self._running

    def limits(self) -> Limits:
        """The resource limits of the guardian that was asked for last: its zygote's."""
        return {} if self._running is None else self._running.limits

    def orphans(self) -> list[Process]:
        """What is alive below the zygote and below none of its guardians: a guardian that was killed has left it."""
        found: list[Process] = []
        guardians = self.guardians | self._in_advance()
        for running in (self._running, *self._earlier):
            if running is not None and running.popen.poll() is None:  # else its pid may be a stranger's
                found += [p for p in identity.descendants(running.popen.pid, without=guardians) if p.alive]
        return found

    def _in_advance(self) -> set[int]:
        """The guardian that has no tree yet: what it said is kept for the one that takes it."""
        try:
            hello = b"" if self._spare is None else self._spare.recv(4096, socket.MSG_PEEK)
        except OSError:  # it has said nothing yet; or it was killed
            hello = b""
        return {marshal.loads(hello)["pid"]} if hello else set()

    def close(self, sock: socket.socket) -> None:
        """Close our end. A process that our host forked may have it, too: then closing alone would tell nobody."""
        if os.getpid() == self._pid:  # but such a process must not end what is ours
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:  # the other end was faster
                    raise
        sock.close()

    def rouse(self) -> None:
        """If somebody has stopped it, it goes on."""
        for running in (self._running, *self._earlier):
            if running is not None:
                running.send(signal.SIGCONT)

    def give_up(self) -> None:
        """It has not answered. End it; the next request starts another."""
        if self._running is not None:
            log.warning("the forking helper (process %d) did not answer: ended", self._running.popen.pid)
            self._running.send(signal.SIGKILL)
        self._drop()

    async def aclose(self) -> None:
        """Wait until it has ended; at most twice `timeout`, then it is killed. Not cancellable."""
        self._drop()
        with trio.CancelScope(shield=True):
            for running in self._earlier:
                await running.end(self.timeout)
        self._earlier.clear()
        self.record.strike(ZYGOTE)

    def _forget_ended(self) -> None:
        for running in [each for each in self._earlier if each.popen.poll() is not None]:
            self._earlier.remove(running)
            running.tell_complaints()

    def _drop(self) -> None:
        """Ask nothing more of the one that runs: it ends when its guardians have."""
        if self._spare is not None:
            self.close(self._spare)
            self._spare = None
        if self._running is not None:
            self.close(self._running.requests)
            self._earlier.append(self._running)
            self._running = None


@final
class _Running:
    """A zygote that was started."""

    def __init__(self, popen: subprocess.Popen[bytes], requests: socket.socket, complaints: int) -> None:
        self.popen = popen
        self.requests = requests
        self.identity = _identity()
        self.limits: Limits = {**_limits(), resource.RLIMIT_CORE: None}  # nobody's is what children shall have
        self.complaints = complaints
        process = identity.read(popen.pid)
        self.start = process.start if process else -1

    def send(self, number: int) -> None:
        try:
            self.popen.send_signal(number)  # which polls first, so that the pid is still its own
        except PermissionError:  # we have become another user since
            log.warning("the forking helper (process %d) may not be signalled", self.popen.pid)

    def complaints_text(self) -> str:
        return os.pread(self.complaints, 1 << 16, 0).decode("utf-8", "replace").strip()

    async def end(self, timeout: float) -> None:
        for number in (None, signal.SIGCONT, signal.SIGKILL):
            if number is not None:
                self.send(number)
            with trio.move_on_after(timeout if number is None else 1.0):
                await self.ended()
                break
        else:
            log.error("the forking helper (process %d) does not end", self.popen.pid)
        self.popen.poll()
        self.tell_complaints()

    def tell_complaints(self) -> None:
        """What it has written to standard error is a bug of ours."""
        try:
            if text := self.complaints_text():
                log.error("the forking helper complained: %s", text)
        finally:
            os.close(self.complaints)

    async def ended(self) -> None:
        if self.popen.poll() is not None:
            return
        try:
            pidfd = os.pidfd_open(self.popen.pid)
        except OSError:  # no descriptor is free: nobody tells
            while self.popen.poll() is None:  # noqa: ASYNC110  # nobody tells
                await trio.sleep(0.02)
            return
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)


def _start(scan: bool, cgroup: Path | None) -> _Running:
    """Runs in a worker thread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline = complaints = -1
    try:
        ours.setblocking(False)
        lifeline = os.pidfd_open(os.getpid())
        complaints = os.memfd_create("supervise-complaints", os.MFD_CLOEXEC)
        # -I -S: no site, no user's PYTHON… variables, so that it starts fast and as we know it.
        how = "scan" if scan else "file"
        words = [sys.executable, "-I", "-S", PROGRAM, str(theirs.fileno()), str(lifeline), how]
        popen = subprocess.Popen(
            [*words, *([] if cgroup is None else [str(cgroup)])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            cwd="/",
            env={name: os.environ[name] for name in KEPT if name in os.environ},
            pass_fds=(theirs.fileno(), lifeline),
            start_new_session=True,
        )
        try:
            return _Running(popen, ours, complaints)
        except BaseException:  # that was the last descriptor
            popen.kill()
            popen.wait()
            raise
    except BaseException:
        ours.close()
        if complaints >= 0:
            os.close(complaints)
        raise
    finally:
        theirs.close()
        if lifeline >= 0:
            os.close(lifeline)


def is_closed(sock: socket.socket) -> bool:
    """Whether the other end is gone, whatever it has said before."""
    poll = select.poll()
    poll.register(sock, 0)  # asks for nothing, so that only a hangup is told
    return bool(poll.poll(0))


def send(sock: socket.socket, message: bytes, descriptors: Iterable[int] = ()) -> None:
    """One message, at once."""
    passed = array.array("i", descriptors)
    sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)] if passed else [])


def changed_limits(known: Limits) -> list[tuple[int, int, int]]:
    """Our resource limits that a guardian with these has to set for its children."""
    return [(number, *pair) for number, pair in _limits().items() if known.get(number) != pair]


def _limits() -> dict[int, tuple[int, int]]:
    """Our resource limits. No core dumps: they would hold keys, and be left behind.

    One byte is too little for a file, and is what stops a core_pattern that is a pipe (the kernel's do_coredump).
    """
    ours = {number: resource.getrlimit(number) for number in LIMITS}
    core = min(1, ours[resource.RLIMIT_CORE][1] % (1 << 64))  # where it is 0, nobody may raise it; -1 is no limit
    return ours | {resource.RLIMIT_CORE: (core, core)}


def _identity() -> tuple[Any, ...]:
    """What a zygote has from us for good: who and where we are, what we may do, and what no child of its may exceed."""
    with open("/proc/self/status", "rb", buffering=0) as file:
        rights = tuple(RIGHTS.findall(file.read()))
    spaces = tuple(os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES)
    hard = tuple(hard for _, hard in _limits().values())
    return (rights, spaces, os.readlink("/proc/self/root"), os.nice(0), hard)
