"""The guardian and its zygote: who owns a tree of processes when nobody else can.

Run as `python -I -S guardian.py REQUESTS LIFELINE LOOK [CGROUP]`: two descriptors, how to find children ("file", or
"scan" where the kernel has no such file), the supervisor's cgroup. Standard library only; one thread, so it may fork.

The **zygote** is started once by a supervisor. For each tree it forks a **guardian**, the child subreaper (prctl(2))
of all that it starts: who loses its parent becomes the guardian's child, whatever it did to its session, group and
environment. So the tree is what hangs below the guardian, and it is empty when waitpid(2) says ECHILD. The zygote is
a subreaper, too: what a killed guardian leaves falls to it, and it kills each child of its own that is no guardian.

Both watch two lifelines: a socket whose other end the supervisor holds, and a pidfd of the supervisor, because a
process that its host forked would keep the socket open. When the supervisor is gone, a guardian ends its tree
(SIGTERM, a grace, SIGKILL until it is empty) and then itself; the zygote ends when it has no child left.

Messages are datagrams of JSON on SOCK_SEQPACKET sockets, with descriptors beside them.

    to the zygote      {"grace": seconds, "cgroup": path | null}   + the guardian's socket
    to a guardian      {"op": "spawn", "id"}   + memfd that tells the program, stdin, stdout, stderr
                       {"op": "signal", "number", "group": leader | null}
    from a guardian    {"op": "hello", "pid", "start"}
                       {"op": "started", "id", "pid", "start"}
                       {"op": "refused", "id", "errno", "stage"}      nothing is left of that attempt
                       {"op": "exited", "pid", "code"}                a leader, as soon as it has ended; -9 is SIGKILL
                       {"op": "signalled", "denied": [pid, …]}        one for each "signal"
                       {"op": "empty", "spawned"}                     ECHILD; so many were started by then
"""

from __future__ import annotations

import array
import ctypes
import errno
import json
import math
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
    Fds = array.array[int]
LIBC = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter's lock, which a raw clone needs
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 4, 15, 36
SYS_CLONE3, CLONE_INTO_CGROUP = 435, 0x200000000

