"""A fake indexer that does what its plan says and records what it did: `fake_cidx.py PLAN COMMAND …`.

The plan is JSON: {"record": FILE, COMMAND: {…}}; in place of one table a list may stand, for the first run of the
command, the second … (the last is repeated). What a table may say is in `DEFAULTS`. Standard library only.

The test's side is `FakeCidx`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

#: Ends by itself after so many seconds, should a test forget it.
LIFE = 60

READY = "Watchdog observer started monitoring: /somewhere"

DEFAULTS: dict[str, Any] = {
    "out": [],  # lines to print first
    "seconds": 0,  # how long it takes then
    "until": None,  # and at least until this file exists
    "code": 0,
    "kill": None,  # end by this signal instead
    "late": "",  # text to print at the end, without a newline
    "ignore": [],  # signals to ignore
    # of the watch:
    "ready": 0,  # seconds until the readiness line; None for never
    "ready_until": None,  # and not before this file exists
    "exit_at_start": None,  # a code
    "crash": None,  # a code, `crash_after` seconds after readiness and when the file `crash_until` exists
    "crash_after": 0,
    "crash_until": None,
    "flush": 0,  # seconds from SIGINT to the end
    "flush_until": None,
    # after which it ends with "code"
    "env": False,  # record the environment, too
    "leak": None,  # print this variable of the environment
}


class FakeCidx:
    """The plan and the record of fake indexers, in the test."""

    def __init__(self, directory: Any, **plan: Any) -> None:
        self.plan_file = os.path.join(directory, "cidx-plan.json")
        self.record_file = os.path.join(directory, "record.jsonl")
        self.command = (sys.executable, "-I", "-S", os.path.abspath(__file__), self.plan_file)
        self.plan(**plan)

    def plan(self, **plan: Any) -> None:
        """Lay down what each command does from now on."""
        no_daemon = {"code": 1, "out": ["Daemon mode not enabled"]}
        plan = {"record": self.record_file, "start": no_daemon, "stop": no_daemon, **plan}
        with open(self.plan_file + ".new", "w") as file:
            json.dump(plan, file)
        os.replace(self.plan_file + ".new", self.plan_file)

    def record(self) -> list[dict[str, Any]]:
        """What was done so far, also by fake agents with the same record."""
        return read_record(self.record_file)

    def order(self) -> list[str]:
        """The record in words, such as "watch begin", without the short commands."""
        short = ("start", "stop", "fix-config")
        return [f"{entry['who']} {entry['what']}" for entry in self.record() if entry["who"] not in short]


def read_record(path: str) -> list[dict[str, Any]]:
    try:
        with open(path) as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        return []


def main() -> None:
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    command = sys.argv[2]
    who = "reconcile" if command == "index" else command

    def note(what: str, **more: Any) -> None:
        entry = {"who": who, "what": what, "pid": os.getpid(), "time": time.monotonic(), **more}
        os.write(record, (json.dumps(entry) + "\n").encode())

    record = os.open(plan["record"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    steps = plan.get(who, {})
    if isinstance(steps, list):
        runs = sum(entry["who"] == who and entry["what"] == "begin" for entry in read_record(plan["record"]))
        steps = steps[min(runs, len(steps) - 1)]
    do = {**DEFAULTS, **steps}
    asked = False

    def on_signal(number: int, _frame: object) -> None:
        nonlocal asked
        asked = asked or number == signal.SIGINT
        note(signal.Signals(number).name)

    def wait(seconds: float, until: str | None, *, also_asked: bool = False) -> None:
        """Until the time has passed and the file is there; `also_asked` ends with SIGINT."""
        end = time.monotonic() + seconds
        while time.monotonic() < end or (until is not None and not os.path.exists(until)):
            if also_asked and asked:
                return
            time.sleep(0.005)

    signal.alarm(LIFE)
    for name in do["ignore"]:
        signal.signal(signal.Signals[name], on_signal)
    if who == "watch":
        signal.signal(signal.SIGINT, on_signal)
    note("begin", argv=sys.argv[2:], env=dict(os.environ) if do["env"] else None)
    for line in do["out"]:
        print(line, flush=True)
    if do["leak"]:
        print("the key is", os.environ.get(do["leak"]), flush=True)
    if who == "watch":
        if do["exit_at_start"] is not None:
            end(note, do["exit_at_start"], None)
        if do["ready"] is None:
            wait(LIFE, None, also_asked=True)
        wait(do["ready"] or 0, do["ready_until"], also_asked=True)
        if not asked:
            print(READY, flush=True)
            note("ready")
        if do["crash"] is not None:
            wait(do["crash_after"], do["crash_until"], also_asked=True)
            if not asked:
                end(note, do["crash"], None)
        wait(LIFE, None, also_asked="SIGINT" not in do["ignore"])
        wait(do["flush"], do["flush_until"])
    wait(do["seconds"], do["until"])
    if do["late"]:
        print(do["late"], end="", flush=True)
    end(note, do["code"], do["kill"])


def end(note: Any, code: int, kill: str | None) -> None:
    note("end")
    if kill:
        os.kill(os.getpid(), signal.Signals[kill])
    os._exit(code)


if __name__ == "__main__":
    main()
