"""The worker: how soon it takes what is dropped, what it costs when idle, and how many durable tasks it ends a second.

All on one disk: in the directory for temporary files, or, where that is no disk, in the working directory. The workers
and what they are measured against are processes of their own (worker_process.py, worker_peers.py), in turn.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.table import Row
from benchmarks.worker_peers import TASK
from benchmarks.worker_process import WORKER

#: No answer of a process takes so long, in seconds.
PATIENCE = 600.0
#: Between two drops: what the last one has caused is over.
PAUSE = 0.005
#: Between two looks at the threads of an idle worker; one that ends meanwhile takes its last wakeups with it.
LOOK = 0.25


@dataclass(frozen=True)
class Numbers:
    """How much is measured.

    Attributes:
        drops: tasks dropped, one at a time.
        idle: how long idle workers are watched, in seconds.
        tasks: tasks that lie there at the start.
        rounds: how often they do.
        places: tasks under way at a time.
        queues: kinds of huey's queue, each with a number of threads.
    """

    drops: int = 500
    idle: float = 60.0
    tasks: int = 2000
    rounds: int = 5
    places: tuple[int, ...] = (3, 16)
    queues: tuple[tuple[str, int], ...] = (("file", 1), ("file", 3), ("sqlite", 1), ("sqlite", 3))


class _Process:
    """One that says what it does, a line at a time, and ends with its standard input."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.pid = popen.pid
        self._popen = popen
        self._rest = b""

    def line(self) -> str:
        """The next one."""
        assert self._popen.stdout is not None
        while b"\n" not in self._rest:
            assert select.select([self._popen.stdout], [], [], PATIENCE)[0], "it says nothing"
            more = os.read(self._popen.stdout.fileno(), 65536)
            assert more, f"it has ended: {self._popen.args!r}"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()


@contextmanager
def _process(*arguments: str) -> Iterator[_Process]:
    project = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([os.fspath(project), *filter(None, sys.path)])
    command = [sys.executable, "-m", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env={**os.environ, "PYTHONPATH": paths}) as popen:
        try:
            yield _Process(popen)
            assert popen.stdin is not None
            popen.stdin.close()
            popen.wait(10)
        finally:
            popen.kill()


def _serving(root: Path, **settings: object) -> AbstractContextManager[_Process]:
    return _process("benchmarks.worker_process", "serve", os.fspath(root), json.dumps(settings))


# --- drop to claim ------------------------------------------------------------------------------------------


class _Drops:
    """Drops tasks on one taker, one at a time."""

    def __init__(self, process: _Process, tasks: Path) -> None:
        import inotify_simple

        self.gone: list[float] = []  # until the file has left tasks/, as we see it
        self.claimed: list[float] = []  # until its taker holds it, and both directories are on the disk
        self._process = process
        self._tasks = tasks
        self._watch = inotify_simple.INotify()
        self._watch.add_watch(os.fspath(tasks), inotify_simple.flags.MOVED_FROM)

    def drop(self, task_id: str) -> None:
        """One, and wait for its end."""
        ready = self._tasks.parent / f"{task_id}.new"
        ready.write_bytes(TASK % task_id.encode())
        began = time.monotonic_ns()
        ready.rename(self._tasks / f"{task_id}.json")
        assert any(event.name == f"{task_id}.json" for event in self._watch.read(timeout=PATIENCE * 1000))
        self.gone.append((time.monotonic_ns() - began) / 1e6)
        while (words := self._process.line().split())[0] != "finished":
            if words[0] == "claimed":
                self.claimed.append((int(words[2]) - began) / 1e6)
        time.sleep(PAUSE)

    def close(self) -> None:
        """Watch no more."""
        self._watch.close()


