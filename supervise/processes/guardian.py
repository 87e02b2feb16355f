"""The guardian and its zygote: who owns a tree of processes when nobody else can.

Run as `python -I -S guardian.py REQUESTS LIFELINE file|scan [CGROUP]`: two descriptors, how children are found, and
the supervisor's cgroup. Standard library only; one thread, so it may fork.

The **zygote** is started once by a supervisor. For each tree it forks a **guardian**, the child subreaper (prctl(2))
of all that it starts: who loses its parent becomes the guardian's child, whatever it did to its session, group and
environment. So the tree is what hangs below the guardian, and it is empty when waitpid(2) says ECHILD. The zygote is
a subreaper, too: what a killed guardian leaves falls to it, and it kills each child of its own that is no guardian.

Both watch two lifelines: a socket whose other end the supervisor holds, and a pidfd of the supervisor, because a
process that its host forked would keep the socket open. When the supervisor is gone, a guardian ends its tree
(SIGTERM, a grace, SIGKILL until it is empty) and then itself; the zygote ends when it has no child left.

Messages are marshalled dicts on SOCK_SEQPACKET, with descriptors: with json's modules, each fork would be dearer.

    to the zygote      {"grace": seconds}   + the guardian's socket
    to a guardian      {"op": "spawn", "id", "cgroup": path | None}   + memfd that tells the program, and its streams
                       {"op": "signal", "number", "group": leader | None}
    from a guardian    {"op": "hello", "pid", "start"}, then {"op": "started", "id", "pid", "start"} for each program,
                       or {"op": "refused", "id", "errno", "stage"}: nothing is left of that attempt
                       {"op": "ended", "leaders": [(pid, code), …], "empty": so many spawns left nothing}   -9: SIGKILL
                       {"op": "signalled", "denied": [pid, …]}, one for each "signal"
"""

from __future__ import annotations

import array
import ctypes
import errno
import marshal
import os
import resource
import select
import signal
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes longer than all the rest
    from typing import Any, NoReturn

    Message = dict[str, Any]
LIBC = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter's lock, which a raw clone needs
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 4, 15, 36
SYS_CLONE3, CLONE_INTO_CGROUP = 435, 0x200000000
SETTABLE = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
FATAL = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGCONT}
SCAN, PARENT, START = False, 1, 19  # the fields of /proc/PID/stat are counted from the state on
NEVER, SHORT, LONG = 1e18, 0.02, 1.0  # seconds; the last two between rounds of SIGKILL that find nobody new


def clone_into(group: int) -> int:
    """fork(2) into a cgroup: 0.4 ms, where joining it takes 11. -1 where the kernel, or a filter, does not have it."""
    args = array.array("Q", [CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, group])
    address, size = ctypes.c_void_p(args.buffer_info()[0]), ctypes.c_size_t(8 * len(args))
    pid = int(LIBC.syscall(ctypes.c_long(SYS_CLONE3), address, size))
    if pid < 0 and ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.E2BIG):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))  # a fork would get round a limit, say
    return pid


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """One message and its descriptors; None when the other end is gone."""
    fds = array.array("i")
    try:
        # Descriptors come without close-on-exec unless asked for, see recvmsg(2).
        data, ancillary, flags, _ = sock.recvmsg(4096, socket.CMSG_SPACE(8 * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # the peer ended with a message of ours unread
        return None
    for _, _, payload in ancillary:
        fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return ({**marshal.loads(data), "truncated": bool(flags & socket.MSG_CTRUNC)}, list(fds)) if data else None


def fields(path: str) -> list[bytes]:
    """What a file in /proc holds, after the name of the program, which may hold anything."""
    try:
        with open(f"/proc/{path}", "rb", buffering=0) as file:
            return file.read().rpartition(b") ")[2].split()
    except OSError:  # its process has gone, or is hidden from us (hidepid), or no descriptor is free
        return []


def stat(pid: int | str, index: int) -> int:
    return int((fields(f"{pid}/stat") or [b"-1"] * 20)[index])


def offspring(pid: int) -> list[int]:
    if SCAN:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and stat(name, PARENT) == pid]
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [int(child) for thread in threads for child in fields(f"{pid}/task/{thread}/children")]


def exec_child(program: Message, streams: list[int], report: int, guardian: int, join: int | None) -> NoReturn:
    """The child, between fork and exec."""
    stage = "start"
    try:
        os.setsid()
        if join is not None:
            stage = "cgroup"
            os.write(os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=join), b"0")
        for target, fd in enumerate(streams):  # they are above the three standard streams, which we have ourselves
            os.dup2(fd, target)
        os.umask(program["umask"])
        stage = "limits"
        for number, soft, hard in program["limits"]:
            resource.setrlimit(number, (soft, hard))
        if program["user"] is not None:
            stage = "user"
            uid, gid, groups = program["user"]
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        os.chdir(program["cwd"])
        stage = "exec"
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # last, because setuid clears it
        if os.getppid() != guardian:  # it ended before that
            os.kill(os.getpid(), signal.SIGKILL)
        os.execve(program["path"], program["argv"], program["env"])  # noqa: S606  # a shell is what nobody wants here
    except BaseException as error:  # a ValueError, say, of a limit that makes no sense
        os.write(report, marshal.dumps({"errno": getattr(error, "errno", errno.EINVAL), "stage": stage}))
    finally:
        os._exit(127)


