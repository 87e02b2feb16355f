"""A supervisor of its own, for tests that kill it or run it as somebody else: `python lone.py OPTIONS` (JSON).

Says what it is in a line of JSON, then passes on what its jobs' programs print, then their results in lines of JSON.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import trio

from supervise import (
    AgentReport,
    AgentSettings,
    FailureKind,
    JobSpec,
    Limits,
    Settings,
    SpawnError,
    Supervisor,
    open_supervisor,
)
from supervise.agents.protocol import AgentRun
from supervise.codec import to_json

if __name__ != "__main__":  # it would need pytest, which takes as long to import as all else
    from tests.processes.conftest import TOKEN

LIMIT = 30.0  # seconds for anything that is waited for
NOBODY = 65534
ROOT = Path(__file__).parents[2]


class Lone:
    """Such a process, as its parent sees it."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen = popen
        self._heard = b""

    @cached_property
    def about(self) -> dict[str, Any]:
        """What it says of itself. Only who asks waits, so that several can be started side by side."""
        return dict(json.loads(self.until(r"(\{.*\})")))

    @property
    def pid(self) -> int:
        return int(self.about["pid"])

    @property
    def tier(self) -> str:
        return str(self.about["tier"])

    @property
    def notes(self) -> list[str]:
        return list(self.about["notes"])

    @property
    def group(self) -> Path | None:
        """The cgroup of all its trees."""
        return Path(self.about["group"]) if self.about["group"] else None

    def until(self, pattern: str) -> str:
        """The group in the first line that fits; waited for."""
        assert self.popen.stdout is not None
        end = time.monotonic() + LIMIT
        while (match := re.search(rf"^{pattern}\n".encode(), self._heard, re.MULTILINE)) is None:
            ready, _, _ = select.select([self.popen.stdout], [], [], max(0, end - time.monotonic()))
            data = os.read(self.popen.stdout.fileno(), 65536) if ready else b""
            assert data, f"no {pattern!r}, but {self._heard.decode()!r}"
            self._heard += data
        return match[1].decode()

    def tell(self, name: str) -> int:
        """The pid that one of its programs has said."""
        return int(self.until(rf"{name} (\d+)"))

    def result(self) -> dict[str, Any]:
        """Of its only job."""
        return dict(json.loads(self.until(r'(\{"job_id".*\})')))

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()


@contextmanager
def lone(*programs: Sequence[str], python: Sequence[str] = (sys.executable,), **options: Any) -> Iterator[Lone]:
    """Run one, with a job of these programs. It is killed in the end."""
    popen_options = options.pop("popen", {})
    job = {"programs": programs, **options.pop("job", {})}
    value = json.dumps(
        {"jobs": [job] if programs else [], "settings": options.pop("settings"), "token": TOKEN, **options}
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [*python, __file__, value]
    with subprocess.Popen(
        command, **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "env": env, "cwd": "/", **popen_options}
    ) as popen:
        try:
            yield Lone(popen)
        finally:
            popen.kill()


@lru_cache(1)
def python_for_nobody() -> str | None:
    """A Python like this one that another user may run, too; None if there is none."""
    for path in (sys.executable, "/usr/bin/python{}.{}".format(*sys.version_info)):
        env = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        try:
            done = subprocess.run(
                [path, "-c", "import supervise"], env=env, cwd="/", user=NOBODY, group=NOBODY, check=False
            )
        except OSError:
            continue
        if done.returncode == 0:
            return path
    return None


def put(data: bytes) -> None:
    """To standard output, at once."""
    os.write(1, data)


def group_of(supervisor: Supervisor) -> Path | None:
    """The cgroup of all its trees."""
    group = supervisor._containments._group
    return None if group is None else group.path


def inside(group: Path) -> list[Path]:
    """The groups in a group."""
    return sorted(Path(directory, name) for directory, names, _ in os.walk(group) for name in names)


class Programs:
    """An agent that starts some programs in its tree, and waits for the last one."""

    name = "programs"

    def __init__(self, programs: Sequence[Sequence[str]], sink: Any = put) -> None:
        self.programs = programs
        self.sink = sink

    async def run(self, run: AgentRun) -> None:
        try:
            async with run.tree() as tree:
                for program in self.programs:
                    child = await tree.spawn(run.command(tuple(program)), stdout=self.sink, stderr=self.sink)
                    run.started(child.pid)
                status = await child.wait()
                await child.drained()
        except SpawnError as error:
            run.report(AgentReport(failure_kind=FailureKind.SPAWN, error=str(error)))
            return
        failure = None if status.ok else FailureKind.AGENT_ERROR
        run.report(AgentReport(failure_kind=failure, text=child.tails()[0], exit=status))


async def main(options: dict[str, Any]) -> None:
    agent = AgentSettings(pass_env=(options["token"],), termination_timeout=0.2)
    settings = Settings(agent=agent, **options["settings"])
    async with open_supervisor(settings=settings) as supervisor, trio.open_nursery() as nursery:
        about = {
            "pid": os.getpid(),
            "tier": supervisor.containment,
            "notes": supervisor._containments.notes,
            "group": str(group_of(supervisor) or ""),
        }
        put(json.dumps(about).encode() + b"\n")

        async def run(job: dict[str, Any]) -> None:
            limits = Limits(**job.get("limits", {}))
            spec = JobSpec(
                prompt="go",
                workspace=options.get("workspace", "/"),
                index=None,
                agent=Programs(job["programs"]),
                limits=limits,
                user=job.get("user"),
            )
            put(json.dumps(to_json(await supervisor.run(spec))).encode() + b"\n")

        for job in options.get("jobs", ()):
            nursery.start_soon(run, job)


if __name__ == "__main__":
    trio.run(main, json.loads(sys.argv[1]))
