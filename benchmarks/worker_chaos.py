"""`python -m benchmarks.worker_chaos`: kill a worker at random moments while tasks flow, and count what became of them.

A worker with made-up jobs is killed with SIGKILL again and again, and started again at once. Meanwhile tasks are
dropped: by rename, by hard link, and by writing in pieces, also across a kill. The jobs write a journal of their own.
At the end each task must have exactly one result or one dead letter, whose number of attempts agrees with the journal;
nothing may be left in tasks/ and running/, and no unfinished write anywhere.

The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import inotify_simple
import trio

from supervise.dispatch.spool import Spool
from supervise.dispatch.worker import open_worker
from supervise.executors.mock import MockExecutor
from supervise.model import FailureKind, JobResult, JobSpec, Outcome
from supervise.settings import BreakerSettings, Settings, WorkerSettings

WORKER = "w1"
LIMIT = 60.0  # seconds that the last worker has for what is left
STARTED = 2.0  # seconds after which a worker is killed that has begun nothing: there was nothing to do
#: What comes of a job: the share of each, in percent.
FATES = {"completed": 72, "network": 12, "agent_error": 6, "auth": 5, "timed_out": 5}


# --- the worker that is killed -----------------------------------------------------------------------------


def settings(root: Path) -> Settings:
    """Deaths alone bury no task; pauses are short; hints that are missed would cost the run its time."""
    worker = WorkerSettings(
        root=root,
        workspace=root,
        max_concurrent=6,
        max_attempts=50,
        backoff_base=0.01,
        backoff_cap=0.02,
        parse_grace=20.0,
        sweep_interval=30.0,
        poll_interval=0.1,
    )
    breaker = BreakerSettings(failures=1_000_000)
    return Settings(state_dir=root / "state", heartbeat_interval=0.05, worker=worker, breaker=breaker)


def executor(journal: int) -> MockExecutor:
    """Jobs of a few milliseconds that tell the journal of their beginning and of their end."""
    draw = random.Random()

    async def script(spec: JobSpec) -> JobResult:
        name = f"{spec.labels['task_id']} {spec.labels['attempt']}"
        os.write(journal, f"begun {name}\n".encode())
        await trio.sleep(draw.random() * 0.04)
        fate = draw.choices([*FATES], [*FATES.values()])[0]
        os.write(journal, f"{fate} {name}\n".encode())
        if fate in ("completed", "timed_out"):
            return JobResult(job_id=spec.job_id, outcome=Outcome(fate))
        kind = FailureKind(fate)
        return JobResult(job_id=spec.job_id, outcome=Outcome.FAILED, failure_kind=kind, error=f"made up: {fate}")

    return MockExecutor(script)


async def live(root: Path, tasks: int | None) -> None:
    """A worker's life; with `tasks`, until so many have come to their end."""
    spool = Spool(root, WORKER)
    journal = os.open(root / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    async with open_worker(WORKER, settings=settings(root), executor=executor(journal)):
        if tasks is None:
            await trio.sleep_forever()
        with trio.fail_after(LIMIT):
            while ended(spool) < (tasks or 0):
                await trio.sleep(0.01)


def ended(spool: Spool) -> int:
    """How many tasks have come to their end."""
    both = (*os.listdir(spool.results), *os.listdir(spool.dlq))
    return sum(name.endswith(".json") and not name.startswith(".") for name in both)


def journaled(root: Path) -> int:
    """The size of the journal: it grows when somebody is at work."""
    path = root / "journal"
    return path.stat().st_size if path.exists() else 0


def start(root: Path, tasks: int | None = None) -> int:
    """A worker in a child: a fork, since an import for each would take longer than all of its life. Returns its pid."""
    pid = os.fork()
    if not pid:
        _be_a_worker(root, tasks)
    return pid


def _be_a_worker(root: Path, tasks: int | None) -> NoReturn:
    code = 1
    try:
        logging.disable(logging.CRITICAL)
        trio.run(live, root, tasks)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


# --- whoever gives it tasks --------------------------------------------------------------------------------


@dataclass
class Dropper:
    """Drops tasks, each in one of three ways."""

    spool: Spool
    draw: random.Random
    count: int = 0
    ways: Counter[str] = field(default_factory=Counter)
    _being_written: list[tuple[int, bytes]] = field(default_factory=list)

    def drop(self) -> None:
        """One more."""
        name, self.count = f"t{self.count}", self.count + 1
        priority = self.draw.choice(["low", "normal", "high"])
        data = json.dumps({"task_id": name, "description": "x" * self.draw.randrange(1, 400), "priority": priority})
        way = self.draw.choice(["rename", "hard link", "written in pieces"])
        self.ways[way] += 1
        path, other = self.spool.tasks / f"{name}.json", self.spool.root / f"{name}.part"
        if way == "written in pieces":
            self._being_written.append((os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), data.encode()))
            return
        other.write_text(data)
        if way == "rename":
            other.rename(path)
        else:
            path.hardlink_to(other)
            other.unlink()

    def go_on(self) -> None:
        """Write a piece more of each file that is being written."""
        todo, self._being_written = self._being_written, []
        for descriptor, data in todo:
            size = self.draw.randrange(1, 200)
            os.write(descriptor, data[:size])
            if data[size:]:
                self._being_written.append((descriptor, data[size:]))
            else:
                os.close(descriptor)

    def end(self) -> None:
        """Write all of them to their end."""
        while self._being_written:
            self.go_on()


# --- the run -----------------------------------------------------------------------------------------------