def _measure_drops(scratch: Path, numbers: Numbers) -> list[Row]:
    with ExitStack() as stack:
        takers: list[_Drops] = []
        for name in ("ours", "bare"):
            root = scratch / name
            root.mkdir()
            if name == "ours":
                process = stack.enter_context(_serving(root))
                tasks = root / "tasks" / WORKER
            else:
                process = stack.enter_context(_process("benchmarks.worker_peers", "claim", os.fspath(root)))
                tasks = root / "tasks"
            assert process.line() == "ready"
            taker = _Drops(process, tasks)
            stack.callback(taker.close)
            takers.append(taker)
        warm = min(20, numbers.drops)
        for number in range(numbers.drops + warm):
            for taker in takers:
                taker.drop(f"t{number:05}")
    for taker in takers:
        del taker.gone[:warm], taker.claimed[:warm]
    ours, bare = takers
    return [
        _drop_row(
            "a task dropped on an idle worker, until it has left tasks/ (seen by the dropper)", ours.gone, bare.gone
        ),
        _drop_row(
            "… until it is claimed, its move on the disk (told by the taker)", ours.claimed, bare.claimed, budget=False
        ),
    ]


def _drop_row(what: str, ours: list[float], bare: list[float], *, budget: bool = True) -> Row:
    median, tail = statistics.median(ours), _percentile(ours, 0.99)
    return Row(
        what=what,
        ours=f"p50 {median:.2f}, p99 {tail:.2f} ms",
        peer=f"p50 {statistics.median(bare):.2f}, p99 {_percentile(bare, 0.99):.2f} ms (bare inotify and rename)",
        ratio=f"+{statistics.median(a - b for a, b in zip(ours, bare, strict=True)):.2f} ms",
        budget="p50 < 1 ms, p99 < 5 ms" if budget else "none set",
        met=median < 1 and tail < 5 if budget else None,
    )


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# --- idle ---------------------------------------------------------------------------------------------------


class _Wakeups:
    """How often the threads of a process went to sleep of their own accord: so often they have woken up."""

    def __init__(self, pid: int, heartbeat: Path) -> None:
        self.beats = 0
        self._pid = pid
        self._heartbeat = heartbeat
        self._seen: dict[str, int] = {}
        self._beat = 0
        self.look()
        self._before = sum(self._seen.values())
        self.beats = 0

    @property
    def count(self) -> int:
        """Since the beginning."""
        return sum(self._seen.values()) - self._before

    def look(self) -> None:
        """To be done often: threads come and go."""
        for thread in os.listdir(f"/proc/{self._pid}/task"):
            try:
                text = Path(f"/proc/{self._pid}/task/{thread}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)$", text, re.MULTILINE)
            assert found is not None
            self._seen[thread] = int(found[1])
        beat = self._heartbeat.stat().st_mtime_ns
        self.beats += beat != self._beat
        self._beat = beat


def _measure_idle(scratch: Path, numbers: Numbers) -> list[Row]:
    with ExitStack() as stack:
        watched: list[_Wakeups] = []
        for name in ("hinted", "polling"):
            root = scratch / name
            root.mkdir()
            process = stack.enter_context(_serving(root, poll=name == "polling"))
            assert process.line() == "ready"
            heartbeat = root / "heartbeats" / f"{WORKER}.json"
            time.sleep(2 * LOOK)  # what the start has caused is over
            watched.append(_Wakeups(process.pid, heartbeat))
        began = time.monotonic()
        while time.monotonic() < began + numbers.idle:
            time.sleep(LOOK)
            for each in watched:
                each.look()
        minutes = (time.monotonic() - began) / 60
    ours, polling = watched
    each_beat = f"; {ours.count / ours.beats:.1f} for each of {ours.beats} heartbeats" if ours.beats else ""
    return [
        Row(
            what=f"wakeups a minute of an idle worker, all threads (in {minutes * 60:.0f} s)",
            ours=f"{ours.count / minutes:.0f}{each_beat}",
            peer=f"{polling.count / minutes:.0f} (polling each second)",
            ratio=f"{ours.count / max(1, polling.count):.2f} ×",
            budget="the heartbeat's and the sweep's alone",
            met=None if not ours.beats else ours.count <= 12 * (ours.beats + 1),
        )
    ]


# --- durable tasks a second ---------------------------------------------------------------------------------


class _Runner(NamedTuple):
    """Ends a number of tasks in a directory of its own."""

    name: str
    run: Callable[[Path, int], float]


