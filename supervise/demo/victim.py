"""A supervising process of its own, to be killed: `python -m supervise.demo.victim WORKSPACE STATE_DIR`.

It runs the demo's job there, and tells its events on standard output, one JSON object a line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from supervise.codec import event_to_json, to_line
from supervise.demo.scene import demo_settings, demo_spec
from supervise.events import JobFinished
from supervise.job.supervisor import open_job


async def main(workspace: Path, state_dir: Path) -> None:
    """Run the job to its end, unless somebody kills us before."""
    async with (
        open_job(demo_spec(workspace), settings=demo_settings(state_dir, None)) as job,
        job.subscribe() as events,
    ):
        async for event in events:
            if not isinstance(event, JobFinished):
                sys.stdout.buffer.write(to_line(event_to_json(event)))
                sys.stdout.buffer.flush()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]))
