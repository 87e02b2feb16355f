"""What a job costs beside its two children: the same watch and agent, run by bare Trio and by `supervise`.

Both sides wait for the same readiness line and the same exits, so that those waits cancel out. What a job does
beyond that is on our side of the balance: `cidx start` and `cidx fix-config` (two more processes), two stamps of
the workspace, the stale mark with its fsyncs, logs, heartbeat and the result on the disk.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

import supervise
from benchmarks.table import Row

ROUNDS = 25

WATCH = """
import signal, sys
def end(number, frame): sys.exit(0)
signal.signal(signal.SIGINT, end)
print("Watchdog observer started monitoring: .", flush=True)
signal.pause()
"""
CIDX = f"""#!/bin/sh
case "$1" in
watch) exec {sys.executable} -I -S -c '{WATCH}' ;;
start) exit 1 ;;
esac
exit 0
"""
AGENT = """#!/bin/sh
cat > /dev/null
echo '{"type":"system","subtype":"init","session_id":"s"}'
echo '{"type":"result","subtype":"success","is_error":false,"result":"done","num_turns":1}'
"""


async def _bare(programs: Path, workspace: Path) -> float:
    began = time.perf_counter()
    pipe = subprocess.PIPE
    watch = await trio.lowlevel.open_process([str(programs / "cidx"), "watch"], cwd=workspace, stdout=pipe, stderr=pipe)
    assert watch.stdout is not None
    await watch.stdout.receive_some(4096)
    await trio.run_process([str(programs / "agent")], cwd=workspace, stdin=b"hello", capture_stdout=True)
    watch.send_signal(signal.SIGINT)
    await watch.wait()
    await watch.stdout.aclose()
    if watch.stderr is not None:
        await watch.stderr.aclose()
    return time.perf_counter() - began


async def _supervised(programs: Path, workspace: Path, sup: supervise.Supervisor) -> float:
    began = time.perf_counter()
    result = await sup.run(supervise.JobSpec(prompt="hello", workspace=workspace))
    seconds = time.perf_counter() - began
    assert result.outcome is supervise.Outcome.COMPLETED, result
    assert result.index.status is supervise.IndexStatus.WATCH_TERMINATED, result.index
    return seconds


async def _measure(scratch: Path) -> tuple[list[float], list[float]]:
    workspace = scratch / "workspace"
    workspace.mkdir()
    for name, text in (("cidx", CIDX), ("agent", AGENT)):
        (scratch / name).write_text(text)
        (scratch / name).chmod(0o755)
    settings = supervise.Settings(
        state_dir=scratch / "state",
        agent=supervise.AgentSettings(command=(str(scratch / "agent"),)),
        index=supervise.IndexSettings(mode="cidx", command=(str(scratch / "cidx"),), assume_fresh=True),
    )
    bare, ours = [], []
    async with supervise.open_supervisor(settings=settings) as sup:
        for round_ in range(ROUNDS + 3):
            pair = await _bare(scratch, workspace), await _supervised(scratch, workspace, sup)
            if round_ >= 3:  # the first ones warm up
                bare.append(pair[0])
                ours.append(pair[1])
    return bare, ours


def measure() -> list[Row]:
    """The rows of this benchmark."""
    with tempfile.TemporaryDirectory(prefix="supervise-benchmark-") as scratch:
        bare, ours = trio.run(_measure, Path(scratch))
    added = statistics.median(b - a for a, b in zip(bare, ours, strict=True)) * 1000
    return [
        Row(
            what="one job, beside its two children",
            ours=f"{statistics.median(ours) * 1000:.1f} ms",
            peer=f"{statistics.median(bare) * 1000:.1f} ms (bare Trio)",
            ratio=f"+{added:.1f} ms",
            budget="≤ +15 ms",
            met=added <= 15,
        )
    ]


if __name__ == "__main__":
    os.environ.pop("SUPERVISE_MARK", None)
    for row in measure():
        print(row)