@dataclass
class _Rates:
    """Tasks a second, a number for each round."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)


def _ours(places: int) -> _Runner:
    def run(root: Path, count: int) -> float:
        tasks = root / "tasks" / WORKER
        tasks.mkdir(parents=True)
        for number in range(count):
            (tasks / f"t{number:05}.json").write_bytes(TASK % f"t{number:05}".encode())
        settings = json.dumps({"count": count, "max_concurrent": places})
        seconds = _seconds("benchmarks.worker_process", "drain", os.fspath(root), settings)
        assert len(os.listdir(root / "results" / WORKER)) == count
        return seconds

    return _Runner(f"ours {places}", run)


def _peer(name: str, *arguments: str) -> _Runner:
    mode, *more = arguments

    def run(root: Path, count: int) -> float:
        return _seconds("benchmarks.worker_peers", mode, os.fspath(root), *more, str(count))

    return _Runner(name, run)


def _seconds(*arguments: str) -> float:
    with _process(*arguments) as process:
        return float(process.line())


def _measure_rates(scratch: Path, numbers: Numbers) -> list[Row]:
    runners = [_peer("write", "write"), _peer("steps", "steps"), *map(_ours, numbers.places)]
    queues = numbers.queues
    if importlib.util.find_spec("huey") is None:
        print("(no row for huey: it is not installed)", flush=True)
        queues = ()
    runners += [_peer(f"huey {kind} {workers}", "huey", kind, str(workers)) for kind, workers in queues]
    rates = {runner.name: _Rates() for runner in runners}
    for round_ in range(numbers.rounds):
        for runner in runners if round_ % 2 == 0 else reversed(runners):
            with tempfile.TemporaryDirectory(dir=scratch) as root:
                os.sync()  # nobody pays for what another has left unwritten
                rates[runner.name].values.append(numbers.tasks / runner.run(Path(root), numbers.tasks))
    rows = []
    for places in numbers.places:
        ours = rates[f"ours {places}"]
        kept = f"durable tasks a second that do nothing, {places} at a time"
        rows.append(_rate_row(kept, ours, rates["write"], "write, fsync, rename, fsync", budget=0.5))
        rows.append(_rate_row("… against all steps of a task, bare", ours, rates["steps"], "claim, result, removal"))
    for kind, workers in queues:
        loses = {
            "file": "huey loses on a kill each task it has begun, on a power cut what is not on the disk (no fsync)",
            "sqlite": "huey loses on a kill each task it has begun; what was committed is on the disk (WAL, fsync)",
        }[kind]
        name = {"file": "FileHuey", "sqlite": "SqliteHuey"}[kind]
        ours = rates[f"ours {numbers.places[0]}"]
        what = f"… against {name}, results kept; {loses}; ours loses none"
        rows.append(_rate_row(what, ours, rates[f"huey {kind} {workers}"], f"{name}, threads: {workers}"))
    return rows


def _rate_row(what: str, ours: _Rates, peer: _Rates, name: str, *, budget: float | None = None) -> Row:
    ratio = statistics.median(a / b for a, b in zip(ours.values, peer.values, strict=True))
    return Row(
        what=what,
        ours=f"{ours.median:.0f} /s",
        peer=f"{peer.median:.0f} /s ({name})",
        ratio=f"{ratio:.2f} ×",
        budget="none set" if budget is None else f"≥ {budget:g} ×",
        met=None if budget is None else ratio >= budget,
    )


# --- all of it ----------------------------------------------------------------------------------------------


def _disk() -> Path:
    """A directory on a disk: a file system in memory has no device, and nothing to wait for."""
    temporary = Path(tempfile.gettempdir())
    return temporary if os.major(temporary.stat().st_dev) else Path.cwd()


def measure(numbers: Numbers | None = None, parts: Sequence[str] = ("drops", "idle", "rates")) -> list[Row]:
    """The rows of this benchmark."""
    measures = {"drops": _measure_drops, "idle": _measure_idle, "rates": _measure_rates}
    rows: list[Row] = []
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="supervise-benchmark-", dir=_disk()) as scratch:
            rows += measures[part](Path(scratch), numbers or Numbers())
    return rows


if __name__ == "__main__":
    for row in measure(parts=sys.argv[1:] or ("drops", "idle", "rates")):
        print(row)
