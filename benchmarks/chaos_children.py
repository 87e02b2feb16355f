"""Programs that do their worst: `python -I -S chaos_children.py TOKEN DIRECTORY ROLE PLAN [argument …]`.

Role `agent` is an agent's program, `cidx` an indexer with cidx's command line, `child` one that was executed anew. The
plan is JSON; see `Agent` and `Cidx` below. Standard library only.

Every process writes "PID START ROLE" to DIRECTORY/announced before it misbehaves, and anew after each fork. TOKEN is in
its arguments, which neither an empty environment nor a new session takes away. And it shares a flock(2) on
DIRECTORY/lock, which forks and executed programs inherit, for as long as it does not close its descriptors.

Whatever is started here ends by itself after `LIFE` seconds, unless it is stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

LIFE = 40
#: Bytes of announcements after which nobody forks any more, should all else fail: 15,000 forks.
ENOUGH = 300_000
READY = "Watchdog observer started monitoring: here"
RESULT = '{"type":"result","subtype":"success","is_error":false,"result":"done","num_turns":1}'
IGNORED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

#: What a child does, in this order, which is the worst: what must come before an exec does.
FLAGS = (
    "late",  # waits a little first: it may be in the middle of it when somebody is killed
    "sibling",  # clone(2) with CLONE_PARENT: its parent is that of its maker
    "setsid",
    "daemon",  # forks twice, and the parents exit
    "subreaper",
    "chdir",
    "ignore",
    "noenv",  # executes itself anew with an empty environment and another name
    "rename",
    "close",  # all descriptors; others hold the pipes of the tree
    "breed",  # on SIGTERM it forks two that are deaf to it
    "brood",  # forks every 20 ms
    "hop",  # forks and exits every 4 ms: a new pid each time
    "hop_exec",  # the same, and executes itself
    "headless",  # the main thread exits, another one lives on
    "foreign",  # executes a program that has no token in its arguments
    "traced",  # asks its parent to trace it, and stops
    "stop",  # SIGSTOP to itself
)
#: Nothing that comes after one of them is ever done.
LAST = ("brood", "hop", "hop_exec", "headless", "foreign", "traced", "stop")


def announce(role: str) -> None:
    with open("/proc/self/stat", "rb", buffering=0) as file:
        start = file.read().rpartition(b") ")[2].split()[19].decode()
    log = os.open(f"{DIRECTORY}/announced", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.write(log, f"{os.getpid()} {start} {role}\n".encode())
    os.close(log)


def hold_lock() -> None:
    """A shared lock that lives as long as any process that has inherited this descriptor."""
    lock = os.open(f"{DIRECTORY}/lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    os.set_inheritable(lock, True)


def is_enough() -> bool:
    """Whether the referee has counted, and wants hoppers to end."""
    return os.path.exists(f"{DIRECTORY}/enough")


def fork(role: str = "child") -> int:
    if os.path.getsize(f"{DIRECTORY}/announced") > ENOUGH:
        os._exit(1)
    pid = os.fork()
    if pid == 0:
        announce(role)
        signal.alarm(LIFE)
    return pid


def linger() -> NoReturn:
    while True:
        signal.pause()


def again(flags: list[str]) -> NoReturn:
    """Another program with nothing in its environment, and a name that says nothing."""
    words = ["[kworker/0:1]", "-I", "-S", os.path.abspath(__file__), TOKEN, DIRECTORY, "child", json.dumps(flags)]
    os.execve(os.readlink("/proc/self/exe"), words, {})


def prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value))


# --- one flag each -----------------------------------------------------------------------------------------


def late(_: list[str]) -> None:
    time.sleep(os.getpid() % 16 / 50)


def sibling(_: list[str]) -> None:
    import ctypes

    number, clone_parent = {"x86_64": 56, "aarch64": 220}[os.uname().machine], 0x8000
    if ctypes.PyDLL(None).syscall(number, ctypes.c_ulong(clone_parent | signal.SIGCHLD), None, None, None, None):
        os._exit(0)
    announce("child")
    signal.alarm(LIFE)


def setsid(_: list[str]) -> None:
    if os.getpgid(0) != os.getpid():
        os.setsid()


def daemon(rest: list[str]) -> None:
    for _ in range(2):
        if fork():
            os._exit(0)


def subreaper(rest: list[str]) -> None:
    prctl(36, 1)
    for _ in range(2):
        if fork() == 0:
            if fork() == 0:
                linger()
            os._exit(0)


def chdir(_: list[str]) -> None:
    os.chdir("/")


def ignore(_: list[str]) -> None:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def noenv(rest: list[str]) -> None:
    again(rest)


def rename(_: list[str]) -> None:
    with open("/proc/self/comm", "w") as file:
        file.write("sv-guardian)")  # its rival's name, and a parenthesis for whoever reads stat


def close(_: list[str]) -> None:
    os.closerange(0, 1024)


def breed(_: list[str]) -> None:
    def on_term(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # before the fork: else they would breed, too, and so on without end
        for _ in range(2):
            if fork() == 0:
                os.setsid()
                linger()
        signal.signal(number, on_term)

    signal.signal(signal.SIGTERM, on_term)


def brood(rest: list[str]) -> None:
    for _ in range(30):
        if fork() == 0:
            os.setsid()
            linger()
        time.sleep(0.02)


def hop(_: list[str]) -> None:
    end = time.monotonic() + LIFE
    while time.monotonic() < end and not is_enough():
        time.sleep(0.004)
        if fork():
            os._exit(0)


def hop_exec(_: list[str]) -> None:
    time.sleep(0.05)
    if fork() or is_enough():
        os._exit(0)
    again(["hop_exec"])


def headless(_: list[str]) -> None:
    import ctypes
    import threading

    threading.Thread(target=time.sleep, args=(LIFE,)).start()
    ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)  # exit, not exit_group


def foreign(_: list[str]) -> None:
    os.execve("/bin/sleep", ["sleep", str(LIFE)], {})


def traced(_: list[str]) -> None:
    import ctypes

    ctypes.CDLL(None).ptrace(0, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)


def stop(_: list[str]) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


ACTIONS: dict[str, Callable[[list[str]], None]] = {name: globals()[name] for name in FLAGS}


def behave(flags: list[str]) -> NoReturn:
    rest = [name for name in FLAGS if name in flags]
    while rest:
        ACTIONS[rest.pop(0)](rest)
    linger()


def start_all(children: list[list[str]]) -> None:
    for flags in children:
        if fork() == 0:
            try:
                behave(flags)
            finally:
                os._exit(1)


# --- the leaders -------------------------------------------------------------------------------------------


def agent(plan: dict[str, Any]) -> None:
    """`children`: what each does; `leader`: what this one does; `life`: ends by itself after so many seconds."""
    start_all(plan["children"])
    os.write(1, b'{"type":"system","subtype":"init","session_id":"s"}\n')
    for name in plan["leader"]:
        ACTIONS[name]([])
    if plan["life"] is None:
        linger()
    time.sleep(plan["life"])
    os.write(1, RESULT.encode() + b"\n")
    os._exit(0)


def cidx(plan: dict[str, Any], command: str) -> None:
    """`children`, `leader`: as above, for `watch`. The other commands do nothing, as without daemon mode."""
    if command != "watch":
        os._exit(int(command == "start"))
    start_all(plan["children"])
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(0))
    os.write(1, READY.encode() + b"\n")
    for name in plan["leader"]:
        ACTIONS[name]([])
    linger()


if __name__ == "__main__":
    TOKEN, DIRECTORY, ROLE, PLAN = sys.argv[1:5]
    signal.alarm(LIFE)
    announce(ROLE if ROLE != "cidx" else sys.argv[5])
    if ROLE == "child":
        behave(json.loads(PLAN))
    hold_lock()
    if ROLE == "agent":
        agent(json.loads(PLAN))
    cidx(json.loads(PLAN), sys.argv[5])
