"""Memory and disk stay bounded: a child that prints without end, and a reader that never reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.fake_claude import FakeClaude

SECONDS = 30
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


@pytest.mark.slow
def test_thirty_seconds_of_a_flood(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    flood = FakeClaude(tmp_path, ["init"], ["endless", 500]).command
    stderr = (sys.executable, "-I", "-S", "-c", FLOOD_STDERR)
    values = (str(state_dir), str(tmp_path), flood, stderr, SECONDS, LOG_LIMIT)
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, *map(repr, values)], capture_output=True, timeout=SECONDS * 4, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    samples = told["samples"]
    assert len(samples) > SECONDS / 2  # the loop was not held up
    third = len(samples) // 3
    growth = max(samples[-third:]) - max(samples[third : 2 * third])
    assert growth < 16 << 20, [sample >> 20 for sample in samples]
    assert max(samples) < 512 << 20, [sample >> 20 for sample in samples]
    assert [outcome for _, outcome, _ in told["jobs"]] == ["timed_out", "timed_out"]
    assert told["jobs"][0][2] <= 64 * 1024
    assert told["first"] == "events_dropped"
    assert told["kept"] == 1024
    assert told["dropped"] > 10_000
    for job_id, _, _ in told["jobs"]:
        logs = list((state_dir / "jobs" / job_id).glob("*.log*"))
        assert LOG_LIMIT // 2 < sum(log.stat().st_size for log in logs) < LOG_LIMIT + 1024, logs
