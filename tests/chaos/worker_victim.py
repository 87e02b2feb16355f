"""A worker's part that kills itself at its n-th call to the file system: `python worker_victim.py ROOT SETTINGS`.

The calls are counted by names in `os` that are replaced here, before and after each: the product knows nothing of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from supervise import durable
from supervise.dispatch.backlog import Offer
from supervise.dispatch.spool import Held, Spool
from supervise.dispatch.task import Attempt
from supervise.dispatch.worker import open_worker
from supervise.executors.mock import MockExecutor
from supervise.model import FailureKind, JobResult, JobSpec, Outcome
from tests.processes.workers import WORKER, eventually, settings_of

#: What changes a file or tells of one. `Path` calls these, too.
CALLS = ("open", "rename", "unlink", "fsync", "close", "lstat", "stat", "scandir", "listdir", "mkdir", "link", "utime")
ENDS = ("finish", "retry", "bury", "release")


class Fate:
    """Counts calls, and kills this process at the one that was named: before it, or after it."""

    def __init__(self, at: int, below: Path) -> None:
        self.at = at
        self.calls = 0
        self._below = os.fspath(below)

    def attach(self) -> None:
        for name in CALLS:
            setattr(os, name, self._deadly(getattr(os, name)))
        vars(durable)["_renameat2"] = self._deadly(durable._renameat2)

    def _deadly(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def deadly(*args: Any, **options: Any) -> Any:
            if not self._is_ours(args):
                return call(*args, **options)
            self._step()
            try:
                return call(*args, **options)
            finally:
                self._step()

        return deadly

    def _is_ours(self, args: tuple[Any, ...]) -> bool:
        """Descriptors count, too: of what was opened here."""
        if not args or isinstance(args[0], int):
            return bool(args)
        return os.fsdecode(args[0]).startswith(self._below)

    def _step(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def act(spool: Spool, end: str) -> None:
    """A task's whole life, without a loop: what the dead have left, then seen, claimed, and ended in one way."""
    for held in spool.recover():
        spool.retry(held, (*held.attempts, _failed(len(held.attempts) + 1)), 0.0)
    for name in spool.names():
        seen = spool.look(name)
        if isinstance(seen, Offer) and (held_now := spool.claim(seen.key, seen.task_id)) is not None:
            _end(spool, held_now, end)
        elif not isinstance(seen, Offer):
            spool.quarantine(seen, {"dlq_reason": "invalid_format"})  # type: ignore[arg-type]  # a Half is as good


def _end(spool: Spool, held: Held, end: str) -> None:
    if end == "finish":
        spool.finish(held, {"task_id": held.task.task_id, "status": "completed"})
    elif end == "retry":
        spool.retry(held, (*held.attempts, _failed(len(held.attempts) + 1)), 0.0)
    elif end == "bury":
        spool.bury(held, {"task_id": held.task.task_id, "dlq_reason": "auth"})
    else:
        spool.release(held)


def _failed(number: int) -> Attempt:
    return Attempt(attempt=number, failure_kind="killed")


def script(spec: JobSpec) -> JobResult:
    """What the description says, a word for each attempt."""
    words = spec.prompt.split()
    word = words[min(int(spec.labels["attempt"]), len(words)) - 1]
    if word == "ok":
        return JobResult(job_id=spec.job_id, outcome=Outcome.COMPLETED)
    return JobResult(job_id=spec.job_id, outcome=Outcome.FAILED, failure_kind=FailureKind(word), error=word)


async def work(root: Path, wanted: int, **changes: Any) -> None:
    """A whole worker, until so many tasks have come to their end."""
    spool = Spool(root, WORKER)

    def is_over() -> bool:
        both = (*spool.results.glob("[!.]*.json"), *spool.dlq.glob("[!.]*.json"))
        return len(both) >= wanted

    settings = settings_of(root, max_attempts=20, **changes)
    async with open_worker(WORKER, settings=settings, executor=MockExecutor(script)):
        await eventually(is_over, "all have ended")


def in_child(root: Path, at: int, life: Callable[[], None]) -> tuple[bool, int]:
    """Run a life in a fork, dead at its n-th call. Returns whether it died of it, and how many calls it has made."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(read)
            fate = Fate(at, root)
            fate.attach()
            life()
            calls, fate.at = fate.calls, -1
            os.write(write, str(calls).encode())
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    os.close(write)
    with open(read, "rb") as file:
        calls = int(file.read() or b"0")
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), status
    return os.WIFSIGNALED(status), calls


def spools(root: Path, end: str, step: int) -> list[dict[str, Any]]:
    """Die at every `step`-th call of a task's life that ends so; then die so in what comes after, once; then end it."""
    told: list[dict[str, Any]] = []
    at = 1
    while True:
        place = root / f"{end}-{at}"
        spool = Spool(place, WORKER)
        spool.create()
        for name, data in (("a.json", {"task_id": "t", "description": "x"}), ("bad.json", [])):
            (spool.tasks / name).write_text(json.dumps(data))
        died, calls = in_child(place, at, lambda spool=spool: act(spool, end))  # type: ignore[misc]  # mypy infers no lambda with a default
        again = in_child(place, at // 2 + 1, lambda spool=spool: act(spool, end))[0] if died else False  # type: ignore[misc]  # as above
        act(spool, "finish")
        act(spool, "finish")
        told.append({"at": at, "died": died, "again": again, "calls": calls, **left(spool)})
        if not died:
            return told
        at += step


def left(spool: Spool) -> dict[str, Any]:
    """What lies in each directory."""
    own = {"tasks": spool.tasks, "running": spool.running, "results": spool.results, "dlq": spool.dlq}
    return {name: sorted(os.listdir(path)) for name, path in own.items()}


def workers(root: Path, numbers: list[int]) -> list[dict[str, Any]]:
    """Die at these calls of a whole worker that does three tasks; then a worker ends what is left."""
    told: list[dict[str, Any]] = []
    for at in numbers:
        place = root / f"worker-{at}"
        spool = Spool(place, WORKER)
        spool.create()
        for number, words in enumerate(("ok", "network ok", "auth")):
            text = json.dumps({"task_id": f"t{number}", "description": words})
            (spool.tasks / f"t{number}.json").write_text(text)
        (spool.tasks / "bad.json").write_text("[]")
        died, calls = in_child(place, at, lambda place=place: trio.run(work, place, 4))  # type: ignore[misc]  # as above
        over, _ = in_child(place, -1, lambda place=place: trio.run(work, place, 4))  # type: ignore[misc]  # as above
        told.append({"at": at, "died": died, "over": over, "calls": calls, **left(spool)})
    return told


if __name__ == "__main__":
    import inotify_simple

    inotify_simple.INotify().close()  # it looks for the C library once, which takes long
    options = json.loads(sys.argv[2])
    which: Callable[..., list[dict[str, Any]]] = spools if options.pop("what") == "spools" else workers
    print(json.dumps(which(Path(sys.argv[1]), **options)))
