"""What containment costs, tier by tier: starting a child, holding it, and ending 200 of them at once.

Peers are bare Trio (`trio.lowlevel.open_process`) and a loop of killpg and waitpid over the same programs. Tiers and
peers take turns, round by round, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from benchmarks.table import Row
from supervise.errors import UnsupportedPlatform
from supervise.model import Limits, StopPolicy
from supervise.processes.child import ProcessTree, TreeOptions, open_tree
from supervise.processes.containment import Command
from supervise.processes.hurry import Hurry
from supervise.processes.tiers import Containments, open_containments
from supervise.settings import Settings

STARTS = 200
HELD = 50
CANCELLED = 200
CANCEL_ROUNDS = 5
POLICY = StopPolicy(((signal.SIGTERM, 10.0),))
ECHO = ("/bin/echo", "x")
SLEEP = ("/bin/sleep", "600")


def _tree(containments: Containments) -> AsyncExitStack:
    options = TreeOptions(mark="benchmark", contain=containments.of_job("benchmark", Limits()))
    return open_tree("child", POLICY, Hurry(), options=options, emit=lambda event: None)  # type: ignore[return-value]  # only entered


def _command(argv: tuple[str, ...]) -> Command:
    return Command(argv=argv, cwd="/", env={"PATH": os.environ["PATH"]})


@asynccontextmanager
async def _tiers(scratch: Path) -> AsyncIterator[dict[str, Containments]]:
    async with AsyncExitStack() as stack:
        tiers = {}
        for wanted in ("process-group", "guardian", "cgroup"):
            settings = Settings(state_dir=scratch / wanted, containment=wanted)
            try:
                containments = await stack.enter_async_context(open_containments(settings))
            except UnsupportedPlatform as error:
                print(f"(no {wanted} here: {error})")
                continue
            tiers[containments.tier] = containments
        yield tiers


async def _bare_start() -> float:
    began = time.perf_counter()
    pipe = subprocess.PIPE
    process = await trio.lowlevel.open_process(list(ECHO), stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    await process.stdout.receive_some(16)
    seconds = time.perf_counter() - began
    await process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            await stream.aclose()
    return seconds


async def _start(containments: Containments) -> float:
    """The tree is opened in this time, too: a guardian is forked for it."""
    heard = trio.Event()
    began = time.perf_counter()
    async with _tree(containments) as tree:
        child = await tree.spawn(_command(ECHO), stdout=lambda data: heard.set())
        await heard.wait()
        seconds = time.perf_counter() - began
        await child.wait()
    return seconds


async def _measure_starts(tiers: dict[str, Containments]) -> tuple[list[float], dict[str, list[float]]]:
    bare: list[float] = []
    ours: dict[str, list[float]] = {name: [] for name in tiers}
    for round_ in range(STARTS + 10):
        took = await _bare_start()
        each = {name: await _start(containments) for name, containments in tiers.items()}
        if round_ >= 10:  # the first ones warm up
            bare.append(took)
            for name, seconds in each.items():
                ours[name].append(seconds)
    return bare, ours


def _private(pid: int) -> int:
    """Memory that a process shares with nobody, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _guardians() -> list[int]:
    """Of this process: the zygote's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text() == "sv-guardian\n":
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


async def _held(containments: Containments) -> tuple[float, float]:
    """Private memory for each of `HELD` running children: ours, and its guardian's, in bytes."""
    before = _private(os.getpid())
    earlier = set(_guardians())
    async with AsyncExitStack() as stack:
        for _ in range(HELD):
            tree = await stack.enter_async_context(_tree(containments))
            await tree.spawn(_command(SLEEP))
        guardians = [_private(pid) for pid in _guardians() if pid not in earlier]
        ours = (_private(os.getpid()) - before) / HELD
        theirs = statistics.mean(guardians) if guardians else 0.0
    return ours, theirs


def _bare_cancel() -> float:
    processes = [subprocess.Popen(SLEEP, start_new_session=True) for _ in range(CANCELLED)]
    began = time.perf_counter()
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        process.wait()
    return time.perf_counter() - began


async def _cancel(containments: Containments, count: int) -> float:
    running: list[ProcessTree] = []
    all_run = trio.Event()

    async def one() -> None:
        async with _tree(containments) as tree:
            await tree.spawn(_command(SLEEP))
            running.append(tree)
            if len(running) == count:
                all_run.set()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
        await all_run.wait()
        began = time.perf_counter()
        nursery.cancel_scope.cancel()
    return time.perf_counter() - began


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def _measure(scratch: Path) -> list[Row]:
    rows = []
    async with _tiers(scratch) as tiers:
        bare, starts = await _measure_starts(tiers)
        median = statistics.median(bare)
        for name, ours in starts.items():
            added = statistics.median(b - a for a, b in zip(bare, ours, strict=True)) * 1000
            tail = (_percentile(ours, 0.99) - _percentile(bare, 0.99)) * 1000
            contained = name != "process group"
            rows.append(
                Row(
                    what=f"start of a child until it runs, {name}",
                    ours=f"p50 {statistics.median(ours) * 1000:.2f}, p99 {_percentile(ours, 0.99) * 1000:.2f} ms",
                    peer=f"p50 {median * 1000:.2f}, p99 {_percentile(bare, 0.99) * 1000:.2f} ms (bare Trio)",
                    ratio=f"+{added:.2f} ms, p99 +{tail:.1f} ms"
                    if contained
                    else f"{statistics.median(ours) / median:.2f} ×",
                    budget="≤ +3 ms, p99 ≤ +10 ms" if contained else "≤ 1.3 ×",
                    met=added <= 3 and tail <= 10 if contained else statistics.median(ours) / median <= 1.3,
                )
            )
        for name, containments in tiers.items():
            ours_bytes, theirs = await _held(containments)
            rows.append(
                Row(
                    what=f"private memory for each running child, {name}",
                    ours=f"supervisor {ours_bytes / 1e3:.0f} kB, guardian {theirs / 1024:.0f} KiB",
                    peer="–",
                    ratio="–",
                    budget="≤ 150 kB, ≤ 1024 KiB",
                    met=ours_bytes <= 150e3 and theirs <= 1 << 20,
                )
            )
        bare = []
        cancels: dict[str, list[float]] = {name: [] for name in tiers}
        for _ in range(CANCEL_ROUNDS):
            bare.append(_bare_cancel())
            for name, containments in tiers.items():
                cancels[name].append(await _cancel(containments, CANCELLED))
        loop = statistics.median(bare)
        for name, ours in cancels.items():
            took = statistics.median(ours)
            rows.append(
                Row(
                    what=f"{CANCELLED} running children cancelled until nothing is left, {name}",
                    ours=f"{took * 1000:.0f} ms",
                    peer=f"{loop * 1000:.0f} ms (killpg + waitpid)",
                    ratio=f"{took / loop:.1f} ×",
                    budget="≤ 200 ms, ≤ 10 ×",
                    met=took <= 0.2 and took / loop <= 10,
                )
            )
        for name, containments in tiers.items():
            took = statistics.median([await _cancel(containments, 1) for _ in range(20)])
            rows.append(
                Row(
                    f"one tree cancelled until it is empty, {name}",
                    f"{took * 1000:.1f} ms",
                    "–",
                    "–",
                    "≤ 50 ms",
                    took <= 0.05,
                )
            )
    return rows


def measure() -> list[Row]:
    """The rows of this benchmark."""
    with tempfile.TemporaryDirectory(prefix="supervise-benchmark-") as scratch:
        return trio.run(_measure, Path(scratch))


if __name__ == "__main__":
    for row in measure():
        print(row)