def fork_child(
    program: Message, streams: list[int], group: int | None, lifelines: list[int]
) -> tuple[int, Message | None]:
    """Fork and exec. Returns the pid, and what went wrong (errno, stage), if it did: then nothing is left."""
    guardian, join = os.getpid(), None
    read, write = os.pipe2(os.O_CLOEXEC)
    with open(read, "rb", buffering=0) as report:
        try:
            pid = os.fork() if group is None else clone_into(group)
            if pid < 0:
                join, pid = group, os.fork()
            if pid == 0:
                exec_child(program, streams, write, guardian, join)
        finally:
            os.close(write)
        poll = select.poll()  # the report ends with the exec; but that may hang on a file system, or be stopped
        for fd in (read, *lifelines):
            poll.register(fd, select.POLLIN if fd != lifelines[0] else 0)  # of the socket, a hangup alone
        text = report.read() if read in {fd for fd, _ in poll.poll()} else b""
    if text:  # it ends by itself, unless somebody has stopped it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return pid, marshal.loads(text) if text else None


class Keeper:
    """What guardian and zygote are: reaps, listens, kills in rounds; ends when supervisor and children are gone."""

    def __init__(self, sock: socket.socket, lifeline: int, cgroup: str | None) -> None:
        self.sock, self.lifeline, self.cgroup = sock, lifeline, cgroup
        self.alone = self.more = self.hunting = False  # without supervisor; with more to reap; after a guardian died
        self.group: int | None = None
        self.kill_file: int | None = None
        self.kill_at, self.pause = NEVER, SHORT
        self.forked = set[int]()  # by ourselves: leaders, or guardians
        self.struck, self.denied, self.exits = set[int](), set[int](), list[tuple[int, int]]()
        if LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
            raise OSError(ctypes.get_errno(), "this kernel has no child subreapers")
        LIBC.prctl(PR_SET_DUMPABLE, 0)  # environments pass through here: not to be read
        LIBC.prctl(PR_SET_NAME, f"sv-{type(self).__name__.lower()}".encode())
        self.wakeup, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        # Open from the start, so that no descriptor need be free to end them.
        self.children = os.open("/dev/null" if SCAN else f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY)

    def run(self) -> None:
        while not (self.reap() and self.alone):
            if time.monotonic() >= self.kill_at:
                self.kill()
            ready = self.wait()
            message = receive(self.sock) if self.sock.fileno() in ready else ({}, None)
            if self.lifeline in ready or message is None:
                self.alone = True
                if not self.reap():
                    self.be_alone()
            elif message[1] is not None:
                try:
                    self.obey(*message)
                finally:
                    for fd in message[1]:
                        os.close(fd)
        for _ in range(0 if self.cgroup is None else 200):  # it is busy for a moment after the end of its last process
            try:
                os.rmdir(str(self.cgroup))
                break
            except OSError:
                time.sleep(0.005)

    def wait(self) -> set[int]:
        poll = select.poll()
        for fd in [self.wakeup] if self.alone else [self.wakeup, self.sock.fileno(), self.lifeline]:
            poll.register(fd, select.POLLIN)
        seconds = 0 if self.more else min(1e5, max(0, self.kill_at - time.monotonic()))
        ready = {fd for fd, _ in poll.poll(seconds * 1000)}
        if self.wakeup in ready:
            os.read(self.wakeup, 4096)
        return ready

    def reap(self) -> bool:
        """Take in who has ended, but not for ever where that is as fast as we are. Returns whether no child is left."""
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                self.kill_at, self.pause, self.more = NEVER, SHORT, False
                return True
            self.more = pid != 0
            if not self.more:
                break
            if os.WIFSTOPPED(status):
                if isinstance(self, Zygote) and pid in self.forked:  # a guardian goes on, or it would never end
                    os.kill(pid, signal.SIGCONT)
            elif pid in self.forked:
                self.forked.discard(pid)
                self.exits.append((pid, os.waitstatus_to_exitcode(status)))
        return False

    def own(self) -> list[int]:
        """Children that shall end. What is below them becomes ours when they do."""
        text = b""
        while chunk := os.pread(self.children, 1 << 16, len(text)):
            text += chunk
        return offspring(os.getpid()) if SCAN else [int(pid) for pid in text.split()]

    def kill(self) -> None:
        """One round of SIGKILL, at once again while there is progress: to win against who forks as fast as it can."""
        if self.kill_file is not None:
            os.write(self.kill_file, b"1")
        own = self.own()
        self.send_own(own[:100] + own[100:][-500:], signal.SIGKILL)  # of a thousand and more, most are zombies
        new = not self.struck.issuperset(own)
        if not new:  # who is left sleeps in the kernel, or is not ours to end: but what is below it may be
            self.send_below(own, signal.SIGKILL, set())
        self.struck = set(own)
        self.pause = SHORT if new else min(LONG, self.pause * 1.5)
        self.kill_at = time.monotonic() + (0 if new else self.pause)

    def send_own(self, pids: list[int], number: int, kill: Any = os.kill) -> None:
        """Signal children, the newest first, as it forks next. No number is a stranger's before we have reaped."""
        groups = {os.getpgrp()}
        for pid in reversed(pids):
            try:
                if number == signal.SIGKILL and (group := os.getpgid(pid)) not in groups:
                    groups.add(group)
                    os.killpg(group, number)  # all at once: no fork can slip through
                kill(pid, number)
                if number != signal.SIGKILL:
                    kill(pid, signal.SIGCONT)  # a stopped process holds a SIGTERM pending
            except OSError:  # it became another user's, and is neither hurried nor forgotten
                self.denied.add(pid)

    def send_below(self, own: list[int], number: int, told: set[int]) -> None:
        """Signal who is below these, as far as can be read in a second, but for whom was told."""
        found, until = list(own), time.monotonic() + LONG
        for pid in found:  # which grows meanwhile
            found += offspring(pid) if time.monotonic() < until else []
        for pid in set(found) - set(own) - told:
            told.add(pid)
            try:
                pidfd = os.pidfd_open(pid)
                try:
                    # Its parent may have reaped it since it was found, and the number gone to a stranger.
                    if stat(pid, PARENT) in {os.getpid(), *found}:
                        signal.pidfd_send_signal(pidfd, number)
                        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                finally:
                    os.close(pidfd)
            except OSError as error:
                if error.errno == errno.EPERM:
                    self.denied.add(pid)

    def obey(self, message: Message, fds: list[int]) -> None: ...
    def be_alone(self) -> None: ...


