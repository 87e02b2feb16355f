"""A worker of its own, for tests that take something from it or run it as somebody else.

`python -m tests.processes.lone_worker ROOT SETTINGS` (JSON, of the worker). It does what it reads, a word in a line,
and answers each in a line of JSON; it ends with its standard input.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from supervise.dispatch.worker import Worker, open_worker
from supervise.executors.mock import MockExecutor
from tests.processes.workers import LIMIT, ROOT, WORKER, settings_of


class LoneWorker:
    """Such a process, as its parent sees it."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen = popen

    def ask(self, word: str) -> Any:
        """Its answer."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(word.encode() + b"\n")
        self.popen.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, "it has ended"
        return json.loads(line)

    def status(self, wanted: str, *words: str) -> str:
        """Its reasons, as soon as its status is this one and each of the words is in them."""
        end = time.monotonic() + LIMIT
        while True:
            status, reasons = self.ask("status")
            if status == wanted and all(word in "; ".join(reasons) for word in words):
                return "; ".join(reasons)
            assert time.monotonic() < end, f"{wanted} {words}, but it is {status}: {reasons}"
            time.sleep(0.02)


@contextmanager
def lone_worker(
    root: Path, *, python: Sequence[str] = (sys.executable,), popen: dict[str, Any] | None = None, **settings: Any
) -> Iterator[LoneWorker]:
    """Run one. It is killed in the end, if it does not end by itself."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.fspath(ROOT), *filter(None, sys.path)])}
    command = [*python, "-m", "tests.processes.lone_worker", os.fspath(root), json.dumps(settings)]
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, **(popen or {})}
    with subprocess.Popen(command, env=env, cwd="/", **options) as process:
        try:
            worker = LoneWorker(process)
            assert worker.answer() == "ready"
            yield worker
            assert process.stdin is not None
            process.stdin.close()
            process.wait(LIMIT)
        finally:
            process.kill()


# --- the other side ----------------------------------------------------------------------------------------

_held: list[int] = []


def hold_files() -> int:
    """Take all descriptors that this process may have."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    while True:
        try:
            _held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            return len(_held)


def free_files() -> int:
    while _held:
        os.close(_held.pop())
    return 0


def switches() -> int:
    """How often this process has gone to sleep of its own accord, its threads included."""
    found = 0
    for thread in os.listdir("/proc/self/task"):
        text = Path(f"/proc/self/task/{thread}/status").read_text()
        match = re.search(r"^voluntary_ctxt_switches:\s+(\d+)$", text, re.MULTILINE)
        assert match is not None
        found += int(match[1])
    return found


async def idle(worker: Worker) -> list[int]:
    """How often anything woke up within two seconds: threads, and the dispatcher's loop."""
    turns = -1
    while turns != worker._dispatcher.turns:  # until what is going on has ended
        turns = worker._dispatcher.turns
        await trio.sleep(0.4)  # a time in which nothing happened is what is waited for
    before = switches()
    await trio.sleep(2.0)  # a length on purpose: who wakes up in it is what is counted
    return [switches() - before, worker._dispatcher.turns - turns]


async def obey(worker: Worker, word: str) -> Any:
    if word == "status":
        return [worker.status, worker.reasons]
    if word == "idle":
        return await idle(worker)
    name, _, value = word.partition(" ")
    if name == "limit":  # of this user namespace alone
        Path("/proc/sys/user", value.split("=")[0]).write_text(value.split("=")[1])
        return None
    return {"hold-files": hold_files, "free-files": free_files}[name]()


async def main(root: Path, changes: dict[str, Any]) -> None:
    for limit in changes.pop("limits", ()):
        Path("/proc/sys/user", limit.split("=")[0]).write_text(limit.split("=")[1])
    async with open_worker(WORKER, settings=settings_of(root, **changes), executor=MockExecutor()) as worker:
        os.write(1, b'"ready"\n')
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            os.write(1, json.dumps(await obey(worker, line.strip())).encode() + b"\n")
        worker.cancel()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), json.loads(sys.argv[2]))