def run(root: Path, kills: int, tasks: int, seed: int) -> dict[str, Any]:
    """Kill so many workers while so many tasks flow. Returns the numbers, and under `wrong` what is wrong."""
    draw = random.Random(seed)
    spool = Spool(root, WORKER)
    spool.create()
    dropper = Dropper(spool, draw)
    inotify_simple.INotify().close()  # it looks for the C library once, which takes longer than many a life here
    began = time.monotonic()
    wrong: list[str] = []
    busy = 0
    for number in range(kills):
        pid = start(root)
        descriptor = os.pidfd_open(pid)
        try:
            goal = tasks * (number + 1) // kills
            # Some die while they start, and see to what the one before has left; most when they are at work.
            moment = time.monotonic() + (draw.uniform(0.0, 0.1) if draw.random() < 0.2 else STARTED)
            before, at_work = journaled(root), False
            while dropper.count < goal or time.monotonic() < moment:
                if dropper.count < goal:
                    dropper.drop()
                dropper.go_on()
                time.sleep(0.001)
                if not at_work and journaled(root) > before:
                    at_work, moment = True, min(moment, time.monotonic() + draw.uniform(0.0, 0.06))
            busy += any(True for _ in spool.running.iterdir())
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        finally:
            os.close(descriptor)
        if not os.WIFSIGNALED(status):
            wrong.append(f"worker {number} ended by itself, with status {status}")
    dropper.end()
    pid = start(root, tasks)
    _, status = os.waitpid(pid, 0)
    if status:
        wrong.append(f"the last worker ended with status {status}")
    seconds = time.monotonic() - began
    found, more = examine(root, tasks)
    return {
        "kills": kills,
        "kills with a task under way": busy,
        "tasks": tasks,
        **{f"dropped by {way}": count for way, count in sorted(dropper.ways.items())},
        **found,
        "seconds": round(seconds, 1),
        "wrong": wrong + more,
    }


def examine(root: Path, tasks: int) -> tuple[dict[str, Any], list[str]]:
    """What became of the tasks: numbers, and what is wrong."""
    spool = Spool(root, WORKER)
    results = {path.stem: json.loads(path.read_bytes()) for path in spool.results.glob("*.json")}
    letters = {path.stem: json.loads(path.read_bytes()) for path in spool.dlq.glob("*.json")}
    wrong: list[str] = []

    def check(good: object, text: str) -> None:
        if not good:
            wrong.append(text)

    wanted = {f"t{number}" for number in range(tasks)}
    check(not results.keys() & letters.keys(), f"twice: {sorted(results.keys() & letters.keys())}")
    seen = results.keys() | letters.keys()
    check(seen == wanted, f"lost: {sorted(wanted - seen)}, too many: {sorted(seen - wanted)}")
    left = [*spool.tasks.iterdir(), *spool.running.iterdir(), *spool.dlq.glob("*.raw")]
    for directory in (spool.results, spool.dlq, spool.triggers, spool.heartbeat.parent):
        left += [path for path in directory.iterdir() if path.name.startswith(".")]
    check(not left, f"left: {sorted(map(str, left))}")

    begun: dict[str, list[int]] = defaultdict(list)
    fates: dict[tuple[str, int], str] = {}
    for line in (root / "journal").read_text().splitlines():
        what, name, number = line.split()
        if what == "begun":
            begun[name].append(int(number))
        else:
            fates[name, int(number)] = what
    deaths = 0
    for name, record in results.items():
        attempt: int = record["attempt"]
        check(record["task_id"] == name, f"{name}: the result is another's")
        check(record["retry_count"] == attempt - 1, f"{name}: retry_count does not fit attempt")
        told = fates.get((name, attempt))
        check(told == record["status"], f"{name}: it has a result, but the job {told}")
        deaths += sum((name, each) not in fates for each in range(1, attempt))
    for name, record in letters.items():
        numbers = [each["attempt"] for each in record["attempts"]]
        check(numbers == [*range(1, len(numbers) + 1)], f"{name}: attempts {numbers}")
        told = fates.get((name, len(numbers)))
        check(told == record["dlq_reason"], f"{name}: a dead letter, but the job {told}")
        for each in record["attempts"]:
            told = fates.get((name, each["attempt"]))
            # A job may have ended in time and its worker died before the end was on the disk.
            fits = each["failure_kind"] in (told, "killed")
            check(fits, f"{name}: {each}, but the job {told}")
            deaths += each["failure_kind"] == "killed"
    for name, numbers in begun.items():
        check(numbers == sorted({*numbers}), f"{name}: attempts begun: {numbers}")
        last = results[name]["attempt"] if name in results else len(letters.get(name, {}).get("attempts", ()))
        check(numbers[-1] == last, f"{name}: begun {numbers}, but it has had {last}")
    found = {
        **{f"results: {status}": n for status, n in Counter(each["status"] for each in results.values()).items()},
        **{f"dead letters: {why}": n for why, n in Counter(each["dlq_reason"] for each in letters.values()).items()},
        "attempts begun": sum(map(len, begun.values())),
        "attempts lost to a death": deaths,
    }
    return found, wrong


def main(words: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker_chaos", description="Kill a worker.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where to make the root; default is in memory")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(words)
    memory = Path("/dev/shm")
    place = options.directory or (memory if os.access(memory, os.W_OK) else None)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place)))
        found = run(root, options.kills, options.tasks, options.seed)
    if options.json:
        print(json.dumps(found))
    else:
        print("| what | number |\n|---|---|")
        for name, number in found.items():
            if name != "wrong":
                print(f"| {name} | {number} |")
        print(f"| wrong | {len(found['wrong'])} |")
        for each in found["wrong"]:
            print(each, file=sys.stderr)
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
