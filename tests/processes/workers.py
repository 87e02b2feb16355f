"""What the tests of the worker share: its settings, its directories, made-up jobs, and waiting with a bound."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from attrs import evolve

from supervise.dispatch.spool import Spool
from supervise.dispatch.worker import Worker
from supervise.executors.mock import MockExecutor
from supervise.model import FailureKind, JobResult, JobSpec, Outcome
from supervise.settings import BreakerSettings, Settings, WorkerSettings

LIMIT = 20.0  # seconds for anything that is waited for
WORKER = "w1"
ROOT = Path(__file__).parents[2]


def settings_of(root: Path, **changes: Any) -> Settings:
    """Quick ones. `changes` are of the worker, but for `heartbeat_interval` and `breaker`."""
    workspace = root / "workspace"
    workspace.mkdir(parents=True, exist_ok=True)
    top = {name: changes.pop(name) for name in ("heartbeat_interval", "breaker") if name in changes}
    bounds: dict[str, Any] = {
        "root": root,
        "workspace": workspace,
        "backoff_base": 0.01,
        "backoff_cap": 0.05,
        "poll_interval": 0.05,
        "parse_grace": 0.3,
        "drain_timeout": 5.0,
    }
    return evolve(
        Settings(
            state_dir=root / "state",
            executor="mock",
            heartbeat_interval=0.05,
            breaker=BreakerSettings(failures=1000),
            worker=WorkerSettings(**{**bounds, **changes}),
        ),
        **top,
    )


class Files:
    """The directories of a worker, as others see them."""

    def __init__(self, root: Path, worker: str = WORKER) -> None:
        self.spool = Spool(root, worker)
        self.spool.create()

    @property
    def tasks(self) -> Path:
        return self.spool.tasks

    def drop(self, task_id: str, description: str = "ok", *, name: str | None = None, **fields: Any) -> Path:
        """A task, whole as soon as it is there."""
        return self.drop_bytes(task(task_id, description, **fields), name or f"{task_id}.json")

    def drop_bytes(self, data: bytes, name: str) -> Path:
        path, new = self.tasks / name, self.tasks / f".{os.getpid()}.part"
        new.write_bytes(data)
        new.rename(path)
        return path

    def result(self, task_id: str) -> dict[str, Any] | None:
        return read(self.spool.results / f"{task_id}.json")

    def letter(self, stem: str) -> dict[str, Any] | None:
        return read(self.spool.dlq / f"{stem}.json")

    def heartbeat(self) -> dict[str, Any]:
        return read(self.spool.heartbeat) or {}

    def letters(self) -> list[dict[str, Any]]:
        return [record for path in sorted(self.spool.dlq.glob("*.json")) if (record := read(path))]

    async def ended(self, task_id: str) -> dict[str, Any]:
        """Its result; waited for."""
        await eventually(lambda: self.result(task_id), f"the result of {task_id}")
        found = self.result(task_id)
        assert found is not None
        return found

    async def buried(self, stem: str) -> dict[str, Any]:
        """A dead letter; waited for."""
        await eventually(lambda: self.letter(stem), f"the dead letter {stem}")
        found = self.letter(stem)
        assert found is not None
        return found

    def left(self) -> list[str]:
        """What should not be there once all has ended: waiting and running tasks, unfinished writes."""
        spool = self.spool
        found = [*spool.tasks.iterdir(), *spool.running.iterdir()]
        for directory in (spool.results, spool.dlq, spool.triggers, spool.heartbeat.parent):
            found += [path for path in directory.iterdir() if path.name.startswith(".")]
        return sorted(os.fspath(path) for path in found)


def task(task_id: str, description: str = "ok", **fields: Any) -> bytes:
    return json.dumps({"task_id": task_id, "description": description, **fields}).encode()


def read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    assert isinstance(found, dict)
    return found


async def eventually(check: Callable[[], object], what: str, seconds: float = LIMIT) -> None:
    """Look again and again: a file tells nobody."""
    with trio.move_on_after(seconds):
        while not check():
            await trio.sleep(0.005)
        return
    raise AssertionError(f"not within {seconds:g} s: {what}")


async def status(worker: Worker, wanted: str, *words: str) -> str:
    """The reasons of the status that is waited for; each of the words is in them."""

    def told() -> str:
        return "; ".join(worker.reasons)

    await eventually(
        lambda: worker.status == wanted and all(word in told() for word in words),
        f"{wanted} {words}, but it is {worker!r}: {told()}",
    )
    return told()


class Gate:
    """Jobs that wait until they are let go, by task id."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self._open: dict[str, trio.Event] = {}
        self._all = False

    def executor(self) -> MockExecutor:
        return MockExecutor(self._script)

    def let_go(self, *task_ids: str) -> None:
        """These, or all that come."""
        self._all = self._all or not task_ids
        for task_id in task_ids or tuple(self._open):
            self._event(task_id).set()

    def _event(self, task_id: str) -> trio.Event:
        return self._open.setdefault(task_id, trio.Event())

    async def _script(self, spec: JobSpec) -> JobResult:
        task_id = spec.labels["task_id"]
        self.begun.append(task_id)
        try:
            if not self._all:
                await self._event(task_id).wait()
        except trio.Cancelled:
            self.cancelled.append(task_id)
            raise
        return made_up(spec)


def made_up(spec: JobSpec, failure: str = "", **fields: Any) -> JobResult:
    """A job's result."""
    if failure == "timed_out":
        return JobResult(job_id=spec.job_id, outcome=Outcome.TIMED_OUT, error="it took too long", **fields)
    if failure:
        kind = FailureKind(failure)
        return JobResult(
            job_id=spec.job_id, outcome=Outcome.FAILED, failure_kind=kind, error=f"made up: {kind}", **fields
        )
    return JobResult(job_id=spec.job_id, outcome=Outcome.COMPLETED, text="made up", **fields)


def playing() -> MockExecutor:
    """Jobs that do what the task's description says, a word for each attempt: `ok`, or a failure's kind."""

    def script(spec: JobSpec) -> JobResult:
        words = spec.prompt.split()
        number = min(int(spec.labels["attempt"]), len(words)) - 1
        return made_up(spec, "" if words[number] == "ok" else words[number])

    return MockExecutor(script)
