"""A fake agent CLI that does what its plan says, in the words of stream-json: `fake_claude.py PLAN … arguments`.

The plan is JSON: {"record": FILE, "steps": [[OPERATION, argument …], …]}; the operations are the functions marked
`@operation`. After the last step it exits with 0. Standard library only; the test's side is `FakeClaude`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

#: Ends by itself after so many seconds, and so does whatever it starts, should a test forget it.
LIFE = 60

RESULT: dict[str, Any] = {
    "type": "result",
    "subtype": "success",
    "is_error": False,
    "duration_ms": 1200,
    "duration_api_ms": 1000,
    "num_turns": 2,
    "result": "all done",
    "session_id": "5e551011-0000-4000-8000-000000000001",
    "total_cost_usd": 0.0123,
    "usage": {
        "input_tokens": 10,
        "output_tokens": 20,
        "cache_read_input_tokens": 30,
        "cache_creation_input_tokens": 40,
    },
    "modelUsage": {},
    "permission_denials": [],
    "terminal_reason": "completed",
}

OPERATIONS: dict[str, Callable[..., None]] = {}


class FakeClaude:
    """The plan of a fake agent, in the test. Give it the record of a `FakeCidx` to see both in one order."""

    def __init__(self, directory: Any, *steps: list[Any], record: str | None = None) -> None:
        self.plan_file = os.path.join(directory, "claude-plan.json")
        self.record_file = record or os.path.join(directory, "record.jsonl")
        self.command = (sys.executable, "-I", "-S", os.path.abspath(__file__), self.plan_file)
        self.plan(*steps)

    def plan(self, *steps: list[Any]) -> None:
        """Lay down what the next run does."""
        with open(self.plan_file, "w") as file:
            json.dump({"record": self.record_file, "steps": steps}, file)

    def record(self) -> list[dict[str, Any]]:
        """What agents did so far."""
        with open(self.record_file) as file:
            entries = [json.loads(line) for line in file]
        return [entry for entry in entries if entry["who"] == "agent"]


def operation(function: Callable[..., None]) -> Callable[..., None]:
    OPERATIONS[function.__name__] = function
    return function


def put(data: bytes, descriptor: int = 1) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def say(line: dict[str, Any]) -> None:
    put(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n")


def note(what: str, **more: Any) -> None:
    entry = {"who": "agent", "what": what, "pid": os.getpid(), "time": time.monotonic(), **more}
    put((json.dumps(entry) + "\n").encode(), record)


# --- what it says ------------------------------------------------------------------------------------------


@operation
def init() -> None:
    say({"type": "system", "subtype": "init", "session_id": RESULT["session_id"], "model": "fake", "cwd": os.getcwd()})


@operation
def text(words: str) -> None:
    say({"type": "assistant", "message": {"content": [{"type": "text", "text": words}]}})


@operation
def result(changes: dict[str, Any] | None = None) -> None:
    say({**RESULT, **(changes or {})})


@operation
def result_of_size(size: int) -> None:
    """A result whose text has so many bytes, numbered, so that a lost piece would show."""
    say({**RESULT, "result": numbered(size)})


def numbered(size: int) -> str:
    return "".join(f"{number:09d} " for number in range(size // 10 + 1))[:size]


@operation
def line_of_size(size: int) -> None:
    put(b"x" * size + b"\n")


@operation
def raw(words: str) -> None:
    put(words.encode("utf-8", "surrogateescape"))


@operation
def stderr(words: str) -> None:
    put(words.encode(), 2)


@operation
def endless(size: int) -> None:
    """Print lines without end."""
    line = json.dumps({"type": "assistant", "message": {"content": [{"type": "text", "text": "x" * size}]}})
    block = (line + "\n").encode()
    while True:
        put(block)


@operation
def leak(name: str) -> None:
    """Print a variable in every way: as it is, in JSON, cut in two, on standard error."""
    value = os.environ[name]
    raw_value = os.fsencode(value)
    text(f"the key is {value}")
    put(b"bare: " + raw_value + b"\n")
    put(b"bare: " + raw_value + b"\n", 2)
    half = len(raw_value) // 2
    put(b"cut: " + raw_value[:half])
    time.sleep(0.05)
    put(raw_value[half:] + b"\n")
    result({"result": f"the key was {value}"})


# --- what it looks at --------------------------------------------------------------------------------------


@operation
def environment() -> None:
    note("environment", env=dict(os.environ), argv=sys.argv[2:], stdin=sys.stdin.read())


@operation
def arguments_of_all() -> None:
    """Put the command line of every process into the record."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    found.append(file.read().decode("utf-8", "replace"))
            except OSError:
                continue
    note("arguments", all=found)


@operation
def parent_environment() -> None:
    """Try to read the supervisor's environment."""
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            put(file.read() + b"\n")
        note("parent environment read")
    except OSError as error:
        note("parent environment refused", error=error.errno)


# --- how it lives and ends ---------------------------------------------------------------------------------


@operation
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@operation
def burn(seconds: float) -> None:
    """Use the processor for so long."""
    while time.process_time() < seconds:
        sum(range(1000))


@operation
def hold(megabytes: int) -> None:
    """Take memory, and keep it."""
    globals()["held"] = bytearray(b"x" * (megabytes << 20))


@operation
def hang() -> None:
    while True:
        signal.pause()


@operation
def until(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.005)


@operation
def touch(path: str) -> None:
    with open(path, "w"):
        pass


@operation
def ignore(*names: str) -> None:
    for name in names:
        signal.signal(signal.Signals[name], on_signal)
    note("ignores")


@operation
def die(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])
    signal.pause()


@operation
def leave(code: int) -> None:
    note("end")
    os._exit(code)


@operation
def spawn(kind: str) -> None:
    """Start a process that lives on: a `child`, one with a session of its own (`setsid`), a `daemon`."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        if kind != "child":
            os.setsid()
        if kind != "daemon" or os.fork() == 0:
            signal.alarm(LIFE)
            note("spawned", kind=kind)
            os.write(write, b"x")
            os.close(read)
            os.close(write)
            hang()
        os._exit(0)
    os.close(write)
    if kind == "daemon":
        os.waitpid(pid, 0)
    os.read(read, 1)
    os.close(read)


def on_signal(number: int, _frame: object) -> None:
    note(signal.Signals(number).name)


def on_term(number: int, _frame: object) -> None:
    note(signal.Signals(number).name)
    os._exit(143)


if __name__ == "__main__":
    with open(sys.argv[1]) as plan_file:
        plan = json.load(plan_file)
    record = os.open(plan["record"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    signal.alarm(LIFE)
    signal.signal(signal.SIGTERM, on_term)
    note("begin")
    for name, *rest in plan["steps"]:
        OPERATIONS[name](*rest)
    note("end")
    os._exit(0)
