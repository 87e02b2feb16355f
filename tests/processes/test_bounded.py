"""Memory and disk stay bounded: a child that prints without end, a reader that never reads, a stdout that blocks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.fake_claude import FakeClaude

SECONDS = 10
LOG_LIMIT = 4 << 20

#: Supervises two jobs: one whose agent floods its protocol, one that floods its standard error with a line that
#: never ends; a reader of each that never reads. Looks at its own memory, twice a second.
SUPERVISOR = """
import json, sys, trio, supervise
from supervise.events import Heartbeat
state_dir, workspace, flood, stderr, seconds, log_limit = map(eval, sys.argv[1:])

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

async def main():
    settings = supervise.Settings(
        state_dir=state_dir, log_max_bytes=log_limit, heartbeat_interval=1, index=supervise.IndexSettings(mode="none")
    )
    samples = []
    async with supervise.open_supervisor(settings=settings) as sup:
        jobs = []
        for command in (flood, stderr):
            agent = supervise.ClaudeAgent(command=command)
            spec = supervise.JobSpec(prompt="go", workspace=workspace, agent=agent, timeout=seconds)
            jobs.append(await sup.start(spec))
        async with jobs[0].subscribe() as never_read, jobs[1].subscribe() as nor_this:
            while any(job.state is not supervise.JobState.DONE for job in jobs):
                samples.append(rss())
                await trio.sleep(0.5)
            told = [event async for event in never_read]
    print(json.dumps({
        "samples": samples,
        "jobs": [[job.job_id, job.result_nowait().outcome.value, len(job.result_nowait().stdout_tail)] for job in jobs],
        "first": told[0].type,
        "dropped": getattr(told[0], "count", 0),
        "kept": len(told) - 1,
    }))

trio.run(main)
"""

FLOOD_STDERR = """
import os
while True:
    os.write(2, b"x" * 65536)
"""


def steady(samples: list[int]) -> bool:
    """Whether the last third of the samples is no higher than the one before, but for a little."""
    third = len(samples) // 3
    return max(samples[-third:]) - max(samples[third : 2 * third]) < 16 << 20 and max(samples) < 512 << 20


def rss(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def blocked(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`supervise run --json` with an agent that floods, into a pipe that nobody reads."""
    (tmp_path / "blocked").mkdir()
    command = FakeClaude(tmp_path / "blocked", ["init"], ["endless", 500]).command
    settings = ("--set", f"agent.command={json.dumps(command)}", "--set", "index.mode=none")
    words = ("run", "go", "--json", "--timeout", str(SECONDS), "--workspace", str(tmp_path), *settings)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "supervise", *words],
        stdout=write,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=env,
    )
    os.close(write)
    try:
        yield process
    finally:
        os.close(read)
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.slow
def test_ten_seconds_of_a_flood(tmp_path: Path, blocked: subprocess.Popen[bytes]) -> None:
    state_dir = tmp_path / "state"
    flood = FakeClaude(tmp_path, ["init"], ["endless", 500]).command
    stderr = (sys.executable, "-I", "-S", "-c", FLOOD_STDERR)
    values = (str(state_dir), str(tmp_path), flood, stderr, SECONDS, LOG_LIMIT)
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, *map(repr, values)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    outside: list[int] = []
    while blocked.poll() is None:
        outside.append(rss(blocked.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            blocked.wait(0.5)
        assert len(outside) < SECONDS * 8, "the command does not end"
    assert blocked.returncode == 124
    assert b"nobody reads standard output" in blocked.communicate()[1]
    assert steady(outside), [sample >> 20 for sample in outside]

    out, err = supervisor.communicate(timeout=SECONDS * 3)
    assert supervisor.returncode == 0, err.decode()
    told = json.loads(out)
    samples = told["samples"]
    assert len(samples) > SECONDS / 2  # the loop was not held up
    assert steady(samples), [sample >> 20 for sample in samples]
    assert [outcome for _, outcome, _ in told["jobs"]] == ["timed_out", "timed_out"]
    assert told["jobs"][0][2] <= 64 * 1024
    assert told["first"] == "events_dropped"
    assert told["kept"] == 1024
    assert told["dropped"] > 10_000
    for job_id, _, _ in told["jobs"]:
        logs = list((state_dir / "jobs" / job_id).glob("*.log*"))
        assert LOG_LIMIT // 2 < sum(log.stat().st_size for log in logs) < LOG_LIMIT + 1024, logs