class Guardian(Keeper):
    """Owns one tree."""

    def __init__(self, sock: socket.socket, lifeline: int, request: Message) -> None:
        super().__init__(sock, lifeline, None)
        self.grace, self.spawned, self.told_empty = request["grace"], 0, 0
        self.say(op="hello", pid=os.getpid(), start=stat("self", START))

    def say(self, **message: object) -> None:
        try:
            self.sock.send(marshal.dumps(message))
        except OSError:  # the supervisor is gone: the lifelines tell, too
            pass

    def be_alone(self) -> None:
        self.kill_at = min(self.kill_at, time.monotonic() + self.grace)
        self.signal_all(signal.SIGTERM)

    def obey(self, message: Message, fds: list[int]) -> None:
        if message["op"] == "signal":
            number, group = message["number"], message["group"]
            if group is None and number == signal.SIGKILL:
                self.kill_at, self.pause = 0, SHORT
            elif group is None:
                self.signal_all(number)
            elif group in self.forked:  # not reaped yet, so that the group is nobody else's
                self.send_own([group], number, os.killpg)
            self.say(op="signalled", denied=list(self.denied))
            return
        self.kill_at = NEVER
        problem: Message | None = {"errno": errno.EMFILE, "stage": "start"}
        try:
            if message["cgroup"] is not None and self.cgroup is None:
                self.group = os.open(message["cgroup"], os.O_RDONLY)
                self.kill_file = os.open("cgroup.kill", os.O_WRONLY, dir_fd=self.group)
                self.cgroup = message["cgroup"]
            if len(fds) == 4 and not message["truncated"]:  # else no descriptor was free for all
                program = marshal.loads(os.pread(fds[0], os.fstat(fds[0]).st_size, 0))
                pid, problem = fork_child(program, fds[1:], self.group, [self.sock.fileno(), self.lifeline])
        except OSError as error:
            problem = {"errno": error.errno, "stage": "fork"}
        if problem is None:
            self.forked.add(pid)
            self.spawned += 1
            self.say(op="started", id=message["id"], pid=pid, start=stat(pid, START))
        else:
            self.say(op="refused", id=message["id"], **problem)

    def signal_all(self, number: int) -> None:
        told, grew, until = set[int](), True, time.monotonic() + LONG  # it may grow faster than we can tell it
        while grew and time.monotonic() < until:  # a file of children that is read while some end may miss others
            self.reap()
            own, before = self.own(), len(told)
            self.send_own([pid for pid in own if pid not in told], number)
            told.update(own)
            self.send_below(own, number, told)
            grew = len(told) > before

    def reap(self) -> bool:
        empty = super().reap()
        if self.exits or (empty and self.told_empty != self.spawned):
            self.told_empty = self.spawned if empty else self.told_empty
            self.say(op="ended", leaders=self.exits, empty=self.told_empty)
            self.exits.clear()
        return empty


