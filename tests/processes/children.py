"""A fake child program that misbehaves on demand: `python -I -S children.py <behaviour> [argument …]`.

Standard library only, and few imports, so that it starts quickly. Whatever it starts ends by itself after `LIFE`
seconds: an alarm, which survives exec, but neither fork nor being stopped; see `fork` and `guard`.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

LIFE = 60
BLOCK = 64 * 1024
NOT_UTF8 = b"caf\xe9 \xff\xfe\n\xc3"

BEHAVIOURS: dict[str, Callable[..., None]] = {}


def behaviour(function: Callable[..., None]) -> Callable[..., None]:
    BEHAVIOURS[function.__name__] = function
    return function


def block(number: int) -> bytes:
    """The block of this number out of the output of `print_bytes`: a numbered line and a long one."""
    return b"%015d\n" % number + b"x" * (BLOCK - 17) + b"\n"


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def put(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest) :]


def pause() -> NoReturn:
    while True:
        signal.pause()


def fork() -> int:
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIFE)
    return pid


def guard(pid: int) -> None:
    """End `pid` after `LIFE` seconds even if it is stopped."""
    target = os.pidfd_open(pid)
    if fork() == 0:
        signal.alarm(LIFE + 5)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if not select.select([target], [], [], LIFE)[0]:
            signal.pidfd_send_signal(target, signal.SIGKILL)
        os._exit(0)
    os.close(target)


def leave(then: Callable[[], None]) -> None:
    """Run `then` in a daemon: own session, and its parent is gone."""
    read, write = os.pipe()
    if (pid := fork()) == 0:
        os.setsid()
        parent = os.getpid()
        if fork() == 0:
            while os.getppid() == parent:
                time.sleep(0.001)
            os.write(write, b"x")
            os.close(read)
            os.close(write)
            then()
            os._exit(0)
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    os.read(read, 1)
    os.close(read)


def become(*argv: str) -> NoReturn:
    """Another behaviour, with an empty environment."""
    os.execve(sys.executable, [sys.executable, "-I", "-S", os.path.abspath(__file__), *argv], {})


def numbers(names: tuple[str, ...]) -> list[signal.Signals]:
    return [signal.Signals[name] for name in names]


# --- signals -----------------------------------------------------------------------------------------------


@behaviour
def wait() -> None:
    """Reads nothing, and does nothing about signals."""
    say("ready", os.getpid())
    pause()


@behaviour
def ignore(*names: str) -> None:
    for number in numbers(names):
        signal.signal(number, signal.SIG_IGN)
    say("ready", os.getpid())
    pause()


@behaviour
def stop_itself() -> None:
    guard(os.getpid())
    say("ready", os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
    pause()


@behaviour
def record(path: str, *names: str) -> None:
    """Write each signal that comes to the file, with its time; say it, too; go on."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def handle(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        os.write(file, f"{time.monotonic()} {name}\n".encode())
        say(name)

    for number in numbers(names):
        signal.signal(number, handle)
    say("ready", os.getpid())
    pause()


# --- trees -------------------------------------------------------------------------------------------------


@behaviour
def leader_exits() -> None:
    """Leaves one member in its group, and one in its session with a group of its own."""
    for name in ("in_group", "in_session"):
        if fork() == 0:
            if name == "in_session":
                os.setpgid(0, 0)
            say(name, os.getpid())
            os.close(1)
            os.close(2)
            pause()


@behaviour
def slow_member(path: str, seconds: str) -> None:
    """The leader ends at once; another member needs a while after SIGTERM, and then leaves `path`."""
    if fork() == 0:

        def clean_up(*_: object) -> None:
            time.sleep(float(seconds))
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
            os._exit(0)

        signal.signal(signal.SIGTERM, clean_up)
        say("member", os.getpid())
        pause()
    pause()


@behaviour
def daemons(count: str) -> None:
    """Starts daemons that ignore SIGTERM and SIGHUP, then waits."""

    def daemon() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        say("daemon", os.getpid())
        pause()

    for _ in range(int(count)):
        leave(daemon)
    pause()