SETTABLE = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
# Whatever else a terminal, an orphaned group or a careless kill sends is ignored.
HEARD = {signal.SIGCHLD, signal.SIGCONT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
SCAN = False
SHORT, LONG = 0.02, 1.0  # seconds between rounds of SIGKILL that find nobody new: they grow from one to the other


def prctl(option: int, value: int | bytes) -> None:
    if LIBC.prctl(option, value if isinstance(value, bytes) else ctypes.c_ulong(value)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def clone_into(group: int) -> int:
    """fork(2), but the child starts inside the cgroup: 0.4 ms, where joining it takes 11. -1 if that fails."""
    args = array.array("Q", [CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, group])
    address = ctypes.c_void_p(args.buffer_info()[0])
    return int(LIBC.syscall(ctypes.c_long(SYS_CLONE3), address, ctypes.c_size_t(8 * len(args))))


def receive(sock: socket.socket) -> tuple[Message, Fds] | None:
    """One message and its descriptors; None when the other end is gone."""
    fds = array.array("i")
    try:
        # Descriptors come without close-on-exec unless asked for, see recvmsg(2).
        data, ancillary, flags, _ = sock.recvmsg(65536, socket.CMSG_SPACE(8 * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # the peer ended with a message of ours unread
        return None
    for _, _, payload in ancillary:
        fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return ({**json.loads(data), "truncated": bool(flags & socket.MSG_CTRUNC)}, fds) if data else None


def fields(path: str) -> list[bytes]:
    """What a file in /proc holds, after the name of the program, which may hold anything."""
    try:
        with open(f"/proc/{path}", "rb", buffering=0) as file:
            return file.read(1 << 20).rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # a read says ESRCH when its process has gone
        return []


def parent(pid: int | str) -> int:
    return int((fields(f"{pid}/stat") or [b"", b"0"])[1])


def everybody() -> dict[int, list[int]] | None:
    """Who is whose child, for kernels without the file that `offspring` reads. Slower, and sooner outdated."""
    found: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc") if SCAN else []):
        found.setdefault(parent(name), []).append(int(name))
    return found if SCAN else None


def offspring(pid: int, known: dict[int, list[int]] | None) -> list[int]:
    if known is not None:
        return known.get(pid, [])
    try:  # it may end meanwhile: its children are somebody else's then, and the next look finds them
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for thread in threads for child in fields(f"{pid}/task/{thread}/children")]


def remove_group(path: str, patience: float = 1.0) -> None:
    try:
        os.rmdir(path)
    except OSError as error:
        if error.errno == errno.EBUSY and patience > 0:  # for a moment after the end of its last process
            time.sleep(0.005)
            remove_group(path, patience - 0.005)


def exec_child(program: Message, streams: Fds, report: int, guardian: int, join: int | None) -> NoReturn:
    """The child, between fork and exec."""
    stage = "start"
    try:
        os.setsid()
        for number in SETTABLE:
            signal.signal(number, signal.SIG_DFL)
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
        stage = "cwd"
        # Bytes travel as the text of the same code points: JSON has none, and the file system's encoding may differ.
        path, cwd, *argv = (text.encode("latin-1") for text in (program["path"], program["cwd"], *program["argv"]))
        env = {name.encode("latin-1"): text.encode("latin-1") for name, text in program["env"].items()}
        os.chdir(cwd)
        stage = "exec"
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # last, because setuid clears it
        if os.getppid() != guardian:  # it ended before that
            os.kill(os.getpid(), signal.SIGKILL)
        os.execve(path, argv, env)  # noqa: S606  # a shell is what nobody wants here
    except BaseException as error:  # a ValueError, say, of a limit that makes no sense
        os.write(report, json.dumps({"errno": getattr(error, "errno", errno.EINVAL), "stage": stage}).encode())
    finally:
        os._exit(127)


def fork_child(program: Message, streams: Fds, group: int | None) -> tuple[int, Message | None]:
    """Fork and exec. Returns the pid, and what went wrong (errno, stage), if it did."""
    guardian, join = os.getpid(), None
    read, write = os.pipe2(os.O_CLOEXEC)
    with open(read, "rb", buffering=0) as report:
        try:
            pid = -1 if group is None else clone_into(group)
            if pid < 0:  # or an older kernel, or a seccomp filter
                join, pid = group, os.fork()
            if pid == 0:
                exec_child(program, streams, write, guardian, join)
        except OSError as error:
            return 0, {"errno": error.errno, "stage": "fork"}
        finally:
            os.close(write)
        text = report.read()  # ends with the exec, as no other process has the other end
    if not text:
        return pid, None
    os.waitpid(pid, 0)
    return 0, json.loads(text)


class Keeper:
    """What guardian and zygote are: reaps, listens, kills in rounds; ends when supervisor and children are gone."""

    def __init__(self, sock: socket.socket, lifeline: int, cgroup: str | None) -> None:
        self.sock, self.lifeline, self.cgroup = sock, lifeline, cgroup
        self.alone = False  # the supervisor is gone
        self.kill_at, self.pause = math.inf, SHORT
        self.forked: set[int] = set()  # by ourselves: leaders, or guardians
        self.struck: set[int] = set()
        self.denied: set[int] = set()
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        prctl(PR_SET_DUMPABLE, 0)  # environments pass through here: not to be read
        prctl(PR_SET_NAME, f"sv-{type(self).__name__.lower()}".encode())
        for number in SETTABLE - HEARD:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.wakeup, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def run(self) -> None:
        while not (self.reap() and self.alone):
            if time.monotonic() >= self.kill_at:
                self.kill()
            ready = self.wait()
            if self.alone:
                continue
            message = receive(self.sock) if self.sock.fileno() in ready else ({}, None)
            if self.lifeline in ready or message is None:
                self.alone = True
                self.be_alone()
            elif message[1] is not None:
                try:
                    self.obey(*message)
                finally:
                    for fd in message[1]:
                        os.close(fd)
        if self.cgroup is not None:
            remove_group(self.cgroup)

    def wait(self) -> set[int]:
        poll = select.poll()
        for fd in [self.wakeup] if self.alone else [self.wakeup, self.sock.fileno(), self.lifeline]:
            poll.register(fd, select.POLLIN)
        seconds = self.kill_at - time.monotonic()
        ready = {fd for fd, _ in poll.poll(None if seconds == math.inf else max(0, seconds * 1000))}
        if self.wakeup in ready:
            os.read(self.wakeup, 4096)
        return ready

    def reap(self) -> bool:
        """Take in whoever has ended. Returns whether no child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.kill_at, self.pause = math.inf, SHORT
                return True
            if pid == 0:
                return False
            if pid in self.forked:
                self.forked.discard(pid)
                self.ended(pid, os.waitstatus_to_exitcode(status))

    def kill(self) -> None:
        """One round of SIGKILL: who forks meanwhile is found by the next one."""
        found, new = self.victims(), False
        for pid in found:
            new |= self.send(pid, signal.SIGKILL, {os.getpid(), *found}) and pid not in self.struck
        self.struck = set(found)
        # At once again while there is progress. Who is left sleeps in the kernel, or is not ours to end.
        self.pause = SHORT if new else min(LONG, self.pause * 1.5)
        self.kill_at = time.monotonic() + (0 if new else self.pause)

    def send(self, pid: int, number: int, family: set[int]) -> bool:
        """Signal one process of the tree. Returns whether it was."""
        try:
            pidfd = os.pidfd_open(pid)
            try:
                # Its parent may have reaped it since it was found, and the number gone to a stranger.
                if parent(pid) not in family:
                    return False
                signal.pidfd_send_signal(pidfd, number)
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)  # a stopped process holds a SIGTERM pending
            finally:
                os.close(pidfd)
        except OSError as error:  # it has ended; or it became another user's, and is neither hurried nor forgotten
            if error.errno == errno.EPERM:
                self.denied.add(pid)
            return False
        return True

    def obey(self, message: Message, fds: Fds) -> None: ...
    def be_alone(self) -> None: ...
    def ended(self, pid: int, code: int) -> None: ...
    def victims(self) -> list[int]:
        return []


class Guardian(Keeper):
    """Owns one tree."""

    def __init__(self, sock: socket.socket, lifeline: int, request: Message) -> None:
        super().__init__(sock, lifeline, request["cgroup"])
        self.group = None if self.cgroup is None else os.open(self.cgroup, os.O_RDONLY | os.O_CLOEXEC)
        self.grace, self.spawned, self.told_empty = request["grace"], 0, 0
        self.say(op="hello", pid=os.getpid(), start=int(fields("self/stat")[19]))

    def say(self, **message: object) -> None:
        try:
            self.sock.send(json.dumps(message).encode())
        except OSError:  # the supervisor is gone: the lifelines tell, too
            pass

    def victims(self) -> list[int]:
        known = everybody()
        found = list(offspring(os.getpid(), known))
        for pid in found:  # which grows meanwhile
            found += offspring(pid, known)
        return found

    def be_alone(self) -> None:
        self.kill_at = min(self.kill_at, time.monotonic() + self.grace)
        self.signal_all(signal.SIGTERM)

    def obey(self, message: Message, fds: Fds) -> None:
        if message["op"] == "signal":
            self.signal(message["number"], message["group"])
            self.say(op="signalled", denied=list(self.denied))
            return
        self.kill_at = math.inf
        problem: Message | None = {"errno": errno.EMFILE, "stage": "start"}
        if len(fds) == 4 and not message["truncated"]:  # else no descriptor was free for all
            program = json.loads(os.pread(fds[0], os.fstat(fds[0]).st_size, 0))
            pid, problem = fork_child(program, fds[1:], self.group)
        if problem is None:
            self.forked.add(pid)
            self.spawned += 1
            self.say(op="started", id=message["id"], pid=pid, start=int(fields(f"{pid}/stat")[19]))
        else:
            self.say(op="refused", id=message["id"], **problem)

    def signal(self, number: int, group: int | None) -> None:
        if number == signal.SIGKILL:
            self.kill_at, self.pause = 0, SHORT
        elif group is None:
            self.signal_all(number)
        elif group in self.forked:  # it is not reaped yet, so that the group is nobody else's
            try:
                os.killpg(group, number)
            except OSError:  # PermissionError
                self.denied.add(group)

    def signal_all(self, number: int) -> None:
        told: set[int] = set()
        for _ in range(16):  # a file of children that is read while some end may miss others: look again
            found = self.victims()
            if told.issuperset(found):
                return
            for pid in set(found) - told:
                self.send(pid, number, {os.getpid(), *found})
            told.update(found)

    def ended(self, pid: int, code: int) -> None:
        self.say(op="exited", pid=pid, code=code)

    def reap(self) -> bool:
        empty = super().reap()
        if empty and self.told_empty != self.spawned:
            self.told_empty = self.spawned
            self.say(op="empty", spawned=self.spawned)
        return empty


class Zygote(Keeper):
    """Forks guardians, and ends what a killed one leaves."""

    def victims(self) -> list[int]:
        return [pid for pid in offspring(os.getpid(), everybody()) if pid not in self.forked]

    def reap(self) -> bool:
        empty = super().reap()
        if not self.victims():
            self.kill_at, self.pause = math.inf, SHORT
        elif self.kill_at == math.inf:
            self.kill_at = 0
        return empty

    def obey(self, message: Message, fds: Fds) -> None:
        try:
            control = socket.socket(fileno=os.dup(fds[0]))
            pid = os.fork()
        except (IndexError, OSError):  # nothing is free: the supervisor sees its end closed
            return
        if pid > 0:
            control.close()
            self.forked.add(pid)
            return
        try:
            os.setsid()
            for fd in (*fds, self.sock.fileno(), self.wakeup, signal.set_wakeup_fd(-1)):
                os.close(fd)
            Guardian(control, self.lifeline, message).run()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)


if __name__ == "__main__":
    requests, lifeline, SCAN = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "scan"
    for each in (requests, lifeline):
        os.set_inheritable(each, False)
    Zygote(socket.socket(fileno=requests), lifeline, sys.argv[4] if len(sys.argv) > 4 else None).run()