class Zygote(Keeper):
    """Forks guardians, and ends what a killed one leaves."""

    def own(self) -> list[int]:
        return [pid for pid in super().own() if pid not in self.forked]

    def reap(self) -> bool:
        empty = super().reap()
        self.hunting |= any(code != 0 for _, code in self.exits)  # of those who end well, nobody is left
        self.exits.clear()
        if not self.hunting or not self.own():
            self.hunting, self.kill_at, self.pause = False, NEVER, SHORT
        elif self.kill_at == NEVER:
            self.kill_at = 0
        return empty

    def obey(self, message: Message, fds: list[int]) -> None:
        try:
            pid = os.fork() if fds else -1
        except OSError:  # nothing is free: the supervisor sees its end closed
            pid = -1
        if pid > 0:
            self.forked.add(pid)
        if pid != 0:
            return
        try:
            os.setsid()
            control = socket.socket(fileno=os.dup(fds[0]))
            for fd in (*fds, self.sock.fileno(), self.children, self.wakeup, signal.set_wakeup_fd(-1)):
                os.close(fd)
            Guardian(control, self.lifeline, message).run()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)


if __name__ == "__main__":
    requests, lifeline, SCAN = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "scan"
    for each in (requests, lifeline):
        os.set_inheritable(each, False)
    for number in SETTABLE:  # not SIG_IGN: exec would keep it, and resetting them all takes longer than a fork
        signal.signal(number, signal.SIG_DFL if number in FATAL else lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    Zygote(socket.socket(fileno=requests), lifeline, sys.argv[4] if len(sys.argv) > 4 else None).run()