@behaviour
def disguised(*names: str) -> None:
    """Children with empty environments that ignore SIGTERM, `in_session` or with their `own_session`; or `exit`."""
    for name in names:
        if name == "exit":
            return
        if fork() == 0:
            if name == "own_session":
                os.setsid()
            else:
                os.setpgid(0, 0)
            become("ignore", "SIGTERM", "SIGHUP")
    pause()


@behaviour
def hold_pipe(how: str) -> None:
    """Exits, and leaves somebody who holds its output: `here`, `escaped`, or `outside` of every tree."""

    def holder() -> None:
        say("holder", os.getpid())
        pause()

    if how == "here":
        if fork() == 0:
            holder()
    else:
        leave(holder if how == "escaped" else lambda: become("wait"))


@behaviour
def forks(how: str) -> None:
    """Never ends forking (at most 200 times, 10 s): a `chain` whose links live 20 ms each, or a `swarm`."""
    for number in numbers(("SIGTERM", "SIGINT", "SIGHUP")):
        signal.signal(number, signal.SIG_IGN)
    say("ready", os.getpid())
    end = time.monotonic() + 10
    for _ in range(200):
        if time.monotonic() > end:
            break
        if how == "chain":
            if fork():
                os._exit(0)
            os.setsid()
            time.sleep(0.02)
        else:
            if fork() == 0:
                os.setsid()
                pause()
            time.sleep(0.02)


@behaviour
def main_thread_exits(how: str) -> None:
    """Lives on in another thread, as the leader (`here`) or as a daemon (`escaped`)."""
    import ctypes
    import threading

    def live() -> None:
        state = b""
        while state != b"Z":
            with open(f"/proc/{os.getpid()}/stat", "rb") as file:
                state = file.read().rpartition(b") ")[2][:1]
        say("ready", os.getpid())
        time.sleep(LIFE)

    def exit_alone() -> None:
        threading.Thread(target=live).start()
        ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)  # exit, not exit_group

    if how == "here":
        exit_alone()
    leave(exit_alone)


# --- output and input --------------------------------------------------------------------------------------


@behaviour
def print_bytes(count: str) -> None:
    number, left = 0, int(count)
    while left:
        data = block(number)[:left]
        put(data)
        left -= len(data)
        number += 1


@behaviour
def print_forever() -> None:
    number = 0
    while True:
        put(block(number))
        number += 1


@behaviour
def unfinished_line() -> None:
    os.write(1, b"one\ntwo")
    os.write(2, b"three")


@behaviour
def not_utf8() -> None:
    os.write(1, NOT_UTF8)


@behaviour
def long_line(count: str) -> None:
    left = int(count)
    while left:
        left -= os.write(1, b"y" * min(left, BLOCK))
    put(b"\nafter\n")


@behaviour
def close_descriptors() -> None:
    say("ready", os.getpid())
    os.closerange(0, 1024)
    pause()


@behaviour
def report(*_: str) -> None:
    """What this process was given, as JSON."""
    import json

    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    listing = os.listdir("/proc/self/fd")
    result = {
        "pid": os.getpid(),
        "session": os.getsid(0),
        "group": os.getpgid(0),
        "blocked": int(status["SigBlk"], 16),
        "ignored": int(status["SigIgn"], 16),  # Python itself ignores SIGPIPE and SIGXFSZ
        "descriptors": sorted(int(name) for name in listing if os.path.exists(f"/proc/self/fd/{name}")),
        "cwd": os.getcwd(),
        "argv": sys.argv[2:],
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": os.getgroups(),
        "environment": dict(os.environ),
        "stdin": sys.stdin.buffer.read().decode(),
    }
    put(json.dumps(result).encode() + b"\n")


# --- ends --------------------------------------------------------------------------------------------------


@behaviour
def leave_with(code: str) -> None:
    os._exit(int(code))


@behaviour
def die(number: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if int(number) != signal.SIGKILL:
        signal.signal(int(number), signal.SIG_DFL)
    os.kill(os.getpid(), int(number))
    pause()


if __name__ == "__main__":
    signal.alarm(LIFE)
    BEHAVIOURS[sys.argv[1]](*sys.argv[2:])
